import pytest
import torch
from torch._subclasses import FakeTensorMode

from safari import ClusterAttention, head_groups, reference
from safari.cluster_attention import LEAST_RIDGE, RIDGE
from safari.clusters import spread


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def module_of(d_model: int = 12, heads: int = 3, landmarks: int = 5, **options) -> ClusterAttention:
    """In float64, and if it learns away from its start, with a ridge at which two ways to solve agree."""
    torch.manual_seed(0)
    module = ClusterAttention(d_model, heads, landmarks, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
        if module.learned:
            module.log_ridge.add_(4)
    return module


def definition(module: ClusterAttention, streams: list[torch.Tensor], state: dict | None = None) -> torch.Tensor:
    length = streams[0].shape[1]
    order = spread(length, min(module.sample, length)).tolist()
    state = dict(module.named_parameters()) if state is None else state
    given = {"steps": module.steps, "ridge": RIDGE, "least": LEAST_RIDGE}
    return reference.cluster_attention(state, streams, module.heads, module.landmarks, order, **given)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("smallest", [1, 300, 2**18])
def test_any_number_of_heads_at_once_gives_the_same(smallest, monkeypatch):
    """Streams, and tokens with the projections that make streams of them."""
    monkeypatch.setattr(head_groups, "SMALLEST_GROUP", smallest)
    monkeypatch.setattr(head_groups, "NARROWEST", 1)
    module, x = module_of(learned=True), randn(2, 23, 12)
    weight = randn(3, 12, 12, seed=1)
    for bias in (randn(3, 12, seed=2), None):
        streams = [torch.nn.functional.linear(x, weight[i], None if bias is None else bias[i]) for i in range(3)]
        expected, projected = definition(module, streams), head_groups.ProjectedStreams(x, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(projected, streams, strict=True))
        for given in (streams, projected):
            torch.testing.assert_close(module(given, x), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"learned": True}, {"steps": 1, "sample": 9}, {"steps": 4, "sample": 40}], ids=str
)
@pytest.mark.parametrize("length", [1, 5, 6, 23, 57])
def test_the_mixer_equals_the_definition_in_values_and_gradients(length, options):
    module = module_of(**options)
    state = {name: value.detach().clone().requires_grad_() for name, value in module.state_dict().items()}
    streams = [randn(2, length, 12, seed=s).requires_grad_() for s in range(3)]
    y, expected = module(streams, None), definition(module, streams, state)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-7)
    weight, parameters = randn(*y.shape, seed=3), dict(module.named_parameters())
    given = {"allow_unused": True, "materialize_grads": True}  # where it is exact, nothing learned counts
    ours = torch.autograd.grad((y * weight).sum(), [*streams, *parameters.values()], **given)
    theirs = torch.autograd.grad((expected * weight).sum(), [*streams, *(state[name] for name in parameters)], **given)
    for name, a, b in zip(["q", "k", "v", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("mean", "sharpness"), [(0, 1), (10, 1), (0, 6)])
def test_without_gradients_the_answers_are_the_same_by_another_way(learned, mean, sharpness, dtype, rounding):
    module = module_of(16, 2, 8, learned=learned).to(dtype)
    streams = [(randn(2, 60, 16, seed=s) * (sharpness if s == 0 else 1) + mean).to(dtype) for s in range(3)]
    expected = module(streams, None)
    with torch.no_grad():
        y = module(streams, None)
    assert not torch.equal(y, expected)  # two ways indeed
    assert (y - expected).abs().max() < (1 + mean) * rounding * expected.abs().max()


def test_nothing_is_stored_where_nothing_is_learned():
    assert not module_of().state_dict()


def test_what_is_learned_starts_as_what_it_is_without():
    streams = [randn(2, 40, 12, seed=s).float() for s in range(3)]
    y = ClusterAttention(12, 3, 8, learned=True)(streams, None)
    torch.testing.assert_close(y, ClusterAttention(12, 3, 8)(streams, None))


@pytest.mark.parametrize("length", [1, 7, 16])
def test_no_more_tokens_than_landmarks_is_softmax_attention(length):
    streams = [randn(2, length, 12, seed=s) for s in range(3)]
    torch.testing.assert_close(module_of(landmarks=16)(streams, None), softmax_attention(*streams, 3))


def test_tokens_of_as_few_kinds_as_there_are_landmarks_are_mixed_exactly():
    """However often each occurs: every cluster is one kind, and the ridge alone is between the two."""
    kinds = [2 * randn(2, 5, 12, seed=s) for s in range(3)]
    which = torch.cat([torch.arange(5), torch.randint(5, (38,), generator=torch.Generator().manual_seed(0))])
    unordered = torch.empty_like(which)
    unordered[spread(43, 43)] = which  # one of each kind among the first that are chosen
    streams = [t[:, unordered] for t in kinds]
    exact = softmax_attention(*streams, 3)
    assert (module_of()(streams, None) - exact).norm() < 2e-3 * exact.norm()


def test_more_landmarks_come_nearer_to_softmax_attention():
    q, k, v = (randn(1, 400, 16, seed=s) for s in range(3))
    exact = softmax_attention(q, k, v, 2)
    error = [(module_of(16, 2, m)((q, k, v), None) - exact).square().mean() / exact.var() for m in (4, 32, 128)]
    assert error[0] > 1.3 * error[1] > 1.3 * 1.3 * error[2]


def test_clusters_of_one_token_each_are_answered_as_attention_answers_where_the_ridge_allows():
    """Of tokens far apart, of which a sample is clustered that holds no more of them than there are clusters."""
    q, k, v = (randn(1, 90, 8, seed=s) for s in range(3))
    module, asked = module_of(8, 1, 20, learned=True, sample=20), spread(90, 20)
    with torch.no_grad():
        module.log_ridge.fill_(-30)
        gap = (module((q, k, v), None) - softmax_attention(q, k, v, 1)).square().mean(dim=(0, 2))
    others = [i for i in range(90) if i not in asked.tolist()]
    assert gap[asked].mean() < 1e-3 * gap[others].mean()


def test_a_token_that_heeds_itself_alone_is_answered_with_its_own_value():
    """Which no small number of clusters can say: the keys are all different, and far from each other."""
    k = 12 * torch.nn.functional.normalize(randn(1, 300, 16), dim=-1)
    v = randn(1, 300, 16, seed=1)
    exact = softmax_attention(k, k, v, 1)
    assert (exact - v).norm() < 1e-2 * v.norm()
    assert (module_of(16, 1, 20)((k, k, v), None) - v).norm() < 3e-2 * v.norm()


def test_sharper_attention_relies_on_the_means_instead_of_exploding():
    """Each answer stays about as large as the values, whatever the logits."""
    q, k, v = (randn(1, 400, 16, seed=s) for s in range(3))
    for sharpness in (1, 4, 16, 64):
        y = module_of(16, 2, 32)((sharpness * q, k, v), None)
        assert y.abs().max() < 2 * v.abs().max() and y.norm() < 1.1 * v.norm()


def test_equal_values_stay_equal():
    q, k = randn(2, 37, 12), randn(2, 37, 12, seed=1)
    y = module_of()((q, k, torch.full_like(q, 3.0)), None)
    torch.testing.assert_close(y, torch.full_like(y, 3.0), rtol=1e-9, atol=1e-9)


def test_a_sample_of_all_tokens_is_all_of_them_and_a_smaller_one_is_near():
    streams = [randn(1, 500, 16, seed=s) for s in range(3)]
    whole = module_of(16, 2, 16, sample=500)(streams, None)
    assert torch.equal(whole, module_of(16, 2, 16, sample=9999)(streams, None))
    part = module_of(16, 2, 16, sample=100)(streams, None)
    exact = softmax_attention(*streams, 2)
    assert not torch.equal(part, whole) and (part - exact).norm() < 1.5 * (whole - exact).norm()


def test_a_picture_always_gives_the_same():
    streams = [randn(2, 99, 12, seed=s).float() for s in range(3)]
    module = ClusterAttention(12, 3, 7)
    assert torch.equal(module(streams, None), module(streams, None, (3, 33)))
    torch.testing.assert_close(module([t[1:] for t in streams], None), module(streams, None)[1:])


def test_a_head_of_the_answer_depends_on_its_own_head_of_the_streams():
    streams = [randn(2, 9, 12, seed=s).requires_grad_() for s in range(3)]
    for gradient in torch.autograd.grad(module_of()(streams, None)[..., 4:8].sum(), streams):
        assert gradient[..., 4:8].abs().max() > 0
        assert gradient[..., :4].abs().max() == gradient[..., 8:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0, 10])
