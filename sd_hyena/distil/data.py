"""What students are trained on: states of the teacher, an endless stream in which sample i depends on (seed, i) alone.

A bank holds latents that were made once; a state is one of them, noised to a random timestep, with or without its
caption. The DataModule turns batches of states into lessons by asking the teacher.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from sd_hyena.distil.stages import Layerwise, Stage
from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.picture import read_picture
from sd_hyena.files.weights import read_weights
from sd_hyena.large.tiling import batches
from sd_hyena.models.condition import condition
from sd_hyena.models.example_prompts import split_prompts
from sd_hyena.models.latents import encoded, resized
from sd_hyena.models.vae import vae_sha256
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.teacher import Condition

VALIDATION_SEED = 2**33  # outside what a user can choose
DRAWN_AT_ONCE = 8
GUIDANCE_SCALES = 1.0, 10.0
UNCONDITIONAL_SHARE = 0.5  # guidance calls the UNet as often without the caption as with it


@dataclass(frozen=True)
class Bank:
    """`latents` (N, 4, h, w), scaled as the UNet sees them; `text` {name: (P, ...)}, its last row the empty prompt.

    `prompt` (N,) is the row of each latent's caption. With `timesteps` (N,) the latents are noisy states as they are,
    several of one picture, whose number is in `picture` (N,).
    """

    latents: Tensor
    text: Condition
    prompt: Tensor
    timesteps: Tensor | None = None
    picture: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def split(self) -> tuple[Bank, Bank]:
        """The pictures to train on and the last ones, for validation; a bank of one picture serves as both."""
        picture = torch.arange(len(self)) if self.picture is None else self.picture
        pictures = int(picture.max()) + 1
        n = trained_pictures(pictures)

        def part(rows: Tensor) -> Bank:
            chosen = [None if x is None else x[rows] for x in (self.timesteps, self.picture)]
            return Bank(self.latents[rows], self.text, self.prompt[rows], *chosen)

        return part(picture < n), part(picture >= n if pictures > 1 else picture >= 0)


def trained_pictures(pictures: int) -> int:
    """How many of so many pictures are trained on: three quarters, the first ones."""
    return min(max(1, round(pictures * 0.75)), max(1, pictures - 1))


def captions_of(prompts: list[str], pictures: int) -> list[str]:
    """A caption for each picture; those held out have captions that are not trained on."""
    train, held_out = split_prompts(prompts)
    n = trained_pictures(pictures)
    return [train[i % len(train)] for i in range(n)] + [held_out[i % len(held_out)] for i in range(pictures - n)]


class Numbered(IterableDataset):
    """An endless stream: `sample(i)` from i = `start` on, `block` of every `stride` numbers."""

    start, block, stride = 0, 1, 1

    def part(self, start: int, block: int = 1, stride: int = 1) -> Numbered:
        part = copy.copy(self)
        part.start, part.block, part.stride = start, block, stride
        return part

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.sample(i) for first in count(self.start, self.stride) for i in range(first, first + self.block))


class States(Numbered):
    """The endless stream of {"latents" (4, h, w), "timestep" (), "text", "empty", "guidance" ()}.

    `text` is the caption's condition, or in `unconditional` of the samples the empty one, which `empty` always is.
    `guidance` is a scale to combine the two with.
    """

    def __init__(self, bank: Bank, scheduler: Any, seed: int, unconditional: float = UNCONDITIONAL_SHARE):
        self.bank, self.scheduler, self.seed, self.unconditional = bank, scheduler, seed, unconditional

    def sample(self, i: int, timestep: int | None = None) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, i])
        noise_source = torch.Generator().manual_seed(int(rng.integers(2**62)))
        n = int(rng.integers(len(self.bank)))
        last = self.scheduler.config.num_train_timesteps
        t = int(rng.integers(last)) if timestep is None else timestep
        latents = self.bank.latents[n]
        if self.bank.timesteps is None:
            noise = torch.randn(latents.shape, generator=noise_source)
            latents = self.scheduler.add_noise(latents[None], noise[None], torch.tensor([t]))[0]
        else:
            t = int(self.bank.timesteps[n])
        row = -1 if rng.random() < self.unconditional else int(self.bank.prompt[n])
        return {
            "latents": latents,
            "timestep": torch.tensor(t),
            "text": {name: rows[row] for name, rows in self.bank.text.items()},
            "empty": {name: rows[-1] for name, rows in self.bank.text.items()},
            "guidance": torch.tensor(rng.uniform(*GUIDANCE_SCALES), dtype=torch.float32),
        }


class GaussianTokens(Numbered):
    """The ancestor's inputs: standard normal tokens for each site. A baseline; attention is near uniform on them."""

    def __init__(self, shapes: dict[str, tuple[int, int]], seed: int):
        self.shapes, self.seed = shapes, seed

    def sample(self, i: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, i]).integers(2**62)))
        return {name: torch.randn(shape, generator=source) for name, shape in self.shapes.items()}


