import dataclasses

import pytest
import yaml
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import write_image
from sd_hyena.options import help
from sd_hyena.options.command_line import from_dict, parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_every_option_has_help_and_its_default_is_valid(config_class):
    text = help.text(config_class, everything=True)
    for field in dataclasses.fields(config_class):
        assert f"--{field.name}" in text and len(field.metadata["help"]) > 3
    assert from_dict(config_class, {}) == config_class()


def test_the_ancestors_short_flags_mean_what_they_meant():
    flags = f"-m {SHIPPED_MODEL} -t IN02 -b 2 -r 1e-4 -n 5 -W 128 -H 192 -s 3 -l L -o O -f x{{s:03d}} -d 9".split()
    config = parse(TrainConfig, flags)
    expected = dict(
        teacher_model=str(SHIPPED_MODEL), target="IN02", batch_size=2, lr=1e-4, n_steps=5, width=128, height=192
    )
    expected |= dict(save_every_n_steps=3, log_dir="L", out_dir="O", name_format="x{s:03d}", seed=9)
    assert {k: getattr(config, k) for k in expected} == expected
    flags = f"-m {SHIPPED_MODEL} -t IN02 -p hi -q no -W 128 -H 192 -n 2 -s 3 -c 0 -i 4 -k 9 -o O -f x{{n:03d}}_{{h}}_{{b}}_{{i}}".split()
    config = parse(GenerateConfig, flags)
    expected = dict(
        model=str(SHIPPED_MODEL), target="IN02", prompt="hi", negative_prompt="no", width=128, height=192, num_images=2
    )
    expected |= dict(steps=3, cfg_scale=0.0, iteration=4, seed=9, out_dir="O", name_format="x{n:03d}_{h}_{b}_{i}")
    assert {k: getattr(config, k) for k in expected} == expected


def test_the_ancestors_defaults_stand_where_they_are_good_and_the_models_where_it_has_some():
    train, generate = TrainConfig(), GenerateConfig()
    assert (train.target, train.batch_size, train.n_steps, train.width, train.save_every_n_steps) == (
        "IN01",
        16,
        200,
        512,
        40,
    )
    assert (train.log_dir, train.out_dir, train.name_format, train.seed) == ("logs", "out", "Hyena-{s:05d}", -1)
    assert (generate.num_images, generate.steps, generate.cfg_scale, generate.iteration) == (4, 0, None, 1)
    assert (generate.out_dir, generate.name_format, generate.width) == ("outputs", "image_{n:03d}", 0)


def test_the_height_is_the_width_unless_given():
    assert parse(TrainConfig, ["-W", "768"]).height == 768
    assert parse(TrainConfig, ["-W", "768", "-H", "512"]).height == 512


def test_a_yaml_file_is_read_and_flags_win_over_it(tmp_path):
    (tmp_path / "c.yaml").write_text("\ufefftarget: IN04\r\nlr: 1e-4\r\nn_steps: 7\r\n", "utf-8")
    config = parse(TrainConfig, ["--config", str(tmp_path / "c.yaml"), "-n", "9"])
    assert (config.target, config.lr, config.n_steps) == ("IN04", 1e-4, 9)


def test_what_is_stored_and_gone_matters_only_if_no_flag_replaces_it(tmp_path):
    """A YAML file or a picture of another day names students, a model and a mask; the flags name others."""
    here = tmp_path / "here.pt"
    here.touch()
    gone = dict(hyena="/gone.pt", model="/gone", vae="/gone.vae", regions="/gone.json", controlnet="/a,/b")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(gone | {"mask": "/gone.png", "scheduler": "ddim"}))
    stored = to_dict(GenerateConfig(**gone, control_image="/a.png,/b.png", control_scale="1,0.5"))
    write_image(tmp_path / "x.png", Image.new("RGB", (4, 4)), "", {"config": stored})
    none = [
        "--regions",
        "",
        "--vae",
        "",
        "--controlnet",
        "",
        "--control_image",
        "",
        "--control_scale",
        "1",
        "--mask",
        "",
    ]
    flags = ["-y", str(here), "-m", str(SHIPPED_MODEL), *none]
    for source in (["--config", str(tmp_path / "c.yaml")], ["--from", str(tmp_path / "x.png")]):
        config = parse(GenerateConfig, [*source, *flags])
        assert (config.hyena, config.model, config.mask) == (str(here), str(SHIPPED_MODEL), "")
        here.unlink()  # while images are drawn: what a picture records is a copy
        assert dataclasses.replace(config, seed=1).hyena == str(here)
        here.touch()
        with pytest.raises(BadInput, match=r"hyena='/gone\.pt' is no file"):
            parse(GenerateConfig, [*source, *flags[2:]])
        with pytest.raises(BadInput, match=r"regions='/gone\.json' is no file"):
            parse(GenerateConfig, [*source, *flags[:4], *none[2:]])


