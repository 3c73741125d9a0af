"""The size at which a model was trained, read from its configuration, without the model."""

from __future__ import annotations

import json
from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.models.single_file import configuration_of


def own_side(path: Path) -> int:
    """Pixels of a side of the square that the model of a folder or file draws by itself. Raises BadInput."""
    folder = path if path.is_dir() else configuration_of(path)
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
        side = unet["sample_size"]
        return (max(side) if isinstance(side, list) else side) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"model {str(path)!r} does not say at which size it draws ({str(error)[:120]})") from None
