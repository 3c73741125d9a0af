"""What a UNet is told of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def text_encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The pipeline's tokenizers and text encoders: one pair, two in SDXL."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    return [*pairs, (pipe.tokenizer_2, pipe.text_encoder_2)] if hasattr(pipe, "text_encoder_2") else pairs


@torch.no_grad()
def condition(pipe: Any, prompt: str, width: int, height: int) -> dict[str, Tensor]:
    """What the UNet is told of a prompt for an image of this size, each of one row; SDXL is told sizes and crop too."""
    given = dict(prompt=prompt, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    text, _, *pooled = pipe.encode_prompt(**given)
    if not pooled:
        return {"encoder_hidden_states": text}
    pooled = pooled[0]
    if not prompt and pipe.config.force_zeros_for_empty_prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=text.device)
    return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": sizes}
