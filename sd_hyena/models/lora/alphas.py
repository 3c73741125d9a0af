"""The alphas that PEFT keeps outside its tensors: in the header of diffusers' files, or in a JSON file beside its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PEFTS_OWN = "base_model.model."  # how the modules of its own files begin
LARGEST = 1e9  # of a number that can be meant
NETWORKS = ("unet.", "text_encoder.", "text_encoder_2.", "")  # how those in diffusers' headers do


@dataclass(frozen=True)
class Alphas:
    """Of modules whose names begin so, PEFT's config."""

    configs: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def beside(cls, path: Path) -> Alphas:
        """What is said in a file and beside it; a config that cannot be read says nothing."""
        found = [(PEFTS_OWN, _parsed(path.with_name("adapter_config.json")))]
        header = _parsed(path)
        for network in NETWORKS:
            config = {key.removeprefix(network): value for key, value in header.items() if key.startswith(network)}
            found.append((network, config))
        return cls(tuple((start, config) for start, config in found if config))

    def scale_of(self, module: str, rank: int | None) -> float | None:
        """Alpha by the rank that its tensors have, or else the config says, or by its root; None if nothing is said."""
        for start, config in self.configs:
            if not module.startswith(start):
                continue
            own = config.get("alpha_pattern")
            own = own if isinstance(own, dict) else {}
            named = [alpha for end, alpha in own.items() if f".{module}".endswith(f".{end}")]
            alpha = (named or [config.get("lora_alpha", config.get("alpha"))])[0]
            rank = rank or config.get("r")
            if all(isinstance(number, int | float) and 0 < number < LARGEST for number in (alpha, rank)):
                return alpha / (rank**0.5 if config.get("use_rslora") is True else rank)
        return None


def _parsed(path: Path) -> dict[str, Any]:
    """PEFT's config in a JSON file, or in the header of a `.safetensors` file."""
    try:
        if path.suffix.lower() == ".json":
            text = path.read_text("utf-8")
        else:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError, SafetensorError):
        return {}
    return config if isinstance(config, dict) else {}
