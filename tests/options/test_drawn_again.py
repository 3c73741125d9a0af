"""A picture drawn again: by its own words, in its own shape; and --from, whose shape and size are a picture's too."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import write_image
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig

A1111 = (
    "a fox <lora:fur:1>\nNegative prompt: blur\nSteps: 20, Sampler: Euler a, CFG scale: 6, Seed: 5, Size: 512x256, "
    "Model hash: 0123456789, Model: any, VAE: v.pt, Hires upscale: 2, Hires upscaler: Latent, Denoising strength: 0.5, "
    'ControlNet 0: "Module: canny", Version: v1.9'
)


def picture(folder, text: str = "", size=(256, 128)) -> str:
    info = PngInfo()
    if text:
        info.add_text("parameters", text)
    Image.new("RGB", size).save(folder / "x.png", pnginfo=info)
    return str(folder / "x.png")


def test_without_a_prompt_a_picture_is_drawn_again_by_its_own_words(tmp_path, capsys):
    path = picture(tmp_path, A1111.replace(" <lora:fur:1>", ""))
    config = parse(GenerateConfig, ["--init_image", path, "-s", "9"])
    assert (config.prompt, config.negative_prompt, config.steps, config.cfg_scale) == ("a fox", "blur", 9, 6.0)
    assert config.scheduler == "euler_a" and config.seed == -1  # the noise that made it would make it again
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: init_image={path!r} is drawn again with its own words (A1111), but for ")
    assert all(said in line for said in ("model 'any' (hash 0123456789; give -m", "vae 'v.pt'", "ControlNet"))
    assert "Hires" not in line and "GPU" not in line
    config = parse(GenerateConfig, ["--init_image", path, "-p", "a cat"])
    assert (config.prompt, config.negative_prompt, config.steps) == ("a cat", "", 25) and not capsys.readouterr().out


def test_of_our_own_picture_that_is_drawn_again_the_words_count_and_not_the_file_or_the_size(tmp_path):
    own = GenerateConfig(prompt="a (fox:1.2)", width=512, steps=7, seed=3, num_images=1, name_format="x", format="webp")
    path = write_image(tmp_path / "own.webp", Image.new("RGB", (96, 64)), "", {"config": to_dict(own.filled())})
    config = parse(GenerateConfig, ["--init_image", str(path)])
    assert (config.prompt, config.steps, config.width, config.height) == ("a (fox:1.2)", 7, 96, 64)
    assert (config.seed, config.num_images, config.name_format, config.format) == (-1, 4, "image_{n:03d}", "png")


@pytest.mark.parametrize("text", ["", "\nSteps: 20, Seed: 1"])
def test_a_picture_without_words_asks_for_a_prompt_and_never_takes_an_example(tmp_path, text):
    path = picture(tmp_path, text)
    with pytest.raises(BadInput, match=r"init_image=.*-p what is to be drawn") as error:
        parse(GenerateConfig, ["--init_image", path])
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="say with -p what is to be drawn"):
        GenerateConfig(init_image=path).filled()
    (tmp_path / "t.txt").write_text("x")
    for name, said in (("gone", "init_image='gone' is no file"), (str(tmp_path / "t.txt"), "no readable image")):
        with pytest.raises(BadInput, match=said):
            parse(GenerateConfig, ["--init_image", name])


SHAPES = {  # of a picture of 256x128, drawn with a model whose own size is 256x256
    "": (256, 128),
    "-W 512": (512, 256),
    "-H 512": (1024, 512),
    "-W 512 -H 512": (512, 512),
    "--scale 2": (512, 256),
    "--scale 0.5": (128, 64),
    "-W 200": (200, 96),  # 100 is no whole number of cells
}


@pytest.mark.parametrize("flags", SHAPES)
def test_the_shape_is_kept(tmp_path, flags):
    config = parse(GenerateConfig, ["--init_image", picture(tmp_path), "-p", "a", *flags.split()])
    assert (config.width, config.height, config.scale) == (*SHAPES[flags], 0)


def test_a_large_picture_becomes_as_large_as_the_model_draws_and_a_small_one_as_can_be_drawn(tmp_path):
    at = lambda size: parse(GenerateConfig, ["--init_image", picture(tmp_path, size=size), "-p", "a"])
    large, small = at((4000, 1000)), at((40, 20))
    assert (large.width, large.height) == (512, 128) and (small.width, small.height) == (128, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter round
    Image.new("RGB", (256, 128)).save(tmp_path / "turned.jpg", exif=exif)
    turned = parse(GenerateConfig, ["--init_image", str(tmp_path / "turned.jpg"), "-p", "a"])
    assert (turned.width, turned.height) == (128, 256)


FROM = {  # of a picture that says 512x256
    "": (512, 256),
    "-W 1024": (1024, 512),
    "-W 512 -H 512": (512, 512),
    "-W 1024 -H 256": (1024, 256),
    "-H 512": (512, 512),
    "--scale 2": (1024, 512),
    "-W 0": (256, 256),
}


@pytest.mark.parametrize("flags", FROM)
def test_what_is_repeated_larger_keeps_its_shape_too(tmp_path, flags):
    path = picture(tmp_path, "a\nSteps: 5, Seed: 1, Size: 512x256, RNG: CPU")
    config = parse(GenerateConfig, ["--from", path, *flags.split()])
    assert (config.width, config.height, config.scale) == (*FROM[flags], 0)


def test_a_scale_and_a_size_contradict_each_other(tmp_path):
    path = picture(tmp_path, "a\nSteps: 5, Seed: 1, Size: 512x256")
    for flags in (["--from", path], ["--init_image", path]):
        with pytest.raises(BadInput, match=r"scale=2 and .* contradict"):
            parse(GenerateConfig, [*flags, "-W", "64", "--scale", "2"])


def test_everything_that_is_not_followed_of_a_picture_is_in_one_line(tmp_path, capsys):
    with pytest.raises(BadInput, match="the LoRA 'fur' has no folder to be looked for in; give --lora_dir FOLDER"):
        parse(GenerateConfig, ["--from", picture(tmp_path, A1111)])
    text = A1111.replace(" <lora:fur:1>", "").replace("Euler a", "Restart") + ', Lora hashes: "fur: aabbcc"'
    parse(GenerateConfig, ["--from", picture(tmp_path, text)])
    (line,) = capsys.readouterr().out.splitlines()
    for said in (
        "sampler 'Restart'", "Hires upscaler 'Latent'", "noise of a GPU", "ControlNet (0 Module: canny)",
        "model 'any' (hash 0123456789; give -m", "vae 'v.pt' (give --vae", "LoRA 'fur'",
    ):  # fmt: skip
        assert said in line
