"""What took long is done once: pieces survive a kill, a full disk and a lack of memory, and two runs make one file."""

import contextlib
import errno
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sd_hyena.distil import sources
from sd_hyena.distil.kept import Kept
from sd_hyena.distil.pieces import Pieces
from sd_hyena.distil.sources import make_bank
from tests.distil.test_sources import PROMPTS, config
from tests.fork import Child
from tests.fork import started as python_started
from tests.gate import gated

PIECES = """
import os, signal, sys, time, torch
from pathlib import Path
from sd_hyena.distil.kept import Kept

def make(rows, shown):
    made = []
    for i in rows:
        print(i, flush=True)
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(sys.argv[3]))
        made.append({"latents": torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(i))})
    return made

Kept(Path(sys.argv[1]), 12, (4, 2, 3)).get(make, 1, "pictures are made")
"""


def started(path, killed_at: int, seconds: float = 0.0) -> Child:
    script = path.parent.parent / "pieces.py"
    script.write_text(PIECES)
    return python_started(script, path, killed_at, seconds, cwd=path.parent.parent)


def begun(said: str) -> list[int]:
    """The pieces that a run told of."""
    return [int(line) for line in said.splitlines() if line.isdecimal()]


@pytest.fixture
def path(tmp_path):
    """Of what is kept, in a folder of its own."""
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept" / "x.safetensors"


def expected() -> torch.Tensor:
    return torch.cat([torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(i)) for i in range(12)])


def test_killed_at_picture_7_of_12_the_next_run_makes_five_and_all_are_bit_equal(path):
    first = started(path, killed_at=7).end()
    assert begun(first.out) == list(range(8)) and first.code == -signal.SIGKILL and not path.exists()
    assert Kept(path, 12, (4, 2, 3)).missing == 5
    second = started(path, killed_at=-1).end()
    assert begun(second.out) == [7, 8, 9, 10, 11] and second.code == 0, second.err
    assert torch.equal(load_file(path)["latents"], expected()) and sorted(path.parent.iterdir()) == [path]


@pytest.mark.gate
def test_of_two_runs_at_once_one_makes_the_pictures_and_the_other_takes_them(path):
    runs = [run.end() for run in [started(path, killed_at=-1, seconds=0.1) for _ in range(2)]]
    assert sorted(len(begun(run.out)) for run in runs) == [0, 12] and [run.code for run in runs] == [0, 0]
    assert torch.equal(load_file(path)["latents"], expected()) and sorted(path.parent.iterdir()) == [path]


@pytest.mark.gate
def test_when_the_run_that_was_waited_for_is_killed_the_other_one_goes_on(path):
    first = started(path, killed_at=7, seconds=0.2)
    deadline = time.monotonic() + 120
    while not begun(first.said()) and time.monotonic() < deadline:
        time.sleep(0.01)
    second = started(path, killed_at=-1)
    first.end()
    assert begun(second.end().out) == [7, 8, 9, 10, 11]
    assert torch.equal(load_file(path)["latents"], expected())


