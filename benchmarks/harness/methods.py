"""Everything that can stand in a site's place, with its projections: attention by each of PyTorch's kernels, peers, ours.

B batch, L tokens, D channels. A method comes with a float64 reference for some of its rows, so that even a quadratic
one can be checked at every size.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers  # noqa: F401  (registers them)
from benchmarks.harness.setting import Setting
from sd_hyena.cost.operations import attention_flops, folded_flops
from sd_hyena.large.bricks import edges, grid
from sd_hyena.large.tiled_attention import Tiled
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import Site
from sd_hyena.students.student import Projections, StudentSpec, build_student, cast, spec_for
from sd_hyena.students.untrained import Untrained

ATTENTION = "sdpa"  # PyTorch's own choice of kernel: what everything is held against
KERNELS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
LARGEST_MATH = 16384  # tokens: it holds all scores
WINDOW = 32  # cells, HyperTile's 256 px
STUDENTS = {
    "hyena2d": {},
    "landmarks": {"operator": "landmarks"},
    "64 landmarks": {"operator": "landmarks", "operator_options": "landmarks=64"},
    "hyena2d, learned landmarks": {"operator_options": "content=landmarks"},
    "hyena2d rank 1": {"operator_options": "long=separable,rank=1"},
    "hyena2d rank 4": {"operator_options": "long=separable,rank=4"},
    "hyena2d rank 8": {"operator_options": "long=separable,rank=8"},
    "hyena2d full": {"operator_options": "long=full"},
    "hyena2d axial": {"operator_options": "long=axial_1d"},
    "hyena2d hedgehog": {"operator_options": "content=hedgehog"},
    "safari, published": {"operator": "safari"},
    "linear attention": {"operator": "linear"},
    "hyena2d, 64": {"operator_options": "landmarks=64"},
    "hyena2d, 256": {"operator_options": "landmarks=256"},
    "clusters, 256": {"operator": "clusters", "operator_options": "landmarks=256,learned=true"},
    "Hyena-SE, raster": {"operator": "hyena_se"},
    "Hyena-SE, plane": {"operator": "hyena_se", "operator_options": "axes=plane"},
    "pointwise": {"operator": "pointwise"},
}
UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {  # between the site's own projections
    **{f"clusters, {m}, untrained": ("clusters", {"landmarks": m}) for m in (64, 128, 256, 512)},
    "block means, 256, untrained": ("nystromformer", {"landmarks": 256}),
    "ToMe, 50 %, untrained": ("tome", {}),
    "ToDo, 2x2, untrained": ("todo", {}),
    "CLEAR, radius 8, untrained": ("clear", {"radius": 8}),
    "CLEAR, radius 16, untrained": ("clear", {"radius": 16}),
    "HyperTile, 128 px, untrained": ("windows", {"window": 16}),
}

Size = tuple[int, int]
Reference = Callable[[Tensor, Tensor], Tensor]  # float64 tokens (1, L, D), indices of rows -> (1, rows, D)


@dataclass(frozen=True)
class Method:
    """A block's computation, tokens (B, L, D) to (B, L, D), with what it should be and the operations of one sample."""

    name: str
    call: Callable[[Tensor], Tensor]
    reference: Reference
    operations: int


def new_attention(site: Site, setting: Setting) -> Attention:
    """The site's own attention with random weights, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = Attention(site.channels, heads=site.heads, dim_head=site.channels // site.heads)
    return attention.to(setting.device, setting.dtype).eval().requires_grad_(False)


def methods(site: Site, size: Size, setting: Setting, only: tuple[str, ...] = ()) -> Iterator[Method]:
    """Those that can run here at a grid (H, W); `only` names what is wanted, all by default."""
    attention = new_attention(site, setting)
    for found in (
        _attentions(attention, site, size, setting),
        _students(attention, site, size, setting, only),
        _untrained(attention, site, size, setting, only),
    ):
        yield from (method for method in found if not only or method.name in only)


def _attentions(attention: Attention, site: Site, size: Size, setting: Setting) -> Iterator[Method]:
    exact, cost = _softmax_reference(attention), attention_flops(site, size)
    yield Method(ATTENTION, attention, exact, cost)
    for name in available_kernels(site, setting):
        if name != "math" or size[0] * size[1] <= LARGEST_MATH:
            yield Method(f"sdpa {name}", _with_kernel(attention, name), exact, cost)
    yield Method("sdpa by heads", lambda x: by_heads(attention, x), exact, cost)
    if setting.on_gpu and importlib.util.find_spec("flash_attn"):
        yield Method("flash-attn", lambda x: _flash_attn(attention, x), exact, cost)
    tiles = grid(*(edges(side, max(1, side // WINDOW)) for side in size))
    if len(tiles) > 1:
        tiled = Tiled(lambda _size: tiles)
        tiled.inner, tiled.size = attention, size
        tokens, d = size[0] * size[1], site.channels
        cost = 8 * tokens * d * d + sum(4 * (t.height * t.width) ** 2 * d for t in tiles)
        yield Method("hypertile 256 px", tiled, _tiled_reference(exact, tiles, size), cost)


def _students(
    attention: Attention, site: Site, size: Size, setting: Setting, only: tuple[str, ...]
) -> Iterator[Method]:
    latent = tuple(side * 2**site.level for side in size)
    projections = Projections.of(attention)
    for name, given in STUDENTS.items():
        half = f"{name}, half FFT"
        if only and name not in only and half not in only:
            continue
        config = TrainConfig(**given)
        spec = spec_for(site, config.operator, config.options_of_operator(), latent)
        student = woken(build_student(spec))
        student = (
            cast(student, torch.empty((), device=setting.device, dtype=setting.dtype)).eval().requires_grad_(False)
        )
        cost = folded_flops(spec, size)
        reference = _student_reference(student, projections, size)
        yield Method(name, lambda x, s=student: s(x, projections, size), reference, cost)
        if config.operator == "safari" and setting.on_gpu:
            operator = copy.deepcopy(student.operator).half()
            yield Method(half, lambda x, o=operator: safari_in_its_dtype(o, x.half()).to(x.dtype), reference, cost)


def _untrained(
    attention: Attention, site: Site, size: Size, setting: Setting, only: tuple[str, ...]
) -> Iterator[Method]:
    projections = Projections.of(attention)
    for name, (operator, options) in UNTRAINED.items():
        if not only or name in only:
            spec = StudentSpec(site.name, site.short, site.channels, operator, {"heads": site.heads} | options, None)
            student = Untrained(spec).to(setting.device).eval()
            reference = _student_reference(student, projections, size)
            yield Method(name, lambda x, s=student: s(x, projections, size), reference, folded_flops(spec, size))


def woken(student: nn.Module) -> nn.Module:
    """A new student whose every weight counts: what starts at zero would hide what its branch computes."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=source))
    return student


