"""What a config asks for, looked at before a model is loaded."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sd_hyena.generate.alternatives import kept_in
from sd_hyena.generate.growth import Stage
from sd_hyena.generate.kept import stamp
from sd_hyena.generate.offload import check_offload
from sd_hyena.generate.optimize import check_optimize
from sd_hyena.models.location import model_path
from sd_hyena.models.lora.applied import Given
from sd_hyena.models.prediction import noise_levels
from sd_hyena.models.upscaler import Upscaler, load_upscaler
from sd_hyena.models.vae import check_vae
from sd_hyena.options.command_line import with_paths
from sd_hyena.options.generate_config import GenerateConfig, check_measuring
from sd_hyena.options.growing import method_of, own_side
from sd_hyena.options.sampler import check_sampler
from sd_hyena.processes.device import pick_device, pick_dtype
from sd_hyena.processes.group import own_device
from sd_hyena.text.textual_inversion import Embedding, check_asked, read_embeddings, with_bundled


@dataclass(frozen=True)
class Order:
    """Files, stages and device of a config; a picture that does not grow has one stage."""

    config: GenerateConfig
    model: Path
    device: torch.device
    dtype: torch.dtype
    stages: tuple[Stage, ...]
    embeddings: tuple[Embedding, ...]

    @classmethod
    def of(cls, config: GenerateConfig) -> Order:
        """Raises BadInput."""
        config = with_paths(config)
        path = model_path(config.model, config.vae)
        check_sampler(config.scheduler, noise_levels(path))
        if config.vae:
            check_vae(config.vae)
        own = own_side(config.model)
        stages = tuple(Stage.all_of(config, own, method_of(config, own)))
        if "auto" in kept_in(config.keep_attention, len(stages)):
            check_measuring(config.offload)
        embeddings = with_bundled(read_embeddings(config.embeddings), (one.lora for one in stages[-1].task.loras))
        prompts = config.prompt or "", config.negative_prompt, *stages[-1].arrangement.prompts
        check_asked(prompts, embeddings)
        device = pick_device(own_device(config.device))
        check_offload(config.offload, device)
        check_optimize(config.optimizations, device)
        return cls(config, path, device, dtype_of(config, device), stages, embeddings)

    @property
    def loras(self) -> tuple[Given, ...]:
        """The LoRAs with their weights."""
        return self.stages[-1].task.loras

    @property
    def plainly(self) -> Order:
        """The same without growing."""
        return Order.of(replace(self.config, grow="off"))

    def keys(self) -> dict[str, Hashable]:
        """By which it is known whether something is loaded already."""
        config = self.config
        parts = {
            "embeddings": tuple(map(stamp, (one.path for one in self.embeddings))),
            "loras": tuple((stamp(one.lora.path), one.strength, one.text_strength) for one in self.loras),
            "controlnets": tuple(stamp(path) for path, _ in config.controls),
        }
        parts["loras"] += parts["embeddings"]  # a LoRA may change the vectors of words
        model = (stamp(self.model), config.vae and stamp(config.vae), self.dtype, str(self.device), config.offload)
        if config.offload != "off":  # its hooks stand around all that was there when they were set
            model += tuple(parts.values())
        alone = {"pipeline": ("pipeline", model), "upscaler": self.upscaler_key}
        return alone | {name: (name, key, model) for name, key in parts.items()}

    @property
    def upscaler_key(self) -> Hashable:
        """That of `keys()`, without a look at all the other files."""
        return "upscaler", self.config.upscaler and stamp(self.config.upscaler), self.dtype, str(self.device)

    def upscaler(self) -> Upscaler | None:
        """Raises BadInput."""
        return load_upscaler(self.config.upscaler, self.device, self.dtype) if self.config.upscaler else None


def dtype_of(config: GenerateConfig, device: torch.device) -> torch.dtype:
    """What a config is drawn in. Raises BadInput."""
    return torch.bfloat16 if "bf16" in config.optimizations else pick_dtype(config.dtype, device)
