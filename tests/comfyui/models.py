"""Small models as ComfyUI has them, from diffusers' own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import Projections, build_student, spec_for
from sd_hyena.students.swap import swapped
from tests import ldm

STEPS, GUIDANCE, SCALE, SCALE_XL = 4, 5.0, 0.18215, 0.13025
BETAS = dict(beta_schedule="sqrt_linear", linear_start=0.0001, linear_end=0.02)  # the shipped model's


def patcher_of(unet: nn.Module, dtype: torch.dtype = torch.float32, prediction: str = "V_PREDICTION") -> Any:
    """A ModelPatcher with a diffusers UNet's weights; of SDXL's kind if the UNet is."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups: int, *args, **kwargs):  # 32 there, whatever the width
                super().__init__(unet.config.norm_num_groups, *args, **kwargs)

    config, xl = unet.config, unet.config.addition_embed_type == "text_time"
    widths, each = config.block_out_channels, config.layers_per_block
    layers = config.transformer_layers_per_block
    layers = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    down = [n if "CrossAttn" in kind else 0 for n, kind in zip(layers, config.down_block_types, strict=True)]
    heads = config.attention_head_dim  # diffusers' name for the number of heads
    shape = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=[each] * len(widths),
        transformer_depth=[n for n in down for _ in range(each)],
        transformer_depth_output=[n for n in down for _ in range(each + 1)],
        transformer_depth_middle=layers[-1],
        context_dim=config.cross_attention_dim,
        use_spatial_transformer=True,
        use_linear_in_transformer=config.use_linear_projection,
        legacy=False,
        dtype=dtype,
    )
    if xl:
        shape |= dict(num_classes="sequential", adm_in_channels=config.projection_class_embeddings_input_dim)
    kind = comfy.supported_models.SDXL if xl else comfy.supported_models.SD15
    known = kind(shape)
    known.unet_config |= dict(num_heads=-1, num_head_channels=widths[0] // heads[0]) if xl else dict(num_heads=heads)
    known.sampling_settings |= BETAS
    known.custom_operations, known.manual_cast_dtype = Operations, None
    base = comfy.model_base.BaseModel(known, getattr(comfy.model_base.ModelType, prediction))
    if xl:
        base.encode_adm = lambda **told: told["adm"]
    state = {name.removeprefix("model.diffusion_model."): value for name, value in ldm.of_unet(unet).items()}
    base.diffusion_model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
    base.diffusion_model.requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, cpu, cpu)


def condition(text: Tensor, **more: Any) -> list:
    """A prompt's embedding (1, tokens, width) as ComfyUI's CONDITIONING."""
    return [[text, more]]


def noise(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def drawn(model: Any, texts: tuple[Tensor, Tensor], start: Tensor, **more: Any) -> Tensor:
    """Latents after some Euler steps in ComfyUI, from pure noise; texts with the prompt and without."""
    import comfy.sample

    conditions = [condition(text) if isinstance(text, Tensor) else text for text in texts]
    arguments = [model, start, STEPS, GUIDANCE, "euler", "simple", *conditions, torch.zeros_like(start)]
    with torch.inference_mode():
        return comfy.sample.sample(*arguments, disable_pbar=True, seed=0, **more).clone()


def drawn_by_diffusers(
    unet: nn.Module,
    texts: tuple[Tensor, Tensor],
    start: Tensor,
    prediction: str = "v_prediction",
    students: Callable[[int], dict[str, nn.Module]] = lambda step: {},
    **told: Any,
) -> Tensor:
    """The same by diffusers' own scheduler and UNet, with these students in each step."""
    scheduler = EulerDiscreteScheduler(
        beta_start=BETAS["linear_start"],
        beta_end=BETAS["linear_end"],
        beta_schedule="linear",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(timesteps=[999 - 1000 * n // STEPS for n in range(STEPS)])
    latents = start * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    text = torch.cat([t.expand(len(start), -1, -1) for t in texts])
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            x = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            with swapped(unet, students(step)):
                with_text, without = unet(x, t, text, **told).sample.chunk(2)
            latents = scheduler.step(without + GUIDANCE * (with_text - without), t, latents).prev_sample
    return latents / (SCALE if unet.config.addition_embed_type is None else SCALE_XL)


def students_of(unet: nn.Module, targets: str, operator: str = "hyena2d", latent=(32, 32), seed: int = 0, **options):
    """Students that matter: random where new ones are zero."""
    if operator == "hyena2d":  # clusters would make rounding jump
        options = {"landmarks": 24, "content": "landmarks"} | options
    students = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for site in select(find_sites(unet), targets):
            student = build_student(spec_for(site, operator, options, latent)).eval().requires_grad_(False)
            for layer in (*getattr(student, "change", ()), getattr(student, "change_out", None)):
                if layer is not None:
                    layer.weight.normal_(std=0.1 * site.channels**-0.5)
            students[site.name] = student
    return students


class StandIn(nn.Module):
    """`Student.forward` in place of a ComfyUI block's attn1, by another door than the pack's."""

    def __init__(self, attention: nn.Module, student: nn.Module):
        super().__init__()
        self.attention, self.student = [attention], student  # no submodule: its weights stay where they are

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        size = tuple(transformer_options["activations_shape"][-2:])
        return self.student(x, Projections.of(self.attention[0]), size)


def by_another_door(model: Any, students: dict[str, nn.Module]) -> Any:
    """A clone of a ModelPatcher whose attn1 modules are replaced."""
    model = model.clone()
    for student in students.values():
        match = re.fullmatch(r"(IN|M|OUT)(\d+)(?:\.(\d+))?", student.spec.short)
        block = {"IN": f"input_blocks.{int(match[2])}", "M": "middle_block", "OUT": f"output_blocks.{int(match[2])}"}[
            match[1]
        ]
        path = f"diffusion_model.{block}.1.transformer_blocks.{int(match[3] or 0)}.attn1"
        model.add_object_patch(path, StandIn(model.get_model_object(path), student))
    return model


def vae_of(width: int = 32, seed: int = 0) -> Any:
    """A VAE of Stable Diffusion's kind, but narrow; random, with norms that matter."""
    import comfy.sd

    shape = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=width, dropout=0.0)
    shape |= dict(ch_mult=[1, 2, 2, 2], num_res_blocks=1, attn_resolutions=[])
    generator = torch.Generator().manual_seed(seed)
    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    for module in vae.first_stage_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
        elif isinstance(getattr(module, "weight", None), Tensor):
            module.weight.data.normal_(std=1.5 * module.weight[0].numel() ** -0.5, generator=generator)
            module.bias.data.normal_(std=0.1, generator=generator)
    return vae
