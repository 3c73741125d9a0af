import pytest
import torch

from safari import LandmarkAttention, head_groups, reference
from safari.landmark_attention import ridge_solve


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module_of(d_model: int = 12, heads: int = 3, landmarks: int = 5) -> LandmarkAttention:
    """In float64 and away from its start."""
    torch.manual_seed(0)
    module = LandmarkAttention(d_model, heads, landmarks).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("smallest", [1, 300, 2**18])
def test_any_number_of_heads_at_once_gives_the_same(smallest, monkeypatch):
    """Streams, and tokens with the projections that make streams of them."""
    monkeypatch.setattr(head_groups, "SMALLEST_GROUP", smallest)
    monkeypatch.setattr(head_groups, "NARROWEST", 1)
    module, x = module_of(), randn(2, 23, 12)
    weight, bias = randn(3, 12, 12, seed=1), randn(3, 12, seed=2)
    streams = [torch.nn.functional.linear(x, w, b) for w, b in zip(weight, bias, strict=True)]
    expected = reference.landmark_attention(dict(module.named_parameters()), streams, 3)
    for given in (streams, head_groups.ProjectedStreams(x, weight, bias)):
        torch.testing.assert_close(module(given, x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("landmarks", [1, 5, 40])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 23])
def test_the_mixer_equals_the_definition_in_values_and_gradients(length, heads, landmarks):
    module = module_of(heads=heads, landmarks=landmarks)
    with torch.no_grad():
        module.log_ridge.add_(1 + torch.rand_like(module.log_ridge))  # well conditioned, so that both can be exact
    state = {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}
    streams = [randn(2, length, 12, seed=s).requires_grad_() for s in range(3)]
    y, expected = module(streams, None), reference.landmark_attention(state, streams, heads)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
    weight, parameters = randn(*y.shape, seed=3), dict(module.named_parameters())
    ours = torch.autograd.grad((y * weight).sum(), [*streams, *parameters.values()])
    theirs = torch.autograd.grad((expected * weight).sum(), [*streams, *(state[name] for name in parameters)])
    for name, a, b in zip(["q", "k", "v", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_damped_inverse_is_least_squares_with_the_ridge_as_further_rows():
    a, b, ridge = randn(2, 3, 7, 7), randn(2, 3, 7, 4, seed=1), torch.tensor([0.3, 1e-2, 2.0]).double()[:, None, None]
    rows = torch.cat([a, ridge * torch.eye(7, dtype=a.dtype).expand(2, 3, -1, -1)], dim=-2)
    expected = torch.linalg.lstsq(rows, torch.cat([b, torch.zeros_like(b)], dim=-2)).solution
    torch.testing.assert_close(ridge_solve(a, b, ridge), expected, rtol=1e-8, atol=1e-8)


def test_where_landmarks_are_the_tokens_themselves_it_is_softmax_attention():
    """Landmarks that each find one token: distinct keys, sought by far larger ones."""
    length, heads = 6, 2
    module = LandmarkAttention(12, heads, landmarks=length).double()
    k = torch.eye(6, dtype=torch.float64).repeat(1, 1, 2) * 2
    q, v = randn(1, length, 12), randn(1, length, 12, seed=1)
    with torch.no_grad():
        module.seek.copy_(1e3 * k[0].unflatten(-1, (heads, -1)).transpose(0, 1))
        module.b_q.zero_(), module.b_k.zero_()
        module.log_ridge.fill_(-15)
    torch.testing.assert_close(module((q, k, v), None), softmax_attention(q, k, v, heads), rtol=1e-6, atol=1e-6)


def test_more_landmarks_come_nearer_to_softmax_attention():
    q, k, v = (randn(1, 200, 16, seed=s) for s in range(3))
    exact = softmax_attention(q, k, v, 2)
    error = [(module_of(16, 2, m)((q, k, v), None) - exact).square().mean() / exact.var() for m in (4, 32, 128)]
    assert error[0] > 1.3 * error[1] > 1.3 * 1.3 * error[2]


def test_equal_values_stay_equal():
    """The weights of a row sum to one, up to the ridge."""
    q, k, module = randn(2, 37, 12), randn(2, 37, 12, seed=1), module_of()
    with torch.no_grad():
        module.log_ridge.fill_(-12)
    y = module((q, k, torch.ones_like(q)), None)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-4, atol=1e-4)


def test_the_answer_depends_on_the_share_of_tokens_not_on_their_number():
    streams = [randn(2, 7, 12, seed=s) for s in range(3)]
    module = module_of()
    five_times = module([t.repeat(1, 5, 1) for t in streams], None)
    torch.testing.assert_close(five_times, module(streams, None).repeat(1, 5, 1))


def test_permuting_the_tokens_permutes_the_answer_and_the_grid_does_not_matter():
    module, order = module_of(), torch.randperm(21)
    streams = [randn(2, 21, 12, seed=s) for s in range(3)]
    y = module(streams, None, (3, 7))
    assert torch.equal(y, module(streams, None, (21, 1)))
    torch.testing.assert_close(module([t[:, order] for t in streams], None), y[:, order])


def test_a_head_of_the_answer_depends_on_its_own_head_of_the_streams():
    streams = [randn(2, 7, 12, seed=s).requires_grad_() for s in range(3)]
    for gradient in torch.autograd.grad(module_of()(streams, None)[..., 4:8].sum(), streams):
        assert gradient[..., 4:8].abs().max() > 0
        assert gradient[..., :4].abs().max() == gradient[..., 8:].abs().max() == 0


@pytest.mark.parametrize("mean", [0, 10])
def test_bfloat16_is_close_to_float32(mean):
    torch.manual_seed(0)
    module, streams = LandmarkAttention(32, 2), [mean + torch.randn(2, 99, 32) for _ in range(3)]
    y = module([t.bfloat16() for t in streams], None)
    assert y.dtype == torch.bfloat16
    expected = module([t.bfloat16().float() for t in streams], None)
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()


def test_the_inverse_is_taken_in_float32_under_autocast():
    torch.manual_seed(0)
    module, streams = LandmarkAttention(32, 2), torch.randn(3, 2, 99, 32)
    expected = module(list(streams), None)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(list(streams), None)
    assert (y.float() - expected).norm() < 3e-2 * expected.norm()


def test_a_hundred_thousand_tokens_need_no_square():
    module = LandmarkAttention(16, 1).requires_grad_(False)  # the square would take 40 GB
    tokens = torch.randn(1, 100_000, 16)
    assert module((tokens, tokens, tokens), tokens).isfinite().all()


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 5}, {"heads": -3}, {"landmarks": 0}], ids=str)
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LandmarkAttention(**{"d_model": 12, "heads": 3} | options)
