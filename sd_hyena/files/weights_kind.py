"""What a file of weights holds, told by its tensors' names; and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sd_hyena.errors import BadInput

UNET = "model.diffusion_model."
AVERAGED = "model_ema.diffusion_model"  # then the rest of the name, without dots
TEXTS = {  # by layout and part of the pipeline: where a file has a text encoder, in the original layout and in ComfyUI's
    ("sdxl", "text_encoder_2"): ("conditioner.embedders.1.", "text_encoders.clip_g."),
    ("sdxl", "text_encoder"): ("conditioner.embedders.0.", "text_encoders.clip_l."),
    ("sd21", "text_encoder"): ("cond_stage_model.", "text_encoders.clip_h."),
    ("sd15", "text_encoder"): ("cond_stage_model.", "text_encoders.clip_l."),
}


@dataclass(frozen=True)
class Kind:
    """A kind of file: with its article, as in "looks like a LoRA", and where such a file belongs."""

    name: str
    use: str
    pattern: str  # of one of its tensors' names

    def __str__(self) -> str:
        return f"{self.name}; {self.use}"


UNKNOWN = "Stable Diffusion 1.x, 2.x and SDXL are known"
LORA = Kind(
    "a LoRA",
    "give it as --lora FILE beside -m MODEL",
    r"[._](lora_(up|down|A|B|mid)|hada_w1_a|lokr_w[12]|oft_(blocks|diag)|ia3_l|on_input|w_norm|diff|diff_b)\b"
    r"|^(lora|lycoris)_(unet|te)|^bundle_emb\.",
)
STUDENTS = Kind("trained students", "give it as -y FILE beside -m MODEL", r"^[^/]+attn1/|^filter_fn\.")
VAE = Kind("a VAE", "give it as --vae FILE beside -m MODEL", r"^(first_stage_model\.|vae\.)?decoder\.conv_in\.")
MODEL = Kind(
    "a Stable Diffusion model",
    "give it as -m FILE",
    rf"^{re.escape(UNET)}input_blocks\.0\.0\.|^{re.escape(AVERAGED)}input_blocks00",
)
INVERSION = Kind(
    "a textual inversion", "give it as --embeddings FILE beside -m MODEL", r"^(emb_params|clip_[gl]|string_to_param.*)$"
)
REFINER = Kind("SDXL's refiner", "give SDXL's base", r"^conditioner\.embedders\.0\.model\.")
UPSCALER = Kind(
    "an upscaler model",
    "give it as --upscaler FILE",
    r"^((module|netG)\.)?(model\.1\.sub\.0\.RDB1\.|body\.0\.rdb1\.|RRDB_trunk\.0\.RDB1\.|body\.0\.weight$|conv_after_body\.)",
)
CONTROLNETS_ALONE = "of what steers by a picture ControlNets alone are read"
CONTROLNET = Kind(
    "a ControlNet",
    "give it as --controlnet FILE beside -m MODEL",
    r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\.0\.",
)
NO_CONTROLNETS = (
    Kind("a T2I-Adapter", CONTROLNETS_ALONE, r"^(adapter\.)?body\.\d+\.(block|resnets|in_conv)|^transformer_layes\."),
    Kind("a control-LoRA", CONTROLNETS_ALONE, r"^lora_controlnet$"),
    Kind("a ControlNet-LLLite", CONTROLNETS_ALONE, r"^lllite_"),
    Kind("a union of ControlNets", CONTROLNETS_ALONE, r"^(control_model\.)?(task_embedding$|control_add_embedding\.)"),
    Kind("an IP-Adapter", CONTROLNETS_ALONE, r"^(image_proj|ip_adapter)\."),
)
KINDS = (  # the first whose pattern is met: what holds a UNet's first convolution is a model, whatever else it holds
    REFINER,
    Kind("Playground 2.5", UNKNOWN, r"^edm_mean$"),  # of SDXL's shapes, with noise levels of its own
    MODEL,
    STUDENTS,
    LORA,
    Kind("a training checkpoint of ours", "give it as --resume FILE to train.py", r"^students\."),
    *NO_CONTROLNETS,
    CONTROLNET,
    Kind("Stable Diffusion 3", UNKNOWN, r"joint_blocks\.0\."),
    Kind("Flux", UNKNOWN, r"double_blocks\.0\."),
    Kind("Stable Cascade", UNKNOWN, r"^clip_txt_mapper\.|^down_blocks\.1\.0\.channelwise\."),
    Kind("the UNet of a diffusers folder", "give the folder", r"^down_blocks\.\d+\.resnets\.|^conv_in\.weight$"),
    Kind("the UNet alone of a model", "give a whole one", r"^(diffusion_model\.)?input_blocks\.0\.0\."),
    VAE,
    INVERSION,
    UPSCALER,
    Kind("a text encoder", "give a whole model", r"(^|\.)text_model\.|^(embeddings\.token|token)_embedding\."),
)
NOTHING_KNOWN = Kind("no file of weights that is known here", UNKNOWN, "")


def kind_of(names: Iterable[str]) -> Kind:
    """What tensors of these names are."""
    text = "\n".join(names)
    return next((kind for kind in KINDS if re.search(kind.pattern, text, re.MULTILINE)), NOTHING_KNOWN)


def is_controlnet(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold a ControlNet, a whole model beside it or not."""
    text = "\n".join(names)
    others = (kind.pattern for kind in NO_CONTROLNETS)
    found, *refused = (re.search(pattern, text, re.MULTILINE) for pattern in (CONTROLNET.pattern, *others))
    return bool(found) and not any(refused)


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sd15, sd21 or sdxl: which model the tensors of a single file are. Raises BadInput for all that is none of them."""
    kind = kind_of(shapes)
    if kind is not MODEL:
        raise BadInput(f"looks like {kind}")
    channels = (*shapes.get(f"{UNET}input_blocks.0.0.weight", ()), 0, 0)[1]
    if channels not in (4, 9):
        known = {5: " (depth to image)", 7: " (an upscaler)", 8: " (InstructPix2Pix)"}.get(channels, "")
        raise BadInput(f"its UNet takes {channels} channels{known}; known are 4, and 9 for inpainting")
    layout = layout_of_names(shapes)
    first = any(name.startswith(TEXTS["sdxl", "text_encoder"]) for name in shapes)
    if layout != "sdxl" and first and any(name.startswith(f"{UNET}label_emb.") for name in shapes):
        raise BadInput("it holds no second text encoder, which SDXL needs; give a whole model")
    if not layout:
        raise BadInput("it holds no text encoder; give a whole model")
    return layout


def layout_of_names(names: Iterable[str]) -> str:
    """The same by names alone, of a whole model; empty if there is no text encoder among them."""
    names = list(names)
    if any(name.startswith(TEXTS["sdxl", "text_encoder_2"]) for name in names):
        return "sdxl"
    prefixes = TEXTS["sd21", "text_encoder"] + TEXTS["sd15", "text_encoder"]
    if not (texts := [name for name in names if name.startswith(prefixes)]):
        return ""
    open_clip = any(".resblocks." in name or name.startswith("text_encoders.clip_h.") for name in texts)
    return "sd21" if open_clip else "sd15"
