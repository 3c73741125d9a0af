"""Our own files are read as carefully as others'."""

import json
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_hyena.distil import training
from sd_hyena.distil.run_card import Outcome, print_card
from sd_hyena.distil.run_folder import newest_first
from sd_hyena.distil.sources import pictures_of
from sd_hyena.distil.training import train
from sd_hyena.errors import BadInput
from sd_hyena.files.names import for_a_shell
from sd_hyena.files.pixels import read_pixels
from sd_hyena.files.text import read_text
from sd_hyena.files.weights import check_weights, read_pickle, read_weights, write_weights
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.large.regions import read_regions
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.recipe import _record
from tests.distil.test_training import config
from tests.gate import gated

WORDS = "a café — naïve, 漫画\nsecond line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["a red circle, by night", WORDS, "x", ""])
def test_text_is_read_in_what_editors_write(tmp_path, encoding, text):
    if encoding in ("utf-16-le", "utf-16-be") and text == WORDS:
        text = "a café in a long English sentence"
    (tmp_path / "x.txt").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert read_text(tmp_path / "x.txt") == text


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "shift-jis"])
def test_other_encodings_are_refused_with_the_files_name_and_the_way_out(tmp_path, encoding):
    words = "漫画" if encoding == "shift-jis" else "a café"
    (tmp_path / "x.txt").write_bytes(words.encode(encoding))
    with pytest.raises(BadInput, match=r"x\.txt' is no UTF-8 text \(byte 0x.. at \d\); save it as UTF-8") as error:
        read_text(tmp_path / "x.txt")
    assert "\n" not in str(error.value)


