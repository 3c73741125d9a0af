"""Large Stable Diffusion images without the quadratic cost of self-attention.

    from sd_hyena import load_pipeline, load_students, swapped

Each name is loaded when it is asked for, so importing this alone loads nothing. docs/python.md has examples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; PLACES says the same to Python
    from sd_hyena.distil.training import train as train
    from sd_hyena.generate.engine import Engine as Engine
    from sd_hyena.generate.watch import Cancelled as Cancelled
    from sd_hyena.generate.watch import Watch as Watch
    from sd_hyena.large.feed_forward import chunk_feed_forward as chunk_feed_forward
    from sd_hyena.large.growing.deep_shrink import deep_shrink as deep_shrink
    from sd_hyena.large.growing.demofusion import demofusion as demofusion
    from sd_hyena.large.growing.diffusehigh import diffusehigh as diffusehigh
    from sd_hyena.large.growing.hidiffusion import hidiffusion as hidiffusion
    from sd_hyena.large.large_res_patch import LargeResPatch as LargeResPatch
    from sd_hyena.large.noise_inversion import noise_inversion as noise_inversion
    from sd_hyena.large.regions import Region as Region
    from sd_hyena.large.tiled_attention import brick_attention as brick_attention
    from sd_hyena.large.tiled_attention import split_attention as split_attention
    from sd_hyena.large.tiled_unet import tiled_diffusion as tiled_diffusion
    from sd_hyena.large.tiled_vae import tiled_vae as tiled_vae
    from sd_hyena.models.pipeline import load_pipeline as load_pipeline
    from sd_hyena.options.generate_config import GenerateConfig as GenerateConfig
    from sd_hyena.options.operators import register_operator as register_operator
    from sd_hyena.options.train_config import TrainConfig as TrainConfig
    from sd_hyena.sites import find_sites as find_sites
    from sd_hyena.sites import select as select
    from sd_hyena.students.checkpoint import load_students as load_students
    from sd_hyena.students.swap import swapped as swapped
    from sd_hyena.students.untrained import untrained as untrained
    from sd_hyena.text.encoding import weighted_prompts as weighted_prompts

__version__ = "0.1.0"
PLACES = {
    "Cancelled": "generate.watch",
    "Engine": "generate.engine",
    "GenerateConfig": "options.generate_config",
    "LargeResPatch": "large.large_res_patch",
    "Region": "large.regions",
    "TrainConfig": "options.train_config",
    "Watch": "generate.watch",
    "brick_attention": "large.tiled_attention",
    "chunk_feed_forward": "large.feed_forward",
    "deep_shrink": "large.growing.deep_shrink",
    "demofusion": "large.growing.demofusion",
    "diffusehigh": "large.growing.diffusehigh",
    "find_sites": "sites",
    "hidiffusion": "large.growing.hidiffusion",
    "load_pipeline": "models.pipeline",
    "load_students": "students.checkpoint",
    "noise_inversion": "large.noise_inversion",
    "register_operator": "options.operators",
    "select": "sites",
    "split_attention": "large.tiled_attention",
    "swapped": "students.swap",
    "tiled_diffusion": "large.tiled_unet",
    "tiled_vae": "large.tiled_vae",
    "train": "distil.training",
    "untrained": "students.untrained",
    "weighted_prompts": "text.encoding",
}
__all__ = list(PLACES)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
