import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from safari import WindowAttention, reference
from safari.window_attention import window_attention

SIZES = [(1, 1), (1, 7), (5, 3), (7, 7), (8, 11)]


def streams_of(size: tuple[int, int], d_model: int = 6, batch: int = 2) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(size[0])
    shape = batch, size[0] * size[1], d_model
    return [torch.randn(shape, dtype=torch.float64, generator=source, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("size", SIZES)
def test_window_attention_equals_the_definition_in_values_and_gradients(size, window, heads):
    streams = streams_of(size)
    y, expected = (f(*streams, heads, size, window) for f in (window_attention, reference.window_attention))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((t * weight).sum(), streams) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_a_window_as_large_as_the_grid_is_attention(size):
    streams = streams_of(size)
    split = (rearrange(t, "b l (n e) -> b n l e", n=2) for t in streams)
    expected = rearrange(F.scaled_dot_product_attention(*split), "b n l e -> b l (n e)")
    for window in (max(size), max(size) + 2):
        torch.testing.assert_close(window_attention(*streams, 2, size, window), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cell", [(0, 0), (2, 5), (6, 4), (6, 10)])
def test_a_cell_sees_its_own_window_to_the_last_cell_and_nothing_else(cell):
    size, window = (7, 11), 3
    streams = streams_of(size)
    y = window_attention(*streams, 2, size, window).unflatten(1, size)
    (seen,) = torch.autograd.grad(y[0, cell[0], cell[1]].sum(), streams[2])
    seen = seen.unflatten(1, size).abs().sum(dim=-1)
    same = torch.zeros(2, *size, dtype=torch.bool)
    for row in range(size[0]):
        for column in range(size[1]):
            same[0, row, column] = row // window == cell[0] // window and column // window == cell[1] // window
    assert (seen[same] > 1e-6).all() and (seen[~same] == 0).all()


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_a_constant_value_stays_constant_to_the_border(size):
    q, k, v = streams_of(size)
    v = v[:, :1].expand_as(v)
    torch.testing.assert_close(window_attention(q, k, v, 3, size, 2), v, rtol=1e-11, atol=1e-11)


def test_each_sample_of_a_batch_is_for_itself():
    """With cut windows too, where the batch shares one mask."""
    size = (5, 7)
    streams = streams_of(size, batch=3)
    alone = [window_attention(*(t[i : i + 1] for t in streams), 2, size, 3) for i in range(3)]
    torch.testing.assert_close(window_attention(*streams, 2, size, 3), torch.cat(alone), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_with_cut_windows_and_keeps_its_dtype(dtype):
    size = (5, 7)
    streams = [t.detach().to(dtype) for t in streams_of(size)]
    y = window_attention(*streams, 2, size, 3)
    expected = reference.window_attention(*(t.double() for t in streams), 2, size, 3)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)


def test_the_mixer_is_the_function_with_its_options_and_no_weights():
    size = (5, 7)
    streams = streams_of(size)
    mixer = WindowAttention(6, 2, window=3)
    assert not mixer.state_dict()
    assert torch.equal(mixer(streams, torch.randn(2, 35, 6), size), window_attention(*streams, 2, size, 3))
    default = WindowAttention(6, 2)(streams, streams[0], size)
    assert torch.equal(default, window_attention(*streams, 2, size, 8))


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 4}, {"heads": -2}, {"window": 0}, {"window": -1}], ids=str)
def test_what_cannot_work_raises_with_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        WindowAttention(**{"d_model": 6, "heads": 2} | options)
