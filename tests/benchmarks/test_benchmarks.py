"""The benchmarks measure what they say, and time nothing that computes the wrong thing."""

import csv
import importlib.util
import json
import math
import random
import re
import statistics
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.harness import contest as contests
from benchmarks.harness import layouts, record
from benchmarks.harness.assignments import Assignments
from benchmarks.harness.gate import relative_error, verdict
from benchmarks.harness.methods import ATTENTION, methods, safari_in_its_dtype
from benchmarks.harness.rounds import TWIN, Compared, Spread, compare, quantile
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from benchmarks.report import plots, tables
from benchmarks.suites import core, image, ladder
from benchmarks.suites.unet import error_of_students
from safari import HyenaOperator, clusters
from sd_hyena.cost.timing import interleaved
from sd_hyena.sites import Site, find_sites
from tests.conftest import ROOT

SETTING = Setting(torch.device("cpu"), torch.float32, quick=True)
SITE = Site("s", "S", channels=64, heads=2, level=0)
CEILINGS = Ceilings(copy=1e10, matmul=1e11)
BLANK = Row(SETTING, "block", (512, 264), "", site="S")
COLUMNS_OF_DIFFUSION_FAST = (
    "pipeline_cls,ckpt_id,bf16,sdpa,fused_qkv_projections,upcast_vae,batch_size,num_inference_steps,compile_unet,compile_vae,"
    "compile_mode,change_comp_config,do_quant,time (secs),memory (gbs),actual_gpu_memory (gbs),tag"
).split(",")


def busy(units):
    """Work of so many units of processor time."""

    def call():
        end = time.thread_time() + units * 2e-3
        while time.thread_time() < end:
            pass

    return call


def test_a_call_that_does_twice_the_work_is_half_as_fast_and_its_twin_is_equal():
    compared = compare({"one": busy(1), "two": busy(2)}, "one", SETTING, budget=0.1)
    assert 0.4 < compared["two"].ratio.median < 0.6 and compared["two"].verdict.endswith("x")
    assert 0.8 < compared[TWIN].ratio.median < 1.25
    assert compared["one"].seconds.p10 <= compared["one"].seconds.median <= compared["one"].seconds.p90


def test_every_round_takes_every_call_once_in_an_order_of_its_own():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(5)]
    times = interleaved(calls, 6, SETTING.device, random.Random(0))
    rounds = [tuple(order[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(r) == [0, 1, 2, 3, 4] for r in rounds) and len(set(rounds)) > 3
    assert [len(each) for each in times] == [6] * 5


def test_quantiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for q in (0, 0.1, 0.37, 0.5, 0.9, 1):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))
    assert Spread.of(values).median == statistics.median(values)


def test_a_difference_within_the_noise_is_none():
    spread = lambda ratio: Compared(Spread.of([1.0]), Spread.of([ratio]), noise=0.1)
    assert [spread(r).verdict for r in (0.95, 1.09, 1.2, 0.5)] == ["about equal", "about equal", "1.20x", "0.50x"]


def test_what_is_no_number_or_has_another_shape_fails_the_gate():
    y = torch.ones(2, 3, dtype=torch.float64)
    assert verdict(relative_error(y.float(), y), torch.float32) == "ok"
    assert relative_error(1.5 * y, y) == pytest.approx(0.5)
    for wrong in (y * math.nan, y * math.inf, y[:1]):
        assert verdict(relative_error(wrong, y), torch.float32).startswith("failed")
    assert verdict(math.nan, torch.float32).startswith("failed")


