"""sd-hyena train -t IN01 -W 512: distil self-attentions of a checkpoint into Hyena operators. See --help."""

from __future__ import annotations

import sys

from sd_hyena.distil.run_options import options_of_run
from sd_hyena.options.command import run_parsed
from sd_hyena.options.command_line import parse
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import work


def main(config: TrainConfig) -> None:
    with work("loading PyTorch, diffusers and Lightning", announced=False):
        from sd_hyena.distil.training import train

    train(config)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code. `--resume RUN` brings the options of that run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_parsed(lambda: parse(TrainConfig, given, options_of_run(given)), main, given)


if __name__ == "__main__":
    sys.exit(command())
