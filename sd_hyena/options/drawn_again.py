"""What a picture lends to a drawing that starts from it and is not told what to draw: its own words, and how it was sampled."""

from __future__ import annotations

from sd_hyena.errors import BadInput
from sd_hyena.files.picture_text import read_texts
from sd_hyena.options import from_image, given_path
from sd_hyena.options.found import Found

LENT = (  # not its seed: noise that a picture was made of makes it again
    "prompt", "negative_prompt", "steps", "cfg_scale", "scheduler", "karras", "clip_skip", "model", "vae", "hyena", "target",
    "embeddings", "lora",
)  # fmt: skip


def own_words(path: str) -> Found:
    """Of the picture at `path`. Raises BadInput, which asks for a prompt, if it holds none."""
    given_path.plain_file(path, "init_image")
    try:
        read_texts(path)
    except BadInput as error:
        raise BadInput(f"init_image: {error}") from None
    try:
        found = from_image.read(path, "init_image")
    except BadInput as error:
        raise BadInput(f"{error}; or say with -p what is to be drawn") from None
    found.options = {name: value for name, value in found.options.items() if name in LENT}
    if not (found.options.get("prompt") or "").strip():
        raise BadInput(f"{found.source} holds no prompt; say with -p what is to be drawn")
    of_noise = "noise of a GPU", "Variation"
    found.left = [
        (text, option)
        for text, option in found.left
        if option not in ("init_image", "regions", "tiled_diffusion", "upscaler") and not text.startswith(of_noise)
    ]
    return found
