"""Small models of random weights by layout, as diffusers folders."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from examples.tiny_sd.train import MAX_TOKENS
from sd_hyena.options.shipped import SHIPPED_MODEL


@pytest.fixture(scope="session")
def tiny_sd21(shared_pipe):
    """Stable Diffusion 2's kind: velocity, OpenCLIP's text encoder, linear projections, heads per level; random."""
    tokenizer = shared_pipe.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=[2, 4],
            cross_attention_dim=48,
            use_linear_projection=True,
            norm_num_groups=8,
        )
        shape = dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu"
        )
        shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, projection_dim=48)
        tokens = dict(pad_token_id=0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        text_encoder = CLIPTextModel(CLIPTextConfig(**shape, **tokens))
    return StableDiffusionPipeline(
        vae=shared_pipe.vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def folders(tiny_sd21, tiny_sdxl, tmp_path_factory):
    """Diffusers folders by layout."""
    root = tmp_path_factory.mktemp("folders")
    scheduler, tiny_sdxl.scheduler = tiny_sdxl.scheduler, EulerDiscreteScheduler(beta_schedule="scaled_linear")
    for name, pipe in (("sd21", tiny_sd21), ("sdxl", tiny_sdxl)):
        pipe.save_pretrained(root / name)
    tiny_sdxl.scheduler = scheduler
    return {"sd15": SHIPPED_MODEL, "sd21": root / "sd21", "sdxl": root / "sdxl"}
