"""What stands around a pipeline while it draws: tile fusion, regions, tiled attention and VAE, noise inversion.

One config tells all of it and travels in the picture; parts that are off are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sd_hyena.files.mask import read_mask
from sd_hyena.large.circular import circular_convolutions
from sd_hyena.large.feed_forward import chunk_feed_forward
from sd_hyena.large.noise_inversion import NoiseInversion, noise_inversion
from sd_hyena.large.progress import Progress
from sd_hyena.large.regions import read_regions
from sd_hyena.large.regions import to_dict as regions_to_dict
from sd_hyena.large.tiled_attention import brick_attention, split_attention
from sd_hyena.large.tiled_unet import TiledDiffusion, tiled_diffusion
from sd_hyena.large.tiled_vae import VAETiling, tiled_vae
from sd_hyena.options.effect import TILED_VAE_FROM
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.tile import tile_of, tiled_by

BRICK = 64  # cells of LargeResPatch's


def tile_fusion(config: GenerateConfig) -> TiledDiffusion | None:
    """The tiles of a picture; None if it is drawn in one piece. Raises BadInput."""
    method = tiled_by(config)
    if method == "off" and not config.regions:
        return None
    sides = tile_of(config)
    return TiledDiffusion(
        method="multidiffusion" if method == "off" else method,
        tile_height=sides[0],
        tile_width=sides[1],
        overlap=config.overlap,
        tile_batch_size=config.tile_batch_size,
        weights=config.tile_weights,
        regions=read_regions(config.regions) if config.regions else (),
        draw_background=config.draw_background,
        circular=config.circular,
    )


def vae_tiling(config: GenerateConfig) -> VAETiling | None:
    """How the VAE is tiled; None if it works in one piece. Raises BadInput."""
    mode = config.tiled_vae
    if mode == "auto":
        mode = "exact" if max(config.width, config.height) > TILED_VAE_FROM else "off"
    if mode == "off" and config.circular:
        mode = "exact"  # in tiles it goes round
    if mode == "off":
        return None
    return VAETiling(
        mode,
        encoder_tile_size=config.encoder_tile_size or None,
        decoder_tile_size=config.decoder_tile_size or None,
        color_fix=config.color_fix,
        padding_mode="circular" if config.circular else "constant",
    )


def inversion(config: GenerateConfig) -> NoiseInversion | None:
    """How the noise of the picture to start from is found; None if any noise will do. Raises BadInput."""
    if not config.noise_inversion:
        return None
    return NoiseInversion(
        steps=config.noise_inversion,
        retouch=config.retouch,
        renoise_strength=config.renoise_strength,
        renoise_kernel=config.renoise_kernel,
        circular=config.circular,
    )


@dataclass(frozen=True)
class Arrangement:
    """What one config arranges; parts that are off are None."""

    config: GenerateConfig
    tiles: TiledDiffusion | None
    vae: VAETiling | None
    inversion: NoiseInversion | None

    @classmethod
    def of(cls, config: GenerateConfig) -> Arrangement:
        """Read the region file and check the whole. Raises BadInput."""
        return cls(config, tile_fusion(config), vae_tiling(config), inversion(config))

    @property
    def tile(self) -> tuple[int, int]:
        """The largest (H, W) in latent cells that the UNet meets."""
        h, w = self.config.height // 8, self.config.width // 8
        return (min(h, self.tiles.tile_height), min(w, self.tiles.tile_width)) if self.tiles else (h, w)

    @property
    def metadata(self) -> dict[str, Any]:
        """What has to travel in the picture beside the config."""
        return {"regions": regions_to_dict(self.tiles.regions)} if self.tiles and self.tiles.regions else {}

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of the regions."""
        regions = self.tiles.regions if self.tiles else ()
        return tuple(text for region in regions for text in (region.prompt, region.negative_prompt))

    @property
    def cuts_nothing(self) -> list[str]:
        """A line for each kind of tile that is as large as what it would cut."""
        config, tile, lines = self.config, self.tile, []
        if self.tiles and not self.tiles.regions and tile == (config.height // 8, config.width // 8):
            lines.append(f"note: a tile of {self.tiles.tile_width}x{self.tiles.tile_height} cells is the whole picture")
        if config.hypertile and config.hypertile >= 8 * max(tile):
            lines.append(
                f"note: hypertile={config.hypertile} cuts nothing here, where {8 * max(tile)} px are attended to"
            )
        if config.attn_shape != "off" and max(tile) <= BRICK:
            lines.append(f"note: attn_shape={config.attn_shape} cuts nothing here, a brick is {8 * BRICK} px")
        return lines

    @property
    def guides_regions(self) -> bool:
        """Whether a region has guidance of its own."""
        return any(region.guidance_scale is not None for region in (self.tiles.regions if self.tiles else ()))

    @property
    def notes(self) -> list[str]:
        """How the regions' masks are read, where that has to be said."""
        masks = dict.fromkeys(region.mask for region in (self.tiles.regions if self.tiles else ()) if region.mask)
        return [said for mask in masks if (said := read_mask(mask)[1])]

    def __str__(self) -> str:
        """What `auto` chose and what is on, for people; empty if nothing is."""
        config, parts = self.config, []
        if tiles := self.tiles:
            regions = f" with {len(tiles.regions)} regions" if tiles.regions else ""
            weights = f", {config.tile_weights} weights" if config.tile_weights != "auto" else ""
            parts.append(f"{tiles.method} in tiles of {tiles.tile_width}x{tiles.tile_height} cells{weights}{regions}")
        if self.vae:
            parts.append(f"the VAE in tiles, {self.vae.mode}")
        if config.hypertile:
            parts.append(f"attention in tiles of {config.hypertile} px")
        if config.attn_shape != "off":
            parts.append(f"attention in {config.attn_shape}s")
        if config.circular:
            parts.append("round the borders")
        if self.inversion:
            parts.append(f"noise inversion in {self.inversion.steps} steps")
        return ", ".join(parts)

    @contextmanager
    def around(
        self, pipe: Any, map: Callable = map, of_vae: Progress | None = None, of_inversion: Progress | None = None
    ) -> Iterator[None]:
        """Within the block, `pipe` draws as the config says; afterwards it is as it was.

        `map` is TiledDiffusion's; the VAE tells `of_vae` how far it is, the noise inversion `of_inversion`.
        """
        with ExitStack() as stack:
            if self.vae:
                stack.enter_context(tiled_vae(pipe.vae, **vars(self.vae) | {"progress": of_vae}))
            controlnet = getattr(pipe, "controlnet", None)
            for network in filter(None, (pipe.unet, *getattr(controlnet, "nets", (controlnet,)))):
                if self.config.circular and not self.tiles:
                    stack.enter_context(circular_convolutions(network))
                for block in self._around_attention(network):
                    stack.enter_context(block)
            if self.inversion:  # before the tiles, which then tile it too
                stack.enter_context(noise_inversion(pipe, **vars(self.inversion) | {"progress": of_inversion}))
            if self.tiles:
                stack.enter_context(tiled_diffusion(pipe, **vars(self.tiles) | {"map": map}))
            yield

    def _around_attention(self, network: Any) -> Iterator[AbstractContextManager]:
        """For the transformers of a UNet or ControlNet."""
        config = self.config
        if config.ff_chunk_size:
            yield chunk_feed_forward(network, config.ff_chunk_size)
        if config.hypertile:
            given = dict(swap_size=config.hypertile_swap, max_depth=config.hypertile_depth)
            given["seed"] = 0  # one for all pictures, so that each can be drawn again
            yield split_attention(network, tile_size=config.hypertile, **given)
        if config.attn_shape != "off":
            yield brick_attention(network, attn_shape=config.attn_shape)
