"""Small random UNets of both layouts in float64, and proof that a test left nothing behind in them."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ADDED = {
    "text_embeds": torch.randn(2, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    "time_ids": torch.tensor([[280.0, 216, 0, 0, 280, 216]]).repeat(2, 1),
}


def small_unet(sdxl: bool) -> UNet2DConditionModel:
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    kinds = (plain, cross, cross) if sdxl else (cross, cross, plain)
    more = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
        transformer_layers_per_block=[1, 2, 1],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            down_block_types=tuple(kind.format("Down") for kind in kinds),
            up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
            **(more if sdxl else {}),
        )
    return unet.eval().double()


def state_of(network):
    """All that a context manager could leave behind."""
    modules = list(network.named_modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for _, m in modules]
    return [(name, id(module)) for name, module in modules], hooks, list(network.state_dict())


@pytest.fixture(scope="session")
def small():
    """By layout, as far as a pipeline is needed: UNet, scheduler, what its call needs."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    return {
        "sd": SimpleNamespace(unet=small_unet(False), scheduler=scheduler, vae_scale_factor=8, added=None),
        "sdxl": SimpleNamespace(unet=small_unet(True), scheduler=scheduler, vae_scale_factor=8, added=ADDED),
    }


@pytest.fixture(params=["sd", "sdxl"])
def some(request, small):
    """Each layout, and proof that the test put it back as it was."""
    pipe = small[request.param]
    before = state_of(pipe.unet), sorted(vars(pipe.scheduler))
    yield pipe
    assert (state_of(pipe.unet), sorted(vars(pipe.scheduler))) == before


@pytest.fixture
def sd(small):
    before = state_of(small["sd"].unet)
    yield small["sd"]
    assert state_of(small["sd"].unet) == before


def predict(pipe, x, timestep=900.0, **kwargs):
    rows = len(x)
    added = {name: value[:rows] for name, value in (pipe.added or {}).items()} or None
    with torch.no_grad():
        return pipe.unet(x, timestep, TEXT[:rows].to(x), added_cond_kwargs=added, **kwargs).sample


def latents(height, width, batch=2, channels=4):
    source = torch.Generator().manual_seed(3)
    return torch.randn(batch, channels, height, width, generator=source, dtype=torch.float64)
