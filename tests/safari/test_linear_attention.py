import pytest
import torch

from safari import LinearAttention, reference
from safari.linear_attention import EluPlusOne, Hedgehog
from safari.linear_attention import linear_attention as channels_first


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *epsilon: float, **options) -> torch.Tensor:
    """Of (B, heads, L, E), as the definition has it."""
    return channels_first(q.mT, k.mT, v.mT, *epsilon, **options).mT


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).exp().requires_grad_()


def module_of(d_model: int = 12, heads: int = 3, **options) -> LinearAttention:
    """In float64 and away from its start, where half of it is zero."""
    torch.manual_seed(0)
    module = LinearAttention(d_model, heads, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("epsilon", [1e-4, 0.5])
@pytest.mark.parametrize("length", [1, 2, 7, 63])
def test_linear_attention_equals_the_quadratic_form_in_values_and_gradients(length, epsilon):
    q, k = positive(2, 3, length, 10), positive(2, 3, length, 10, seed=1)
    v = randn(2, 3, length, 5, seed=2).requires_grad_()
    y, expected = linear_attention(q, k, v, epsilon), reference.linear_attention(q, k, v, epsilon)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    weight = randn(*y.shape, seed=3)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_default_epsilon_is_that_of_the_definition():
    q, k, v = 1e-2 * positive(1, 1, 7, 4), 1e-2 * positive(1, 1, 7, 4, seed=1), randn(1, 1, 7, 4)
    y = linear_attention(q, k, v)
    torch.testing.assert_close(y, reference.linear_attention(q, k, v), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(y, linear_attention(q, k, v, 1e-5), rtol=1e-2)


def test_the_weights_of_a_row_sum_to_one_up_to_epsilon():
    """So a constant v stays constant, and every answer lies between the smallest and the largest v."""
    q, k = positive(2, 3, 37, 8), positive(2, 3, 37, 8, seed=1)
    ones = torch.ones(2, 3, 37, 1, dtype=torch.float64)
    total = linear_attention(q, k, ones)
    smallest = (q @ k.mT).mean(dim=-1).min()
    assert (total < 1).all() and (total > 1 - 1.01e-4 / smallest).all()
    v = randn(2, 3, 37, 4, seed=2)
    y = linear_attention(q, k, v) / total
    assert (y > v.amin(dim=2, keepdim=True)).all() and (y < v.amax(dim=2, keepdim=True)).all()


def test_the_answer_depends_on_the_mean_over_tokens_not_on_their_number():
    q, k, v = positive(2, 3, 7, 8), positive(2, 3, 7, 8, seed=1), randn(2, 3, 7, 4)
    five_times = linear_attention(*(t.repeat(1, 1, 5, 1) for t in (q, k, v)), epsilon=0.5)
    torch.testing.assert_close(five_times, linear_attention(q, k, v, epsilon=0.5).repeat(1, 1, 5, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32_whatever_the_autocast(dtype):
    q, k = ((8 + torch.rand(1, 2, 9000, 4)).to(dtype) for _ in range(2))  # 8 * 9000 > 65504
    v = (8 + torch.randn(1, 2, 9000, 4)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_attention(q, k, v)
    assert y.dtype == dtype and torch.equal(y, linear_attention(q.float(), k.float(), v.float()).to(dtype))
    exact = linear_attention(q.double(), k.double(), v.double())
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"width": 5}, {"heads": 1}, {"heads": 12}], ids=str)
@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_the_mixer_equals_the_definition_in_values_and_gradients(feature_map, options):
    module = module_of(feature_map=feature_map, **options)
    state = {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}
    q, k, v, x = (randn(2, 23, 12, seed=s).requires_grad_() for s in range(4))
    y, expected = module((q, k, v), x, (23, 1)), reference.content(state, (q, k, v), x, module.heads)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weight, parameters = torch.randn_like(y), dict(module.named_parameters())
    ours = torch.autograd.grad((y * weight).sum(), [q, k, v, x, *parameters.values()])
    theirs = torch.autograd.grad((expected * weight).sum(), [q, k, v, x, *(state[name] for name in parameters)])
    for name, a, b in zip(["q", "k", "v", "x", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_permuting_the_tokens_permutes_the_answer_and_the_grid_does_not_matter(feature_map):
    module, order = module_of(feature_map=feature_map), torch.randperm(21)
    *streams, x = (randn(2, 21, 12, seed=s) for s in range(4))
    y = module(streams, x, (3, 7))
    assert torch.equal(y, module(streams, x, (21, 1))) and torch.equal(y, module(streams, x))
    torch.testing.assert_close(module([t[:, order] for t in streams], x[:, order]), y[:, order])


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_a_head_of_the_answer_depends_on_its_own_head_of_the_streams(feature_map):
    module = module_of(feature_map=feature_map)
    *streams, x = (randn(2, 7, 12, seed=s).requires_grad_() for s in range(4))
    seen = torch.autograd.grad(module(streams, x)[..., 4:8].sum(), streams)
    for gradient in seen:
        assert gradient[..., 4:8].abs().max() > 0
        assert gradient[..., :4].abs().max() == gradient[..., 8:].abs().max() == 0


def test_the_feature_maps_are_positive_and_hedgehog_sums_to_two():
    z = 5 * randn(2, 3, 4, 7)
    hedgehog = Hedgehog(3, 4).double()(z)
    assert (EluPlusOne()(z) > 0).all() and (hedgehog > 0).all()
    torch.testing.assert_close(hedgehog.sum(dim=-2), torch.full((2, 3, 7), 2.0, dtype=torch.float64))


def test_a_hundred_thousand_tokens_need_no_square():
    module = LinearAttention(4, 2).requires_grad_(False)  # the square would take 80 GB
    tokens = torch.randn(1, 100_000, 4)
    assert module((tokens, tokens, tokens), tokens).isfinite().all()


@pytest.mark.parametrize(
    "change", [{"heads": 4}, {"feature_map": "elu"}, {"width": 5}, {"heads": 2, "feature_map": "elu"}], ids=str
)
def test_no_knob_is_dead(change):
    def outcome(**options):
        module = module_of(**options)
        *streams, x = (randn(1, 7, 12, seed=s) for s in range(4))
        return {name: value.shape for name, value in module.state_dict().items()}, module(streams, x).sum().item()

    assert outcome() == outcome()
    other = outcome(**change)
    assert other[0] != outcome()[0] and other[1] != outcome()[1]


def test_the_heads_matter_without_weights_of_their_own():
    """The state dict of feature_map='elu' is the same for any number of heads; the answer is not."""
    one, three = (module_of(heads=heads, feature_map="elu") for heads in (1, 3))
    three.load_state_dict(one.state_dict())
    *streams, x = (randn(1, 7, 12, seed=s) for s in range(4))
    assert (one(streams, x) - three(streams, x)).abs().max() > 1e-2


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_every_parameter_receives_a_gradient_from_the_start(feature_map):
    torch.manual_seed(0)
    module = LinearAttention(12, 3, feature_map)
    *streams, x = torch.randn(4, 2, 11, 12)
    module(streams, x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 5}, {"heads": -3}, {"feature_map": "softmax"}], ids=str)
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LinearAttention(**{"d_model": 12, "heads": 3} | options)
