"""sd-hyena generate -y out/hyena.pt -W 512: generate images with trained students swapped in. See --help."""

from __future__ import annotations

import sys

from sd_hyena.options.command import run_parsed
from sd_hyena.options.command_line import parse_all
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.processes.progress import work


def main(configs: list[GenerateConfig]) -> None:
    with work("loading PyTorch and diffusers", announced=False):
        from sd_hyena.generate.generation import generate

    for path in generate(configs):
        print(path)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_parsed(lambda: parse_all(GenerateConfig, arguments), main, arguments)


if __name__ == "__main__":
    sys.exit(command())
