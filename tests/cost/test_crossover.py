"""Where attention is faster than its student it can stay, and says so."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.cost import crossover
from sd_hyena.cost.crossover import speedup
from sd_hyena.distil.selection import Candidate, choose, table, useful
from sd_hyena.errors import BadInput
from sd_hyena.generate import alternatives
from sd_hyena.generate.alternatives import keep_attention, load_alternatives
from sd_hyena.generate.generation import generate
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01, OUT11


class Counted(torch.nn.Module):
    """A student that does nothing, or `work` times what attention does, and counts its calls."""

    def __init__(self, attention, work=0):
        super().__init__()
        self.spec = StudentSpec(IN01, "IN01", 32, "pointwise", {"hidden": work}, None)
        self.attention, self.work, self.calls = [attention], work, 0

    def forward(self, x, projections, size):
        self.calls += 1
        for _ in range(self.work):
            self.attention[0](x)
        return x


@pytest.fixture
def site(unet, monkeypatch):
    monkeypatch.setattr(crossover, "_measured", {})
    monkeypatch.setattr(crossover, "folded_flops", lambda spec, size: 10**9)
    return next(site for site in find_sites(unet) if site.name == IN01)


def test_the_faster_of_the_two_is_found_and_measured_once_for_each_shape(unet, site):
    attention = unet.get_submodule(IN01)
    idle, busy = Counted(attention), Counted(attention, work=4)
    assert speedup(site, attention, idle, (12, 20), 2) > 1.5
    assert speedup(site, attention, busy, (12, 20), 2) < 0.6
    calls = idle.calls
    assert speedup(site, unet.get_submodule(OUT11), idle, (12, 20), 2) > 1.5 and idle.calls == calls
    speedup(site, attention, idle, (12, 20), 1)
    assert idle.calls > calls


def test_what_counted_operations_settle_is_not_measured(unet, site):
    student = Counted(unet.get_submodule(IN01))
    assert speedup(site, unet.get_submodule(IN01), student, (512, 512), 2) == float("inf") and student.calls == 0


@pytest.fixture
def two(tmp_path):
    """A file of students for two sites."""
    torch.manual_seed(0)
    specs = [StudentSpec(name, short, 32, "pointwise", {}, None) for name, short in ((IN01, "IN01"), (OUT11, "OUT11"))]
    save_students(path := str(tmp_path / "two.safetensors"), StudentFile({s.site: build_student(s) for s in specs}))
    return path


def test_named_sites_keep_their_attention_and_leave_the_label(unet, two):
    [whole] = load_alternatives(two, unet)
    kept = keep_attention(whole, unet, "out11,M00", (8, 8), 2)
    assert set(kept.students) == {IN01} and kept.kept == ("OUT11",) and kept.label == "IN01:two"
    assert set(whole.students) == {IN01, OUT11}
    with pytest.raises(BadInput, match="IN99"):
        keep_attention(whole, unet, "IN99", (8, 8), 2)


@pytest.mark.usefixtures("loaded_once")
def test_a_picture_remembers_what_was_measured_and_is_repeated_without_measuring(tmp_path, two, monkeypatch, capsys):
    monkeypatch.setattr(alternatives, "speedup", lambda site, *_: 0.5 if site.short == "IN01" else 3.0)
    given = dict(width=64, steps=2, num_images=1, seed=3, prompt="a red circle on blue", out_dir=str(tmp_path))
    [path] = generate(GenerateConfig(**given, hyena=two, keep_attention="auto"))
    assert "IN01 keeps its attention, 2.00 times faster at 8x8 tokens" in capsys.readouterr().out
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path)])
    assert again.keep_attention == "auto:IN01"
    monkeypatch.setattr(alternatives, "speedup", None)
    [second] = generate(again)
    [both] = generate(GenerateConfig(**given, hyena=two))
    pixels = [np.array(Image.open(file)) for file in (path, second, both)]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])


def test_auto_does_not_replace_a_site_whose_student_was_measured_to_be_slower():
    slow, fast = Candidate("A", 100, 10, 0.01, speedup=0.8), Candidate("B", 60, 10, 0.001, speedup=1.4)
    assert useful([slow, fast], 200) == [fast] and choose([slow, fast], 200, max_error=0.1) == [fast]
    rows = {line.split()[0]: line for line in table([slow, fast], [fast], 200).splitlines()}
    assert rows["A"].endswith("attention, faster") and " 0.80 " in rows["A"] and rows["B"].endswith("student")
    with pytest.raises(BadInput, match="every site"):
        useful([slow], 200)
