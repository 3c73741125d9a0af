"""Small LoRA and ControlNet files as the world writes them: families, names, dtypes; and what they mean, in float64.

The formulas are written out from the papers and from LyCORIS' description of its files, as loops and products that share
nothing with the reader's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.ldm import of_unet

RANK = 3
Factors = dict[str, Tensor]


def _draw(seed: int) -> Callable[..., Tensor]:
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(*shape, generator=source)


def _divided(n: int) -> tuple[int, int]:
    """n = a * b, a the smaller."""
    a = next(a for a in range(int(n**0.5), 0, -1) if n % a == 0)
    return a, n // a


def lora(shape, draw, alpha=1.5) -> Factors:
    down, up = draw(RANK, *shape[1:]), draw(shape[0], RANK, *[1] * len(shape[2:]))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}


def cp(shape, draw) -> Factors:
    down, mid, up = draw(RANK, shape[1], 1, 1), draw(RANK, RANK, *shape[2:]), draw(shape[0], RANK, 1, 1)
    factors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return factors | {"alpha": torch.tensor(1.5)}


def loha(shape, draw, alpha=float(RANK)) -> Factors:
    flat = torch.Size(shape[1:]).numel()
    factors = {f"hada_w{n}_a": draw(shape[0], RANK) for n in (1, 2)} | {
        f"hada_w{n}_b": draw(RANK, flat) for n in (1, 2)
    }
    return factors | {"alpha": torch.tensor(alpha)}


def loha_cp(shape, draw) -> Factors:
    factors = {f"hada_w{n}_a": draw(RANK, shape[0]) for n in (1, 2)}
    factors |= {f"hada_w{n}_b": draw(RANK, shape[1]) for n in (1, 2)}
    factors |= {f"hada_t{n}": draw(RANK, RANK, *shape[2:]) for n in (1, 2)}
    return factors | {"alpha": torch.tensor(float(RANK))}


def lokr(shape, draw, alpha=1.0) -> Factors:
    (a, b), (c, d) = _divided(shape[0]), _divided(shape[1])
    factors = {"lokr_w1": draw(a, c), "lokr_w2_a": draw(b, 1)}
    return factors | {"lokr_w2_b": draw(1, d * torch.Size(shape[2:]).numel()), "alpha": torch.tensor(alpha)}


def lokr_whole(shape, draw) -> Factors:
    (a, b), (c, d) = _divided(shape[0]), _divided(shape[1])
    return {"lokr_w1": draw(a, c), "lokr_w2": draw(b, d, *shape[2:]), "alpha": torch.tensor(9e9)}  # means nothing here


def lokr_cp(shape, draw) -> Factors:
    (a, b), (c, d) = _divided(shape[0]), _divided(shape[1])
    factors = {"lokr_w1": draw(a, c), "lokr_t2": draw(1, 1, *shape[2:])}
    return factors | {"lokr_w2_a": draw(1, b), "lokr_w2_b": draw(1, d), "alpha": torch.tensor(1.0)}


def oft(shape, draw) -> Factors:
    size = _divided(shape[0])[0]
    return {"oft_blocks": draw(shape[0] // size, size, size), "alpha": torch.tensor(0.0)}


def oft_short(shape, draw) -> Factors:
    """With a bound that is met, and lengths of rows."""
    return oft(shape, draw) | {"alpha": torch.tensor(0.01), "rescale": 1 + draw(shape[0], *[1] * len(shape[1:]))}


def boft(shape, draw) -> Factors:
    blocks, stages = shape[0] // 4, 1
    while blocks % 2**stages == 0:
        stages += 1
    return {"oft_blocks": draw(stages, blocks, 4, 4), "alpha": torch.tensor(0.0)}


def oft_old(shape, draw) -> Factors:
    size = _divided(shape[0])[0]
    skew = draw(shape[0] // size, size, size)
    return {"oft_diag": torch.matrix_exp(skew - skew.mT)}


def ia3(shape, draw) -> Factors:
    return {"weight": draw(shape[0], 1), "on_input": torch.tensor(False)}


def ia3_on_input(shape, draw) -> Factors:
    return {"weight": draw(shape[1]), "on_input": torch.tensor(True)}


def glora(shape, draw) -> Factors:
    narrow = [1] * len(shape[2:])
    return {
        "a1.weight": draw(shape[1], RANK, *narrow),
        "a2.weight": draw(RANK, shape[1], *narrow),
        "b1.weight": draw(shape[0], RANK, *narrow),
        "b2.weight": draw(RANK, *shape[1:]),
        "alpha": torch.tensor(1.5),
    }


def full(shape, draw) -> Factors:
    return {"diff": draw(*shape)}


def dora(factors: Factors, shape, draw, rows: bool = True) -> Factors:
    """The same with lengths of rows, or of columns."""
    ones = [1] * len(shape[1:])
    return factors | {"dora_scale": 1 + draw(shape[0], *ones).abs() if rows else 1 + draw(1, shape[1], *ones[1:]).abs()}


FAMILIES: dict[str, Callable] = {  # of these, LyCORIS itself reads the first ten
    "LoRA": lora,
    "LoHa": loha,
    "LoKr": lokr_whole,
    "DoRA": lambda shape, draw: dora(lora(shape, draw), shape, draw),
    "LoHa with DoRA": lambda shape, draw: dora(loha(shape, draw), shape, draw),
    "LoKr with DoRA": lambda shape, draw: dora(lokr_whole(shape, draw), shape, draw),
    "OFT": oft,
    "OFT, bounded": oft_short,
    "GLoRA": glora,
    "a whole difference": full,
    "LoHa of half strength": lambda shape, draw: loha(shape, draw, RANK / 2),
    "LoKr in factors": lambda shape, draw: lokr(shape, draw, 0.5),
    "DoRA on columns": lambda shape, draw: dora(lora(shape, draw), shape, draw, rows=False),
    "OFT of old": oft_old,
    "(IA)³": ia3,
    "(IA)³ on the input": ia3_on_input,
}
FAMILIES_OF_CONVOLUTIONS = {"CP": cp, "LoHa with CP": loha_cp, "LoKr with CP": lokr_cp}
READ_BY_LYCORIS = (*list(FAMILIES)[:10], "CP", "LoHa with CP", "BOFT")


def factors_of(family: str, shape, seed: int = 0) -> Factors:
    known = FAMILIES | FAMILIES_OF_CONVOLUTIONS | {"BOFT": boft}
    return known[family](tuple(shape), _draw(seed))


def merged(weight: Tensor, factors: Factors, strength: float = 1.0) -> Tensor:
    """What a weight becomes, in float64."""
    t = {name.removesuffix(".weight"): value.double() for name, value in factors.items()}
    w, alpha = weight.double(), t.get("alpha")
    if "lora_mid" in t:
        up, down = t["lora_up"].flatten(1), t["lora_down"].flatten(1)
        change = torch.stack(
            [
                torch.stack([up @ t["lora_mid"][:, :, y, x] @ down for x in range(w.shape[3])], -1)
                for y in range(w.shape[2])
            ],
            -2,
        )
        change = change * alpha / len(down)
    elif "lora_up" in t:
        change = t["lora_up"].flatten(1) @ t["lora_down"].flatten(1) * alpha / len(t["lora_down"])
    elif "hada_t1" in t:
        halves = [
            torch.einsum("i j h w, i o, j n -> o n h w", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"])
            for n in (1, 2)
        ]
        change = halves[0] * halves[1] * alpha / RANK
    elif "hada_w1_a" in t:
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * alpha / RANK
    elif "lokr_w1" in t:
        w1, scale = t["lokr_w1"], 1.0
        if "lokr_t2" in t:
            w2 = torch.einsum("i j h w, i b, j d -> b d h w", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
            scale = alpha / 1
        elif "lokr_w2" in t:
            w2 = t["lokr_w2"]
        else:
            w2, scale = t["lokr_w2_a"] @ t["lokr_w2_b"], alpha / 1
            w2 = w2.reshape(len(w2), -1, *w.shape[2:])
        rows = [torch.cat([one * w2 for one in row], dim=1) for row in w1]
        change = torch.cat(rows, dim=0) * scale
    elif "oft_blocks" in t or "oft_diag" in t:
        return w + strength * (_rotated(w, t) - w)
    elif "on_input" in t:
        inner = [1] * (w.ndim - 2)
        change = w * factors["weight"].double().reshape((1, -1, *inner) if bool(t["on_input"]) else (-1, 1, *inner))
    elif "a1" in t:
        a, b = t["a1"].flatten(1) @ t["a2"].flatten(1), t["b1"].flatten(1) @ t["b2"].flatten(1)
        mixed = torch.stack([part @ a for part in w.reshape(*w.shape[:2], -1).unbind(-1)], -1)
        change = (mixed.reshape(w.shape) + b.reshape(w.shape)) * alpha / RANK
    else:
        change = t["diff"]
    new = w + change.reshape(w.shape)
    if "dora_scale" in t:
        rows = t["dora_scale"].shape[0] == len(w)
        along = new.flatten(1) if rows else new.transpose(0, 1).flatten(1)
        lengths = along.norm(dim=1).reshape((-1, *[1] * (w.ndim - 1)) if rows else (1, -1, *[1] * (w.ndim - 2)))
        new = new / lengths * t["dora_scale"]
    return w + strength * (new - w)


def _rotated(w: Tensor, t: Factors) -> Tensor:
    flat = w.flatten(1)
    if "oft_diag" in t:
        blocks, rotations = t["oft_diag"], t["oft_diag"]
    else:
        blocks = t["oft_blocks"]
        skew = blocks - blocks.mT
        longest = float(t["alpha"]) * len(w)
        if longest:
            skew = skew * min(1.0, longest / float(skew.norm()))
        eye = torch.eye(blocks.shape[-1], dtype=w.dtype)
        rotations = torch.linalg.solve((eye - skew).mT, (eye + skew).mT).mT  # (I + Q)(I - Q)^-1
    if blocks.ndim == 4:  # butterflies: rows of stage i meet in groups of stride 2^i b / 2
        rows = flat
        for i, stage in enumerate(rotations):
            b, k = stage.shape[-1], 2**i * stage.shape[-1] // 2
            order = torch.arange(len(w)).reshape(-1, 2, k).transpose(1, 2).reshape(-1, b)
            turned = torch.empty_like(rows)
            for rotation, members in zip(stage, order, strict=True):
                turned[members] = rotation @ rows[members]
            rows = turned
    else:
        rows = torch.block_diag(*rotations).mT @ flat
    return rows.reshape(w.shape) * t.get("rescale", 1)


# Names


def _kohya(pipe: Any, network: str, path: str) -> str:
    start = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    if network == "text_encoder" and hasattr(pipe, "text_encoder_2"):
        return "lora_te1_text_model_" + _bare(path)
    return start[network] + _bare(path)


def _bare(path: str) -> str:
    return path.removeprefix("text_model.").replace(".", "_")


def _numbered(pipe: Any, network: str, path: str) -> str:
    """A UNet's module in the original Stable Diffusion, model.diffusion_model.input_blocks... ."""
    names = dict(zip(pipe.unet.state_dict(), of_unet(pipe.unet), strict=True))
    return names[f"{path}.weight"].removesuffix(".weight")


