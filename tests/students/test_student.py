import copy

import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.options.operators import OPERATORS
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import Projections, StudentSpec, build_student, cast, spec_for
from tests.conftest import IN01


@pytest.fixture
def projections():
    torch.manual_seed(0)
    linear = [torch.nn.Linear(8, 8, bias=False) for _ in range(3)]
    return Projections(*linear, torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Dropout(0.0)]))


def spec(operator, size=(3, 5), **options):
    return StudentSpec("site", "S", 8, operator, options, size if OPERATORS[operator].one_size else None)


@pytest.mark.parametrize("operator", ["causal", "bidirectional"])
def test_a_new_student_is_its_sites_value_path(projections, operator):
    """Gates near one, identity filters, no change yet: out = to_out((1 + q)(1 + k) v) once the long filter is silent."""
    student = build_student(spec(operator))
    torch.nn.init.zeros_(student.mixer.filter_fn.implicit_filter[-1].weight)
    x = torch.randn(2, 15, 8)
    q, k, v = (p(x) for p in projections[:3])
    torch.testing.assert_close(student(x, projections, (3, 5)), projections.to_out[0]((1 + q) * (1 + k) * v))


EVERY = [
    ("causal", {}),
    ("bidirectional", {}),
    ("pointwise", {}),
    ("hyena2d", {"heads": 2, "window": 2, "landmarks": 3}),
    ("landmarks", {"heads": 2, "landmarks": 3}),
    ("clusters", {"heads": 2, "landmarks": 3, "learned": True}),
    ("linear", {"heads": 2, "feature_map": "elu"}),
    ("windows", {"heads": 2, "window": 2}),
]


@pytest.mark.parametrize("operator, options", EVERY)
def test_a_student_follows_a_change_of_its_sites_projections_and_the_published_one_does_not(
    projections, operator, options
):
    student, published = build_student(spec(operator, **options)).eval(), build_student(spec("safari")).eval()
    x = torch.randn(1, 15, 8)
    before = student(x, projections, (3, 5)), published(x, projections, (3, 5))
    with torch.no_grad():
        projections.to_v.weight.mul_(2)
    assert not torch.allclose(student(x, projections, (3, 5)), before[0])
    assert torch.equal(published(x, projections, (3, 5)), before[1])


@pytest.mark.parametrize("operator, options", EVERY)
def test_every_parameter_learns_and_the_sites_projections_do_not(projections, operator, options):
    for p in projections:
        p.requires_grad_(False)
    student, x = build_student(spec(operator, **options)), torch.randn(2, 15, 8)
    for parameter in student.parameters():  # away from the zeros at which some gradients start
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    student(x, projections, (3, 5)).square().sum().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert all(p.grad is None for module in projections for p in module.parameters())


def test_a_1d_student_refuses_another_size_with_both_sizes(projections):
    student = build_student(spec("bidirectional", size=(3, 5)))
    for size in ((5, 3), (3, 6)):
        with pytest.raises(BadInput, match=rf"trained for 5x3 cells and met {size[1]}x{size[0]}"):
            student(torch.randn(1, 15, 8), projections, size)


@pytest.mark.parametrize("operator, options", [e for e in EVERY if not OPERATORS[e[0]].one_size])
def test_a_student_without_a_sequence_works_at_any_size(projections, operator, options):
    student = build_student(spec(operator, **options))
    for size in ((3, 5), (7, 2)):
        assert student(torch.randn(1, size[0] * size[1], 8), projections, size).shape == (1, size[0] * size[1], 8)


def test_higher_orders_take_the_keys_again_with_a_change_of_their_own(projections):
    student = build_student(spec("causal", order=4))
    assert len(student.change) == 5
    assert student(torch.randn(1, 15, 8), projections, (3, 5)).shape == (1, 15, 8)


@pytest.mark.parametrize("options", [{"order": 1}, {"num_heads": 2}, {"ordre": 2}, {"emb_dim": 4}])
def test_options_that_cannot_work_name_the_site(options):
    with pytest.raises(BadInput, match="operator causal for S"):
        build_student(spec("causal", **options))


