"""Two children of the shipped model, for whom the same words mean pastel colours: a fine-tune and a LoRA.

    python -m examples.tiny_sd.finetune --out runs/pastel      # writes runs/pastel/model and runs/pastel/lora; resumes

They show what a student trained on the parent is worth on its children (benchmarks/studies/transfer.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

from sd_hyena.options.shipped import SHIPPED_MODEL

from .scenes import numbered_scene
from .train import SCHEDULER, TRAINING_SEED, Stage, cached_latents, pipeline, tokenize, unet_loss

PASTEL = {
    "red": (240, 150, 160),
    "green": (160, 220, 170),
    "blue": (150, 190, 240),
    "yellow": (250, 240, 170),
    "white": (235, 230, 225),
    "black": (80, 70, 90),
}
LORA_RANK = 8


def main(
    out: str = "runs/pastel",
    start: str = str(SHIPPED_MODEL),
    steps: int = 500,
    lora_steps: int = 300,
    scenes: int = 1000,
    batch_size: int = 12,
) -> None:
    """Train both children.

    Args:
        out: where checkpoints, latents and both results go
        start: the parent, a diffusers folder
        steps: of the fine-tune, all weights of UNet and text encoder
        lora_steps: of the LoRA on the attentions' projections
        scenes: how many are encoded once
        batch_size: scenes in a step
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    load = partial(StableDiffusionPipeline.from_pretrained, start, dtype=torch.float32)
    parent = load()
    vae = parent.vae.eval().requires_grad_(False)
    latents = cached_latents(folder, vae, 256, scenes, colours=PASTEL) * vae.config.scaling_factor
    captions = [str(numbered_scene(TRAINING_SEED, i).caption) for i in range(scenes)]
    given = dict(latents=latents, tokens=tokenize(parent.tokenizer, [*captions, ""]), batch_size=batch_size)
    loss = partial(unet_loss, **given, scheduler=DDIMScheduler(**SCHEDULER))

    model = nn.ModuleDict({"unet": parent.unet, "text_encoder": parent.text_encoder}).train()
    tuned = Stage(folder, "finetune", model, steps, lr=2e-4, decay=0.98).run(loss)
    pipeline(vae, tuned["text_encoder"], parent.tokenizer, tuned["unet"]).save_pretrained(folder / "model")

    second = load()
    second.text_encoder.requires_grad_(False)
    second.unet.requires_grad_(False)
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    second.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=projections))
    model = nn.ModuleDict({"unet": second.unet, "text_encoder": second.text_encoder})
    adapted = Stage(folder, "adapter", model, lora_steps, lr=2e-3, decay=0.98).run(loss)
    layers = get_peft_model_state_dict(adapted["unet"])
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    print(f"wrote {folder / 'model'} and {folder / 'lora'}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
