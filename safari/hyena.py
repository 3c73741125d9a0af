"""The Hyena operator on a sequence (Poli et al. 2023, "Hyena Hierarchy"): gates and long convolutions in turn.

B batch, L tokens, D channels, N order. Weight- and number-compatible with HazyResearch/safari's `HyenaOperator`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from safari.fftconv import long_conv
from safari.filters import HyenaFilter

ACTIVATIONS = {
    **dict.fromkeys((None, "id", "identity", "linear"), nn.Identity()),
    **dict.fromkeys(("silu", "swish"), F.silu),
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}


class HyenaMixer(nn.Module):
    """Mixes N+1 streams `(x_0, ..., x_{N-1}, v)` of a sequence; the projections around it are somebody else's.

    `mix` takes (B, L, (N+1) D) and returns (B, L, D). `bidirectional` lets every token reach every other (lags -(L-1) ...
    L-1, short filter centred) instead of only its past. Sequences up to `l_max`; a longer one raises ValueError.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        order: int = 2,
        filter_order: int = 64,
        num_heads: int = 1,
        inner_factor: int = 1,
        num_blocks: int = 1,
        dropout: float = 0.0,
        filter_dropout: float = 0.0,
        short_filter_order: int = 3,
        activation: str | None = "id",
        bidirectional: bool = False,
        **filter_options,
    ):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("inner_factor", inner_factor), ("num_blocks", num_blocks)):
            if value != 1:  # safari crashes on the first two; with blocks its filter wraps and leaks the future
                raise ValueError(f"{name}={value}: only 1 is supported")
        if order < 2:
            raise ValueError(f"order={order} must be at least 2")
        if l_max < 1 or d_model < 1 or short_filter_order < 1:
            raise ValueError(f"l_max={l_max}, d_model={d_model} and {short_filter_order=} must be positive")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not one of {', '.join(filter(None, ACTIVATIONS))}")
        self.d_model, self.l_max, self.order, self.bidirectional = d_model, l_max, order, bidirectional
        width = d_model * (order + 1)
        self.short_filter = nn.Conv1d(width, width, short_filter_order, groups=width, padding=short_filter_order - 1)
        self.filter_fn = HyenaFilter(
            d_model * (order - 1),
            l_max,
            order=filter_order,
            bidirectional=bidirectional,
            dropout=filter_dropout,
            **filter_options,
        )
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def start_as_identity_(self) -> None:
        """Make the short filter and the skip connection the identity and the long filter small, so that training
        starts near `x_0 x_1 v`."""
        taps = self.short_filter.kernel_size[0]
        nn.init.zeros_(self.short_filter.weight).data[..., (taps // 2) if self.bidirectional else -1] = 1
        nn.init.zeros_(self.short_filter.bias)
        nn.init.ones_(self.filter_fn.bias)
        self.filter_fn.implicit_filter[-1].weight.data.mul_(0.1)

    def mix(self, streams: Tensor) -> Tensor:
        length = streams.shape[1]
        if length > self.l_max:
            raise ValueError(f"{length} tokens exceed l_max={self.l_max}")
        first_lag = -(length - 1) if self.bidirectional else 0
        centre = (self.short_filter.kernel_size[0] - 1) // 2 if self.bidirectional else 0
        u = self.short_filter(rearrange(streams, "b l d -> b d l"))[..., centre : centre + length]
        *x, v = u.split(self.d_model, dim=1)
        h = rearrange(self.filter_fn(length), "p (v o) -> o v p", o=self.order - 1)
        skip = rearrange(self.filter_fn.skip(), "(v o) -> o v 1", o=self.order - 1)
        for x_i, h_o, skip_o in zip(reversed(x[1:]), h, skip, strict=True):
            v = self.dropout(x_i * v)
            v = long_conv(v, h_o, first_lag) + skip_o.to(v.dtype) * v
        return self.activation(rearrange(x[0] * v, "b d l -> b l d"))

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int]) -> Tensor:
        """As a mixer: streams of (B, L, D) each; neither the tokens nor the grid matter to it."""
        return self.mix(torch.cat(tuple(streams), dim=-1))


class CausalHyena(HyenaMixer):
    """A mixer of N+1 streams, order N, that starts near `x_0 x_1 v`."""

    def __init__(self, d_model: int, l_max: int, **options):
        super().__init__(d_model, l_max, **options)
        self.start_as_identity_()


class BidirectionalHyena(CausalHyena):
    """The same, in which every token reaches every other."""

    def __init__(self, d_model: int, l_max: int, **options):
        super().__init__(d_model, l_max, bidirectional=True, **options)


class HyenaOperator(HyenaMixer):
    """HazyResearch/safari's operator: a mixer between its own input and output projections, (B, L, D) -> (B, L, D).

    A state dict of the original loads strictly and gives the same output and gradients.
    """

    def __init__(self, d_model: int, l_max: int, *, order: int = 2, fused_bias_fc: bool = False, **options):
        super().__init__(d_model, l_max, order=order, **options)
        linear = _fused_dense() if fused_bias_fc else nn.Linear
        self.in_proj = linear(d_model, (order + 1) * d_model)
        self.out_proj = linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.mix(self.in_proj(x)))


def _fused_dense() -> type[nn.Module]:
    try:
        from flash_attn.ops.fused_dense import FusedDense
    except ImportError as error:
        raise ValueError("fused_bias_fc=True needs flash-attn's FusedDense (pip install 'sd_hyena[flash]')") from error
    return FusedDense
