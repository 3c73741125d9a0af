"""Where a bank's latents come from: the teacher draws them, once, or a folder of images or a file of latents has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from sd_hyena.distil.bank import Bank, captions_of
from sd_hyena.distil.counted import PictureCost
from sd_hyena.distil.kept import Kept
from sd_hyena.distil.pieces import Piece
from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_picture
from sd_hyena.files.text import read_text
from sd_hyena.files.weights import read_weights
from sd_hyena.models.condition import condition
from sd_hyena.models.latents import encoded, resized
from sd_hyena.models.vae import vae_sha256
from sd_hyena.options.shown_hashes import shown_hashes
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import Work, work

ON_A_GPU = 4  # pictures drawn at once if nobody says how many; on a CPU one: more take no less time each
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Source:
    """Where the latents of `config.data` come from: `kept` on disk if making them is slow, with a caption for each."""

    kept: Kept | None
    captions: list[str]

    @property
    def missing(self) -> int:
        """How many pictures have yet to be made."""
        return self.kept.missing if self.kept else 0

    @classmethod
    def missing_of(cls, config: TrainConfig, prompts: list[str], model_sha256: str, cache: Path) -> int:
        """The same, of the run that a dry one tries: a folder's pictures are counted then, not read. Raises BadInput."""
        if config.dry_run and config.data == "images":
            return len(pictures_of(config.data_path))
        return cls.of(config, prompts, model_sha256, cache).missing

    @classmethod
    def of(cls, config: TrainConfig, prompts: list[str], model_sha256: str, cache: Path) -> Source:
        """Raises BadInput."""
        size, shape = ("data", "width", "height"), (4, config.height // 8, config.width // 8)
        if config.data == "latents":
            return cls(None, captions_of(prompts, len(_read_latents(config))))
        if config.data == "images":
            pictures = _encoded_of(config)
            what: dict[str, Any] = {name: getattr(config, name) for name in size}
            what["pictures"] = list(shown_hashes(list(pictures), f"{len(pictures)} pictures are read for their hashes"))
            captions = list(pictures.values())
        else:
            what = {name: getattr(config, name) for name in (*size, "num_samples", "sample_steps", "cfg_scale")}
            captions = captions_of(prompts, config.num_samples)
        if what["data"] == "noise":
            what["data"] = "samples"  # for validation
        if config.vae:
            what["vae"] = vae_sha256(config.vae)
        key = hashlib.sha256(json.dumps([what, captions, model_sha256]).encode()).hexdigest()[:16]
        path = cache / f"{what['data']}-{config.width}x{config.height}-{key}.safetensors"
        return cls(Kept(path, len(captions), shape, config.data == "trajectories"), captions)


def make_bank(pipe: Any, config: TrainConfig, prompts: list[str], model_sha256: str, cache: Path) -> Bank:
    """The bank that `config.data` asks for; what takes long to make is made once and kept in `cache`.

    The pipeline's scheduler must be DDIM: its states are what the UNet sees, unscaled. Raises BadInput.
    """
    source = Source.of(config, prompts, model_sha256, cache)
    captions = source.captions
    if source.kept is None:
        return _with_text(pipe, config, _read_latents(config), captions)
    n, at_once = len(captions), config.draw_at_once or (1 if pipe.device.type == "cpu" else ON_A_GPU)
    draws = f"the teacher draws {n} pictures, {config.sample_steps} steps each"
    if config.data == "images":
        at_once, what, make = 1, f"{n} pictures are encoded", partial(_encode, pipe, config)
    elif config.data == "trajectories":
        what, make = draws, partial(_draw_states, pipe, config, captions)
    else:
        what, make = draws, partial(_draw_images, pipe, config, captions)
    made = source.kept.get(make, at_once, f"{what}, at {config.width}x{config.height}")
    bank = _with_text(pipe, config, made["latents"], captions)
    if "timesteps" in made:
        picture = made["picture"]
        bank = Bank(bank.latents, bank.text, bank.prompt[picture], made["timesteps"], picture)
    return bank


@torch.no_grad()
def _with_text(pipe: Any, config: TrainConfig, latents: Tensor, captions: list[str]) -> Bank:
    rows, told = list(dict.fromkeys(captions)), []
    with work(f"{len(rows)} captions are encoded", len(rows)) as shown:
        for i, prompt in enumerate([*rows, ""]):
            told.append(condition(pipe, prompt, config.width, config.height))
            shown.to(i)
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


def _step_by_step(
    shown: Work, rows: range, steps: int, share: float = 1.0, note: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """What a pipeline calls after each step of these pictures; all of them are this share of the work."""
    before = shown.done

    def after(pipe, step, _timestep, tensors):
        shown.to(before + share * len(rows) * (step + 1) / steps)
        if note:
            note(pipe, step, tensors["latents"])
        return tensors

    return after


def _draw_images(pipe: Any, config: TrainConfig, captions: list[str], rows: range, shown: Work) -> list[Piece]:
    """x0 latents at the model's native size; for another size decoded, resized in pixels and encoded again."""
    after = _step_by_step(shown, rows, config.sample_steps, PictureCost(pipe, config).share_of_steps)
    x0 = pipe(**_arguments(pipe, config, captions, rows), callback_on_step_end=after).images
    return [{"latents": resized(pipe, x[None], config.width, config.height).cpu()} for x in x0]


def _draw_states(pipe: Any, config: TrainConfig, captions: list[str], rows: range, shown: Work) -> list[Piece]:
    """The states x_t met while sampling with guidance at the asked size, from pure noise on."""
    shape = (4, config.height // 8, config.width // 8)
    first = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in rows])
    pipe.scheduler.set_timesteps(config.sample_steps)
    states, timesteps = [first], [int(pipe.scheduler.timesteps[0])]

    def note(pipe: Any, step: int, latents: Tensor) -> None:
        if step + 1 < len(pipe.scheduler.timesteps):
            states.append(latents.float().cpu())
            timesteps.append(int(pipe.scheduler.timesteps[step + 1]))

    after = _step_by_step(shown, rows, config.sample_steps, note=note)
    asked = dict(width=config.width, height=config.height, callback_on_step_end=after)
    pipe(**_arguments(pipe, config, captions, rows), **asked, latents=first.to(pipe.device, pipe.unet.dtype))
    return [{"latents": x, "timesteps": torch.tensor(timesteps)} for x in torch.stack(states, dim=1)]


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


def _encoded_of(config: TrainConfig) -> dict[Path, str]:
    """The pictures that are encoded: of a dry run the first few."""
    few = config.num_samples if config.dry_run else None
    return dict(islice(pictures_of(config.data_path).items(), few))


def _encode(pipe: Any, config: TrainConfig, rows: range, shown: Work) -> list[Piece]:
    """The latents of a folder's pictures, cropped to the asked shape."""
    paths, pieces = list(_encoded_of(config)), []
    for i in rows:
        try:
            image = ImageOps.fit(read_picture(paths[i]), (config.width, config.height))
        except BadInput as error:
            raise BadInput(f"data_path: {error}") from None
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        pieces.append({"latents": encoded(pipe, pixels).cpu()})
    return pieces


def _read_latents(config: TrainConfig) -> Tensor:
    latents = read_weights(config.data_path)[0].get("latents")
    wanted = (4, config.height // 8, config.width // 8)
    if latents is None or latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        found = "no tensor `latents`" if latents is None else tuple(latents.shape)
        raise BadInput(
            f"data_path={config.data_path!r} has {found}; expected `latents` (N, {wanted[0]}, {wanted[1]}, {wanted[2]})"
        )
    return latents
