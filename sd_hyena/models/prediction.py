"""What a UNet predicts, noise or velocity, and the noise that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import shapes_of
from sd_hyena.models.condition import condition
from sd_hyena.models.single_file import PURE_NOISE, configuration_of


def noise_levels(path: Path) -> dict[str, Any]:
    """The configuration of a model's scheduler, without the model. Raises BadInput."""
    folder = path if path.is_dir() else configuration_of(path)
    source = folder / "scheduler" / "scheduler_config.json"
    try:
        levels = json.loads(source.read_text("utf-8"))
        levels["rescale_betas_zero_snr"] = bool(levels.get("rescale_betas_zero_snr"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"model {str(path)!r}: {str(source)!r} cannot be read ({str(error)[:160]})") from None
    if path.is_file() and PURE_NOISE in shapes_of(path):
        levels["rescale_betas_zero_snr"] = True
    return levels


@torch.no_grad()
def predicts_velocity(pipe: Any) -> bool:
    """Whether the UNet answers pure noise with something else than that noise.

    At the last timestep a model of epsilon gives its input back; a velocity is nearly the picture there, its sign
    turned. A single file does not say which it is.
    """
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(pipe.device, pipe.unet.dtype)
    told = condition(pipe, "", 8 * 32, 8 * 32)
    text = told.pop("encoder_hidden_states")
    last = torch.tensor([pipe.scheduler.config.num_train_timesteps - 1], device=pipe.device)
    prediction = pipe.unet(noise, last, text, added_cond_kwargs=told).sample
    return bool(F.cosine_similarity(prediction.float().flatten(), noise.float().flatten(), dim=0) < 0.5)


def tell_prediction(pipe: Any) -> None:
    velocity = predicts_velocity(pipe)
    pipe.scheduler.register_to_config(prediction_type="v_prediction" if velocity else "epsilon")
    if pipe.unet.config.cross_attention_dim == 1024 and not velocity:  # Stable Diffusion 2's base, of 512 px
        pipe.unet.register_to_config(sample_size=64)


def noiser(pipe: Any) -> Any:
    """A scheduler that adds noise as the model was trained with, whatever samples."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def as_noise(scheduler: Any, prediction: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
    """The noise that a prediction (B, h w, C) foresees in latents (1, C, h, w) at a timestep (1,)."""
    if scheduler.config.prediction_type != "v_prediction":
        return prediction
    alpha = scheduler.alphas_cumprod[timestep.cpu()].to(prediction)
    return alpha.sqrt() * prediction + (1 - alpha).sqrt() * latents.to(prediction).flatten(2).mT
