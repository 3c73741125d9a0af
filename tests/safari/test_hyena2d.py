import copy

import pytest
import torch
from einops import rearrange

from safari import ClusterAttention, Hyena2d, fftconv, head_groups, reference, toeplitz
from safari.hyena2d import HeadNorm
from safari.offset_filters import OffsetFilter
from tests.gate import gated, sampled

D, HEADS = 12, 3
KINDS = ["full", "separable", "axial_1d", "none"]
CONFIGURATIONS = {
    "default": {},
    "separable": {"long": "separable"},
    "full": {"long": "full"},
    "full in groups": {"long": "full", "groups": 4, "reach": 2},
    "separable in groups": {"long": "separable", "rank": 2, "groups": 3, "reach": 3},
    "axial": {"long": "axial_1d"},
    "axial in groups": {"long": "axial_1d", "groups": 2, "reach": 1},
    "near only": {"local": 3},
    "far only": {"local": 0, "long": "separable", "content": "none"},
    "two clusters": {"landmarks": 2},
    "learned landmarks": {"content": "landmarks"},
    "hedgehog": {"content": "hedgehog"},
    "elu": {"content": "elu"},
    "windows": {"window": 3},
    "dense gates": {"gates": "dense"},
    "no norm": {"norm": False},
    "nothing but the product": {"local": 0, "long": "none", "content": "none", "norm": False},
    "all that is not default": {
        "local": 5, "long": "full", "reach": 2, "groups": 6, "filter_order": 7, "content": "elu", "landmarks": 2,
        "window": 2,
        "gates": "dense", "norm": False,
    },
}  # fmt: skip
KEPT = ("default", "full in groups", "separable in groups")  # of each kind of filter that is kept between calls
configurations = pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def operator(heads: int = HEADS, seed: int = 0, **options) -> Hyena2d:
    """In float64 and away from its start, where much of it is zero or the identity; a short reach unless told."""
    torch.manual_seed(seed)
    module = Hyena2d(D, heads, **{"reach": 4, "local": 3, "landmarks": 5} | options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def tokens(size: tuple[int, int], batch: int = 2, seed: int = 0, **options) -> list[torch.Tensor]:
    """q, k, v and x."""
    source = torch.Generator().manual_seed(seed)
    shape = batch, size[0] * size[1], D
    return [torch.randn(shape, **{"dtype": torch.float64} | options, generator=source) for _ in range(4)]


def apply(module: Hyena2d, inputs: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    *streams, x = inputs
    return module(tuple(streams), x, size)


def leaves(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}


def assert_close_for_its_size(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """The norm's root and the filters' frequencies are in float32; with both in float64 all agrees to 1e-10."""
    atol = 1e-5 * max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")


def assert_is_the_definition(options: dict, size: tuple[int, int]) -> None:
    module = operator(**options)
    state, parameters = leaves(module), dict(module.named_parameters())
    inputs = [t.requires_grad_() for t in tokens(size)]
    *streams, x = inputs
    y = apply(module, inputs, size)
    expected = reference.hyena2d(state, tuple(streams), x, size, HEADS, **{"reach": 4, "landmarks": 5} | options)
    assert_close_for_its_size(y, expected, "y")
    weight = torch.randn_like(y)
    options_of_grad = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((y * weight).sum(), [*inputs, *parameters.values()], **options_of_grad)
    theirs = [*inputs, *(state[name] for name in parameters)]
    theirs = torch.autograd.grad((expected * weight).sum(), theirs, **options_of_grad)
    for name, a, b in zip([*"qkvx", *parameters], ours, theirs, strict=True):
        assert_close_for_its_size(a, b, name)


@configurations
def test_the_operator_equals_the_definition_in_values_and_gradients(options):
    assert_is_the_definition(options, (5, 7))


@pytest.fixture
def small_pieces(monkeypatch):
    """One head at a time, in bands of two cells: what a large grid gets."""
    monkeypatch.setitem(head_groups.SMALLEST_OF_PLANES, "cpu", 1)
    monkeypatch.setattr(toeplitz, "BAND", 2)
    monkeypatch.setattr(toeplitz, "CHANNELS", 3)


@pytest.mark.parametrize("options", sampled(CONFIGURATIONS.values(), 2), ids=CONFIGURATIONS)
def test_one_head_at_a_time_is_the_definition_in_values_and_gradients(options, small_pieces):
    assert_is_the_definition(options, (5, 7))


@pytest.mark.parametrize(
    "options",
    [*(CONFIGURATIONS[name] for name in KEPT), *gated(v for name, v in CONFIGURATIONS.items() if name not in KEPT)],
    ids=[*KEPT, *(name for name in CONFIGURATIONS if name not in KEPT)],
)
def test_what_is_kept_between_calls_without_gradients_is_the_definition_too(options, small_pieces):
    """With a mean of 10, on two grids in turn, in float32 too, after the weights have changed too."""
    module = operator(**options)
    for _ in range(2):
        for size in ((5, 7), (8, 3), (5, 7)):
            *streams, x = inputs = [t + 10 for t in tokens(size)]
            expected = reference.hyena2d(
                module.state_dict(), tuple(streams), x, size, HEADS, **{"reach": 4, "landmarks": 5} | options
            )
            with torch.inference_mode():
                assert_close_for_its_size(apply(module, inputs, size), expected, "y")
            with torch.no_grad():
                y = apply(copy.deepcopy(module).float(), [t.float() for t in inputs], size)
            assert (y - expected).abs().max() < 1e-4 * expected.abs().max()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)


def test_a_full_filter_too_large_to_keep_is_made_anew_for_some_channels_at_a_time(small_pieces, monkeypatch):
    inputs, module = tokens((5, 7)), operator(long="full", groups=4, reach=3).requires_grad_(False)
    with torch.no_grad():
        expected = apply(module, inputs, (5, 7))
        assert module.long.cache.held_bytes() > 0
        monkeypatch.setattr(type(module.long.cache), "budget", 100)
        module.long.cache.clear()
        seen = []
        module.long.filter.register_forward_hook(lambda part, reach, h: seen.append(len(h)))
        torch.testing.assert_close(apply(module, inputs, (5, 7)), expected, rtol=1e-12, atol=1e-12)
    assert module.long.cache.held_bytes() == 0 and seen == [2, 2, 2]  # heads of 4 channels, filters of 3 channels


@pytest.mark.slow
@pytest.mark.parametrize("long", ["none", "separable", "full", "axial_1d"])
def test_a_million_tokens_with_a_mean_are_finite_and_exact(long):
    torch.manual_seed(0)
    module = Hyena2d(40, 1, long=long, landmarks=64).requires_grad_(False)
    inputs = [torch.randn(1, 2**20, 40) + 10 for _ in range(4)]
    y = apply(module, inputs, (1024, 1024))
    exact = apply(copy.deepcopy(module).double(), [t.double() for t in inputs], (1024, 1024))
    assert y.isfinite().all() and (y - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize(
    "size", [(1, 1), (8, 11), *((pytest.param(size, marks=pytest.mark.gate)) for size in ((1, 7), (7, 2), (7, 7)))]
)
@pytest.mark.parametrize("name", ["default", "axial", "all that is not default"])
def test_one_set_of_weights_is_the_definition_on_every_grid(name, size):
    """Smaller than the reach, where the filter is cut, and larger."""
    assert_is_the_definition(CONFIGURATIONS[name], size)


def test_a_reach_beyond_the_grid_changes_nothing():
    for kind in KINDS:
        near, far = (operator(long=kind, reach=reach) for reach in (6, 50))
        far.load_state_dict(near.state_dict())
        inputs = tokens((5, 7))
        assert torch.equal(apply(near, inputs, (5, 7)), apply(far, inputs, (5, 7)))


@pytest.mark.parametrize("content", ["clusters", "landmarks", "hedgehog", "none"])
@pytest.mark.parametrize("size", [(1, 1), (2, 13), (9, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_stays_constant_to_the_border(kind, size, content):
    module = operator(long=kind, local=5, window=2, content=content, reach=20)
    inputs = [t[:, :1].expand(-1, size[0] * size[1], -1) for t in tokens(size)]
    y = apply(module, inputs, size)
    assert y.abs().max() > 0.1
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=1e-10, atol=1e-10)


def spots(size: tuple[int, int], top: int, left: int, zero_mean: bool) -> list[torch.Tensor]:
    """q, k, v and x of zero but for one spot of 3 x 4 cells; of `zero_mean`, k is zero everywhere and v is in the mean,
    so that u = gate_k(k) v is its own background in the mean."""
    inputs = []
    for name, t in zip("qkvx", tokens((3, 4)), strict=True):
        spot = t.unflatten(1, (3, 4))
        if zero_mean and name == "k":
            spot = torch.zeros_like(spot)
        if zero_mean and name == "v":
            spot = spot - spot.mean(dim=(1, 2), keepdim=True)
        plane = torch.zeros(2, *size, D, dtype=torch.float64)
        plane[:, top : top + 3, left : left + 4] = spot
        inputs.append(plane.flatten(1, 2))
    return inputs


@pytest.mark.parametrize("gates", ["diagonal", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_shifting_a_spot_of_zero_mean_shifts_the_answer_on_the_whole_plane(kind, gates):
    size = (19, 23)
    module = operator(long=kind, gates=gates, reach=3, norm=False, content="none")
    here, there = (
        apply(module, spots(size, top, left, zero_mean=True), size).unflatten(1, size)
        for top, left in ((7, 6), (10, 11))
    )
    assert (here - here[:, :1, :1]).abs().max() > 0.1
    torch.testing.assert_close(there, here.roll((3, 5), dims=(1, 2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_shifting_any_spot_shifts_the_answer_wherever_the_filter_does_not_reach_the_border(kind, norm):
    """Near the border it does not: zero padding is an edge of what is left after the mean is taken out."""
    size, reach = (19, 23), 3
    module = operator(long=kind, reach=reach, norm=norm, content="none")
    here, there = (
        apply(module, spots(size, top, left, zero_mean=False), size).unflatten(1, size)
        for top, left in ((6, 6), (9, 11))
    )
    assert (here - here[:, 9:10, 2:3]).abs().max() > 0.1
    inner_here = here[:, reach : 19 - reach - 3, reach : 23 - reach - 5]
    torch.testing.assert_close(there[:, reach + 3 : 19 - reach, reach + 5 : 23 - reach], inner_here)


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the same operator on the transposed grid."""
    swap = {"long.down.": "long.along.", "long.along.": "long.down."}
    result = {}
    for name, value in state.items():
        for old, new in swap.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if name == "long.filter.first.weight":
            value = rearrange(value, "o (wave axis band) -> o wave axis band", wave=2, axis=2).flip(2).flatten(1)
        result[name] = value.mT if value.ndim == 4 else value
    return result


@configurations
def test_transposing_the_grid_and_the_filters_transposes_the_answer(options):
    size, options = (5, 8), {**options, "landmarks": 40}  # fewer clusters would start from other tokens
    module, other = operator(**options), operator(**options)
    other.load_state_dict(transposed(module.state_dict()))
    inputs = tokens(size)
    turned = [rearrange(t, "b (h w) d -> b (w h) d", h=5) for t in inputs]
    y = rearrange(apply(other, turned, size[::-1]), "b (w h) d -> b (h w) d", h=5)
    torch.testing.assert_close(y, apply(module, inputs, size), rtol=1e-10, atol=1e-10)
    if options.get("long") != "none":
        assert (apply(module, turned, size[::-1]) - apply(other, turned, size[::-1])).abs().max() > 1e-3


@configurations
def test_a_batch_of_two_is_two_batches_of_one(options):
    module, inputs = operator(**options), tokens((5, 7))
    alone = [apply(module, [t[i : i + 1] for t in inputs], (5, 7)) for i in range(2)]
    torch.testing.assert_close(apply(module, inputs, (5, 7)), torch.cat(alone), rtol=1e-10, atol=1e-10)


@configurations
def test_every_parameter_receives_a_gradient_from_the_start(options):
    """From the first step on, which beside clusters opens the place branch's gain."""
    torch.manual_seed(0)
    module, inputs = Hyena2d(D, HEADS, **{"landmarks": 5} | options), tokens((5, 7), dtype=torch.float32)
    with torch.no_grad():
        module.place_gain.add_(1e-3)
    (apply(module, inputs, (5, 7)) * torch.randn(2, 35, D)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-6, name


@configurations
def test_a_state_dict_carries_the_operator_over(options):
    first, second = operator(**options), operator(seed=1, **options)
    inputs = tokens((5, 7))
    expected = apply(first, inputs, (5, 7))
    assert not torch.allclose(apply(second, inputs, (5, 7)), expected)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(apply(second, inputs, (5, 7)), expected)


SAME_WEIGHTS = [  # base, change: the weights have the same names and shapes, the answer is another
    ({"long": "separable"}, {"reach": 2}),
    ({"long": "full"}, {"reach": 2}),
    ({"long": "axial_1d"}, {"reach": 2}),
    ({"long": "separable", "rank": 1}, {"long": "axial_1d"}),
    ({"long": "separable", "rank": 2, "groups": 6}, {"rank": 6, "groups": 2}),
    ({"content": "elu"}, {"heads": 2}),
    ({"content": "none"}, {"heads": 2}),
    ({"content": "none", "norm": False, "window": 3}, {"heads": 2}),
    ({"window": 3}, {"window": 2}),
    ({}, {"landmarks": 6}),
]
OTHER_WEIGHTS = [  # base, change: the rest of the weights stays
    ({}, {"heads": 2}),
    ({}, {"local": 5}),
    ({}, {"local": 0}),
    *[({}, {"long": kind}) for kind in ("full", "separable", "axial_1d")],
    ({"long": "separable"}, {"rank": 3}),
    *[({"long": kind}, {"groups": 3}) for kind in KINDS[:3]],
    *[({"long": kind}, {"filter_order": 9}) for kind in KINDS[:3]],
    ({}, {"content": "hedgehog"}),
    ({}, {"content": "elu"}),
    ({}, {"content": "none"}),
    ({"content": "landmarks"}, {"landmarks": 6}),
    ({}, {"window": 3}),
    ({}, {"gates": "dense"}),
    ({}, {"norm": False}),
]


def shapes(module: Hyena2d) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


@pytest.mark.parametrize("base, change", SAME_WEIGHTS, ids=str)
def test_no_knob_without_weights_is_dead(base, change):
    one, other = operator(**base), operator(**base | change)
    other.load_state_dict(one.state_dict(), strict=True)
    difference = apply(one, tokens((7, 11)), (7, 11)) - apply(other, tokens((7, 11)), (7, 11))
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("base, change", OTHER_WEIGHTS, ids=str)
def test_no_knob_with_weights_is_dead(base, change):
    one, other = operator(**base), operator(**base | change)
    assert shapes(one) == shapes(operator(**base)) != shapes(other)
    shared = {name: t for name, t in one.state_dict().items() if shapes(other).get(name) == t.shape}
    assert {"skip", "place_gain", "short_q.weight", "short_k.weight", "short_v.bias"} <= shared.keys()
    other.load_state_dict(shared, strict=False)
    difference = apply(one, tokens((7, 11)), (7, 11)) - apply(other, tokens((7, 11)), (7, 11))
    assert difference.abs().max() > 1e-4


def test_tiles_bound_the_transforms_of_a_large_plane_and_change_no_number(monkeypatch):
    whole, tiled = (operator(long="full", reach=3) for _ in range(2))
    tiled.long.whole, tiled.long.tile = 40, 8
    inputs, transform, sides = tokens((37, 41)), torch.fft.fft, []
    monkeypatch.setattr(
        torch.fft, "fft", lambda t, n, dim: sides.extend((n, 2 * t.shape[-1] - 2)) or transform(t, n, dim)
    )
    expected = apply(whole, inputs, (37, 41))
    assert max(sides) >= 41
    sides.clear()
    torch.testing.assert_close(apply(tiled, inputs, (37, 41)), expected, rtol=1e-10, atol=1e-10)
    assert 8 <= max(sides) <= fftconv.fast_length(8 + 6)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_groups_are_filters_repeated_over_neighbouring_channels(kind, groups):
    grouped, single = operator(long=kind, groups=groups, rank=2), operator(long=kind, rank=2)
    state = {}
    for name, value in grouped.state_dict().items():
        if name.startswith("long.") and name.endswith(("last.weight", "log_rate")):
            value = value.unflatten(0, (groups, -1)).repeat_interleave(D // groups, dim=0).flatten(0, 1)
        state[name] = value
    single.load_state_dict(state, strict=True)
    inputs = tokens((5, 7))
    expected = apply(single, inputs, (5, 7))
    torch.testing.assert_close(apply(grouped, inputs, (5, 7)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_filters_are_evaluated_in_float32_under_autocast(kind):
    torch.manual_seed(0)
    module, inputs = Hyena2d(D, HEADS, long=kind), tokens((9, 13), dtype=torch.float32)
    seen = []
    for part in module.modules():
        if isinstance(part, OffsetFilter):
            part.register_forward_hook(lambda part, reach, h: seen.append(h))
    expected = apply(module, inputs, (9, 13))
    exact = seen.copy()
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = apply(module, inputs, (9, 13))
    assert len(seen) == len(exact) == (1 if kind == "full" else 2)
    assert all(h.dtype == torch.float32 and torch.equal(h, e) for h, e in zip(seen, exact, strict=True))
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("mean, limit", [(0, 1e-5), (10, 4e-5)])
@configurations
def test_float32_is_close_to_float64_with_a_large_mean_too(options, mean, limit):
    module = operator(**options)
    inputs = [t + mean for t in tokens((9, 13))]
    exact = apply(module, inputs, (9, 13))
    y = apply(module.float(), [t.float() for t in inputs], (9, 13))
    if isinstance(module.content, ClusterAttention):
        limit *= 10  # the fit multiplies rounding
    assert (y - exact).abs().max() < limit * exact.abs().max()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_head_norm_equals_the_definition_and_leaves_each_head_with_a_mean_square_of_one(scale):
    norm = HeadNorm(D, HEADS).double()
    u = scale * torch.randn(2, D, 3, 5, dtype=torch.float64)
    expected = reference.head_norm(u, norm.gain, HEADS)
    torch.testing.assert_close(norm(u), expected, rtol=1e-6, atol=1e-6)  # its root is in float32
    if scale >= 1:
        square = norm(u).unflatten(1, (HEADS, -1)).square().mean(dim=2)
        torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        norm.gain.copy_(torch.arange(D)[:, None, None])
    torch.testing.assert_close(norm(u), expected * torch.arange(D)[:, None, None], rtol=1e-6, atol=1e-6)


def test_the_head_norm_of_half_precision_squares_in_float32():
    u = 300 + torch.rand(2, D, 3, 5)  # 300^2 > 65504
    y = HeadNorm(D, HEADS).half()(u.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), HeadNorm(D, HEADS)(u), rtol=3e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@configurations
def test_weights_in_half_precision_beside_filters_in_float32_are_close_to_float32(options, dtype):
    module, inputs = operator(**options).float(), tokens((9, 13), dtype=torch.float32)
    expected = apply(module, inputs, (9, 13))
    filters = [part for part in module.modules() if isinstance(part, OffsetFilter)]
    exact = {parameter for part in filters for parameter in part.parameters()}
    for parameter in set(module.parameters()) - exact:
        parameter.data = parameter.data.to(dtype)
    y = apply(module, [t.to(dtype) for t in inputs], (9, 13))
    assert y.dtype == dtype
    error = torch.linalg.norm(y.float() - expected) / torch.linalg.norm(expected)
    with_landmarks = module.content is not None and hasattr(module.content, "log_ridge")
    limit = 16 if with_landmarks else 8  # the inverse between landmarks multiplies rounding
    assert error < limit * torch.finfo(dtype).eps


def test_at_the_start_the_short_filters_are_the_identity_and_the_local_filter_is_silent():
    torch.manual_seed(0)
    module = Hyena2d(D, HEADS)
    t = torch.randn(2, D, 5, 7)
    for short in (module.short_q, module.short_k, module.short_v):
        torch.testing.assert_close(short(t), t)
    assert module.local(t).abs().max() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 0}, {"heads": 5}, {"heads": -3}, {"local": 4}, {"local": -1}, {"local": -2}, {"long": "diagonal"},
        {"rank": 0}, {"reach": 0}, {"reach": -1}, {"groups": 5}, {"groups": -1}, {"filter_order": 0},
        {"content": "softmax"}, {"landmarks": 0}, {"window": -1}, {"gates": "sparse"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=repr(value) if name == "content" else f"{name}={value!r}"):
        Hyena2d(**{"d_model": D, "heads": HEADS} | options)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="windows"):
        Hyena2d(D, HEADS, windows=3)
