"""DemoFusion (Du et al. 2023): a picture drawn again larger, held to itself by a skip residual and by dilated samples.

f = (1 + cos(pi done)) / 2 falls from 1 at pure noise to 0; each part counts f to a power of its own. The third part,
tiles that shift from step to step, is `tiled_diffusion(..., jitter=True)`, entered before.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.tiling import Size, batches
from sd_hyena.large.unet_call import each, stacked

Offset = tuple[int, int]
MAPS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True, kw_only=True)
class DemoFusion:
    """How a picture is held to its smaller self; the defaults are those published. Raises BadInput.

    dilation: s; a dilated sample is every s-th cell of every s-th row. 1 takes no such samples.
    c1, c2, c3: powers of f with which the skip residual, the dilated samples and their blur count; larger is weaker,
        0 is all the time, inf is never.
    sigma: of the blur before a sample is taken, in cells, falling to a hundredth with f ** c3.
    tile_batch_size, map: dilated samples in one call of the UNet, and what calls it on each batch, as TiledDiffusion's.
        Regions with a guidance_scale of their own need a tile_batch_size of 1.
    circular: the blur goes round the borders.
    """

    dilation: int = 2
    c1: float = 3.0
    c2: float = 1.0
    c3: float = 1.0
    sigma: float = 1.0
    tile_batch_size: int = 4
    circular: bool = False
    map: Callable[[Callable[[Any], Tensor], Sequence[Any]], Iterable[Tensor]] = map

    def __post_init__(self):
        for name in ("dilation", "tile_batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BadInput(f"{name}={value!r} must be a whole number from 1")
        for name in ("c1", "c2", "c3"):
            value = getattr(self, name)
            if not value >= 0:
                raise BadInput(f"{name}={value!r} must be a power from 0 (all the time) to inf (never)")
        if not 0 < self.sigma < math.inf:
            raise BadInput(f"sigma={self.sigma!r} must be above 0 cells; 1 is usual")


@contextmanager
def demofusion(pipe: Any, **options) -> Iterator[DemoFusion]:
    """Within the block, an img2img pipeline draws its picture larger as DemoFusion does; the options are DemoFusion's.

    The picture, enlarged to the canvas, and the noise are those that the pipeline starts from. After each step the
    latents are drawn to the picture with that step's noise (skip residual); the prediction is that of the UNet as it is
    found, tiles and all, and of as many interleaved samples of the whole canvas as have about the model's own size
    (dilated sampling), any (H, W). A ControlNet sees each sample with its hint at the sample's size; SDXL is told
    the sample's own size as its target, the rest as it is. Any scheduler; UniPC draws without its corrector, which would undo
    the residual. c1 = c2 = inf changes nothing. Yields the options. Afterwards, also after an exception, everything is
    as it was. Raises BadInput; the pipeline's call does where it starts from noise alone.
    """
    options = DemoFusion(**options)
    with ExitStack() as stack:

        def put(owner: Any, name: str, ours: Callable) -> None:
            ours = functools.update_wrapper(functools.partial(ours), getattr(owner, name))
            stack.enter_context(replaced(owner, name, ours))

        if options.dilation > 1 and options.c2 < math.inf:
            dilated = _Dilated(pipe, options)
            put(pipe.unet, "forward", dilated.forward)
            if dilated.controlnet is not None:
                put(pipe.controlnet, "forward", dilated.controlled)
        if options.c1 < math.inf:
            residual = _SkipResidual(pipe.scheduler, options.c1)
            put(pipe.scheduler, "add_noise", residual.add_noise)
            put(pipe.scheduler, "step", residual.step)
            if hasattr(pipe.scheduler, "disable_corrector"):
                every = range(pipe.scheduler.config.num_train_timesteps)
                stack.enter_context(replaced(pipe.scheduler, "disable_corrector", every))
        yield options


def share(done: float, power: float) -> float:
    """How much a part counts where `done` of the noise schedule lies behind, 0 ... 1: f ** power."""
    f = (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2
    return 0.0 if power == math.inf else f**power


class _SkipResidual:
    """A scheduler that draws the latents to the noised picture after each step."""

    def __init__(self, scheduler: Any, power: float):
        self.scheduler, self.power = scheduler, power
        self._add, self._step = scheduler.add_noise, scheduler.step
        self._signature = inspect.signature(scheduler.step)
        self._start: tuple[Tensor, Tensor] | None = None  # picture and noise
        self._timesteps, self._position = None, 0

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The scheduler's; an img2img pipeline calls it with what it starts from."""
        self._start = original_samples, noise
        return self._add(original_samples, noise, timesteps)

    def step(self, *args, **kwargs) -> Any:
        """The scheduler's, and then the residual. Raises BadInput where there is no picture."""
        given = self._signature.bind(*args, **kwargs).arguments
        result = self._step(*args, **kwargs)
        following = self._following(given["timestep"])
        if self._start is None:
            raise BadInput("demofusion needs a picture to start from; draw a smaller one first and give it to img2img")
        if following is None:
            return result
        done = 1 - float(following) / self.scheduler.config.num_train_timesteps
        before = result[0] if isinstance(result, tuple) else result.prev_sample
        picture, noise = (x.to(before) for x in self._start)
        mixed = torch.lerp(before, self._add(picture, noise, following[None]).to(before), share(done, self.power))
        if isinstance(result, tuple):
            return (mixed, *result[1:])
        result.prev_sample = mixed
        return result

    def _following(self, timestep: Any) -> Tensor | None:
        """The timestep at which the UNet is called next; None after the last."""
        timesteps, position = self.scheduler.timesteps, self._position
        now = float(timestep)
        if timesteps is not self._timesteps or position >= len(timesteps) or float(timesteps[position]) != now:
            first = getattr(self.scheduler, "begin_index", None)
            if first is None or float(timesteps[first]) != now:
                first = int((timesteps.double() - now).abs().argmin())
            self._timesteps, position = timesteps, first
        self._position = position + 1
        return timesteps[position + 1] if position + 1 < len(timesteps) else None