class Lessons(L.LightningDataModule):
    """Batches of a stage's lessons, given on the device where the students are; in validation of {site: Activation}."""

    def __init__(self, stage: Stage, scheduler: Any, bank: Bank, config: TrainConfig, validation_size: int = 16):
        super().__init__()
        self.stage, self.teacher, self.scheduler, self.config = stage, stage.teacher, scheduler, config
        self.validation_size = validation_size
        self.micro_batch_size = config.micro_batch_size or config.batch_size // config.processes
        self.training_bank, self.validation_bank = bank.split()
        self.latent_size = tuple(bank.latents.shape[-2:])

    @property
    def accumulate(self) -> int:
        """Micro-batches in a step, on each device."""
        return self.config.batch_size // self.config.processes // self.micro_batch_size

    def halve(self) -> bool:
        """Halve the micro-batch to a divisor of the batch; False if it is 1 already."""
        share = self.config.batch_size // self.config.processes
        smaller = [n for n in range(1, self.micro_batch_size // 2 + 1) if share % n == 0]
        if smaller:
            self.micro_batch_size = smaller[-1]
        return bool(smaller)

    def setup(self, stage: str) -> None:
        self.teacher.to(self.trainer.strategy.root_device)

    def stream(self) -> Numbered:
        """The training samples."""
        if self.config.data != "noise":
            unconditional = 0.0 if self.config.stage == "end_to_end" else UNCONDITIONAL_SHARE
            return States(self.training_bank, self.scheduler, self.config.seed, unconditional)
        shapes = {}
        for site in self.teacher.sites:
            h, w = site.size(*self.latent_size)
            shapes[site.name] = (h * w, site.channels)
        return GaussianTokens(shapes, self.config.seed)

    def train_dataloader(self) -> DataLoader:
        """The ranks take micro-batches in turn, so a step consists of the same ones whoever computes them."""
        size = self.micro_batch_size
        # global_step is already restored here, so a resumed run goes on with the sample after the last one used.
        start = self.trainer.global_step * self.config.batch_size + self.trainer.global_rank * size
        return DataLoader(self.stream().part(start, size, self.trainer.world_size * size), batch_size=size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out(), batch_size=min(self.micro_batch_size, self.validation_size))

    def held_out_batch(self, number: int) -> dict[str, Tensor]:
        """The states of one batch of `val_dataloader`."""
        n, size = self.validation_size, min(self.micro_batch_size, self.validation_size)
        return default_collate(self.held_out(range(number * size, min((number + 1) * size, n))))

    def held_out(self, rows: range | None = None) -> list[dict[str, Tensor]]:
        """Held-out states, at timesteps spread evenly unless they have their own; real ones whatever the data."""
        states = States(self.validation_bank, self.scheduler, VALIDATION_SEED)
        n, last = self.validation_size, self.scheduler.config.num_train_timesteps
        return [states.sample(i, timestep=int((i + 0.5) * last / n)) for i in (range(n) if rows is None else rows)]

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Any:
        if "latents" not in batch:  # tokens of the ancestor's kind
            timestep = torch.zeros(self.micro_batch_size, dtype=torch.long)
            return self.teacher.answers(batch, self.latent_size, timestep)
        if self.trainer is not None and not self.trainer.training:
            return self.teacher.activations(batch["latents"], batch["timestep"], batch["text"])
        if self.trainer is None or isinstance(self.stage, Layerwise):
            return self.stage.lesson(batch)
        with self.trainer.precision_plugin.forward_context():  # the students' UNet will run in it: no rounding to learn
            return self.stage.lesson(batch)


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
    if not path.exists():
        draw = _draw_states if config.data == "trajectories" else _draw_images
        drawn = draw(pipe, config, captions)
        if not drawn["latents"].isfinite().all():
            raise FloatingPointError(f"the teacher drew NaN in {pipe.unet.dtype}; use --dtype bfloat16 or float32")
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in drawn.items()}, temporary)
    drawn = load_file(path)
    bank = _with_text(pipe, config, drawn["latents"], captions)
    if "timesteps" in drawn:
        picture = drawn["picture"]
        bank = Bank(bank.latents, bank.text, bank.prompt[picture], drawn["timesteps"], picture)
    return bank


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


def _encode_folder(pipe: Any, config: TrainConfig) -> tuple[Tensor, list[str]]:
    """Images of a folder, cropped to the asked shape; `name.txt` beside an image is its caption."""
    folder, latents, captions = Path(config.data_path), [], []
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
            continue
        try:
            image = ImageOps.fit(read_picture(path), (config.width, config.height))
        except BadInput as error:
            raise BadInput(f"data_path: {error}") from None
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents.append(encoded(pipe, pixels).cpu())
        caption = path.with_suffix(".txt")
        captions.append(caption.read_text("utf-8").strip() if caption.is_file() else "")
    if not latents:
        raise BadInput(f"data_path={config.data_path!r} holds no .png, .jpg, .webp or .bmp image")
    return torch.cat(latents), captions


def _read_latents(config: TrainConfig) -> Tensor:
    latents = read_weights(config.data_path)[0].get("latents")
    wanted = (4, config.height // 8, config.width // 8)
    if latents is None or latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
        found = "no tensor `latents`" if latents is None else tuple(latents.shape)
        raise BadInput(
            f"data_path={config.data_path!r} has {found}; expected `latents` (N, {wanted[0]}, {wanted[1]}, {wanted[2]})"
        )
    return latents
