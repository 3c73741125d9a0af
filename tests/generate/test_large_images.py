"""generate.py with everything that stands around a pipeline: tiles, regions, tiled attention and VAE, other tasks."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata
from sd_hyena.generate import engine
from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.generation import NotDrawn, generate
from sd_hyena.generate.task import Task, loras
from sd_hyena.large.adapters import is_loaded, loaded
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import command
from tests.fixtures import controlnet_of
from tests.gate import gated

SMALL = dict(width=136, height=96, steps=2, num_images=1, cfg_scale=4.0, seed=11, prompt="a red circle on blue")
REGIONS = {
    "bbox_controls": [
        {"x": 0, "y": 0, "w": 0.5, "h": 1, "prompt": "a red circle", "seed": 5},
        {"x": 0.4, "y": 0.2, "w": 0.5, "h": 0.6, "prompt": "two blue squares", "blend_mode": "Foreground"},
    ]
}


pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture
def student(tmp_path, shared_pipe):
    """One for each of the five level-0 sites."""
    torch.manual_seed(0)
    sites = select(find_sites(shared_pipe.unet), "level0")
    specs = [StudentSpec(site.name, site.short, 32, "hyena2d", {"heads": 2}, None) for site in sites]
    save_students(tmp_path / "s.safetensors", StudentFile({spec.site: build_student(spec) for spec in specs}))
    return str(tmp_path / "s.safetensors")


@pytest.fixture
def regions(tmp_path):
    (tmp_path / "regions.json").write_text(json.dumps(REGIONS))
    return str(tmp_path / "regions.json")


@pytest.fixture
def picture(tmp_path):
    pixels = np.full((96, 136, 3), (220, 40, 40), np.uint8)
    pixels[30:70, 20:60] = pixels[20:80, 90:120] = 245
    Image.fromarray(pixels).resize((68, 48)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def config(tmp_path, **options):
    return GenerateConfig(**{**SMALL, "out_dir": str(tmp_path / "images"), **options})


def drawn(tmp_path, **options):
    return np.array(Image.open(generate(config(tmp_path, **options))[0]))


def test_all_at_once_is_told_and_repeats_bit_for_bit_from_the_picture_alone(tmp_path, student, regions, capsys):
    options = dict(tiled_diffusion="mixture", tile_width=8, tile_height=8, overlap=3, tiled_vae="exact")
    options |= dict(decoder_tile_size=7, hypertile=32, ff_chunk_size=50, draw_background=True)
    (path,) = generate(config(tmp_path, **options, hyena=student, regions=regions))
    said = capsys.readouterr().out
    assert "mixture in tiles of 8x8 cells with 2 regions" in said and "VAE in tiles, exact" in said
    assert read_metadata(path)["regions"]["bbox_controls"][0]["prompt"] == "a red circle"
    (tmp_path / "regions.json").unlink()
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert np.array_equal(np.array(Image.open(generate(again)[0])), np.array(Image.open(path)))


@pytest.mark.parametrize(
    "options",
    [
        dict(tiled_diffusion="multidiffusion", tile_width=8, tile_height=9, overlap=2),
        *gated(
            [
                dict(hypertile=32),
                dict(tiled_vae="fast", decoder_tile_size=8),
                dict(tiled_diffusion="spot", tile_width=8, tile_height=8),
                dict(attn_shape="brick"),
                dict(tiled_vae="blend", decoder_tile_size=8),
            ]
        ),
    ],
    ids=lambda o: next(iter(o.values())) if isinstance(o, dict) else str(o),
)
def test_each_option_changes_the_picture_and_nothing_of_it_stays(tmp_path, own_pipe, options):
    plain = drawn(tmp_path)
    size = dict(width=136, height=96) if "attn_shape" not in options else dict(width=1032, height=64)
    reference = plain if size["width"] == 136 else drawn(tmp_path, **size)
    assert not np.array_equal(drawn(tmp_path, **size, **options), reference)
    assert np.array_equal(drawn(tmp_path), plain)


@pytest.mark.parametrize("options", [dict(tiled_vae="exact", decoder_tile_size=7), *gated([dict(ff_chunk_size=50)])])
def test_what_claims_to_be_exact_gives_the_plain_picture(tmp_path, options):
    a, b = drawn(tmp_path).astype(int), drawn(tmp_path, **options).astype(int)
    assert np.abs(a - b).max() <= 1


def test_auto_tiles_above_its_sizes_and_gives_students_larger_tiles(student):
    at = lambda side, **more: Arrangement.of(GenerateConfig(width=side, tiled_diffusion="auto", **more))
    assert at(2048).tiles is None and at(1024).vae is None and str(at(1024)) == ""
    assert at(2056).tiles.method == "mixture" and at(2056).tiles.tile_width == 96
    assert at(4096, hyena=student).tiles.tile_width == 256
    assert at(1032).vae.mode == "exact" and at(4096, tiled_vae="off").vae is None


@pytest.mark.gate
def test_auto_draws_in_tiles_what_does_not_fit_in_one_piece_and_the_picture_says_so(tmp_path, own_pipe, capsys):
    tiles = dict(tile_width=8, tile_height=9)
    wanted = drawn(tmp_path, **tiles, tiled_diffusion="mixture")

    def full(_conv, arguments):
        if arguments[0].shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    own_pipe.unet.conv_in.register_forward_pre_hook(full)
    (path,) = generate(config(tmp_path, **tiles, tiled_diffusion="auto"))
    assert np.array_equal(np.array(Image.open(path)), wanted)
    assert "out of memory: mixture in tiles of 8x9" in capsys.readouterr().out
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert again.tiled_diffusion == "mixture" and np.array_equal(np.array(Image.open(generate(again)[0])), wanted)
    with pytest.raises(NotDrawn, match="out of memory"):
        generate(config(tmp_path, **tiles, tiled_diffusion="off"))


def test_an_image_to_start_from_is_resized_and_kept_as_far_as_strength_leaves_it(tmp_path, picture):
    start = np.array(Image.open(picture).resize((136, 96), Image.Resampling.LANCZOS)).astype(int)
    near, far = (drawn(tmp_path, init_image=picture, strength=s, steps=5) for s in (0.2, 1.0))
    assert np.abs(near - start).mean() < 0.8 * np.abs(far - start).mean()


@pytest.mark.gate
def test_noise_inversion_keeps_the_picture_and_repeats_from_the_png(tmp_path, picture, capsys):
    start = np.array(Image.open(picture).resize((136, 96), Image.Resampling.LANCZOS)).astype(int)
    given = dict(init_image=picture, strength=0.5, steps=8, cfg_scale=0.0)
    found = dict(noise_inversion=5, renoise_strength=0.0, tiled_diffusion="mixture", tile_width=8, tile_height=8)
    (path,) = generate(config(tmp_path, **given, **found))
    assert "noise inversion in 5 steps" in capsys.readouterr().out
    kept = np.array(Image.open(path))
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert np.array_equal(np.array(Image.open(generate(again)[0])), kept)
    assert np.abs(kept - start).mean() < 0.7 * np.abs(drawn(tmp_path, **given) - start).mean()


@pytest.mark.gate
def test_inpainting_draws_the_masked_part_anew(tmp_path, picture):
    half = np.zeros((96, 136), np.uint8)
    half[:, 68:] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    given = dict(init_image=picture, steps=4, strength=1.0)
    masked = drawn(tmp_path, **given, mask=str(tmp_path / "mask.png")).astype(int)
    start = np.array(Image.open(picture).resize((136, 96), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(masked - start)[:, :60].mean() < 0.5 * np.abs(masked - start)[:, 76:].mean()


@pytest.mark.gate
def test_a_controlnet_reads_its_picture_also_in_tiles(tmp_path, own_pipe, picture):
    controlnet_of(own_pipe.unet, 0).save_pretrained(tmp_path / "net")
    control = dict(controlnet=str(tmp_path / "net"), control_image=picture)
    tiles = dict(tiled_diffusion="multidiffusion", tile_width=8, tile_height=8)
    plain, whole = drawn(tmp_path), drawn(tmp_path, **control)
    assert not np.array_equal(plain, whole)
    assert not np.array_equal(whole, drawn(tmp_path, **control, **tiles))
    assert not np.array_equal(whole, drawn(tmp_path, **control, init_image=picture))


@pytest.mark.gate
def test_several_controlnets_each_read_their_picture_by_their_scale(tmp_path, own_pipe, picture):
    Image.open(picture).rotate(180).save(tmp_path / "b.png")
    for seed, name in enumerate("ab"):
        controlnet_of(own_pipe.unet, seed).save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    one = drawn(tmp_path, controlnet=str(a), control_image=picture, control_scale=0.7)
    both = dict(controlnet=f"{a}, {b}", control_image=f"{picture},{tmp_path / 'b.png'}")
    assert np.array_equal(drawn(tmp_path, **both, control_scale="0.7,0"), one)
    (path,) = generate(config(tmp_path, **both, control_scale="0.7,0.5"))
    picture_of_both = np.array(Image.open(path))
    assert not np.array_equal(picture_of_both, one)
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert np.array_equal(np.array(Image.open(generate(again)[0])), picture_of_both)


@pytest.mark.gate
def test_a_controlnet_without_weights_or_for_another_model_is_refused_in_one_line(tmp_path, own_pipe, picture):
    controlnet_of(own_pipe.unet, 0).save_config(tmp_path / "hollow")
    other = UNet2DConditionModel.from_config({**own_pipe.unet.config, "cross_attention_dim": 48})
    controlnet_of(other, 0).save_pretrained(tmp_path / "other")
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "cut")
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    for name, said in (
        ("hollow", "has no weights; expected diffusion_pytorch_model"),
        ("other", "reads text of width 48, this model's is 96"),
        ("cut", "not a valid safetensors"),
    ):
        with pytest.raises(BadInput, match=said) as error:
            generate(config(tmp_path, controlnet=str(tmp_path / name), control_image=picture))
        assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("several", [False, True])
def test_what_tiles_the_unet_s_attention_tiles_the_controlnets(own_pipe, several):
    pipe, tokens = own_pipe, {}
    nets = [controlnet_of(pipe.unet, 0)] * (1 + several)
    pipe.register_modules(controlnet=MultiControlNetModel([*nets[1:], copy.deepcopy(nets[0])]) if several else nets[0])
    tiled = {"unet": pipe.unet, **{f"controlnet {i}": n for i, n in enumerate(getattr(pipe.controlnet, "nets", nets))}}
    options = dict(width=256, hypertile=64, hypertile_swap=1, ff_chunk_size=100)
    with Arrangement.of(config(Path(), **options)).around(pipe), torch.no_grad():
        for name, network in tiled.items():
            block = network.down_blocks[0].attentions[0].transformer_blocks[0]
            note = lambda _, args, name=name: tokens.setdefault(name, []).append(args[0].shape[1])
            hooks = [block.attn1.register_forward_pre_hook(note), block.ff.register_forward_pre_hook(note)]
            hint = {"controlnet_cond": torch.rand(1, 3, 256, 256)} if name != "unet" else {}
            network(torch.randn(1, 4, 32, 32), 500, torch.randn(1, 32, 96), **hint)
            for hook in hooks:
                hook.remove()
    met = [64, *[100] * 10, 24]
    assert tokens == dict.fromkeys(tiled, met) and len(tiled) == 2 + several


def test_loras_are_called_by_their_files_names_as_regions_name_them(tmp_path, own_pipe):
    layers = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32)}
    layers |= {name.replace("lora_A", "lora_B"): torch.ones(32, 2) for name in layers}
    files = [tmp_path / "a" / "style.safetensors", tmp_path / "b" / "style.safetensors", tmp_path / "b.v2.safetensors"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        save_file(layers, file)
    with loras(own_pipe, Task.of(config(tmp_path, lora=",".join(map(str, files)))).loras):
        assert loaded([own_pipe.unet]) == ["style", "style_1", "b.v2"]
        assert is_loaded([own_pipe.unet], "b_v2")  # as it was called by PEFT, whose names have no dots
    assert not loaded([own_pipe.unet])


@pytest.mark.gate
def test_a_lora_acts_by_its_weight(tmp_path, own_pipe):
    unet = copy.deepcopy(own_pipe.unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
    file = str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    plain = drawn(tmp_path)
    none = drawn(tmp_path, lora=f"{file}:0")
    full = drawn(tmp_path, lora=f"{file}:1.0")
    assert np.array_equal(none, plain) and not np.array_equal(full, plain)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(tiled_diffusion="mixture", tile_width=16, tile_height=16, overlap=16), "overlap=16"),
        (dict(tiled_diffusion="mixture", tile_width=4), "tile_width=4"),
        (dict(regions="/nowhere.json"), "nowhere"),
        (dict(init_image="/nowhere.png"), "init_image='/nowhere.png' is no file"),
        (dict(init_image=__file__), "init_image: .* is no readable image"),
        (dict(lora="/nowhere.safetensors"), "lora='/nowhere.safetensors'"),
        (dict(controlnet="/nowhere", control_image="{picture}"), "controlnet='/nowhere'"),
        (dict(tiled_vae="blend", decoder_tile_size=7), "decoder_tile_size=7"),
        (dict(init_image="{picture}", noise_inversion=5, steps=10, retouch=0.5), "retouch=0.5"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, picture, options, said):
    def loaded(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(engine, "load_pipeline", loaded)
    options = {name: picture if value == "{picture}" else value for name, value in options.items()}
    with pytest.raises(BadInput, match=said) as error:
        generate(config(tmp_path, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(mask="m.png"), "--init_image"),
        (dict(control_image="c.png"), "--controlnet"),
        (
            dict(control_image="c.png", controlnet="a,b"),
            "control_image='c.png' must be as many pictures as controlnet='a,b'",
        ),
        (dict(control_image="c.png,d.png", controlnet="a,b", control_scale="1,2,3"), "control_scale='1,2,3'"),
        (dict(strength=1.5), "strength"),
        (dict(init_image="a.png", strength=0.1), "leaves no step"),
        (dict(hypertile=-1), "hypertile"),
        (dict(noise_inversion=10), "noise_inversion=10 needs --init_image"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, said):
    with pytest.raises(BadInput, match=said):
        GenerateConfig(**{**SMALL, **options})


def test_a_control_image_of_another_shape_is_refused_in_one_line(tmp_path, picture):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BadInput, match="of another shape than the 64x256 picture") as error:
        generate(config(tmp_path, width=64, height=256, controlnet=str(folder), control_image=picture))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_product_in_one_command_repeats_bit_for_bit_with_students_that_were_just_trained(tmp_path):
    """768x512 px, five level-0 students, mixture, six regions and the exact VAE, as configs/generate/regions.yaml has it."""
    few = "-t level0 -n 3 -W 128 -b 2 --num_samples 2 --sample_steps 3 --validate_every_n_steps 0 -d 0 -o".split()
    assert command("train.py", *few, tmp_path / "out", "-l", tmp_path / "logs", timeout=3600).returncode == 0
    given = ["--config", "configs/generate/regions.yaml", "-y", tmp_path / "out" / "hyena.pt", "-s", 4]
    first = command("generate.py", *given, "-o", tmp_path / "first", timeout=3600)
    assert first.returncode == 0 and "mixture in tiles of 32x32 cells with 6 regions, the VAE in tiles" in first.stdout
    again = command(
        "generate.py", "--from", tmp_path / "first" / "image_000.png", "-o", tmp_path / "again", timeout=3600
    )
    pictures = [np.array(Image.open(tmp_path / run / "image_000.png")) for run in ("first", "again")]
    assert again.returncode == 0 and np.array_equal(*pictures) and pictures[0].shape == (512, 768, 3)
    metadata = read_metadata(tmp_path / "first" / "image_000.png")
    assert len(metadata["regions"]["bbox_controls"]) == 6 and metadata["students"]
    plain = command("generate.py", *given[:2], *given[4:], "-o", tmp_path / "plain", timeout=3600)
    assert plain.returncode == 0
    assert not np.array_equal(np.array(Image.open(tmp_path / "plain" / "image_000.png")), pictures[0])
