"""The keys of A1111's parameters, its forks' and extensions': which change no pixel, and at which values.

What is in no list here changes the picture, for all that we know, and is named where it is not followed.
"""

from __future__ import annotations

HARMLESS = {  # of any value: notes for people and programs
    "Version", "App", "Backend", "Pipeline", "Operations", "User", "Time", "Time taken", "Created Date", "Date", "Index",
    "Batch size", "Batch pos", "Batch", "Parser", "Source Identifier", "Civitai resources", "Civitai metadata", "Hashes",
    "Template", "Negative Template", "Wildcard prompt", "Wildcard negative prompt", "Comment", "Software", "Source",
    "Title", "Author", "ADetailer version", "Model hash", "VAE hash", "Lora hashes", "Hyena",
}  # fmt: skip
NEUTRAL = {  # at these values nothing happens
    "ENSD": {"0"},
    "RNG": {"CPU"},  # what we draw our noise with
    "Tiling": {"False"},
    "Face restoration": {"None", "False", ""},
    "Conditional mask weight": {"1", "1.0"},
    "Variation seed strength": {"0", "0.0"},
    "Token merging ratio": {"0", "0.0"},
    "Negative Guidance minimum sigma": {"0", "0.0"},
    "NGMS": {"0", "0.0"},
    "Discard penultimate sigma": {"False"},
    "Pad conds": {"False"},
    "FreeU Stages": {"[]"},
    "Emphasis": {"Original"},
    "Downcast alphas_cumprod": {"False"},
    "Refiner": {"None", ""},
    "Extra noise": {"0", "0.0"},
    "Initial noise multiplier": {"1", "1.0"},
    "CFG rescale": {"0", "0.0"},
    "Skip Early CFG": {"0", "0.0"},
    "Noise schedule": {"Default"},
    "Sigma churn": {"0", "0.0"},
    "Sigma tmin": {"0", "0.0"},
    "Sigma noise": {"1", "1.0"},
}
FAMILIES = (  # keys that begin alike belong to one thing, which is named once
    "Hires", "ADetailer", "ControlNet", "FreeU", "Refiner", "Variation", "Tiled Diffusion", "Tiled VAE", "NoiseInv",
    "Dynamic Thresholding", "Dynamic thresholding", "Hypertile", "multidiffusion", "Self Attention Guidance", "SAG",
    "Kohya HRFix", "kohya_hrfix", "Latent Modifier", "latent_modifier", "Perturbed Attention Guidance", "PAG",
    "Regional Prompter", "RP", "Latent Couple", "AddNet", "Cutoff", "DemoFusion", "Mask", "Inpaint", "AnimateDiff",
    "Postprocess", "Extras", "StyleSelector", "Style Selector", "Soft inpainting", "Schedule", "Token merging", "FABRIC",
    "IPAdapter", "Seed resize", "CFG Auto", "CADS", "BREAK", "LLuL", "Negpip", "NegPiP", "SEGS", "Composable", "Lora Block",
)  # fmt: skip


def is_harmless(key: str, value: str) -> bool:
    """Whether a key of this value changes no pixel."""
    return key in HARMLESS or value.strip() in NEUTRAL.get(key, ())


def family(key: str) -> str:
    """What a key belongs to: the beginning that it shares with others, or itself."""
    return next((name for name in FAMILIES if key == name or key.startswith(f"{name} ")), _numbered(key))


def _numbered(key: str) -> str:
    """`multidiffusion_enabled` is of multidiffusion."""
    return next((name for name in FAMILIES if key.startswith(f"{name}_")), key)
