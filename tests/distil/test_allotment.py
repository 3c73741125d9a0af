"""Landmarks are dealt out to where an error costs most, within the price of an equal share."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from sd_hyena.cost.operations import student_flops
from sd_hyena.distil.allotment import CANVAS, LADDER, allotted, chosen_counts, is_left_open, with_count
from sd_hyena.distil.start import start_from, with_counts_of
from sd_hyena.errors import BadInput
from sd_hyena.options.operators import operator_named
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.recipe import read_recipe
from sd_hyena.sites import Site, find_sites, select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import StudentSpec, build_student, spec_for
from sd_hyena.students.teacher import Teacher
from tests.gate import gated


def test_the_choice_is_within_the_budget_and_near_the_best_there_is():
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        weight = torch.rand(3, generator=source) ** 3
        errors = {(str(s), m): float(weight[s]) / m for s in range(3) for m in LADDER}
        costs = {(str(s), m): m for s in range(3) for m in LADDER}
        chosen = chosen_counts(["0", "1", "2"], errors, costs, 3 * 256)

        def total(counts, errors=errors):
            return sum(errors[str(s), m] for s, m in enumerate(counts))

        best = min(total(counts) for counts in product(LADDER, repeat=3) if sum(counts) <= 3 * 256)
        assert sum(chosen.values()) <= 3 * 256
        assert total(chosen.values()) <= 1.35 * best
        assert total(chosen.values()) <= total([256] * 3) + 1e-12


def test_a_site_that_gains_nothing_stays_at_the_least():
    errors = {("a", m): 1 / m for m in LADDER} | {("b", m): 0.5 for m in LADDER}
    costs = {(s, m): m for s in "ab" for m in LADDER}
    assert chosen_counts(["a", "b"], errors, costs, 700) == {"a": 512, "b": LADDER[0]}
    errors |= {("b", m): 1e-9 / m for m in LADDER}  # as rounding leaves it
    assert chosen_counts(["a", "b"], errors, costs, 2000) == {"a": 512, "b": LADDER[0]}


@pytest.mark.gate
@pytest.mark.parametrize(("asked", "price"), [*gated([("auto", 256)]), ("auto:150", 150)])
def test_the_sites_of_the_shipped_model_get_numbers_of_the_ladder_for_no_more_operations(unet, states, asked, price):
    latents, timestep, condition = states
    sites = select(find_sites(unet), "IN01,OUT09")
    size = tuple(latents.shape[-2:])
    specs = [spec_for(site, "clusters", {"landmarks": asked, "sample": 2048}, size) for site in sites]
    held_out = {"latents": latents, "timestep": timestep, "text": condition}
    found = allotted(specs, Teacher(unet, sites), held_out, sites)
    assert [spec.site for spec in found] == [site.name for site in sites]
    assert all(spec.options["landmarks"] in LADDER and spec.options["heads"] for spec in found)
    assert _operations(found, sites) <= _operations([_given(spec, price) for spec in specs], sites)


def _given(spec: StudentSpec, number: int) -> StudentSpec:
    return replace(spec, options=spec.options | {"landmarks": number})


def _operations(specs: list[StudentSpec], sites: list[Site]) -> int:
    return sum(student_flops(spec, site.size(*CANVAS)) for spec, site in zip(specs, sites, strict=True))


def test_the_shipped_students_are_what_their_recipe_can_buy(unet):
    """Counted as the recipe counts today: what is a step cheaper than the dearest it may have, and no dearer."""
    path = SHIPPED_MODEL.parent / "students" / "all.safetensors"
    specs = [student.spec for student in load_students(str(path), unet).students.values()]
    size_of = {site.name: site.size(*CANVAS) for site in find_sites(unet)}
    cost = lambda spec, count: student_flops(with_count(spec, count), size_of[spec.site])
    [step] = read_recipe(["configs/recipes/tiny_sd_all.yaml"])
    price = int(step({}).options_of_operator()["landmarks"].removeprefix("auto:"))
    budget = sum(cost(spec, price) for spec in specs)
    paid = sum(cost(spec, spec.options["landmarks"]) for spec in specs)
    assert paid <= budget < paid + cost(specs[0], 512) - cost(specs[0], 384)


def test_who_starts_from_a_file_has_its_numbers(unet, tmp_path):
    """A recipe's later stages, whose numbers were dealt out before the first."""
    sites = select(find_sites(unet), "IN01,OUT09")
    of = lambda *counts: [
        spec_for(site, "clusters", {"landmarks": count, "sample": 2048, "learned": True}, (32, 32))
        for site, count in zip(sites, counts, strict=True)
    ]
    students = {spec.site: build_student(spec) for spec in of(24, 48)}
    save_students(tmp_path / "first.safetensors", StudentFile(students))
    left_open = of("auto:192", "auto:192")
    assert is_left_open(left_open)
    found = with_counts_of(str(tmp_path / "first.safetensors"), left_open, unet)
    assert found == of(24, 48)
    start_from(str(tmp_path / "first.safetensors"), {spec.site: build_student(spec) for spec in found}, unet)


def test_auto_is_read_where_it_is_meant_and_refused_elsewhere():
    assert (
        TrainConfig(operator="clusters", operator_options="landmarks=auto").options_of_operator()["landmarks"] == "auto"
    )
    for options in ("local=auto", "landmarks=all", "landmarks=auto:0", "landmarks=auto:", "landmarks=auto:1e3"):
        with pytest.raises(BadInput, match="must be a whole number"):
            TrainConfig(operator="hyena2d", operator_options=options)
    assert "or auto" in operator_named("clusters").options["landmarks"].rule()
