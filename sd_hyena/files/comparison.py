"""Two images of the same seed beside each other, for the eye and in numbers."""

from __future__ import annotations

import numpy as np
import torch


def side_by_side(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """teacher | student | absolute difference."""
    difference = np.abs(teacher.astype(np.int16) - student).astype(np.uint8)
    return np.concatenate([teacher, student, difference], axis=1)


def similarity(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (100 for equal images) and SSIM of two uint8 images."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    mse = np.square(a.astype(np.float64) - b).mean()
    psnr = 100.0 if mse == 0 else float(10 * np.log10(255**2 / mse))
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in (a, b))
    return psnr, float(ssim(x, y, data_range=255.0))