def available_kernels(site: Site, setting: Setting) -> list[str]:
    """PyTorch's attention kernels that take this site's head width here."""
    q = torch.zeros(1, site.heads, 64, site.channels // site.heads, device=setting.device, dtype=setting.dtype)
    found = []
    for name, backend in KERNELS.items():
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                F.scaled_dot_product_attention(q, q, q)
            found.append(name)
        except RuntimeError:  # no such kernel for this device, dtype or width
            continue
    return found


def kernels_chosen(setting: Setting) -> dict[str, str]:
    """Which kernel PyTorch takes by itself for the head widths of Stable Diffusion 1.5 (40, 80, 160) and XL (64)."""
    chosen = {}
    for width in (40, 64, 80, 160):
        q = torch.zeros(1, 8, 4096, width, device=setting.device, dtype=setting.dtype)
        chosen[str(width)] = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    return chosen


def _with_kernel(attention: Attention, name: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, KERNELS[name])):
            return attention(x)

    return call


def by_heads(attention: Attention, x: Tensor) -> Tensor:
    """Attention one head at a time, each through its own part of the projections: what it costs in the least memory."""
    out = attention.to_out[0]
    width = attention.to_q.out_features // attention.heads
    y = out.bias.expand(*x.shape[:2], -1).clone()
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (F.linear(x, p.weight[part])[:, None] for p in (attention.to_q, attention.to_k, attention.to_v))
        y += F.linear(F.scaled_dot_product_attention(q, k, v)[:, 0], out.weight[:, part])
    return y


def _flash_attn(attention: Attention, x: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (p(x).unflatten(-1, (attention.heads, -1)) for p in (attention.to_q, attention.to_k, attention.to_v))
    return attention.to_out[0](flash_attn_func(q, k, v).flatten(2))


def safari_in_its_dtype(operator: nn.Module, x: Tensor) -> Tensor:
    """The published operator wholly in x's dtype, its FFT too, as `.half()` makes it: what its users run on a GPU.

    In float16 it needs a GPU and a length that is a power of two.
    """
    length, d = x.shape[1], x.shape[2]
    u = operator.short_filter(operator.in_proj(x).mT)[..., :length]
    x0, x1, v = u.split(d, dim=1)
    v = v * x1
    h = operator.filter_fn(length).mT.to(x)
    n = 2 * length
    y = torch.fft.irfft(torch.fft.rfft(v, n) * (torch.fft.rfft(h, n) / n), n, norm="forward")[..., :length]
    return operator.out_proj((x0 * (y + operator.filter_fn.skip()[:, None].to(x) * v)).mT)


def _softmax_reference(attention: Attention) -> Reference:
    def reference(x: Tensor, rows: Tensor) -> Tensor:
        q, k, v = (p.weight.double() for p in (attention.to_q, attention.to_k, attention.to_v))
        heads = lambda t: t.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        q, k, v = heads(x[:, rows] @ q.T), heads(x @ k.T), heads(x @ v.T)
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        out = attention.to_out[0]
        return y.transpose(1, 2).flatten(2) @ out.weight.double().T + out.bias.double()

    return reference


def _tiled_reference(exact: Reference, tiles: list, size: Size) -> Reference:
    """Each row among the tokens of its own tile."""

    def reference(x: Tensor, rows: Tensor) -> Tensor:
        y = []
        for row in rows.tolist():
            r, c = divmod(row, size[1])
            t = next(t for t in tiles if t.top <= r < t.top + t.height and t.left <= c < t.left + t.width)
            part = x.unflatten(1, size)[:, t.top : t.top + t.height, t.left : t.left + t.width].flatten(1, 2)
            own = torch.tensor([(r - t.top) * t.width + c - t.left], device=x.device)
            y.append(exact(part, own))
        return torch.cat(y, dim=1)

    return reference


def _student_reference(student: nn.Module, projections: Projections, size: Size) -> Reference:
    """The same student in float64. That it is the operator it claims to be is held by tests against safari/reference.py."""

    def reference(x: Tensor, rows: Tensor) -> Tensor:
        wide = copy.deepcopy(student).double()
        return wide(x, Projections(*(copy.deepcopy(p).double() for p in projections)), size)[:, rows]

    return reference
