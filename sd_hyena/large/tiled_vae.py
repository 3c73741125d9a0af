"""A VAE that encodes and decodes any size in bounded memory, tile by tile.

| mode | statistics of the norms | attention | halo |
|---|---|---|---|
| exact | of the whole map | over the whole map | what each segment sees: the result is the untiled VAE's |
| fast | of a downsampled pass (Tiled VAE) | over the whole map | all that is seen between the attention and the image |
| two_pass | of a first pass over the same tiles (LargeResPatch) | over the whole map | likewise |
| classic | of a downsampled pass | within a tile | 11 latents or 32 px, as in Tiled VAE itself |
| blend | each tile's own | within a tile | a quarter of a tile, blended: diffusers' own tiling |
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sd_hyena.errors import BadInput
from sd_hyena.large.float32 import in_float32
from sd_hyena.large.progress import Progress
from sd_hyena.large.steps import Down, Moments, Norm, Up
from sd_hyena.large.tile_sizes import Side, default_tile_size
from sd_hyena.large.tile_store import Offload, TileStore
from sd_hyena.large.tiled_network import NotFinite, TiledNetwork, crop, split
from sd_hyena.large.vae_steps import decoder_steps, encoder_steps

Mode = Literal["exact", "fast", "two_pass", "classic", "blend"]
Padding = Literal["constant", "circular"]
Known = Mapping[nn.GroupNorm, Moments]

PADS = {"encoder": 32, "decoder": 11}  # Tiled VAE's, px and latents
REPLACED = ("_encode", "_decode")


@dataclass(frozen=True)
class VAETiling:
    """How a VAE is tiled. Raises BadInput for what cannot work."""

    mode: Mode = "exact"
    encoder_tile_size: int | None = None  # px; None: by the free memory
    decoder_tile_size: int | None = None  # latent cells; None: likewise
    color_fix: bool = False  # fast encoder: true statistics from the first downsampling on
    offload: Offload = "cpu"  # where whole maps wait: none (on the device), cpu (RAM), disk (a file in $TMPDIR)
    stats_dtype: torch.dtype = torch.float32
    padding_mode: Padding = "constant"  # circular: the image continues at its other side
    progress: Progress | None = None  # told of each tile; None shows a bar

    def __post_init__(self):
        for name, allowed in (("mode", Mode), ("offload", Offload), ("padding_mode", Padding)):
            if getattr(self, name) not in typing.get_args(allowed):
                raise BadInput(f"{name}={getattr(self, name)!r} is none of {', '.join(typing.get_args(allowed))}")
        for side, unit, step in (("encoder", "px", 32), ("decoder", "latent cells", 4)):
            size = getattr(self, f"{side}_tile_size")
            if size is not None and (type(size) is not int or size < 1):
                raise BadInput(f"{side}_tile_size={size!r} is no positive whole number of {unit}; try a multiple of 32")
            if size is not None and self.mode == "blend" and size % step:
                raise BadInput(f"{side}_tile_size={size} is no multiple of {step} {unit}, which mode='blend' needs")
        if self.stats_dtype not in (torch.float32, torch.float64):
            raise BadInput(f"stats_dtype={self.stats_dtype} is too coarse for sums over an image; use torch.float32")
        if self.color_fix and self.mode != "fast":
            raise BadInput(f"color_fix=True mends mode='fast'; leave it out with mode={self.mode!r}")
        if self.padding_mode == "circular" and self.mode in ("classic", "blend"):
            raise BadInput(f"padding_mode='circular' needs mode exact, fast or two_pass, not {self.mode!r}")

    def tile_size(self, side: Side, device: torch.device) -> int:
        """Of a tile of the image (encoder, px) or of the latents (decoder, cells)."""
        return getattr(self, f"{side}_tile_size") or default_tile_size(side, device)


@contextmanager
def tiled_vae(vae: nn.Module, mode: Mode = "exact", **options) -> Iterator[nn.Module]:
    """Within the block, `vae.encode` and `vae.decode` work tile by tile; `options` are VAETiling's other fields.

    An image of one tile is computed by the untouched VAE. What overflows in half precision is computed again in
    float32. No gradients. Afterwards, also after an exception, the VAE is as it was; blocks may be nested. Raises
    BadInput for options that cannot work and for a VAE that is no AutoencoderKL; encode and decode raise it when the
    disk is full.
    """
    before = {name: vae.__dict__[name] for name in REPLACED if name in vae.__dict__}
    enable_tiled_vae(vae, mode, **options)
    try:
        yield vae
    finally:
        disable_tiled_vae(vae)
        vae.__dict__.update(before)


def enable_tiled_vae(vae: nn.Module, mode: Mode = "exact", **options) -> None:
    """As `tiled_vae`, until `disable_tiled_vae`."""
    tiling = VAETiling(mode, **options)
    if not isinstance(vae, AutoencoderKL):
        raise BadInput(f"a {type(vae).__name__} is no AutoencoderKL, whose layers tiled_vae knows")
    if tiling.mode != "blend":
        encoder_steps(vae), decoder_steps(vae)
    vae._encode, vae._decode = partial(_encode, vae, tiling), partial(_decode, vae, tiling)


def disable_tiled_vae(vae: nn.Module) -> None:
    """The plain VAE again, also if it was plain."""
    for name in REPLACED:
        vae.__dict__.pop(name, None)


def _encode(vae: nn.Module, tiling: VAETiling, x: Tensor) -> Tensor:
    return _computed(vae, tiling, "encoder", x)


def _decode(vae: nn.Module, tiling: VAETiling, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
    image = _computed(vae, tiling, "decoder", z)
    return DecoderOutput(sample=image) if return_dict else (image,)


def _computed(vae: nn.Module, tiling: VAETiling, side: Side, x: Tensor) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        raise BadInput(f"the tiled {side} gives no gradients; detach its input, or leave tiled_vae for training")
    with torch.no_grad():
        try:
            y = _tiled(vae, tiling, side, x)
            if x.dtype.itemsize >= 4 or y.isfinite().all():
                return y
        except NotFinite:
            pass
        warnings.warn(f"the VAE's {side} overflows in {x.dtype}; it computes this once more in float32", stacklevel=2)
        with in_float32(*_parts(vae, side)):
            return _tiled(vae, tiling, side, x.float()).to(x.dtype)


def _tiled(vae: nn.Module, tiling: VAETiling, side: Side, x: Tensor) -> Tensor:
    tile = tiling.tile_size(side, x.device)
    if max(x.shape[2:]) <= tile and tiling.padding_mode == "constant":
        return _untiled(vae, side, x)
    steps = encoder_steps(vae) if side == "encoder" else decoder_steps(vae)
    factor = 2 ** sum(isinstance(step, (Down, Up)) for step in steps)
    if tiling.mode == "blend":
        px, cells = (tile, tile // factor) if side == "encoder" else (tile * factor, tile)
        return _untiled(vae, side, x, use_tiling=True, tile_sample_min_size=px, tile_latent_min_size=cells)
    store = TileStore(tiling.offload, x.device)
    circular = tiling.padding_mode == "circular"
    network = TiledNetwork(steps, tile, store, tiling.stats_dtype, circular, tiling.progress)
    if tiling.mode == "exact":
        return network(x)
    if tiling.mode == "two_pass":
        network(x, own_statistics=True)
        return network(x, _of_norms(network))
    if tiling.mode == "fast":
        return network(x, _of_norms(_estimate(network, x, factor, tiling.color_fix)))
    return _classic(network, x, _estimate(network, x, factor).measured, side, factor)


def _parts(vae: nn.Module, side: Side) -> tuple[nn.Module | None, ...]:
    return (vae.encoder, vae.quant_conv) if side == "encoder" else (vae.decoder, vae.post_quant_conv)


def _untiled(vae: nn.Module, side: Side, x: Tensor, use_tiling: bool = False, **attributes: int) -> Tensor:
    """The VAE's own way, with attributes of its tiling for the time of the call."""
    attributes["use_tiling"] = use_tiling
    before = {name: getattr(vae, name) for name in attributes}
    try:
        vae.__dict__.update(attributes)
        return type(vae)._encode(vae, x) if side == "encoder" else type(vae)._decode(vae, x).sample
    finally:
        vae.__dict__.update(before)


