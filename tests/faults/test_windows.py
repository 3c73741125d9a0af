"""What Windows refuses: no file that is open, or mapped into memory, is taken away, renamed or replaced."""

import os

import pytest
from safetensors.torch import save_file

from sd_hyena.distil.kept import Kept
from sd_hyena.distil.run_folder import write_newest
from sd_hyena.distil.training import train
from sd_hyena.files.atomic import replacing
from tests.distil.test_kept import expected
from tests.distil.test_training import config

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux tells what is open")


def is_open(path) -> bool:
    """Whether this process has it open or mapped."""
    path = os.path.realpath(path)
    with open("/proc/self/maps") as maps:
        if any(line.rstrip("\n").endswith(f" {path}") for line in maps):
            return True
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == path:
                return True
        except OSError:
            continue
    return False


@pytest.fixture
def refused(monkeypatch):
    """The paths that were refused, by the name of the function."""
    asked = []

    def guarded(name, original):
        def guard(*paths, **options):
            for path in paths if "dir_fd" not in options and "src_dir_fd" not in options else ():
                if is_open(path):
                    asked.append((name, os.path.basename(path)))
                    raise PermissionError(13, "The process cannot access the file because it is being used", str(path))
            return original(*paths, **options)

        return guard

    for name in ("unlink", "remove", "rename", "replace"):
        monkeypatch.setattr(os, name, guarded(name, getattr(os, name)))
    return asked


def test_the_guard_knows_what_is_open_and_what_is_not(tmp_path, refused):
    (tmp_path / "x").write_text("x")
    with open(tmp_path / "x"), pytest.raises(PermissionError):
        (tmp_path / "x").unlink()
    (tmp_path / "x").unlink()
    assert refused == [("unlink", "x")]


def test_pictures_that_are_kept_need_no_open_file_to_go_away(tmp_path, refused):
    make = lambda rows, shown: [{"latents": expected()[i : i + 1]} for i in rows]
    save_file({"latents": expected()[:5]}, tmp_path / "x.safetensors")  # less than it should hold: made again
    kept = Kept(tmp_path / "x.safetensors", 12, (4, 2, 3))
    assert len(kept.get(make, 5, "pictures are made")["latents"]) == 12
    assert refused == [] and list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]


def test_a_lock_that_another_run_has_open_stays_and_costs_nothing(tmp_path, refused):
    make = lambda rows, shown: [{"latents": expected()[i : i + 1]} for i in rows]
    (tmp_path / "x.lock").touch()
    with open(tmp_path / "x.lock"):
        assert len(Kept(tmp_path / "x.safetensors", 12, (4, 2, 3)).get(make, 5, "pictures are made")["latents"]) == 12
    assert set(refused) <= {("unlink", "x.lock")}


def test_a_training_that_saves_and_starts_from_its_own_newest_students_replaces_nothing_open(folder, refused):
    small = dict(n_steps=2, save_every_n_steps=1, keep=1, operator="pointwise", validate_every_n_steps=0)
    train(config(folder, **small))
    train(config(folder, **small, pretrained_weight=str(folder / "out" / "hyena.safetensors")))
    assert refused == []


def test_the_newest_file_that_another_program_shows_stays_as_it_was_and_the_run_goes_on(tmp_path, refused, capsys):
    path = tmp_path / "hyena.safetensors"
    path.write_text("old")

    def write(where):
        with replacing(where) as temporary:
            temporary.write_text("new")

    with open(path):
        write_newest(path, "run", write)
    said = capsys.readouterr().out
    assert path.read_text() == "old" and f"note: {path} stays as it was (The process" in said
    assert list(tmp_path.iterdir()) == [path]
    write_newest(path, "run", write)
    assert path.read_text() == "new"


def test_a_temporary_file_that_cannot_be_taken_away_does_not_hide_what_went_wrong(tmp_path, refused):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as temporary, open(temporary):
        raise ZeroDivisionError