def test_prompts_options_and_regions_are_read_in_utf_16_too(tmp_path):
    (tmp_path / "p.txt").write_text("ein Kreis\n○\n", "utf-16")
    assert prompts_of(tmp_path, str(tmp_path / "p.txt")) == ["ein Kreis", "○"]
    (tmp_path / "c.yaml").write_text("prompt: ○", "utf-16")
    assert read_documents(str(tmp_path / "c.yaml")) == [{"prompt": "○"}]
    (tmp_path / "r.json").write_text(json.dumps({"bbox_controls": [dict(x=0, y=0, w=1, h=1)]}), "utf-16")
    assert len(read_regions(tmp_path / "r.json")) == 1
    for name, read in (
        ("p.txt", lambda path: prompts_of(tmp_path, path)),
        ("c.yaml", read_documents),
        ("r.json", read_regions),
    ):
        (tmp_path / name).write_bytes("prompt: é".encode("cp1252"))
        with pytest.raises(BadInput, match=name.replace(".", r"\.")) as error:
            read(str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((64, 64, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}", "utf-16" if i else "utf-8")
    return folder


def test_captions_are_read_before_a_model_is_loaded_and_debris_is_passed_over(pictures, tmp_path, monkeypatch):
    (pictures / "._0.png").write_bytes(b"\0\5\x16\7" * 9)
    (pictures / "folder.png").mkdir()
    assert list(pictures_of(str(pictures)).values()) == ["picture 0", "picture 1", "picture 2"]
    (pictures / "1.txt").write_bytes("café".encode("cp1252"))
    monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BadInput, match=r"data_path: .*1\.txt' is no UTF-8 text"):
        train(config(tmp_path, data="images", data_path=str(pictures)))
    assert not list((tmp_path / "out").glob("*/"))


@pytest.mark.parametrize(
    "data, damage",
    [
        ("samples", "cut"),
        *gated(("trajectories", damage) for damage in ("cut", "text")),
        *(("trajectories", damage) for damage in ("empty", "other sizes", "NaN", "other names")),
    ],
)
def test_a_damaged_cache_of_samples_is_drawn_again(tmp_path, data, damage, capsys, shared_pipe):
    from sd_hyena.distil.sources import make_bank
    from sd_hyena.options.sampler import set_scheduler

    before = shared_pipe.scheduler
    try:
        set_scheduler(shared_pipe, "ddim")
        asked = TrainConfig(width=64, num_samples=2, sample_steps=1, data=data, seed=0)
        bank = make_bank(shared_pipe, asked, ["a red circle", "blue"], "0" * 64, tmp_path / "cache")
        latents = bank.latents.clone()  # which lie in the file that is damaged now
        (path,) = (tmp_path / "cache").iterdir()
        good, content = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
        path.unlink()
        if damage in ("cut", "empty", "text"):
            path.write_bytes({"cut": good[:-100], "empty": b"", "text": b"hello"}[damage])
        else:
            content["latents"] = {
                "other sizes": content["latents"][..., 1:],
                "NaN": content["latents"] * torch.nan,
            }.get(damage, content["latents"])
            save_file({"x" if damage == "other names" else n: v.contiguous() for n, v in content.items()}, path)
        again = make_bank(shared_pipe, asked, ["a red circle", "blue"], "0" * 64, tmp_path / "cache")
    finally:
        shared_pipe.scheduler = before
    assert "is damaged" in capsys.readouterr().out and torch.equal(again.latents, latents)
    assert path.read_bytes() == good


def runs(folder):
    return sorted(path for place in ("out", "logs") for path in (folder / place).glob("*") if path.name != "cache")


def test_a_start_that_fails_leaves_no_run(folder, monkeypatch):
    (folder / "other.pt").write_text("hello")
    with pytest.raises(BadInput):
        train(config(folder, pretrained_weight=str(folder / "other.pt")))
    assert runs(folder) == []

    def fail(*_args, **_kwargs):
        raise RuntimeError("no")

    for place in ("print_estimate", "make_bank", "new_trainer"):
        with monkeypatch.context() as patch:
            patch.setattr(training, place, fail)
            with pytest.raises(RuntimeError, match="no"):
                train(config(folder))
        assert runs(folder) == [], place


def test_a_run_that_fails_later_keeps_what_it_has_saved(folder, monkeypatch):
    from sd_hyena.distil.module import Distillation

    original = Distillation.training_step

    def fail(module, *args):
        if module.trainer.global_step == 2:
            raise RuntimeError("no")
        return original(module, *args)

    monkeypatch.setattr(Distillation, "training_step", fail)
    with pytest.raises(RuntimeError, match="no"):
        train(config(folder, save_every_n_steps=1))
    (run,) = [path for path in runs(folder) if (path / "config.yaml").is_file()]
    assert list((run / "checkpoints").glob("step-*"))


def test_checkpoints_that_people_renamed_are_passed_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-00004", "step-00012", "step-00012 copy", "step-final", "step-", "._step-00004"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
    assert [path.stem for path in newest_first(tmp_path)] == ["step-00012", "step-00004"]


NAMES = ["a b", "it's", "$HOME", "a;b", "-m", "über", "a&b", '"', "x(1)", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_is_printed_can_be_pasted(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    given = TrainConfig(teacher_model=f"{name}.ckpt", vae=f"{name}.vae.pt", out_dir=name, width=64, seed=1)
    print_card(Outcome(Path(name) / "run", Path(name) / "run" / "x.safetensors", {}, {}), given, {})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    assert words[:4] == ["python", "-m", "sd_hyena", "generate"]
    found = dict(zip(words[4::2], words[5::2], strict=False))
    wanted = {"-m": f"{name}.ckpt", "--vae": f"{name}.vae.pt", "-y": f"{name}/hyena.pt", "-W": "64"}
    assert {flag: Path(found[flag]) for flag in wanted} == {flag: Path(path) for flag, path in wanted.items()}
    assert not any(value.startswith("-") for value in found.values())


def test_a_name_for_a_shell_is_that_name_to_the_shell():
    for name in NAMES:
        assert Path(*shlex.split(for_a_shell(name))) == Path(name)


class Spanned(zipfile.ZipFile):
    """What Python's own zipfile says of some damaged archives."""

    def __init__(self, *_args, **_kwargs):
        raise self.error


ERRORS = [
    zipfile.BadZipFile("zipfiles that span multiple disks are not supported"),
    NotImplementedError("version 9.9"),
    IndexError("x"),
    OverflowError(),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "no"),
    RuntimeError("encrypted"),
    EOFError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_zipfile_raises_of_a_damaged_archive_is_bad_input(tmp_path, monkeypatch, error):
    write_weights(tmp_path / "x.pt", {"a": torch.ones(2)}, {})
    monkeypatch.setattr(zipfile, "ZipFile", type("Bad", (Spanned,), {"error": error}))
    for read in (read_weights, read_pickle, check_weights):
        with pytest.raises(BadInput, match=r"x\.pt' is (a )?damaged"):
            read(tmp_path / "x.pt")


def test_an_archive_that_says_it_spans_disks_is_refused(tmp_path):
    write_weights(tmp_path / "x.pt", {"a": torch.ones(2)}, {})
    data = bytearray((tmp_path / "x.pt").read_bytes())
    locator = data.rfind(b"PK\x06\x07")
    end = data.rfind(b"PK\x05\x06")
    data[(locator + 16) if locator >= 0 else (end + 4)] = 9
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(BadInput, match=r"x\.pt"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "error", [KeyError("x"), IndexError(), TypeError("x"), OverflowError("x"), MemoryError(), EOFError()]
)
def test_whatever_pillow_raises_of_a_damaged_picture_is_bad_input(tmp_path, monkeypatch, error):
    def fail(_path):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadInput, match="is no readable image"):
        read_pixels(tmp_path / "x.png")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}', '{"config": {}}', "[" * 10**5])
def test_a_damaged_record_of_a_recipe_says_what_to_delete(tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(BadInput, match=r"done\.json' is damaged .*delete it"):
        _record(tmp_path / "done.json")