def test_a_picture_that_says_a_number_for_the_controlnet_is_read_as_before(tmp_path):
    assert GenerateConfig().controls == [] and GenerateConfig(controlnet="a", control_image="b").controls == [
        ("a", 1.0)
    ]
    for scale, expected in ((0.5, [0.5, 0.5]), (1, [1.0, 1.0]), ("1,.25", [1.0, 0.25])):
        config = from_dict(GenerateConfig, dict(controlnet="a,b", control_image="c.png, d.png", control_scale=scale))
        assert config.controls == list(zip("ab", expected, strict=True))
    (tmp_path / "a, b.png").touch()
    named = GenerateConfig(controlnet="a", control_image=str(tmp_path / "a, b.png"))
    assert named.controls == [("a", 1.0)]


def test_print_config_gives_a_file_that_means_the_same(tmp_path, capsys):
    flags = ["-t", "OUT*", "-r", "0.003", "--hyena_order", "3"]
    with pytest.raises(SystemExit) as exit_:
        parse(TrainConfig, [*flags, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert parse(TrainConfig, ["--config", str(tmp_path / "c.yaml")]) == parse(TrainConfig, flags)


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_a_config_survives_yaml(config_class):
    config = from_dict(config_class, {"width": 640, "seed": 5})
    assert from_dict(config_class, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


BAD_TRAINING = [
    *(f"-W {value}" for value in ("0", "-64", "65", "8", "2147483648", "1000000000", "nan", "512px", "16392")),
    *(f"-H {value}" for value in ("-64", "65", "8")),
    *(f"-r {value}" for value in ("nan", "inf", "-1", "0", "1e9", "fast")),
    *(f"-d {value}" for value in ("-2", "4294967296", "1.5")),
    *(f"-b {value}" for value in ("0", "-1", "x", "1e12")),
    *(f"-n {value}" for value in ("0", "-5", "nan")),
    "--ema 1", "--ema -0.1", "--clip -1", "--cfg_scale nan", "--schedule linear", "--operator fourier", "--data magic",
    "--batch_size 16 --micro_batch_size 3", "--unknown 1", "--hyena_ordre 3", "--precision 8", "--keep 0",
    "--data images", "--data latents --data_path /nowhere", "--prompts /nowhere", "-p /nowhere", "-t ,",
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_TRAINING)
def test_bad_training_options_are_answered_in_one_line_that_names_the_value(flags):
    with pytest.raises(BadInput) as error:
        parse(TrainConfig, flags.split())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert flags.split()[-1].lstrip("-") in str(error.value) or flags.split()[-2].strip("-") in str(error.value)


BAD_GENERATION = [
    "-W 8", "-W 65", "-H -8", "-s -1", "--scale -1", "--scale 99", "--scale 2",
    "--scale 2 -W 64", "-n 0", "-c nan", "-c -1", "-i 0", "-k -2", "-k 4294967296", "--scheduler magic",
    "--karras --scheduler ddim", "--dtype int8", "--control_scale nan", "--control_scale -1", "--control_scale 1,2",
    "--control_scale x", "--control_scale ,", "-y /nowhere.pt", "--attention_backend magic", "--from /nowhere.png",
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_GENERATION)
def test_bad_generation_options_are_answered_in_one_line(flags):
    with pytest.raises(BadInput) as error:
        parse(GenerateConfig, flags.split())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


BAD_YAML = {
    "broken": "a: [1",
    "unknown key": "targett: IN01",
    "wrong type": "n_steps: many",
    "boolean number": "n_steps: true",
    "duplicate key": "target: IN01\ntarget: IN02",
    "python object": "target: !!python/object/apply:os.system ['touch executed']",
    "NaN string": "lr: .nan",
    "no truth": "debug: !!bool 4x",
    "no number": "n_steps: !!int ''",
    "no date": "target: !!timestamp IN01",
    "a list": "- 1\n- 2",
    "not UTF-8": b"target: \xff\xfe",
    "empty": "",
    "an anchor bomb": "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]",
    "enormous": "# " + "x" * (1 << 20),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_bad_config_file_is_answered_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = BAD_YAML[name]
    (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        parse(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_missing_config_file_is_named():
    with pytest.raises(BadInput, match=r"/nowhere\.yaml"):
        parse(TrainConfig, ["--config", "/nowhere.yaml"])


def test_huge_sizes_need_the_flag():
    assert parse(TrainConfig, ["-W", "32768", "--allow_huge"]).width == 32768
