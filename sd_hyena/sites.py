"""Sites: the self-attentions of a Stable Diffusion UNet, found by walking it, selected by name, group or pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.utils.hooks import RemovableHandle

from sd_hyena.errors import BadInput


@dataclass(frozen=True)
class Site:
    """One self-attention. `level` 0 works on the latent's own grid, each further level halves it."""

    name: str  # module path in the UNet
    short: str  # LDM block number: IN01 ... M00 ... OUT11; IN04.0, IN04.1 where a block holds several
    channels: int
    heads: int
    level: int

    @property
    def transformer(self) -> str:
        """Module path of the enclosing Transformer2DModel, whose 4-D input tells the site's true height and width."""
        return transformer_of(self.name)

    def size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """The site's (H, W) for a latent of this size: each level halves, rounding up."""
        step = 2**self.level
        return -(-latent_height // step), -(-latent_width // step)


def transformer_of(name: str) -> str:
    """Module path of the Transformer2DModel around the site of that path."""
    return name.split(".transformer_blocks.")[0]


def on_size(unet: nn.Module, name: str, note: Callable[[tuple[int, int]], None]) -> RemovableHandle:
    """Call `note` with the true (H, W) of a site, by module path, before each of its forwards; returns the hook."""

    def hook(_module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        note(tuple(hidden_states.shape[-2:]))

    return unet.get_submodule(transformer_of(name)).register_forward_pre_hook(hook, with_kwargs=True)


def find_sites(unet: nn.Module) -> list[Site]:
    """All sites of a diffusers UNet2DConditionModel or ControlNetModel, in the order in which a forward meets them."""
    sites, level, number = [], 0, 1  # input block 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            sites += _sites_of(block, f"down_blocks.{i}", j, f"IN{number:02d}", level)
            number += 1
        if block.downsamplers:
            level, number = level + 1, number + 1
    if unet.mid_block is not None:
        for j in range(len(getattr(unet.mid_block, "attentions", None) or ())):
            sites += _sites_of(unet.mid_block, "mid_block", j, f"M{j:02d}", level)
    number = 0
    for i, block in enumerate(getattr(unet, "up_blocks", ())):
        for j in range(len(block.resnets)):
            sites += _sites_of(block, f"up_blocks.{i}", j, f"OUT{number:02d}", level)
            number += 1
        if block.upsamplers:
            level -= 1
    return sites


def _sites_of(block: nn.Module, path: str, index: int, short: str, level: int) -> Iterator[Site]:
    attentions = getattr(block, "attentions", None)
    if attentions is None or not hasattr(attentions[index], "transformer_blocks"):
        return
    layers = attentions[index].transformer_blocks
    for k, layer in enumerate(layers):
        name = f"{path}.attentions.{index}.transformer_blocks.{k}.attn1"
        alias = short if len(layers) == 1 else f"{short}.{k}"
        yield Site(name, alias, layer.attn1.to_q.in_features, layer.attn1.heads, level)


def select(sites: list[Site], targets: str) -> list[Site]:
    """The sites that a comma-separated list names, in the UNet's order.

    Each item is a short name or module path (any case), `all`, `level0` ..., or a pattern (`OUT*`). Raises BadInput.
    """
    chosen = set()
    for item in filter(None, (part.strip() for part in targets.split(","))):
        found = [site for site in sites if _matches(site, item)]
        if not found:
            groups = sorted({f"level{site.level}" for site in sites})
            names = " ".join(site.short for site in sites)
            raise BadInput(f"target={item!r} is no site of this model; it has {names}, {', '.join(groups)} and all")
        chosen.update(found)
    if not chosen:
        raise BadInput("target is empty; name a site (IN01), a group (level0, all) or a pattern (OUT*)")
    return [site for site in sites if site in chosen]


def _matches(site: Site, item: str) -> bool:
    item = item.lower()
    if item == "all" or re.fullmatch(r"level\d+", item):
        return item in ("all", f"level{site.level}")
    return any(fnmatchcase(name.lower(), item) for name in (site.short, site.name))