def test_spec_for_a_site_knows_its_size(unet):
    site = next(site for site in find_sites(unet) if site.short == "IN04")
    assert spec_for(site, "causal", {"order": 2}, (10, 15)).size == (5, 8)
    assert spec_for(site, "pointwise", {}, (10, 15)).size is None
    two_dimensional = spec_for(site, "hyena2d", {"local": 5}, (10, 15))
    assert two_dimensional.size is None and two_dimensional.options == {"heads": site.heads, "local": 5}


def test_the_safari_student_is_the_operator_alone(unet):
    student = build_student(StudentSpec(IN01, "IN01", 32, "safari", {}, (2, 3)))
    x = torch.randn(1, 6, 32)
    assert torch.equal(student(x, None, (2, 3)), student.operator(x))


@pytest.mark.parametrize("operator, options", [("hyena2d", {"heads": 2}), ("bidirectional", {})])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_leaves_the_implicit_filters_as_they_were(operator, options, dtype):
    student = build_student(spec(operator, **options))
    before = {name: value.clone() for name, value in [*student.named_parameters(), *student.named_buffers()]}
    cast(student, torch.zeros(1, dtype=dtype))
    for name, value in [*student.named_parameters(), *student.named_buffers()]:
        implicit = any(part in name for part in ("filter_fn", "long.down", "long.along"))
        assert torch.equal(value, before[name] if implicit else before[name].to(dtype)), name
        assert implicit or value.dtype == dtype


def moved_student(operator, options):
    student = build_student(spec(operator, **options))
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize("operator, options", [e for e in EVERY if e[0] != "causal"])
def test_a_change_folded_into_the_projections_gives_the_same_answer(projections, operator, options, monkeypatch):
    student, x = moved_student(operator, options), torch.randn(2, 15, 8) + 10
    expected = student(x, projections, (3, 5))
    calls, forward = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: calls.append(layer) or forward(layer, x))
    with torch.no_grad():
        y = student(x, projections, (3, 5))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not {*projections[:3], projections.to_out[0], *student.change, student.change_out} & {*calls}


@pytest.mark.parametrize("operator", ["hyena2d", "landmarks", "linear"])
@pytest.mark.parametrize("name", ["IN01", "OUT10"])
def test_stored_in_bfloat16_a_student_is_within_a_hundredth_of_itself(unet, operator, name):
    (site,) = select(find_sites(unet), name)
    torch.manual_seed(0)
    config, attention = TrainConfig(operator=operator), copy.deepcopy(unet.get_submodule(site.name)).float()
    student = build_student(spec_for(site, operator, config.options_of_operator(), (12, 17)))
    for parameter in student.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x = torch.randn(2, 12 * 17, site.channels).bfloat16()
    with torch.no_grad():
        expected = student(x.float(), Projections.of(attention), (12, 17))
        stored = cast(copy.deepcopy(student), x)
        y = stored(x, Projections.of(attention.bfloat16()), (12, 17))
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_a_class_of_its_own(linear):
    linear.__class__ = Doubled


def with_a_forward_of_its_own(linear):
    linear.forward = lambda x: 2 * torch.nn.Linear.forward(linear, x)


def with_a_hook(linear):
    linear.register_forward_hook(lambda module, inputs, y: 2 * y)


def with_a_hook_before(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


@pytest.mark.parametrize("which", [0, 1, 2, "out"])
@pytest.mark.parametrize("wrap", [with_a_class_of_its_own, with_a_forward_of_its_own, with_a_hook, with_a_hook_before])
def test_a_projection_that_somebody_stands_around_is_called(projections, wrap, which):
    """A LoRA, quantisation, weights that wait in the computer's memory."""
    student, x = moved_student("hyena2d", {"heads": 2}), torch.randn(1, 15, 8)
    with torch.no_grad():
        before = student(x, projections, (3, 5))
    wrap(projections.to_out[0] if which == "out" else projections[which])
    expected = student(x, projections, (3, 5))  # with gradients nothing is folded
    with torch.no_grad():
        y = student(x, projections, (3, 5))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, before, rtol=1e-2)
