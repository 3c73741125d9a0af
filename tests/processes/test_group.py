"""Several processes draw what one draws: images shared out, or the tiles of one; where one fails, all end, with one line."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.files.picture import read_metadata
from sd_hyena.generate import job
from sd_hyena.generate.generation import generate
from sd_hyena.large.tiled_unet import _TiledUNet
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.processes.group import Group, own_device
from tests.conftest import command
from tests.faults.conftest import Ended, litter, start

SMALL = [*"-W 72 -H 64 -s 2 -k 11 -p".split(), "a red circle on blue"]
TILES = "-W 136 -n 1 --tiled_diffusion mixture --tile_width 8 --tile_height 8 --overlap 3 --tile_batch_size 2".split()
REGIONS = {"bbox_controls": [{"x": 0, "y": 0, "w": 0.5, "h": 1, "prompt": "a red circle", "seed": 5}]}


@pytest.fixture
def drawn(tmp_path, monkeypatch, shared_pipe):
    """Draw with a number of processes, as torchrun starts them, into a folder; how each of them ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))

    def draw(size: int, folder, *arguments, fault=lambda rank: None) -> list[Ended]:
        def launched(rank: int):
            signal.alarm(200)  # no test waits for one that hangs
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ.update({name: str(value) for name, value in environment.items()})
            fault(rank)

        children = []
        for rank in range(size):
            own = tmp_path / f"{folder}-{rank}"
            own.mkdir()
            given = [*SMALL, *arguments, "-o", tmp_path / folder]
            children.append(start(own, GenerateConfig, *given, fault=lambda rank=rank: launched(rank)))
        return [child.end() for child in children]

    return draw


def pixels(folder) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in folder.glob("*.png")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def alone(tmp_path):
    """The same drawn by one process."""

    def draw(*arguments) -> dict[str, np.ndarray]:
        from sd_hyena.options.command_line import parse

        generate(parse(GenerateConfig, [*map(str, SMALL), *map(str, arguments), "-o", str(tmp_path / "alone")]))
        return pixels(tmp_path / "alone")

    return draw


def test_two_processes_draw_the_images_of_one_bit_for_bit_and_one_of_them_speaks(tmp_path, drawn, alone):
    first, second = drawn(2, "two", "-n", 3)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    summary, *paths = first.out.splitlines()
    assert summary.startswith("a red circle on blue · 72x64 · 2 steps of ddim")
    assert [Path(path).name for path in paths] == [f"image_00{n}.png" for n in range(3)]
    assert second.out == second.err == "" and litter(tmp_path / "two") == []
    assert same(pixels(tmp_path / "two"), alone("-n", 3))


@pytest.mark.parametrize(
    "more",
    [pytest.param([], marks=pytest.mark.slow), ["--regions", "{regions}", "--draw_background", "--hypertile", "32"]],
)
def test_two_processes_share_the_tiles_of_one_image_bit_for_bit(tmp_path, drawn, alone, more):
    (tmp_path / "regions.json").write_text(json.dumps(REGIONS))
    options = [*TILES, *(part.format(regions=tmp_path / "regions.json") for part in more)]

    def counted(rank):
        original = _TiledUNet._predictions

        def predictions(self, call, views):
            with open("calls", "a") as file:
                file.write("x")
            return original(self, call, views)

        _TiledUNet._predictions = predictions

    first, second = drawn(2, "two", *options, fault=counted)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == second.err == "" and len(pixels(tmp_path / "two")) == 1
    calls = [len((tmp_path / f"two-{rank}" / "calls").read_text()) for rank in range(2)]
    assert 0 <= calls[0] - calls[1] <= 2  # one more in a step, of two, where their number is odd
    assert same(pixels(tmp_path / "two"), alone(*options))


def test_a_seed_that_nobody_gave_is_drawn_once_for_all(tmp_path, drawn):
    first, _ = drawn(2, "two", "-n", 2, "-k", -1)
    assert first.code == 0, first.err
    seeds = [read_metadata(path)["config"]["seed"] for path in sorted((tmp_path / "two").iterdir())]
    assert seeds[1] == (seeds[0] + 1) % 2**32


