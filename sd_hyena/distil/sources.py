"""Where a bank's latents come from: the teacher draws them, once, or a folder of images or a file of latents has them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import save_file
from torch import Tensor

from sd_hyena.distil.bank import Bank, captions_of
from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.picture import read_picture
from sd_hyena.files.text import read_text
from sd_hyena.files.weights import read_weights
from sd_hyena.large.tiling import batches
from sd_hyena.models.condition import condition
from sd_hyena.models.latents import encoded, resized
from sd_hyena.models.vae import vae_sha256
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.ranks import say

DRAWN_AT_ONCE = 8
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")


def make_bank(pipe: Any, config: TrainConfig, prompts: list[str], model_sha256: str, cache: Path) -> Bank:
    """The bank that `config.data` asks for; what the teacher has to draw is drawn once and cached.

    The pipeline's scheduler must be DDIM: its states are what the UNet sees, unscaled. Raises BadInput.
    """
    if config.data == "images":
        latents, captions = _encode_folder(pipe, config)
        return _with_text(pipe, config, latents, captions)
    if config.data == "latents":
        latents = _read_latents(config)
        return _with_text(pipe, config, latents, captions_of(prompts, len(latents)))
    what = {
        name: getattr(config, name) for name in ("data", "width", "height", "num_samples", "sample_steps", "cfg_scale")
    }
    if what["data"] == "noise":
        what["data"] = "samples"  # for validation
    if config.vae:
        what["vae"] = vae_sha256(config.vae)
    captions = captions_of(prompts, config.num_samples)
    key = hashlib.sha256(json.dumps([what, captions, model_sha256]).encode()).hexdigest()[:16]
    path = cache / f"{what['data']}-{config.width}x{config.height}-{key}.safetensors"
    if not _is_whole(path, config, len(captions)):
        draw = _draw_states if config.data == "trajectories" else _draw_images
        drawn = draw(pipe, config, captions)
        if not drawn["latents"].isfinite().all():
            raise FloatingPointError(f"the teacher drew NaN in {pipe.unet.dtype}; use --dtype bfloat16 or float32")
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in drawn.items()}, temporary)
    drawn = read_weights(path)[0]
    bank = _with_text(pipe, config, drawn["latents"], captions)
    if "timesteps" in drawn:
        picture = drawn["picture"]
        bank = Bank(bank.latents, bank.text, bank.prompt[picture], drawn["timesteps"], picture)
    return bank


def _is_whole(cache: Path, config: TrainConfig, pictures: int) -> bool:
    """Whether what was drawn before is there; damaged, it is as good as nothing."""
    if not cache.exists():
        return False
    wanted = (4, config.height // 8, config.width // 8)
    try:
        drawn, rows = read_weights(cache)[0], torch.arange(pictures)
        if config.data == "trajectories":
            rows, timesteps = drawn["picture"], drawn["timesteps"]
            if len(timesteps) != len(rows) or sorted(set(rows.tolist())) != list(range(pictures)):
                raise BadInput("its states are not those of its pictures")
        if drawn["latents"].shape != (len(rows), *wanted) or not drawn["latents"].isfinite().all():
            raise BadInput("it does not hold what was drawn")
        return True
    except Exception as error:  # of a file that something else wrote there
        say(f"note: {str(cache)!r} is damaged ({str(error)[:160]}); the teacher draws it again")
        return False


@torch.no_grad()
def _with_text(pipe: Any, config: TrainConfig, latents: Tensor, captions: list[str]) -> Bank:
    rows = list(dict.fromkeys(captions))
    told = [condition(pipe, prompt, config.width, config.height) for prompt in [*rows, ""]]
    text = {name: torch.cat([one[name].float().cpu() for one in told]) for name in told[0]}
    return Bank(latents.float(), text, torch.tensor([rows.index(caption) for caption in captions]))


def _arguments(pipe: Any, config: TrainConfig, captions: list[str], rows: range) -> dict[str, Any]:
    """Sample i is drawn from caption i with seed i, whatever the batch."""
    return dict(
        prompt=[captions[i] for i in rows],
        generator=[torch.Generator().manual_seed(i) for i in rows],
        num_inference_steps=config.sample_steps,
        guidance_scale=config.cfg_scale,
        output_type="latent",
    )


def _draw_images(pipe: Any, config: TrainConfig, captions: list[str]) -> dict[str, Tensor]:
    """x0 latents at the model's native size; for another size decoded, resized in pixels and encoded again."""
    latents = []
    for rows in batches(range(config.num_samples), DRAWN_AT_ONCE):
        x0 = pipe(**_arguments(pipe, config, captions, rows)).images
        latents += [resized(pipe, x[None], config.width, config.height).cpu() for x in x0]
    return {"latents": torch.cat(latents)}


def _draw_states(pipe: Any, config: TrainConfig, captions: list[str]) -> dict[str, Tensor]:
    """The states x_t met while sampling with guidance at the asked size, from pure noise on."""
    latents, timesteps, picture = [], [], []
    shape = (4, config.height // 8, config.width // 8)

    def note(x: Tensor, timestep: Tensor) -> None:
        latents.append(x.float().cpu())
        timesteps.extend([int(timestep)] * len(x))
        picture.extend(rows)

    def after(_pipe, step, _timestep, tensors):
        if step + 1 < len(pipe.scheduler.timesteps):
            note(tensors["latents"], pipe.scheduler.timesteps[step + 1])
        return tensors

    for rows in batches(range(config.num_samples), DRAWN_AT_ONCE):
        given = _arguments(pipe, config, captions, rows)
        first = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in rows])
        pipe.scheduler.set_timesteps(config.sample_steps)
        note(first, pipe.scheduler.timesteps[0])
        first = first.to(pipe.device, pipe.unet.dtype)
        pipe(**given, latents=first, width=config.width, height=config.height, callback_on_step_end=after)
    return {"latents": torch.cat(latents), "timesteps": torch.tensor(timesteps), "picture": torch.tensor(picture)}


def pictures_of(folder: str) -> dict[Path, str]:
    """The pictures of a folder, each with its caption, what stands in `name.txt` beside it. Raises BadInput."""
    found = {}
    for path in sorted(Path(folder).glob("*")):
        hidden = path.name.startswith(".")  # macOS leaves ._name.png beside name.png
        if path.suffix.lower() in PICTURES and path.is_file() and not hidden:
            caption = path.with_suffix(".txt")
            try:
                found[path] = read_text(caption).strip() if caption.is_file() else ""
            except BadInput as error:
                raise BadInput(f"data_path: {error}") from None
    if not found:
        raise BadInput(f"data_path={folder!r} holds no picture ({', '.join(PICTURES)})")
    return found


def _encode_folder(pipe: Any, config: TrainConfig) -> tuple[Tensor, list[str]]:
    """The latents of a folder's pictures, cropped to the asked shape, and their captions."""
    pictures, latents = pictures_of(config.data_path), []
    for path in pictures:
        try:
            image = ImageOps.fit(read_picture(path), (config.width, config.height))
        except BadInput as error:
            raise BadInput(f"data_path: {error}") from None
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents.append(encoded(pipe, pixels).cpu())
    return torch.cat(latents), list(pictures.values())


def _read_latents(config: TrainConfig) -> Tensor:
    latents = read_weights(config.data_path)[0].get("latents")
    wanted = (4, config.height // 8, config.width // 8)
    if latents is None or latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        found = "no tensor `latents`" if latents is None else tuple(latents.shape)
        raise BadInput(
            f"data_path={config.data_path!r} has {found}; expected `latents` (N, {wanted[0]}, {wanted[1]}, {wanted[2]})"
        )
    return latents
