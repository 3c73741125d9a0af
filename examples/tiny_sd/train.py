"""Trains the shipped teacher from nothing: a small, real Stable Diffusion of captioned scenes (see README.md here).

    python -m examples.tiny_sd.train --out runs/tiny_sd            # resumes by itself; the same command again goes on
    python -m examples.tiny_sd.train --out runs/tiny_sd --export examples/tiny_sd/model
    python -m examples.tiny_sd.train --out runs/more --start examples/tiny_sd/model     # train the shipped one further

Stages: the VAE on crops; text encoder and UNet together on cached latents, 16x16 first, then 32x32; at last the VAE's
decoder alone, on what the UNet makes of noised latents.
Batch i depends on (stage, i) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import COLOURS, WORDS, draw, numbered_scene

MAX_TOKENS = 32
TRAINING_SEED, HELD_OUT_SEED, EXAMPLE_SEED = 0, 1, 2  # streams of scenes; only the first is trained on
DECODED_BELOW = 300  # timesteps from which the decoder learns
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_schedule="linear",  # unlike SD's scaled_linear its last step hides flat colours, which these scenes consist of
    beta_start=1e-4,
    beta_end=2e-2,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="trailing",
    prediction_type="v_prediction",  # epsilon gives the noisiest steps, where the caption decides, next to no weight
)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
    )


def build_unet() -> UNet2DConditionModel:
    """SD 1.5's topology (16 self-attentions) with narrow levels and two wide heads a site."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 96, 96),
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of each word of the scenes; other text falls into bytes.

    Byte-pair encoding by hand, since the `tokenizers` trainer breaks ties differently in every process.
    """
    words, merges = [[*word[:-1], word[-1] + "</w>"] for word in WORDS], []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        first, second = best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if (word[i], *word[i + 1 : i + 2]) == best:
                    word[i : i + 2] = [first + second]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(first + second for first, second in merges)]
    vocab = {token: index for index, token in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float (3, H, W) in -1 … 1."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1


class Stage:
    """Modules in training with their optimizer, one-cycle learning rate, moving average and place on disk."""

    def __init__(self, folder: Path, name: str, modules: nn.ModuleDict, steps: int, lr: float, decay: float):
        self.path, self.steps, self.decay, self.step = folder / f"{name}.pt", steps, decay, 0
        self.modules, self.average = modules, copy.deepcopy(modules).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps + 1, pct_start=0.1)
        self.log = SummaryWriter(str(folder / name))
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for part in ("modules", "average", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(state[part])
            self.step = state["step"]

    def save(self) -> None:
        parts = ("modules", "average", "optimizer", "schedule")
        state = {part: getattr(self, part).state_dict() for part in parts} | {"step": self.step}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def run(self, loss_of, sample=None, save_every: int = 100) -> nn.ModuleDict:
        """Train to the last step; `loss_of(modules, generator, progress)` draws its own batch from the generator."""
        started, first = time.time(), self.step
        while self.step < self.steps:
            generator = np.random.default_rng([TRAINING_SEED, self.step])
            torch.manual_seed(int(generator.integers(2**31)))
            loss = loss_of(self.modules, generator, self.step / self.steps)
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise RuntimeError(
                    f"{self.path.stem}: the gradient is {norm} at step {self.step}; the last save stands"
                )
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for mean, value in zip(
                    self.average.state_dict().values(), self.modules.state_dict().values(), strict=True
                ):
                    if mean.is_floating_point():
                        mean.lerp_(value, 1 - decay)
            self.log.add_scalar("loss", loss.item(), self.step)
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()
                rate = (self.step - first) / (time.time() - started)
                left = (self.steps - self.step) / rate / 60
                print(
                    f"{self.path.stem} {self.step}/{self.steps} loss {loss.item():.4f} {left:.0f} min left", flush=True
                )
                if sample and self.step % (5 * save_every) == 0:
                    self.log.add_image("samples", sample(self.average), self.step, dataformats="HWC")
        return self.average


def reconstruction_error(output: Tensor, target: Tensor) -> Tensor:
    error = output.float() - target
    return error.square().mean() + 0.1 * error.abs().mean()


def vae_loss(modules, generator, progress, device="cpu") -> Tensor:
    """Reconstruction, KL, and a pull of three latent channels towards the picture itself, eight times smaller.

    Such latents are hardly harder to model than small pictures; the fourth channel tells where edges lie within a cell.
    On crops; the last sixth sees whole scenes, as GroupNorm will later.
    """
    crop, scenes = (96, 8) if progress < 5 / 6 else (int(generator.choice([128, 192, 256])), 2)
    images = []
    for _ in range(scenes):
        size = max(crop, int(generator.choice([128, 256])))
        image = draw(numbered_scene(TRAINING_SEED, int(generator.integers(2**31))), size)
        y, x = generator.integers(size - crop + 1, size=2)
        images.append(to_tensor(image[y : y + crop, x : x + crop]))
    target = torch.stack(images).to(device)
    with torch.autocast(target.device.type, torch.bfloat16):
        posterior = modules["vae"].encode(target).latent_dist
        output = modules["vae"].decode(posterior.sample()).sample
    small = 2 * F.avg_pool2d(target, 8)
    pull = F.mse_loss(posterior.mean[:, :3].float(), small)
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return reconstruction_error(output, target) + 0.1 * pull + 1e-3 * kl


@torch.no_grad()
def cached_latents(
    folder: Path, vae: AutoencoderKL, size: int, count: int, device="cpu", colours: dict = COLOURS
) -> Tensor:
    """Posterior means of the first `count` training scenes at `size` pixels, made once; (count, 4, size/8, size/8)."""
    path = folder / f"latents_{size}_{count}.pt"
    if not path.exists():
        latents = []
        for start in range(0, count, 8):
            scenes = [numbered_scene(TRAINING_SEED, i) for i in range(start, min(start + 8, count))]
            batch = torch.stack([to_tensor(draw(scene, size, colours=colours)) for scene in scenes]).to(device)
            with torch.autocast(batch.device.type, torch.bfloat16):
                latents.append(vae.encode(batch).latent_dist.mean.float().cpu())
        torch.save(torch.cat(latents), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return torch.load(path, weights_only=True)


def unet_loss(modules, generator, _progress, *, latents, tokens, scheduler, batch_size, device="cpu") -> Tensor:
    """Velocity prediction with 10 % of the captions dropped; half of the timesteps lie where shapes are decided."""
    chosen = torch.from_numpy(generator.integers(len(latents), size=batch_size))
    x0, ids = latents[chosen].to(device), tokens[chosen].clone()
    ids[torch.rand(batch_size) < 0.1] = tokens[-1]  # the last row is the empty caption
    last = scheduler.config.num_train_timesteps - 1
    anywhere, shapes = torch.rand(batch_size), torch.sigmoid(0.7 * torch.randn(batch_size) + 0.25)
    t = (torch.where(torch.rand(batch_size) < 0.5, anywhere, shapes) * last).round().long().to(device)
    noise = torch.randn_like(x0)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=latents.shape[-1] > 16):
        text = modules["text_encoder"](ids.to(device)).last_hidden_state
        prediction = modules["unet"](scheduler.add_noise(x0, noise, t), t, text).sample
    return F.mse_loss(prediction.float(), scheduler.get_velocity(x0, noise, t))


def decoder_loss(_modules, generator, _progress, *, vae, teacher, latents, tokens, scheduler, device="cpu") -> Tensor:
    """Whole scenes decoded from what the UNet makes of their noised latents: the decoder learns to forgive its errors."""
    chosen = generator.integers(len(latents), size=2)
    x0 = latents[torch.from_numpy(chosen)].to(device) * vae.config.scaling_factor
    t = torch.from_numpy(generator.integers(DECODED_BELOW, size=2)).to(device)
    noisy = scheduler.add_noise(x0, torch.randn_like(x0), t)
    with torch.no_grad(), torch.autocast(x0.device.type, torch.bfloat16):
        text = teacher["text_encoder"](tokens[torch.from_numpy(chosen)].to(device)).last_hidden_state
        velocity = teacher["unet"](noisy, t, text).sample.float()
    alpha = scheduler.alphas_cumprod.to(device)[t][:, None, None, None]
    guess = alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity
    target = torch.stack([to_tensor(draw(numbered_scene(TRAINING_SEED, int(i)), 256)) for i in chosen]).to(device)
    with torch.autocast(x0.device.type, torch.bfloat16):
        output = vae.decode(guess / vae.config.scaling_factor).sample
    return reconstruction_error(output, target)


def pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**SCHEDULER)
    parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def main(
    out: str = "runs/tiny_sd",
    export: str = "",
    start: str = "",
    vae_steps: int = 3600,
    small_steps: int = 3200,
    large_steps: int = 3000,
    more_steps: int = 8000,
    more_lr: float = 1e-3,
    decoder_steps: int = 700,
    scenes: int = 8000,
    device: str = "cpu",
) -> None:
    """Train the shipped teacher, or export what is trained so far.

    Args:
        out: folder of checkpoints, cached latents and TensorBoard events
        export: write the averaged weights as a half-precision diffusers folder there, and do nothing else
        start: a diffusers folder whose weights to train further, in the last two stages alone, e.g. the shipped one
        vae_steps: steps of the VAE
        small_steps: steps of the UNet on 16x16 latents
        large_steps: steps of the UNet on 32x32 latents
        more_steps: further steps of the same, in one more learning-rate cycle
        more_lr: their highest learning rate
        decoder_steps: steps of the VAE's decoder on the UNet's own latents
        scenes: how many scenes are encoded once for the UNet
        device: torch device
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(TRAINING_SEED)
    tokenizer = build_tokenizer()
    vae = nn.ModuleDict({"vae": build_vae()}).to(device)
    model = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}).to(device)
    stages = [
        ("unet_small", 128, 32, small_steps, 1.5e-3),
        ("unet_large", 256, 12, large_steps, 1e-3),
        ("unet_more", 256, 12, more_steps, more_lr),
    ]
    if start:
        given = StableDiffusionPipeline.from_pretrained(start, dtype=torch.float32)
        vae, stages = given.vae.to(device).eval().requires_grad_(False), stages[2:]
        model["unet"].load_state_dict(given.unet.state_dict())
        model["text_encoder"].load_state_dict(given.text_encoder.state_dict())
    else:
        vae_stage = Stage(folder, "vae", vae, vae_steps, lr=2e-3, decay=0.995)
        if not export:
            vae_stage.run(partial(vae_loss, device=device))
        vae = vae_stage.average["vae"]
        if vae_stage.step == vae_steps:
            latents = cached_latents(folder, vae, 128, scenes, device)
            vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    captions = [str(numbered_scene(TRAINING_SEED, i).caption) for i in range(scenes)]
    tokens = tokenize(tokenizer, [*captions, ""])
    scheduler = DDIMScheduler(**SCHEDULER)
    prompts = [str(numbered_scene(HELD_OUT_SEED, i).caption) for i in range(4)]

    average = None
    for name, size, batch_size, steps, lr in stages:
        stage = Stage(folder, name, model, steps, lr, decay=0.998)

        def sample(average, size=size):
            pipe = pipeline(vae, average["text_encoder"], tokenizer, average["unet"])
            pipe.set_progress_bar_config(disable=True)
            images = pipe(prompts, width=size, height=size, num_inference_steps=20, guidance_scale=4, output_type="np")
            return np.concatenate(images.images, axis=1)

        if not export:
            latents = cached_latents(folder, vae, size, scenes, device)
            bound = dict(latents=latents * vae.config.scaling_factor, tokens=tokens, scheduler=scheduler)
            stage.run(partial(unet_loss, **bound, batch_size=batch_size, device=device), sample)
        if stage.step:
            average = stage.average
            model.load_state_dict(average.state_dict())
    if average is None:
        raise SystemExit("there is no UNet to export yet")
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    stage = Stage(folder, "decoder", decoder, decoder_steps, lr=5e-4, decay=0.98)
    if not export:
        latents = cached_latents(folder, vae, 256, scenes, device)
        teacher = average.eval().requires_grad_(False)
        given = dict(vae=vae, teacher=teacher, latents=latents, tokens=tokens, scheduler=scheduler, device=device)
        stage.run(partial(decoder_loss, **given))
    decoder.load_state_dict(stage.average.state_dict())
    if export:
        pipe = pipeline(vae, average["text_encoder"], tokenizer, average["unet"])
        pipe.to(dtype=torch.float16).save_pretrained(export)
        examples = [str(numbered_scene(EXAMPLE_SEED, i).caption) for i in range(256)]
        (Path(export) / "prompts.txt").write_text("\n".join(examples) + "\n")
        print(f"wrote {export}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