def _dotted(pipe: Any, network: str, path: str) -> str:
    return f"{network}.{'' if network == 'unet' else 'text_model.'}{path.removeprefix('text_model.')}"


def _processor(pipe: Any, network: str, path: str) -> str:
    """diffusers' first form, of attentions alone."""
    attention, _, projection = path.removesuffix(".0").rpartition(".")
    return f"unet.{attention}.processor.{projection}_lora"


def _of_sdxl(pipe: Any, network: str, path: str) -> str:
    if network != "unet":
        return _kohya(pipe, network, path)
    return "lora_unet_" + _numbered(pipe, network, path).removeprefix("model.diffusion_model.").replace(".", "_")


KOHYA = {}
DOWN_UP = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}
STYLES: dict[str, tuple[Callable[[Any, str, str], str], dict[str, str]]] = {  # of modules, and of their parts
    "kohya, A1111": (_kohya, KOHYA),
    "kohya, SDXL": (_of_sdxl, KOHYA),
    "LyCORIS": (lambda *where: _kohya(*where).replace("lora_", "lycoris_", 1), KOHYA),
    "diffusers": (_dotted, {"lora_down": "lora_A", "lora_up": "lora_B"}),
    "diffusers 0.20": (_dotted, {"lora_down": "lora.down", "lora_up": "lora.up"}),
    "diffusers, linear layers": (
        _dotted,
        {"lora_down": "lora_linear_layer.down", "lora_up": "lora_linear_layer.up"},
    ),
    "diffusers, attention processors": (_processor, {"lora_down": "down", "lora_up": "up"}),
    "ComfyUI": (lambda *where: _numbered(*where).removeprefix("model."), KOHYA),
    "the original": (_numbered, KOHYA),
    "PEFT": (
        lambda pipe, network, path: f"base_model.model.{path}",
        {"lora_down": "lora_A", "lora_up": "lora_B", "dora_scale": "lora_magnitude_vector"},
    ),
    "PEFT, named": (
        lambda pipe, network, path: f"base_model.model.{path}",
        {"lora_down": "lora_A.default", "lora_up": "lora_B.default"},
    ),
}