def test_half_precision_is_close_to_float32(mean, dtype):
    module, streams = ClusterAttention(32, 2, 16), [mean + randn(2, 99, 32, seed=s).to(dtype) for s in range(3)]
    y = module(streams, None)
    assert y.dtype == dtype
    expected = module([t.float() for t in streams], None)
    assert (y.float() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("learned", [False, True])
def test_the_inverse_is_taken_in_full_under_autocast(learned):
    module, streams = ClusterAttention(32, 2, 16, learned=learned), [randn(2, 99, 32, seed=s).float() for s in range(3)]
    expected = module(streams, None)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(streams, None)
    assert (y.float() - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharpness", [0, 1, 30], ids="equal {0} tokens".format)
def test_equal_and_sharp_tokens_give_finite_numbers_and_gradients(sharpness, dtype):
    """Equal tokens leave all clusters but one empty."""
    streams = [(10 + sharpness * randn(1, 80, 12, seed=s)).to(dtype).requires_grad_() for s in range(3)]
    y = ClusterAttention(12, 3, 7)(streams, None)
    y.float().square().sum().backward()
    assert all(t.isfinite().all() for t in (y, *(t.grad for t in streams)))
    if not sharpness:
        torch.testing.assert_close(y, streams[2].detach())


def test_a_hundred_thousand_tokens_need_no_square():
    module = ClusterAttention(16, 1, 32)  # the square would take 40 GB
    tokens = torch.randn(1, 100_000, 16)
    assert module((tokens, tokens, tokens), tokens).isfinite().all()


def test_it_runs_on_tensors_without_numbers():
    """What its operations are counted on."""
    with FakeTensorMode():
        tokens = torch.randn(1, 99, 12)
        assert ClusterAttention(12, 3, 7)((tokens, tokens, tokens), tokens).shape == (1, 99, 12)


@pytest.mark.parametrize(
    "options", [{"heads": 0}, {"heads": 5}, {"landmarks": 0}, {"steps": 0}, {"sample": 0}], ids=str
)
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ClusterAttention(**{"d_model": 12, "heads": 3, "landmarks": 5} | options)
