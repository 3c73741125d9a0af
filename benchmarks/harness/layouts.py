"""UNets of the configurations that ship, with random weights: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.harness.setting import Setting
from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops
from sd_hyena.models.single_file import LAYOUTS
from sd_hyena.options.operators import operator_named
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import Site, find_sites, select
from sd_hyena.students.student import build_student, cast, spec_for

STUDENTS_AT = {"attention": "", "level 0": "level0", "level 0+1": "level0,level1", "all": "all"}
WORDS = 77  # tokens of a prompt


def unet_on(layout: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet of a layout (sd15, sd21, sdxl) on a device; on `meta` without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(LAYOUTS / layout / "unet")).eval()
    nn.Module.to(unet, dtype)
    if str(device) != "meta":
        unet.to_empty(device=device)
        source = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, weight in unet.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5, generator=source)
                else:  # norms start as one, biases as zero
                    weight.fill_("norm" in name and name.endswith("weight"))
    return unet.requires_grad_(False)


def sites() -> dict[str, Site]:
    """Stable Diffusion 1.5's sites by short name."""
    return {site.short: site for site in find_sites(unet_on("sd15", "meta"))}


def states(unet: nn.Module, setting: Setting, latent: tuple[int, int], batch: int) -> dict[str, Any]:
    """Random latents, timestep and text, as the UNet takes them."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=source).to(setting.device, setting.dtype)

    config, told = unet.config, {}
    if config.addition_embed_type == "text_time":  # SDXL
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        told = {"text_embeds": random(pooled), "time_ids": random(6)}
    given = dict(sample=random(config.in_channels, *latent), timestep=torch.tensor(500, device=setting.device))
    return given | dict(encoder_hidden_states=random(WORDS, config.cross_attention_dim), added_cond_kwargs=told)


def new_students(unet: nn.Module, targets: str, setting: Setting, **given: str) -> dict[str, nn.Module]:
    """Untrained students for the sites that `targets` names, of the default operator if none is given."""
    train, like = TrainConfig(**given), torch.empty((), device=setting.device, dtype=setting.dtype)
    specs = (
        spec_for(site, train.operator, train.options_of_operator(), (64, 64))
        for site in (select(find_sites(unet), targets) if targets else ())
    )
    return {spec.site: cast(build_student(spec), like).eval().requires_grad_(False) for spec in specs}


def default_students() -> str:
    """Which these are, in what tells one day's default from another's."""
    config = TrainConfig()
    options = operator_named(config.operator).defaults() | config.options_of_operator()
    return f"{config.operator}, " + ", ".join(f"{name}={options[name]}" for name in ("long", "content", "landmarks"))


def predicted_speedups(
    unet: nn.Module, latent: tuple[int, int], sets: Mapping[str, dict[str, nn.Module]]
) -> dict[str, float]:
    """How many times fewer operations a step takes with each set of students."""
    whole, known = unet_flops(unet, latent), {site.name: site for site in find_sites(unet)}

    def saved(name: str, student: nn.Module) -> int:
        size = known[name].size(*latent)
        return attention_flops(known[name], size) - folded_flops(student.spec, size)

    return {label: whole / (whole - sum(map(saved, some, some.values()))) for label, some in sets.items()}
