"""What --help says, and what is answered to a flag that is none. `python -m tests.options.test_help` renews the texts."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from sd_hyena import recipe
from sd_hyena.demo import DemoConfig
from sd_hyena.doctor import DoctorConfig
from sd_hyena.errors import BadInput
from sd_hyena.evaluate.card import CardConfig
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.options import help, operators
from sd_hyena.options.command_line import option, parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.meant import meant
from sd_hyena.options.operators import OPERATORS
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.upscale import UpscaleConfig

TEXTS = Path(__file__).parent / "help_texts"
SAID = {"train": TrainConfig, "generate": GenerateConfig, "evaluate": EvaluationConfig, "demo": DemoConfig}
SAID |= {"card": CardConfig, "upscale": UpscaleConfig, "doctor": DoctorConfig}


def texts() -> dict[str, str]:
    said = {f"{verb}.txt": help.text(config, False, f"sd-hyena {verb}") for verb, config in SAID.items()}
    said["recipe.txt"] = recipe.help_text(False, "sd-hyena recipe")
    return said | {f"{verb}_all.txt": help.text(SAID[verb], True, f"sd-hyena {verb}") for verb in ("train", "generate")}


@pytest.mark.parametrize("name", texts())
def test_a_help_text_is_the_one_that_was_agreed_on(name, monkeypatch):
    """If the difference is meant: python -m tests.options.test_help"""
    for other in OPERATORS.keys() - operators._SHIPPED:  # that tests have registered
        monkeypatch.delitem(OPERATORS, other)
    assert texts()[name] == (TEXTS / name).read_text("utf-8")


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig])
def test_help_is_the_common_twenty_with_a_line_each_in_groups(config):
    assert all(len(text.splitlines()) <= 60 for name, text in texts().items() if "_all" not in name)
    lines = help.text(config, everything=False, usage="x").splitlines()
    shown = [line for line in lines if line.startswith("  ")]
    common = [field for fields in help.grouped(config).values() for field in fields if field.metadata["common"]]
    assert 18 <= len(common) <= 24 and len(lines) <= 60
    assert all(line[6:8] == "--" for line in shown), "a help is longer than its line"
    assert [line.split("--")[1].split()[0].strip(",") for line in shown[:-4]] == [field.name for field in common]
    assert [line for line in lines if line in config.GROUPS] == [
        name for name, fields in help.grouped(config).items() if any(field.metadata["common"] for field in fields)
    ]


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, EvaluationConfig])
def test_every_option_has_a_group_and_help_all_shows_them_all(config):
    groups = help.grouped(config)
    fields = [field for group in groups.values() for field in group]
    assert tuple(groups) == config.GROUPS and all(field.metadata["group"] in groups for field in fields)
    text = help.text(config, everything=True)
    assert all(re.search(rf" --{field.name}[, \n]", text) for field in fields)
    assert (
        "type:" not in text
        and "Literal" not in text
        and max(map(len, text.split("\noperators")[0].splitlines())) <= 100
    )


def test_an_option_without_a_group_is_among_the_last_ones():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        """Do."""

        GROUPS = ("what", "rest")
        b: int = option(1, "no group")
        a: int = option(1, "a group", group="what")

    assert {name: [field.name for field in fields] for name, fields in help.grouped(Config).items()} == {
        "what": ["a"],
        "rest": ["b"],
    }


@pytest.mark.parametrize(
    "called, usage",
    [
        ("/x/bin/sd-hyena train -h", "sd-hyena train"),
        ("/x/sd_hyena/__main__.py train --help", "python -m sd_hyena train"),
        ("/x/sd_hyena/distil/__main__.py -h", "python -m sd_hyena.distil"),
        ("/x/sd_hyena/demo.py -h", "python -m sd_hyena.demo"),
        ("/x/train.py -h", "python train.py"),
    ],
)
def test_usage_is_as_it_was_typed(called, usage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", called.split())
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["-h"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {usage} [options]\n")


def test_dashes_are_underscores_in_names_and_stay_in_values():
    config = parse(GenerateConfig, "--num-images 3 --cfg-scale=2 --no-karras --name-format=a-{n} -p half-tone".split())
    assert (config.num_images, config.cfg_scale, config.name_format, config.prompt) == (3, 2.0, "a-{n}", "half-tone")
    assert parse(GenerateConfig, ["-p", "a --num-images b"]).prompt == "a --num-images b"
    assert parse(TrainConfig, ["--no-hyena2d-norm"]).operator_options == "norm=false"


MEANT = {
    GenerateConfig: {
        "--sampler": "scheduler", "--sampler-name": "scheduler", "--width_px": "width", "--cfg": "cfg_scale",
        "--num_inference_steps": "steps", "--seed_": "seed", "--ckpt": "model", "--negative": "negative_prompt",
        "--guidance_scale": "cfg_scale", "--num-imges": "num_images", "--output": "out_dir", "--Steps": "steps",
        "--denoising_strength": "strength", "--student": "hyena",
    },
    TrainConfig: {
        "--learning_rate": "lr", "--max_train_steps": "n_steps", "--steps": "n_steps", "--model": "teacher_model",
        "--pretrained_model_name_or_path": "teacher_model", "--train_batch_size": "batch_size", "--n_step": "n_steps",
        "--output_dir": "out_dir", "--mixed_precision": "precision", "--hyena_ordre": "hyena_order",
    },
}  # fmt: skip


@pytest.mark.parametrize("config, typed", [(config, typed) for config, words in MEANT.items() for typed in words])
def test_another_programs_word_and_a_slip_of_the_finger_are_understood(config, typed):
    assert meant(typed, [field.name for field in dataclasses.fields(config)]) == MEANT[config][typed]


@pytest.mark.parametrize(
    "given, said",
    [
        ("--zzz 1", "unrecognized --zzz; see --help_all"),
        ("--sampler ddim", "unrecognized --sampler: did you mean --scheduler?"),
        ("--num-imges=3", "unrecognized --num-imges: did you mean --num_images?"),
        ("stray", "unrecognized stray; an option has a name in front, and spaces need quotes; see --help"),
        ("-W a", "width='a' must be a whole number"),
        ("--overlap x", "overlap='x' must be a whole number"),
        ("-c much", "cfg_scale='much' must be a number"),
        ("--offload all", "offload='all' must be one of off, model, group, sequential"),
    ],
)
def test_what_cannot_be_understood_is_answered_in_words(given, said):
    with pytest.raises(BadInput) as error:
        parse(GenerateConfig, given.split())
    assert str(error.value) == said


def test_a_key_of_a_file_that_is_none_is_answered_alike(tmp_path):
    (tmp_path / "c.yaml").write_text("sampler: ddim\n")
    with pytest.raises(BadInput, match=r"^unrecognized sampler: did you mean scheduler\?$"):
        parse(GenerateConfig, ["--config", str(tmp_path / "c.yaml")])


if __name__ == "__main__":
    for name, text in texts().items():
        (TEXTS / name).write_text(text, "utf-8")
