import math

import pytest
import torch

from safari import reference
from safari.offset_filters import OffsetFilter

REACHES = [(0,), (1,), (7,), (0, 0), (0, 4), (3, 0), (2, 5), (5, 3)]


def filter_of(channels: int, axes: int, **options) -> OffsetFilter:
    torch.manual_seed(channels)
    return OffsetFilter(channels, axes, **options).double()


@pytest.mark.parametrize("options", [{}, {"order": 5, "bands": 3, "start": 1.0}, {"bands": 1}])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_the_filter_equals_the_definition_in_values_and_gradients(reach, channels, options):
    module = filter_of(channels, len(reach), **options)
    state = {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}
    h, expected = module(*reach), reference.offset_filter(state, reach)
    assert h.shape == (channels, *(2 * r + 1 for r in reach))
    # the frequencies are stored in float32, so exact arithmetic agrees to about 1e-7
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-7)
    weight = torch.randn_like(h)
    parameters = dict(module.named_parameters())
    ours = torch.autograd.grad((h * weight).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), [state[name] for name in parameters])
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_names_and_shapes_of_the_weights_are_those_of_a_file():
    shapes = {name: tuple(value.shape) for name, value in OffsetFilter(3, 2, order=5, bands=4).state_dict().items()}
    assert shapes == {
        "first.weight": (5, 16), "first.bias": (5,), "hidden.weight": (5, 5), "hidden.bias": (5,),
        "last.weight": (3, 5), "log_rate": (3,),
    }  # fmt: skip


@pytest.mark.parametrize("axes", [1, 2])
def test_a_filter_of_a_smaller_reach_is_the_middle_of_a_larger_one(axes):
    module = filter_of(3, axes)
    middle = (slice(None), slice(9 - 4, 9 + 5), slice(9 - 2, 9 + 3))[: axes + 1]
    torch.testing.assert_close(module(*(4, 2)[:axes]), module(*(9, 9)[:axes])[middle], rtol=1e-12, atol=1e-12)


def test_the_filter_is_evaluated_in_float32_whatever_the_autocast():
    module = OffsetFilter(4, 2)
    expected = module(30, 20)
    with torch.autocast("cpu", torch.bfloat16):
        h = module(30, 20)
    assert h.dtype == torch.float32 and torch.equal(h, expected)


def test_the_filter_in_float32_is_close_to_float64_at_the_reach_of_a_large_grid():
    module = filter_of(4, 1)
    exact = module(1000)
    torch.testing.assert_close(module.float()(1000).double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("channels", [2, 5, 9])
def test_the_channels_start_with_reaches_from_1_to_16_cells_and_the_window_falls_by_e_at_that_length(channels):
    module = filter_of(channels, 2)
    with torch.no_grad():  # a filter without sines: h(D) = exp(-|D| / reach)
        module.hidden.weight.zero_()
        module.hidden.bias.fill_(math.pi / 2)
        module.last.weight.fill_(1 / module.last.weight.shape[1])
        h = module(4, 4)
    reaches = torch.tensor([5.0 / -math.log(h[c, 4 + 3, 4 - 4]) for c in range(channels)])  # 3, 4, 5
    torch.testing.assert_close(reaches, 16 ** torch.linspace(0, 1, channels), rtol=1e-5, atol=1e-5)


def test_the_start_scales_the_last_layer():
    torch.testing.assert_close(filter_of(3, 1, start=0.3)(5), 3 * filter_of(3, 1, start=0.1)(5), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("change", [{"order": 7}, {"bands": 5}, {"start": 0.2}, {"channels": 5}, {"axes": 2}], ids=str)
def test_no_knob_is_dead(change):
    def outcome(channels=4, axes=1, **options):
        h = filter_of(channels, axes, **options)(*(3,) * axes)
        return h.shape, h.sum().item()

    assert outcome() == outcome() and outcome(**change) != outcome()


@pytest.mark.parametrize("axes", [1, 2])
def test_every_parameter_receives_a_gradient(axes):
    module = OffsetFilter(3, axes)
    module(*(4, 2)[:axes]).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channels": -2}, {"order": 0}, {"bands": 0}, {"axes": 0}, {"axes": 3}], ids=str
)
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        OffsetFilter(**{"channels": 3, "axes": 1} | options)
