"""The tiles in which a config has its canvas drawn."""

from __future__ import annotations

from typing import Any

TILED_FROM = 2048  # pixels of a side above which tiled_diffusion=auto fuses tiles
TILE, TILE_OF_STUDENTS = 96, 256  # cells; a student gains little below 2048 px
CELL = 8  # pixels


def tiled_by(config: Any) -> str:
    """The method by which tiles are fused; off for a canvas in one piece."""
    if config.tiled_diffusion != "auto":
        return config.tiled_diffusion
    return "mixture" if max(config.width, config.height) > TILED_FROM else "off"


def tile_of(config: Any) -> tuple[int, int]:
    """(H, W) of a tile in latent cells, which may be more than the canvas has; without tiles the canvas."""
    if tiled_by(config) == "off":
        return config.height // CELL, config.width // CELL
    side = TILE_OF_STUDENTS if config.hyena else TILE
    return config.tile_height or side, config.tile_width or side


def is_cut(config: Any) -> bool:
    """Whether a tile is less than the canvas."""
    height, width = tile_of(config)
    return height < config.height // CELL or width < config.width // CELL
