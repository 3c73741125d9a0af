"""The card says what the file says of itself; it is uploaded when asked, and never otherwise."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.evaluate import card as model_card
from sd_hyena.evaluate.card import CardConfig, NotPushed, card_of
from sd_hyena.evaluate.report import markdown
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01, OUT11, ROOT, command

SHA = "0123456789abcdef" * 4
TRAINING = {
    "step": 200,
    "teacher": "v1-5.safetensors",
    "teacher_sha256": SHA,
    "metrics": {"val/relative_mse/IN01": 0.03812345, "val/image_psnr": 30.9},
    "config": {"width": 768, "height": 0, "batch_size": 8, "stage": "joint", "data": "samples", "seed": 3},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def students(tmp_path):
    specs = [
        StudentSpec(IN01, "IN01", 32, "hyena2d", {"heads": 2}, None),
        StudentSpec(OUT11, "OUT11", 32, "causal", {}, (8, 12)),
    ]
    path = tmp_path / "mine.safetensors"
    save_students(path, StudentFile({spec.site: build_student(spec) for spec in specs}, TRAINING))
    return path


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the Hub."""
    asked = []

    class Api:
        def __init__(self, **_given):
            pass

        def create_repo(self, name, **given):
            asked.append((name, given))

        def create_commit(self, name, operations, commit_message):
            contents = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
            asked.append((name, contents))
            return huggingface_hub.CommitInfo(
                commit_url=f"https://huggingface.co/{name}/commit/1",
                commit_message=commit_message,
                commit_description="",
                oid="1",
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def test_the_card_has_the_base_models_hash_the_sites_the_errors_and_how_to_use_it(students, hub, capsys):
    model_card.main(CardConfig(students=str(students), base_model="somebody/sd-1-5", license="creativeml-openrail-m"))
    card = students.with_suffix(".md")
    assert capsys.readouterr().out == f"{card}\n" and hub == []
    _, header, text = card.read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "somebody/sd-1-5"
    assert yaml.safe_load(header)["base_model_relation"] == "adapter"
    assert yaml.safe_load(header)["license"] == "creativeml-openrail-m"
    assert f"`{SHA}`" in text and "`0123456789`" in text and "200 steps of batch 8, stage joint" in text
    counts = [sum(p.numel() for p in s.parameters()) for s in students_of(students)]
    assert f"| IN01 | hyena2d | 32 | any | {counts[0]:,} |" in text
    assert f"| OUT11 | causal | 32 | 12x8 cells | {counts[1]:,} |" in text
    assert "| relative_mse/IN01 | 0.03812 |" in text and "| image_psnr | 30.9 |" in text
    assert "sd-hyena generate -m v1-5.safetensors -y mine.safetensors -W 768 -p" in text and "its licence" in text
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"pip install {package['name']}-{package['version']}-py3-none-any.whl" in text
    assert "pip install ." in text and "load_pipeline('v1-5.safetensors')" in text


def test_what_a_card_says_works_as_it_stands(tmp_path, monkeypatch):
    """Its three lines of Python draw, its command is understood; a name of one's own is the title."""
    monkeypatch.chdir(tmp_path)
    spec = StudentSpec(IN01, "IN01", 32, "pointwise", {}, None)
    config = {"teacher_model": "", "width": 64, "height": 0}
    save_students("a.safetensors", StudentFile({IN01: build_student(spec)}, {"teacher": "model", "config": config}))
    model_card.main(CardConfig(students="a.safetensors", name="Our lighthouse"))
    text = Path("a.md").read_text("utf-8")
    assert "\n# Our lighthouse: " in text and "/" not in text.split("```bash")[1].split("```")[0]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    exec(code.replace("height=64)", "height=64, num_inference_steps=2)"), {})
    assert Image.open("picture.png").size == (64, 64)
    typed = shlex.split(re.search(r"```bash\nsd-hyena generate (.*?)\n```", text)[1])
    config = parse(GenerateConfig, typed)
    assert (config.hyena, config.model, config.width, config.prompt) == (
        "a.safetensors",
        "",
        64,
        "a red circle on blue",
    )


def students_of(path):
    from sd_hyena.students.checkpoint import load_students

    return load_students(path).students.values()


def report_of(path, label="mine", sha256=SHA):
    sites = {"IN01": {"relative_mse": 0.05, "attention_ms": 4.0, "student_ms": 1.0}}
    found = {
        "sites": sites,
        "prediction": {"both": 0.1, "as_noise": 0.2, "guided_5": 0.3},
        "images": {"5": {"psnr": 25}},
    }
    entry = {"sizes": {"256x256": found}, "advice": ["train longer"]}
    path.write_text(json.dumps({"model_sha256": sha256, "students": {label: entry}}))
    return entry


def test_a_report_of_these_students_is_shown_and_one_of_others_refused(students, tmp_path):
    report = tmp_path / "report.json"
    entry = report_of(report)
    model_card.main(CardConfig(students=str(students), report=str(report)))
    card = students.with_suffix(".md")
    assert markdown({"mine": entry}) in card.read_text("utf-8")
    card.unlink()
    for given in (dict(label="other"), dict(sha256="0" * 64)):
        report_of(report, **given)
        with pytest.raises(BadInput, match="report="):
            model_card.main(CardConfig(students=str(students), report=str(report)))
    report.write_text("[1, 2")
    with pytest.raises(BadInput, match="no report of an evaluation of mine"):
        model_card.main(CardConfig(students=str(students), report=str(report)))
    assert not card.exists()


def test_a_card_that_was_edited_is_kept_and_pushed_with_the_students_when_asked(students, hub, capsys):
    card = students.with_suffix(".md")
    card.write_text("edited", "utf-8")
    model_card.main(CardConfig(students=str(students), push="me/mine", private=True))
    said = capsys.readouterr().out
    assert "stays as it is" in said and "https://huggingface.co/me/mine/commit/1" in said
    assert hub == [
        ("me/mine", {"private": True, "exist_ok": True}),
        ("me/mine", {"README.md": b"edited", "mine.safetensors": students.read_bytes()}),
    ]


def test_a_strangers_words_do_nothing_in_the_card():
    spec = StudentSpec(IN01, "IN01", 32, "pointwise", {}, None)
    hostile = "x`|<script>[a](b)\n# Heading\n---"
    training = TRAINING | {"teacher": hostile, "config": {"stage": hostile}, "metrics": {hostile: 1.0, "y": "z"}}
    card = card_of(StudentFile({IN01: build_student(spec)}, training), "x.safetensors")
    assert "<script>" not in card and "\n# Heading" not in card and "[a](b)" not in card
    assert card.count("---\n") == 2 and "z |" not in card
    for broken in ({"config": 3, "metrics": [], "versions": None}, {}):
        assert "# x: Hyena" in card_of(StudentFile({IN01: build_student(spec)}, broken), "x.safetensors")


@pytest.mark.gate
def test_without_a_network_there_is_one_line_and_the_card_is_written(students):
    given = ["-m", "sd_hyena.evaluate.card", students, "--push", "me/mine"]
    done = command(*given, env={"HF_HUB_OFFLINE": "1", "HF_TOKEN": "none"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: NotPushed: push='me/mine'") and "offline" in done.stderr
    assert students.with_suffix(".md").exists()


def test_what_the_hub_answers_is_one_line_too(students, hub, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", refuse)
    with pytest.raises(NotPushed, match="403 Forbidden; nothing is uploaded, the card is"):
        model_card.main(CardConfig(students=str(students), push="me/mine"))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(students="/nowhere.safetensors"), "no .safetensors file"),
        (dict(students="{file}.pt"), "no .safetensors file"),
        (dict(push="mine"), "USER/NAME"),
        (dict(push="a/b/c"), "USER/NAME"),
        (dict(base_model="../x"), "USER/NAME"),
        (dict(license="a b\n"), "identifiers"),
        (dict(private=True), "needs --push"),
        (dict(report="/nowhere.json"), "no file"),
    ],
)
def test_bad_options_are_one_line(students, given, said):
    torch.save({}, f"{students}.pt")
    values = {"students": str(students)} | {
        k: v.format(file=students) if isinstance(v, str) else v for k, v in given.items()
    }
    with pytest.raises(BadInput, match=said):
        CardConfig(**values)