class _Dilated:
    """A UNet whose prediction is mixed with that of interleaved samples of its canvas."""

    def __init__(self, pipe: Any, options: DemoFusion):
        self.pipe, self.options = pipe, options
        self.original, self.signature = pipe.unet.forward, inspect.signature(pipe.unet.forward)
        self.controlnet = getattr(pipe, "controlnet", None)
        self._control: dict[str, Any] | None = None  # the ControlNet's arguments in this step
        if self.controlnet is not None:
            self._controlled = self.controlnet.forward
            self._signature = inspect.signature(self._controlled)

    def controlled(self, *args, **kwargs) -> Any:
        """The ControlNet's own forward, which is asked again for each sample."""
        self._control = self._signature.bind(*args, **kwargs).arguments
        return self._controlled(*args, **kwargs)

    def forward(self, *args, **kwargs) -> Any:
        """Same arguments and result as the UNet's."""
        arguments = dict(self.signature.bind(*args, **kwargs).arguments)
        timestep = float(torch.as_tensor(arguments["timestep"]).flatten()[0])
        done = 1 - timestep / self.pipe.scheduler.config.num_train_timesteps
        counts = share(done, self.options.c2)
        local = self.original(*args, **kwargs)
        if counts == 0:
            return local
        return_dict = arguments.pop("return_dict", True)
        blur = self.options.sigma * (0.99 * share(done, self.options.c3) + 0.01)
        prediction = local.sample if return_dict else local[0]
        prediction = torch.lerp(prediction, self._distant(arguments, blur).to(prediction), counts)
        if not return_dict:
            return (prediction, *local[1:])
        local.sample = prediction
        return local

    def _distant(self, arguments: dict[str, Any], blur: float) -> Tensor:
        """What the samples predict, each where it was taken, (B, C, H, W)."""
        s, canvas = self.options.dilation, tuple(arguments["sample"].shape[-2:])
        arguments, control = self._soft(arguments, blur), self._control and self._soft(self._control, blur)
        alike: dict[Size, list[Offset]] = {}
        for top in range(min(s, canvas[0])):
            for left in range(min(s, canvas[1])):
                size = -(-(canvas[0] - top) // s), -(-(canvas[1] - left) // s)
                alike.setdefault(size, []).append((top, left))
        work = [batch for group in alike.values() for batch in batches(group, self.options.tile_batch_size)]
        predicted = self.options.map(functools.partial(self._predictions, arguments, control), work)
        distant = torch.empty_like(arguments["sample"][:, : self.pipe.unet.config.out_channels])
        for batch, predictions in zip(work, predicted, strict=True):
            for (top, left), prediction in zip(batch, predictions, strict=True):
                distant[..., top::s, left::s] = prediction.to(distant)
        return distant

    def _soft(self, arguments: dict[str, Any], blur: float) -> dict[str, Any]:
        """Arguments of a UNet or ControlNet with the latents blurred; an inpainting's mask and picture stay as they are."""
        latents, rest = arguments["sample"].tensor_split([self.pipe.unet.config.out_channels], 1)
        latents = blurred(latents, 2 * self.options.dilation - 1, blur, self.options.circular)
        return arguments | {"sample": torch.cat([latents, rest], 1)}

    def _predictions(
        self, arguments: dict[str, Any], control: dict[str, Any] | None, offsets: Sequence[Offset]
    ) -> Tensor:
        """Of samples of one size, in one call of the UNet: (samples, B, C, h, w)."""
        rows = len(arguments["sample"])
        alone = control is not None and arguments.get("mid_block_additional_residual") is not None
        if alone:
            arguments = {name: value for name, value in arguments.items() if name not in MAPS[:2]}
        given = stacked([self._part(arguments, offset) for offset in offsets], rows)
        if alone:
            given |= self._residuals([self._part(control, offset) for offset in offsets], rows)
        return torch.stack(self.original(**given, return_dict=False)[0].chunk(len(offsets)))

    def _residuals(self, parts: list[dict[str, Any]], rows: int) -> dict[str, Any]:
        """The UNet's residual arguments; in guess mode the ControlNet knows the later rows alone, the others get none."""
        own = len(parts[0]["sample"])
        down, middle = self._controlled(**stacked(parts, own) | {"return_dict": False})

        def rows_of_the_unet(x: Tensor) -> Tensor:
            if own == rows:
                return x
            every = x.new_zeros(len(parts), rows, *x.shape[1:])
            every[:, rows - own :] = x.unflatten(0, (len(parts), own))
            return every.flatten(0, 1)

        return {MAPS[0]: each(rows_of_the_unet, list(down)), MAPS[1]: rows_of_the_unet(middle)}

    def _part(self, arguments: dict[str, Any], offset: Offset) -> dict[str, Any]:
        """Of the arguments of a UNet or ControlNet on the canvas, those of one sample."""
        sample, s = arguments["sample"], self.options.dilation
        canvas = tuple(sample.shape[-2:])
        take = functools.partial(taken, offset=offset, step=s, canvas=canvas)
        part = arguments | {name: each(take, arguments[name]) for name in MAPS if arguments.get(name) is not None}
        part["sample"] = sample[..., offset[0] :: s, offset[1] :: s]
        height, width = part["sample"].shape[-2:]
        scale = self.pipe.vae_scale_factor
        if "controlnet_cond" in arguments:  # a hint has pixels: seen from s times as far
            size = scale * height, scale * width
            smaller = lambda x: F.interpolate(x.float(), size, mode="bilinear", antialias=True).to(x)
            part["controlnet_cond"] = each(smaller, arguments["controlnet_cond"])
        masks = (arguments.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
        if masks is not None:
            masks = {"ip_adapter_masks": each(take, masks)}
            part["cross_attention_kwargs"] = arguments["cross_attention_kwargs"] | masks
        added = arguments.get("added_cond_kwargs") or {}
        if "time_ids" in added and added["time_ids"].shape[1] == 6:
            time_ids = added["time_ids"].clone()
            time_ids[:, 4], time_ids[:, 5] = scale * height, scale * width
            part["added_cond_kwargs"] = added | {"time_ids": time_ids}
        return part


def taken(x: Tensor, offset: Offset, step: int, canvas: Size) -> Tensor:
    """Of a map (..., H', W') of the canvas at any scale the cells that are nearest to those of a dilated sample."""
    index = []
    for start, total, side in zip(offset, canvas, x.shape[-2:], strict=True):
        scale = side / total
        length = max(round(-(-(total - start) // step) * scale + 0.499), 1)
        index.append((int(start * scale) + step * torch.arange(length, device=x.device)).clamp(max=side - 1))
    rows, columns = index
    return x[..., rows[:, None], columns]


def blurred(x: Tensor, size: int, sigma: float, circular: bool = False) -> Tensor:
    """(B, C, H, W) under a Gaussian of `size` cells, zero beyond the border; each image's mean and deviation stay its own."""
    wide = torch.promote_types(x.dtype, torch.float32)
    i = torch.arange(size, device=x.device, dtype=wide) - (size - 1) / 2
    kernel = torch.exp(-(i**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    y, half = x.to(wide), size // 2
    mode = "circular" if circular else "constant"
    y = F.conv2d(F.pad(y, (half, half, 0, 0), mode), kernel[:, :, None], groups=x.shape[1])
    y = F.conv2d(F.pad(y, (0, 0, half, half), mode), kernel[..., None], groups=x.shape[1])
    whole = dict(dim=(1, 2, 3), keepdim=True)
    deviation, mean = torch.std_mean(x.to(wide), **whole)
    blurred_deviation, blurred_mean = torch.std_mean(y, **whole)
    return ((y - blurred_mean) / blurred_deviation.clamp(min=1e-12) * deviation + mean).to(x.dtype)