def test_pieces_are_taken_by_whoever_asks_for_some_of_them_and_a_flipped_bit_is_seen(tmp_path, capsys):
    asked = []

    def got(*names: str) -> list[torch.Tensor]:
        def make(rows, _shown):
            asked.extend(names[i] for i in rows)
            return [{"pixels": torch.full((3, 5), ord(names[i]), dtype=torch.uint8)} for i in rows]

        pieces = Pieces(tmp_path / "pieces", names, lambda piece: None)
        return [piece["pixels"] for piece in pieces.get(make, 1, "pieces are made")]

    def right(*names: str) -> bool:
        return [set(pixels.flatten().tolist()) for pixels in got(*names)] == [{ord(name)} for name in names]

    assert right(*"abc") and right(*"cbd") and right(*"ad") and asked == [*"abc", "d"]
    content = bytearray((tmp_path / "pieces" / "b.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "pieces" / "b.safetensors").write_bytes(content)
    assert right(*"abcd") and right(*"abcd") and asked == [*"abc", "d", "b"]
    assert capsys.readouterr().out.count("b.safetensors' is damaged") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces"]


@pytest.mark.parametrize("data", ["samples", *gated(["trajectories"])])
def test_a_run_that_ends_while_the_teacher_draws_costs_one_picture_and_changes_nothing(
    pipe, tmp_path, data, monkeypatch, capsys
):
    given = config(data=data, num_samples=4)
    whole = make_bank(pipe, given, PROMPTS, "", tmp_path / "whole")
    draw, drawn = sources._arguments, []

    def until_the_third(pipe, config, captions, rows):
        drawn.append(rows)
        if len(drawn) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return draw(pipe, config, captions, rows)

    monkeypatch.setattr(sources, "_arguments", until_the_third)
    with pytest.raises(OSError, match="No space"):
        make_bank(pipe, given, PROMPTS, "", tmp_path / "again")
    assert "2 of 4 pictures are kept; the same command goes on from there" in capsys.readouterr().out
    again = make_bank(pipe, given, PROMPTS, "", tmp_path / "again")
    assert [list(rows) for rows in drawn] == [[0], [1], [2], [2], [3]]
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("whole", "again"))
    assert torch.equal(again.latents, whole.latents) and a.read_bytes() == b.read_bytes() and a.name == b.name


def test_a_picture_that_was_kept_and_is_damaged_is_drawn_again(pipe, tmp_path, monkeypatch, capsys):
    whole = make_bank(pipe, config(), PROMPTS, "", tmp_path / "whole")
    keep = Kept._keep

    def killed(self, i, piece):
        keep(self, i, piece)
        if i == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Kept, "_keep", killed)
        make_bank(pipe, config(), PROMPTS, "", tmp_path / "again")
    damaged = next((tmp_path / "again").glob("*.parts/00000.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert torch.equal(make_bank(pipe, config(), PROMPTS, "", tmp_path / "again").latents, whole.latents)
    said = capsys.readouterr().out
    assert "00000.safetensors' is damaged" in said and "1 of 3 pictures were kept" in said


def test_out_of_memory_while_the_teacher_draws_halves_the_number_at_once(pipe, tmp_path, monkeypatch, capsys):
    draw, drawn = sources._arguments, []

    def out_of_memory(pipe, config, captions, rows):
        drawn.append(list(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return draw(pipe, config, captions, rows)

    monkeypatch.setattr(sources, "_arguments", out_of_memory)
    bank = make_bank(pipe, config(num_samples=5, draw_at_once=4), PROMPTS, "", tmp_path)
    assert drawn == [[0, 1, 2, 3], [0, 1], [2, 3], [4]] and len(bank) == 5
    assert "going on with 2 at once" in capsys.readouterr().out


@pytest.mark.parametrize("times", [1, 2])
def test_a_single_picture_is_tried_once_more_after_an_out_of_memory(pipe, tmp_path, monkeypatch, times):
    draw, left = sources._arguments, [times]

    def out_of_memory(*given):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return draw(*given)

    monkeypatch.setattr(sources, "_arguments", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) if times == 2 else contextlib.nullcontext():
        assert len(make_bank(pipe, config(), PROMPTS, "", tmp_path)) == 3


def test_out_of_memory_while_a_picture_is_encoded_goes_on_in_tiles(pipe, tmp_path, monkeypatch):
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    given = config(data="images", data_path=str(tmp_path))
    whole = make_bank(pipe, given, PROMPTS, "", tmp_path / "whole")
    encode, left = pipe.vae.encode, [1]

    def out_of_memory(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return encode(*arguments, **options)

    monkeypatch.setattr(pipe.vae, "encode", out_of_memory)
    again = make_bank(pipe, given, PROMPTS, "", tmp_path / "again")
    torch.testing.assert_close(again.latents, whole.latents, rtol=1e-4, atol=1e-4)
    assert left == [0]
    monkeypatch.setattr(sources, "encoded", None)  # it is not needed again
    assert torch.equal(make_bank(pipe, given, PROMPTS, "", tmp_path / "again").latents, again.latents)
