"""python -m benchmarks.studies.tiled_vae: how far each way to tile the shipped VAE is from the untiled one, its time and memory.

Images are held-out scenes; what is decoded are their latents. Errors are rms over the images: of the latents' mean, and
of the image in [-1, 1]. Memory is the peak of resident memory above that before the call, the model and the input
loaded and warm, the result and the pages of mapped files included; each row is a process of its own. Gate: exact is
within 1e-4 of untiled. Above UNTILED_UP_TO pixels `exact, disk` takes the place of untiled; above ENCODED_UP_TO there is no
picture any more, what is decoded is noise. What is done is written after each row. Linux only.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from diffusers import AutoencoderKL

from benchmarks.harness.peak import blocks_mapped_one_by_one, in_its_own_process, peak_mib
from benchmarks.harness.record import write
from benchmarks.report.plots import draw as plot
from examples.tiny_sd.scenes import draw, numbered_scene
from examples.tiny_sd.train import HELD_OUT_SEED, to_tensor
from sd_hyena.large.tiled_vae import enable_tiled_vae
from sd_hyena.options.shipped import SHIPPED_MODEL

UNTILED_UP_TO = 1024
ENCODED_UP_TO = 2048
EXACT = (("exact", "disk"), ("exact", "cpu"), ("exact", "none"))
WAYS = (("untiled", ""), *EXACT, *((mode, "cpu") for mode in ("fast", "two_pass", "classic", "blend")))
SIDES = ("encode", "decode")


def measure(folder: Path, pixels: int, images: int, way: tuple[str, str], tile: int, answer) -> None:
    """One row over the images of a size; the first way's results are kept in the folder, the others are held to them."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    mode, offload = way
    vae = AutoencoderKL.from_pretrained(SHIPPED_MODEL / "vae").float().eval()
    sides = SIDES if pixels <= ENCODED_UP_TO else SIDES[1:]
    encode, decode = lambda x: vae.encode(x).latent_dist.mean, lambda z: vae.decode(z).sample
    decode(encode(torch.zeros(1, 3, 64, 64)))
    if mode != "untiled":
        enable_tiled_vae(vae, mode, encoder_tile_size=8 * tile, decoder_tile_size=tile, offload=offload)
    rows = []
    for i in range(images):
        kept = folder / f"{i}.pt"
        wanted = torch.load(kept) if kept.exists() else {}
        found, row = {}, {}
        for side in sides:
            if side == "encode":
                call = partial(encode, to_tensor(draw(numbered_scene(HELD_OUT_SEED, i), pixels, supersample=1))[None])
            else:
                noise = torch.randn(1, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(i))
                call = partial(decode, (found | wanted).get("encode", noise))
            found[side], *cost = peak_mib(call)
            row[f"{side}_s"], row[f"{side}_MiB"] = map(torch.tensor, cost)
            distance = found[side] - wanted.get(side, found[side])
            row[f"{side}_square"], row[f"{side}_max"] = distance.square().mean(), distance.abs().max()
        if not wanted:
            torch.save(found, kept)
        rows.append(row)
    answer.put({key: torch.stack([row[key] for row in rows]).tolist() for key in rows[0]})


def row_of(pixels: int, tile: int, way: tuple[str, str], measured: dict[str, list[float]]) -> dict:
    row = {"pixels": pixels, "tile": tile, "mode": way[0], "offload": way[1]}
    for side in SIDES:
        done = f"{side}_s" in measured
        row[f"{side}_rms"] = f"{fmean(measured[f'{side}_square']) ** 0.5:.2g}" if done else ""
        row[f"{side}_max"] = f"{max(measured[f'{side}_max']):.2g}" if done else ""
        row[f"{side}_s"] = round(median(measured[f"{side}_s"]), 1) if done else ""
        row[f"{side}_MiB"] = round(max(measured[f"{side}_MiB"])) if done else ""
    return row


def main(
    sizes: tuple[int, ...] = (256, 512),
    tile: int = 16,
    images: int = 4,
    exact_sizes: tuple[int, ...] = (1024, 2048, 4096),
    exact_tile: int = 32,
):
    """Measure each way at each size.

    Args:
        sizes: sides of square images, pixels, for all ways
        tile: latent cells; the encoder's tiles are eight times as many pixels
        images: over how many the errors are taken
        exact_sizes: sides for the exact mode alone, one image each
        exact_tile: its tile there
    """
    exact = [way for way in WAYS if way[0] in ("untiled", "exact")]
    runs = [(pixels, WAYS, tile, images) for pixels in sizes]
    runs += [(pixels, exact, exact_tile, 1) for pixels in exact_sizes]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (pixels, ways, side, count) in enumerate(runs):
            (place := Path(folder) / str(number)).mkdir()
            for way in ways if pixels <= UNTILED_UP_TO else ways[1:]:
                with blocks_mapped_one_by_one():
                    measured = in_its_own_process(measure, place, pixels, count, way, side)
                if way[0] == "exact" and max(measured.get("encode_max", []) + measured["decode_max"]) > 1e-4:
                    sys.exit(f"exact, {way[1]} at {pixels} px is not what untiled gives; nothing is reported")
                rows.append(row_of(pixels, side, way, measured))
                plot(write("tiled_vae", rows))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