def test_a_tie_between_clusters_is_decided_as_it_was_and_a_wrong_assignment_is_not_followed():
    x, centers = torch.tensor([[[[0.0], [1.0], [2.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
    for theirs, followed in (([0, 0, 1], [0, 0, 1]), ([0, 1, 1], [0, 1, 1]), ([1, 1, 1], [0, 1, 1])):
        assignments = Assignments(slack=1e-4)
        with assignments.noting():
            assert clusters.nearest(x, centers).tolist() == [[[0, 0, 1]]]  # the first of equally near ones
        [[noted]] = assignments.noted.values()
        noted.copy_(torch.tensor(theirs))
        with assignments.following():
            assert clusters.nearest(x.double(), centers.double()).tolist() == [[followed]]


def test_assignments_of_all_heads_are_followed_by_some_at_a_time():
    x = torch.randn(2, 4, 50, 8, generator=torch.Generator().manual_seed(0))
    assignments = Assignments(slack=math.inf)
    with assignments.noting():
        labels = clusters.lloyd(x, 7, steps=2)
    with assignments.following():
        others = [clusters.lloyd(x[:1].flip(1).double()[:, some], 7, steps=2) for some in (slice(0, 1), slice(1, 4))]
    assert torch.cat(others, dim=1).equal(labels[:1])  # though the heads are others


@pytest.mark.gate
def test_every_method_passes_its_gate_at_a_prime_height():
    size = (67, 33)
    x = torch.randn(2, size[0] * size[1], 64, generator=torch.Generator().manual_seed(0))
    errors = {method.name: contests.error_of(method, x) for method in methods(SITE, size, SETTING)}
    assert {ATTENTION, "sdpa by heads", "hypertile 256 px", "hyena2d", "hyena2d full", "safari, published"} <= set(
        errors
    )
    assert {name: verdict(e, torch.float32) for name, e in errors.items()} == dict.fromkeys(errors, "ok")


def test_every_convolution_passes_its_gate_against_the_sum_itself(monkeypatch):
    monkeypatch.setattr(core, "CHANNELS", 6)
    monkeypatch.setattr(contests, "CHECKED_ROWS", 12)
    x = torch.randn(2, 11 * 14, 6, generator=torch.Generator().manual_seed(0))
    errors = [contests.error_of(method, x) for method in core.methods((11, 14), SETTING)]
    assert len(errors) == 6 and max(errors) < 1e-5


def test_a_method_that_is_wrong_or_too_slow_has_no_time():
    size = (8, 5)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    [good] = methods(SITE, size, SETTING, (ATTENTION,))
    wrong = replace(good, name="wrong", call=lambda t: 1.01 * good.call(t))
    nan = replace(good, name="nan", call=lambda t: good.call(t) * math.nan)
    only_shifted = replace(good, name="shifted", call=lambda t: good.call(t) * (1 + (t.mean() > 5)))
    slow = replace(good, name="slow", operations=10**15)

    def crashes(_):
        raise RuntimeError("no kernel for this")

    broken = replace(good, name="broken", call=crashes)
    found = contests.contest([good, wrong, nan, only_shifted, slow, broken], x, BLANK, CEILINGS, 1e5, 0.05, 1.0)
    rows = {row.method: row for row in found}
    assert rows[ATTENTION].compared and rows[f"{ATTENTION}, {TWIN}"].compared and rows[ATTENTION].roofline > 0
    for name, said in (
        ("wrong", "error"),
        ("nan", "failed"),
        ("shifted", "error"),
        ("slow", "skipped"),
        ("broken", "kernel"),
    ):
        assert rows[name].compared is None and said in rows[name].status
        assert rows[name].columns()["median"] == rows[name].columns()["time (secs)"] == ""


def test_the_published_operator_with_its_own_fft_is_the_operator():
    torch.manual_seed(0)
    operator = HyenaOperator(16, 64, emb_dim=5).eval()
    x = torch.randn(2, 64, 16)
    assert relative_error(safari_in_its_dtype(operator, x), operator(x).double()) < 1e-5


def test_students_inside_a_unet_are_held_against_float64_and_a_wrong_one_is_found(unet, monkeypatch):
    monkeypatch.setattr(layouts, "WORDS", 32)
    given = layouts.new_students(unet, "level0", SETTING)
    with torch.no_grad():
        assert error_of_students(unet, SETTING, given) < 1e-4
        student = next(iter(given.values()))
        right = student.forward
        monkeypatch.setattr(student, "forward", lambda x, *rest: right(x, *rest) * (1 + (x.dtype == torch.float32)))
        assert error_of_students(unet, SETTING, given) > 0.1


@pytest.mark.slow
def test_the_rungs_of_the_ladder_follow_one_another_and_say_what_cannot_be_done_here(unet, monkeypatch):
    monkeypatch.setattr(ladder, "_models", lambda setting: [("tiny", "level0", unet, 64)])
    monkeypatch.setattr(ladder, "BUDGET", 0.0)
    monkeypatch.setattr(ladder, "RUNGS", (("bf16",), ("sdpa",), ("channels_last", "qkv")))
    monkeypatch.setattr(layouts, "WORDS", 32)
    processors = dict(unet.attn_processors)
    rows = list(ladder.rows(SETTING, CEILINGS))
    assert unet.attn_processors == processors and len(rows) == 2 * 6
    by_rung = {row.method: row for row in rows}
    assert list(by_rung)[:4] == ["float32, plain attention", "+ bf16", "+ sdpa", "+ channels_last, qkv"]
    assert by_rung["graphs"].status.startswith("skipped: optimize=graphs") and by_rung["graphs"].compared is None
    for row in (row for row in rows if row.method != "graphs"):
        assert row.status == "ok" and row.compared.seconds.median > 0
    last = by_rung["+ channels_last, qkv"].columns()
    assert last["bf16"] and last["sdpa"] and last["fused_qkv_projections"] and not last["compile_unet"]
    assert by_rung["float32, plain attention"].error == 0 < by_rung["+ bf16"].error


def test_an_image_of_the_shipped_model_is_checked_against_float64(shared_pipe):
    students = layouts.new_students(shared_pipe.unet, "level0", SETTING)
    for given in ({}, students):
        assert image.error_of_latents(shared_pipe, given, torch.float32) < 1e-4


@pytest.mark.slow
def test_the_predicted_speedup_of_sd15_is_what_its_sites_save(sd15):
    students = layouts.new_students(sd15, "level0", SETTING)
    predicted = layouts.predicted_speedups(sd15, (128, 128), {"attention": {}, "level 0": students})
    saved = 5 * 4 * 16384**2 * 320  # the scores and their use; performance.md counts 1.72 TFLOP of 4.67
    assert predicted["attention"] == 1
    assert 1.3 < predicted["level 0"] < 1 / (1 - saved / 4.67e12) == pytest.approx(1.58, abs=0.02)
    assert {site.level for site in find_sites(sd15) if site.name in students} == {0}


def test_a_suite_writes_its_table_circumstances_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(core, "sides", lambda setting: [64, 72])
    monkeypatch.setattr(core, "CHANNELS", 4)
    assert benchmarks.run(["core", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    with (tmp_path / "core_cpu_quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:17] == COLUMNS_OF_DIFFUSION_FAST
    assert {"size", "method", "site", "median", "p10", "p90", "allocated (MiB)", "reserved (MiB)"} <= set(rows[0])
    assert {row["size"] for row in rows} == {"64x64", "72x72"} and all(row["status"] == "ok" for row in rows)
    assert all(float(row["p10"]) <= float(row["median"]) <= float(row["p90"]) for row in rows)
    facts = json.loads((tmp_path / "core_cpu_quick.json").read_text())
    assert {"command", "commit", "date", "hardware", "torch", "sdpa", "copy_GB/s", "matmul_TFLOP/s"} <= set(facts)
    assert (tmp_path / "core_cpu_quick_time.png").read_bytes().startswith(b"\x89PNG")
    assert "against" not in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    def rows(setting, ceilings):
        yield replace(BLANK, method="first", compared=Compared(Spread.of([1.0])))
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(core, "rows", rows)
    assert benchmarks.run(["core", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert [row["method"] for row in plots.read(tmp_path / "core_cpu.csv")] == ["first"]


@pytest.mark.parametrize(
    "wrong", [["warp"], ["core", "--device", "nowhere"], ["core", "--dtype", "int8", "--device", "cpu"]]
)
def test_bad_arguments_end_with_2(wrong):
    assert benchmarks.run(wrong) == 2


@pytest.mark.gate
def test_every_plot_draws_its_suite(tmp_path):
    timed = lambda *values: Compared(Spread.of(values), Spread.of([2.0]), 0.1)
    size = dict(size=(512, 512))
    lines = [
        replace(BLANK, method=m, size=(s, s), compared=timed(s / 1e3), allocated=s) for m in "ab" for s in (256, 512)
    ]
    steps = [
        replace(BLANK, method="step", site=at, compared=timed(2.0), predicted=1.5, **size)
        for at in ("attention", "all")
    ]
    steps += [
        replace(BLANK, method="site, student", site="IN01", note=at, compared=timed(0.5), **size)
        for at in ("attention", "all")
    ]
    tiled = [dict(method="", mode="exact", offload="disk", tile=32, pixels=s, decode_MiB=s) for s in (1024, 2048)]
    judged = [dict(method="", student=name, psnr_median=30 + i) for i, name in enumerate(plots.TRAINED)]
    for suite, kinds in plots.PLOTS.items():
        rows = (
            judged
            if suite == "quality"
            else tiled
            if suite == "tiled"
            else [row.columns() for row in (steps if suite == "unet" else lines)]
        )
        drawn = plots.draw(record.write(f"{suite}_cpu", rows, tmp_path, ("method",)))
        assert {path.name for path in drawn} == {f"{suite}_cpu_{kind}.png" for kind in kinds}
        assert all(path.stat().st_size > 5000 for path in drawn)


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_the_documents_tables_are_those_of_the_committed_results(document):
    text = (ROOT / document).read_text("utf-8")
    assert tables.BLOCK.search(text), "no table"
    assert tables.renewed(ROOT / document) == text, "run python -m benchmarks.report.tables"


def test_the_commands_behind_the_results_are_real_suites():
    for path in record.RESULTS.glob("*.json"):
        command = json.loads(path.read_text())["command"]
        found = re.match(r"python -m (benchmarks(?:\.\w+)*)( \w+)?", command)
        suite = found[1] == "benchmarks" and (found[2] or "").strip() in benchmarks.SUITES
        assert suite or (found[1] != "benchmarks" and importlib.util.find_spec(found[1])), f"{path.name}: {command}"


@pytest.mark.parametrize("arguments", [["--fast"], ["-w", "nowhere"]])
def test_the_gpu_script_refuses_what_it_does_not_know(arguments):
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
