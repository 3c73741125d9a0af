"""Names of tensors in LoRA files: which module of which network one is for, and which part of its family it is.

A module's path is kept flat, its dots as underscores, for half of the writers do so: kohya's trainer, A1111, LyCORIS. The
others are diffusers, of several years, PEFT and ComfyUI.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PARTS = tuple(  # the end of a name, and the part that it is
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (r"(?:\.|_)lora(?:_linear_layer)?\.(up|down)\.weight", r"lora_\1"),
        (r"\.lora_(up|down|mid)(?:\.weight)?", r"lora_\1"),
        (r"\.lora_A(?:\.\w+)?(?:\.weight)?", "lora_down"),
        (r"\.lora_B(?:\.(?!bias)\w+)?(?:\.weight)?", "lora_up"),
        (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),
        (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l)(?:\.(?!weight)\w+)?(?:\.weight)?", r"\1"),
        (r"\.(oft_blocks|oft_diag|rescale|dora_scale|alpha|scale|diff|diff_b|w_norm|b_norm|on_input)", r"\1"),
        (r"\.([ab][12]\.weight)", r"\1"),
        (r"\.(weight)", r"\1"),
    )
)
NETWORKS = tuple(  # the start of a name, and the network that it is for
    (re.compile(pattern), network)
    for pattern, network in (
        (r"(?:lora|lycoris)_te2_|text_encoder_2[._]|(?:text_encoders\.)?clip_g\.(?:transformer\.)?", "text_encoder_2"),
        (r"conditioner\.embedders\.1\.(?:transformer\.)?", "text_encoder_2"),
        (r"(?:lora|lycoris)_te1?_|text_encoder[._]|(?:text_encoders\.)?clip_l\.(?:transformer\.)?", "text_encoder"),
        (r"(?:conditioner\.embedders\.0|cond_stage_model)\.(?:transformer\.)?", "text_encoder"),
        (r"(?:lora|lycoris)_unet_|unet[._]|(?:model\.)?diffusion_model\.|lycoris_", "unet"),
    )
)
WRAPPERS = re.compile(r"(base_model\.model\.)+")  # PEFT's own
EMBEDDING = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?:string_to_param\.)?(?P<key>[^.]+)$")


class TensorName(NamedTuple):
    """`module` as the file calls it; its path, flat; its network, None if the name does not say; its part."""

    module: str
    path: str
    network: str | None
    part: str


def read_name(name: str) -> TensorName | None:
    """None for a name that is of no form that is known."""
    found = next(((match, part) for pattern, part in PARTS if (match := pattern.search(name))), None)
    if found is None:
        return None
    match, part = found
    module = name[: match.start()].removesuffix("_lora")
    path, network = WRAPPERS.sub("", module, count=1), None
    for pattern, network_of_it in NETWORKS:
        if start := pattern.match(path):
            path, network = WRAPPERS.sub("", path[start.end() :], count=1), network_of_it
            break
    return TensorName(module, flat(path), network, match.expand(part))


def flat(path: str) -> str:
    """A module's path with underscores, as diffusers calls the module now."""
    path = path.replace(".", "_").removeprefix("text_model_").replace("_processor_", "_")
    path = re.sub(r"(self_attn)_to_([qkv])$", r"\1_\2_proj", path)
    path = re.sub(r"(self_attn)_to_out$", r"\1_out_proj", path)
    return re.sub(r"(_attn[12]_to_out)$", r"\1_0", path)
