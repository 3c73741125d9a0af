"""Tiled Diffusion at the UNet's own call: a large canvas denoised in tiles and regions, one fused prediction.

The pipeline and the scheduler see an ordinary UNet, so samplers, img2img, inpainting, ControlNet, LoRA, IP-Adapter and
swapped students work as they are. Fusing predictions and stepping once equals averaging the tiles' steps (MultiDiffusion,
Bar-Tal et al. 2023) for every step that is affine in the prediction: DDIM, Euler.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.adapters import acting, is_loaded, loaded
from sd_hyena.large.around import replaced
from sd_hyena.large.deferred_controlnet import DeferredControlNet
from sd_hyena.large.regions import Noise, Region, Texts
from sd_hyena.large.tiling import WEIGHTS, Rect, add, batches, cut, grid, weights
from sd_hyena.large.unet_call import Call, each, stacked
from sd_hyena.large.views import View, opacity_of, regional_views, total_of

METHODS = ("multidiffusion", "mixture", "spot")
SMALLEST_TILE = 8  # cells: the UNet's coarsest level then has one
SPATIAL = (
    "sample",
    "controlnet_cond",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True, kw_only=True)
class TiledDiffusion:
    """How a canvas is tiled; lengths in latent cells of 8 pixels. Raises BadInput.

    method: multidiffusion averages the tiles; mixture weights them by a Gaussian (Mixture of Diffusers); spot lays
        them edge to edge, elsewhere in every step (SpotDiffusion: the fewest tiles, seams drift and dissolve).
    overlap: the least that neighbours share; None is half the short side, 0 for spot.
    tile_batch_size: tiles in one call of the UNet.
    weights: uniform, gaussian, cosine, ramp; auto is gaussian for mixture, else cosine. MultiDiffusion as published is
        uniform, and its tiles show: where one begins, the average jumps.
    regions: rectangles with their own prompts. They replace the tiles, unless draw_background keeps them too.
    fill_uncovered: draw the picture's prompt where no region lies; False predicts 0 there, which gets brown.
    control_tensor_cpu: keep the control image in RAM and bring up the part of each tile.
    buffer_device: where predictions are summed; None is where the latents are.
    circular: tiles go round the borders, so the picture continues at its opposite side.
    jitter: shift the tiles in every step, to dissolve seams; spot always does.
    start, end: the part of the noise schedule that is tiled, from 0 (pure noise) to 1; the rest in one piece.
    map: calls the UNet on each batch of tiles, as the built-in; `Group.map` shares them out between processes.
    seed: of the shifts, which depend on it and the timestep alone.
    """

    method: Literal["multidiffusion", "mixture", "spot"] = "multidiffusion"
    tile_width: int = 96
    tile_height: int = 96
    overlap: int | None = None
    tile_batch_size: int = 4
    weights: Literal["auto", "uniform", "gaussian", "cosine", "ramp"] = "auto"
    regions: Sequence[Region] = ()
    draw_background: bool = False
    fill_uncovered: bool = True
    control_tensor_cpu: bool = False
    buffer_device: str | torch.device | None = None
    circular: bool = False
    jitter: bool = False
    start: float = 0.0
    end: float = 1.0
    seed: int = 0
    map: Callable[[Callable[[Any], Tensor], Sequence[Any]], Iterable[Tensor]] = map

    def __post_init__(self):
        if self.method not in METHODS:
            raise BadInput(f"method={self.method!r} is unknown; use {', '.join(METHODS)}")
        if self.weights not in ("auto", *WEIGHTS):
            raise BadInput(f"weights={self.weights!r} are unknown; use auto, {', '.join(WEIGHTS)}")
        for name, least in (("tile_width", SMALLEST_TILE), ("tile_height", SMALLEST_TILE), ("tile_batch_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise BadInput(f"{name}={value!r} must be a whole number from {least}")
        side = min(self.tile_width, self.tile_height)
        if self.overlap is None:
            object.__setattr__(self, "overlap", 0 if self.method == "spot" else side // 2)
        if type(self.overlap) is not int or not 0 <= self.overlap < side:
            raise BadInput(f"overlap={self.overlap!r} must be a whole number below the tile's short side, {side}")
        if not 0 <= self.start < self.end <= 1:
            raise BadInput(f"start={self.start!r} and end={self.end!r} must be 0 <= start < end <= 1")
        if type(self.seed) is not int:
            raise BadInput(f"seed={self.seed!r} is no whole number")
        if self.buffer_device is not None:
            try:
                torch.zeros(1, device=self.buffer_device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0][:120]
                raise BadInput(
                    f"buffer_device={self.buffer_device!r} cannot be used here ({reason}); try cpu"
                ) from None
        object.__setattr__(self, "regions", tuple(region for region in self.regions if region.enable))
        for region in self.regions:
            region.opacity((SMALLEST_TILE, SMALLEST_TILE))  # a mask that cannot be read is found now, not while drawing

    @property
    def kind(self) -> str:
        """The weights in use."""
        own = "gaussian" if self.method == "mixture" else "cosine"
        return own if self.weights == "auto" else self.weights


@contextmanager
def tiled_diffusion(pipe: Any, method: str = "multidiffusion", **options) -> Iterator[TiledDiffusion]:
    """Within the block, `pipe` (any diffusers pipeline with a UNet) draws in tiles; the options are TiledDiffusion's.

    Yields the options as they are used. Sizes are read from the latents; a canvas of one tile gives bit for bit what
    the pipeline gives by itself. Afterwards, also after an exception, everything is as it was. Raises BadInput.
    """
    options = TiledDiffusion(method=method, **options)
    networks = _with_loras(pipe)
    for name in {name for region in options.regions for name in region.adapters or ()}:
        if not is_loaded(networks, name):
            raise BadInput(
                f"a region's adapter {name!r} is not loaded; there are {', '.join(loaded(networks)) or 'none'}"
            )
    tiled = _TiledUNet(pipe, options)
    with ExitStack() as stack:

        def put(owner: Any, name: str, ours: Callable) -> None:
            ours = functools.update_wrapper(functools.partial(ours), getattr(owner, name))  # keeps the signature
            stack.enter_context(replaced(owner, name, ours))

        put(pipe.unet, "forward", tiled.forward)
        if tiled.controlnet is not None:
            put(pipe.controlnet, "forward", tiled.controlnet.forward)
            if options.control_tensor_cpu:
                name = "prepare_control_image" if hasattr(pipe, "prepare_control_image") else "prepare_image"
                original = getattr(pipe, name)
                put(pipe, name, lambda *args, **kwargs: original(*args, **kwargs | {"device": "cpu"}))
        if options.regions:
            put(pipe, "encode_prompt", tiled.texts.encode_prompt)
        if any(region.seed is not None for region in options.regions):
            noise = Noise(pipe, options.regions)
            put(pipe, "prepare_latents", noise.prepare_latents)
            put(pipe.scheduler, "add_noise", noise.add_noise)
        yield options


class _TiledUNet:
    """One UNet forward on the canvas as several on its tiles and regions."""

    def __init__(self, pipe: Any, options: TiledDiffusion):
        self.pipe, self.options = pipe, options
        self.original, self.signature = pipe.unet.forward, inspect.signature(pipe.unet.forward)
        self.texts = Texts(pipe.encode_prompt, options.regions, _with_loras(pipe)[1:]) if options.regions else None
        controlnet = getattr(pipe, "controlnet", None)
        self.controlnet = DeferredControlNet(controlnet, pipe.vae_scale_factor) if controlnet is not None else None
        self.regional_views = functools.lru_cache(maxsize=1)(
            functools.partial(regional_views, options.regions, options.kind, options.overlap)
        )

    def forward(self, *args, **kwargs) -> Any:
        """Same arguments and result as the UNet's."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        return_dict = arguments.pop("return_dict", True)
        call = self.controlnet.joining(arguments) if self.controlnet else Call(arguments, None, None)
        background, foreground = self._views(call)
        prediction = self._fused(call, background)
        if foreground:
            opacity = opacity_of(foreground, call.canvas).to(prediction.device)
            prediction = torch.lerp(prediction, self._fused(call, foreground), opacity)
        prediction = prediction.to(arguments["sample"])
        if not return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _views(self, call: Call) -> tuple[list[View], list[View]]:
        """What to predict: tiles and background regions; foreground regions."""
        o, canvas = self.options, call.canvas
        timestep = float(torch.as_tensor(call.unet["timestep"]).flatten()[0])
        done = 1 - timestep / self.pipe.scheduler.config.num_train_timesteps
        if not o.start <= min(max(done, 0), 1) <= o.end:
            return [View(Rect(0, 0, *canvas), torch.ones(canvas))], []
        background, foreground = self.regional_views(canvas)
        if o.regions and not (o.draw_background or o.fill_uncovered):
            return background, foreground
        shift = None
        if o.jitter or o.method == "spot":
            source = Random(f"{o.seed} {timestep}")
            shift = source.random(), source.random()
        rects = grid(canvas, (o.tile_height, o.tile_width), o.overlap, shift, o.circular)
        weight = weights(o.kind, rects[0].height, rects[0].width, o.overlap)
        tiles = [View(rect, weight) for rect in rects]
        if o.regions and not o.draw_background:
            uncovered = (total_of(background, canvas) == 0) & (opacity_of(foreground, canvas) < 1)
            tiles = [tile._replace(weight=tile.weight * cut(uncovered, tile.rect, canvas)) for tile in tiles]
            tiles = [tile for tile in tiles if tile.weight.any()]
        return tiles + background, foreground

    def _fused(self, call: Call, views: list[View]) -> Tensor:
        """The views' predictions averaged by weight, float32 (B, C, H, W); 0 where there is none."""
        device = self.options.buffer_device or call.unet["sample"].device
        fused = torch.zeros(call.rows, self.pipe.unet.config.out_channels, *call.canvas, device=device)
        total = total_of(views, call.canvas)
        alike: dict[Any, list[View]] = {}
        for view in views:
            text = view.region and self.texts.length(view.region)
            alike.setdefault((view.rect[2:], text, view.adapters), []).append(view)
        work = [batch for group in alike.values() for batch in batches(group, self.options.tile_batch_size)]
        predicted = self.options.map(functools.partial(self._predictions, call), work)
        for batch, predictions in zip(work, predicted, strict=True):
            for view, prediction in zip(batch, predictions, strict=True):
                share = view.weight / cut(total, view.rect, call.canvas).clamp(min=1e-30)
                add(fused, view.rect, prediction.to(device, torch.float32) * share.to(device))
        return fused

    def _predictions(self, call: Call, views: Sequence[View]) -> Tensor:
        """Of views of one size with texts of one length, in one call of the UNet: (views, B, C, h, w)."""
        arguments = stacked([self._part(call.unet, view) for view in views], call.rows)
        with acting([self.pipe.unet], views[0].adapters):
            if call.control is not None:
                parts = [self._part(call.control, view) for view in views]
                arguments |= self.controlnet.residuals(parts, call.gate)
            predictions = self.original(**arguments, return_dict=False)[0].chunk(len(views))
        return torch.stack([self._guided(call, view, one) for view, one in zip(views, predictions, strict=True)])

    def _part(self, arguments: dict[str, Any], view: View) -> dict[str, Any]:
        """Of the arguments of a UNet or ControlNet on the canvas, those that a view needs."""
        sample, rect = arguments["sample"], view.rect
        canvas = tuple(sample.shape[-2:])
        whole = rect == Rect(0, 0, *canvas)
        crop = lambda x: (x if whole else cut(x, rect, canvas)).to(sample.device)
        part = arguments | {name: each(crop, arguments[name]) for name in SPATIAL if name in arguments}
        masks = (arguments.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        if masks is not None:
            masks = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) else masks  # the older form
            masks = {"ip_adapter_masks": each(crop, masks)}
            part["cross_attention_kwargs"] = arguments["cross_attention_kwargs"] | masks
        if view.region is not None:
            part = self.texts.of(view.region, part)
        added = arguments.get("added_cond_kwargs") or {}
        if "time_ids" in added and not whole:
            time_ids = _time_ids_of(view, added["time_ids"], self.pipe.vae_scale_factor)
            part["added_cond_kwargs"] = part["added_cond_kwargs"] | {"time_ids": time_ids}
        return part

    def _guided(self, call: Call, view: View, prediction: Tensor) -> Tensor:
        """The prediction such that the pipeline's guidance gives what the region's own scale would give."""
        if view.region is None or view.region.guidance_scale is None:
            return prediction
        roles = self.texts.roles(call.unet["encoder_hidden_states"])
        if set(roles) != {0, 1}:
            raise BadInput(
                f"guidance_scale={view.region.guidance_scale:g} of a region needs guidance in the picture: "
                "give the pipeline a guidance_scale above 1"
            )
        parts = prediction.chunk(len(roles))
        change = parts[roles.index(0)] - parts[roles.index(1)]
        change = (view.region.guidance_scale / self.pipe.guidance_scale - 1) * change
        return torch.cat([part + change if role == 0 else part for part, role in zip(parts, roles, strict=True)])


def _with_loras(pipe: Any) -> list[nn.Module]:
    """The networks of a pipeline that LoRAs may change: the UNet, then its text encoders."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return [network for name in names if (network := getattr(pipe, name, None)) is not None]


def _time_ids_of(view: View, time_ids: Tensor, scale: int) -> Tensor:
    """SDXL's micro-conditioning (B, 5 or 6) of a view: original size, crop, target size, in pixels.

    A tile is a crop of the picture; a region is a composition of its own. Either is drawn at its own size.
    """
    time_ids, rect = time_ids.clone(), view.rect
    if view.region is None:
        time_ids[:, 2] += scale * rect.top
        time_ids[:, 3] += scale * rect.left
    if time_ids.shape[1] == 6:
        time_ids[:, 4], time_ids[:, 5] = scale * rect.height, scale * rect.width
    return time_ids