def tensors_of(pipe: Any, family: str, modules: Mapping[str, list[str]], style: str = "kohya, A1111", seed: int = 0):
    """A file's tensors, and each module's factors by (network, path)."""
    named, parts = STYLES[style]
    tensors: Factors = {}
    factors: dict[tuple[str, str], Factors] = {}
    for network, paths in modules.items():
        for path in paths:
            weight = getattr(pipe, network).get_submodule(path).weight
            own = factors[network, path] = factors_of(family, weight.shape, seed := seed + 1)
            for part, value in own.items():
                end = part.removesuffix(".weight")
                tensors[f"{named(pipe, network, path)}.{part.replace(end, parts.get(end, end))}"] = value
    return tensors, factors


def written(path: Path, tensors: Factors, dtype: torch.dtype | None = None, metadata=None) -> Path:
    tensors = {name: value.to(dtype) if dtype else value for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def answer(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What a linear layer or convolution would say with another weight, in float64."""
    bias = None if module.bias is None else module.bias.double()
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x.double(), weight.double(), bias)
    return nn.functional.conv2d(x.double(), weight.double(), bias, module.stride, module.padding)


def question(weight: Tensor) -> Tensor:
    """An input for a layer of this weight."""
    source = torch.Generator().manual_seed(9)
    inner = weight.shape[1]
    shape = (2, 5, inner) if weight.ndim == 2 else (2, inner, 5, 7)
    return torch.randn(shape, generator=source)


# ControlNets


def in_the_original_layout(net: nn.Module, prefix: str = "control_model.") -> Factors:
    """A ControlNet's tensors as its authors name them."""
    last = 2 * (1 + len(net.controlnet_cond_embedding.blocks))
    state = {}
    for name, value in of_unet(net).items():
        name = name.removeprefix("model.diffusion_model.").replace("controlnet_mid_block", "middle_block_out.0")
        name = re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
        name = name.replace("controlnet_cond_embedding.input_blocks.0.0", "input_hint_block.0")
        name = name.replace("controlnet_cond_embedding.out.2", f"input_hint_block.{last}")
        name = re.sub(
            r"controlnet_cond_embedding\.blocks\.(\d+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}", name
        )
        state[prefix + name] = value.detach()
    return state
