"""sd-hyena VERB."""

import sys

import pytest

from sd_hyena import __main__ as commands
from sd_hyena import __version__
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from tests.conftest import ROOT, command


def test_every_verb_is_listed_and_answers_help_without_torch():
    code = "import sys\nfrom sd_hyena.__main__ import VERBS, main\n"
    code += "assert main(['-h']) == 0 and main(['--version']) == 0\n"
    code += "for verb in VERBS:\n    assert verb == 'describe' or main([verb, '-h']) == 0, verb\n"
    code += "assert not {'torch', 'diffusers', 'lightning'} & sys.modules.keys()"
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.split(f"\n{__version__}\n")[0]
    assert all(f"\n  {verb} " in listed for verb in commands.VERBS)
    for option in ("--n_steps", "--hyena", "--sizes", "--push", "--out_dir"):
        assert option in done.stdout


@pytest.mark.parametrize("given", [["paint"], [], ["--hyena", "x"]])
def test_an_unknown_verb_is_answered_in_one_line(given, capsys):
    assert commands.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "demo, doctor, train" in said


@pytest.mark.parametrize(
    "given, said",
    [
        ("train -W 65", "multiple of 8"),
        ("generate -y missing", "hyena='missing' is no file"),
        ("recipe", "no recipe given"),
        ("evaluate missing", "students='missing' is no file"),
        ("card missing.safetensors", "is no .safetensors file"),
        ("describe missing.pt", "'missing.pt' is no file"),
        ("demo --foo", "--foo"),
    ],
)
def test_bad_input_of_a_verb_ends_with_2_and_its_line(given, said, capsys):
    assert commands.main(given.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_it_runs_as_a_module_from_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sd-hyena", "describe", "missing.pt"])
    assert commands.main() == 2 and "missing.pt" in capsys.readouterr().err
    done = command("-m", "sd_hyena", "describe", "missing.pt", cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "error: 'missing.pt' is no file\n"


@pytest.mark.parametrize("name", ["configs/generate/tiny_sd.yaml", "configs/generate/regions.yaml"])
def test_a_config_that_ships_is_found_from_any_folder_unless_there_is_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(GenerateConfig, ["--config", name])
    assert config.width in (256, 768) and (not config.regions or config.regions.startswith("/"))
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("width: 128\n")
    assert parse(GenerateConfig, ["--config", name]).width == 128
