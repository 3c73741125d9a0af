"""Stable Diffusion at 2K to 16K on one GPU: self-attention distilled into Hyena operators."""

__version__ = "0.1.0"