def test_an_image_that_cannot_be_shared_is_drawn_by_one_which_says_so(tmp_path, drawn, alone):
    first, _ = drawn(2, "two", "-n", 1)
    assert first.code == 0 and "note: 1 images in one piece keep 1 of 2 processes busy" in first.out
    assert same(pixels(tmp_path / "two"), alone("-n", 1))


def failing(where, name: str, failure, rank: int, when=lambda *_: True):
    """In process number `rank`, `failure` happens where a function begins."""

    def fault(own: int):
        original = getattr(where, name)

        def function(*args, **kwargs):
            if own == rank and when(*args):
                failure()
            return original(*args, **kwargs)

        setattr(where, name, function)

    return fault


def raising(error: Exception):
    def raise_() -> None:
        raise error

    return raise_


@pytest.mark.parametrize(
    "rank, tiles",
    [
        pytest.param(0, ["-n", "4"], marks=pytest.mark.slow),
        (1, ["-n", "4"]),
        (0, TILES),
        pytest.param(1, TILES, marks=pytest.mark.slow),
    ],
    ids=["0-images", "1-images", "0-tiles", "1-tiles"],
)
def test_where_one_process_fails_all_end_with_its_one_line(tmp_path, drawn, tiles, rank):
    ended = drawn(2, "two", *tiles, fault=failing(job, "draw", raising(ValueError("injected")), rank))
    assert [one.code for one in ended] == [1, 1]
    said = [line for one in ended for line in one.err.splitlines()]
    assert said == ["error: ValueError: injected"] and litter(tmp_path / "two") == []


def test_where_one_process_is_killed_the_other_ends_and_says_so(tmp_path, drawn):
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    first, second = drawn(2, "two", *TILES, fault=failing(_TiledUNet, "_predictions", kill, 1))
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert first.last_line == "error: ProcessFailed: another process of this run has ended"


@pytest.mark.gate
def test_memory_that_runs_out_in_one_process_halves_the_rows_in_all(tmp_path, drawn, alone):
    """Two images together do not fit into the second of three processes; one by one they do."""
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))
    two_rows = lambda _self, call, _views: call.rows > 2
    options = [*TILES, "-n", 2, "-b", 2]
    ended = drawn(3, "three", *options, fault=failing(_TiledUNet, "_predictions", full, 1, when=two_rows))
    assert [one.code for one in ended] == [0] * 3, ended
    assert same(pixels(tmp_path / "three"), alone(*options[:-2]))


def test_numbers_of_one_process_that_are_not_finite_cost_that_image_in_all(tmp_path, drawn):
    nan = raising(FloatingPointError("the VAE gives NaN"))
    ended = drawn(2, "two", *TILES, fault=failing(sys.modules["sd_hyena.generate.drawing"], "decoded", nan, 1))
    assert [one.code for one in ended] == [1, 1]
    (said,) = [line for one in ended for line in one.err.splitlines()]
    assert said.startswith("error: NotDrawn: 1 of 1 images failed") and "process 1: FloatingPointError" in said


def test_what_is_refused_is_refused_once(drawn):
    ended = drawn(2, "two", "-W", 65)
    assert [one.code for one in ended] == [2, 2]
    assert sum(one.err.count("error: width=65") for one in ended) == sum(one.err.count("\n") for one in ended) == 1


def test_one_process_alone_needs_nobody():
    alone = Group()
    assert list(alone.map(lambda x: 2 * x, [1, 2])) == [2, 4] and alone.gathered("x") == ["x"] and alone.agreed(3) == 3
    with pytest.raises(ValueError, match="as it is"):
        alone.tried(raising(ValueError("as it is")))


def test_each_process_takes_the_gpu_of_its_own_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device("auto") == "auto" and own_device("cuda") == "cuda"
    for name, value in dict(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8).items():
        monkeypatch.setenv(name, str(value))
    assert [own_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path, alone):
    """As typed; everything above is started as torchrun does it, without its ten seconds."""
    done = command(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "generate.py", *SMALL, "-n", 2,
        "-o", tmp_path / "two", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(".png\n") == 2, done.stderr
    assert same(pixels(tmp_path / "two"), alone("-n", 2))
