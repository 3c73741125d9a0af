"""sd-hyena train -t IN01 -W 512: distil self-attentions of a checkpoint into Hyena operators. See --help."""

from __future__ import annotations

import sys

from sd_hyena.options.command import run
from sd_hyena.options.train_config import TrainConfig


def main(config: TrainConfig) -> None:
    from sd_hyena.distil.training import train

    train(config)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(TrainConfig, main, arguments)


if __name__ == "__main__":
    sys.exit(command())
