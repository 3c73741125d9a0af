"""Shared pieces: one thread, no network, the shipped pipeline, a way to run the commands."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sd_hyena.config import SHIPPED_MODEL
from sd_hyena.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
IN01 = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
OUT11 = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_pipe():
    return load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)


@pytest.fixture
def pipe(shared_pipe):
    """The shipped pipeline, and proof that the test put it back as it was."""
    before = {name: id(module) for name, module in shared_pipe.unet.named_modules()}
    yield shared_pipe
    assert {name: id(module) for name, module in shared_pipe.unet.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shared_pipe.unet.modules())


@pytest.fixture
def own_pipe(shared_pipe):
    """A copy, for what diffusers or peft do not undo completely."""
    return copy.deepcopy(shared_pipe)


@pytest.fixture
def unet(pipe):
    return pipe.unet


@pytest.fixture
def states():
    """Noisy latents with H != W, timesteps and condition for the shipped UNet, two samples."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 10, 14, generator=source)
    return latents, torch.tensor([700, 40]), {"encoder_hidden_states": torch.randn(2, 32, 96, generator=source)}


@pytest.fixture(scope="session")
def sd15():
    """Stable Diffusion 1.5's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="session")
def sdxl():
    """SDXL's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The bank that all these runs share."""
    from sd_hyena.training import train
    from tests.test_training import config

    folder = tmp_path_factory.mktemp("drawn")
    train(config(folder, n_steps=1))
    return folder / "out" / "cache"


@pytest.fixture
def folder(tmp_path, drawn):
    shutil.copytree(drawn, tmp_path / "out" / "cache")
    return tmp_path


def image_of(pipe, seed: int = 0, width: int = 64, height: int = 64, steps: int = 3) -> torch.Tensor:
    """A small latent image, deterministic."""
    with torch.no_grad():
        return pipe(
            "a red circle on blue",
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images


def command(*arguments, cwd=ROOT, env=None, timeout=300) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    given = [sys.executable, *map(str, arguments)]
    return subprocess.run(given, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