def _of_norms(network: TiledNetwork) -> Known:
    """What a pass measured, without the attentions' norms: those see their whole map anyway."""
    norms = [step.module for step in network.steps if isinstance(step, Norm)]
    finite = all(moments.finite() for moments in network.measured.values())
    return {norm: network.measured[norm] for norm in norms if norm in network.measured} if finite else {}


def _estimate(network: TiledNetwork, x: Tensor, factor: int, color_fix: bool = False) -> TiledNetwork:
    """A pass over x made so small that it fits one tile, with x's mean, deviation and range in each channel.

    With `color_fix` it ends at the first downsampling.
    """
    steps = network.steps
    least = factor if isinstance(next(s for s in steps if isinstance(s, (Down, Up))), Down) else 1
    size = [max(n * network.tile // max(x.shape[2:]), least) for n in x.shape[2:]]
    small = F.interpolate(x.float(), size=size, mode="nearest-exact")
    deviation, mean = torch.std_mean(x.float(), (2, 3), correction=0, keepdim=True)
    deviation_, mean_ = torch.std_mean(small, (2, 3), correction=0, keepdim=True)
    small = (small - mean_) / deviation_.clamp(min=1e-6) * deviation + mean
    small = small.clamp(x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)).to(x.dtype)
    if color_fix:
        steps = steps[: next((i for i, s in enumerate(steps) if isinstance(s, Down)), len(steps))]
    estimate = replace(network, steps=steps, tile=max(size))
    estimate(small)
    return estimate


def _classic(network: TiledNetwork, x: Tensor, known: Known, side: Side, factor: int) -> Tensor:
    """Each tile with its pad is an image of its own, but for the statistics; Tiled VAE's fast mode."""
    n_in = tuple(x.shape[2:])
    cells = tuple(n // factor for n in n_in) if side == "encoder" else n_in
    grid = [-(-n // network.tile) for n in n_in]
    one, y = replace(network, tile=max(n_in)), None
    scale, unscale = (factor, 1) if side == "encoder" else (1, factor)  # cells of the latents to the input and output
    for index in product(*map(range, grid)):
        core = [split(n, parts, i) for n, parts, i in zip(cells, grid, index, strict=True)]
        seen = [
            (max(a * scale - PADS[side], 0), min(b * scale + PADS[side], n))
            for (a, b), n in zip(core, n_in, strict=True)
        ]
        tile = one(crop(x, (0, 0), seen), known)
        out = [(a * unscale, b * unscale) for a, b in core]
        if y is None:
            y = tile.new_empty(*tile.shape[:2], *(n * unscale for n in cells))
        crop(y, (0, 0), out).copy_(crop(tile, [a * unscale // scale for a, _ in seen], out))
    return y
