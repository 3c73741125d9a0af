"""python generate.py -y out/hyena.pt -W 512: generate images with trained students swapped in. See --help."""

import sys

from sd_hyena.options.command import run
from sd_hyena.options.generate_config import GenerateConfig


def main(config: GenerateConfig) -> None:
    from sd_hyena.generate.generation import generate

    for path in generate(config):
        print(path)


if __name__ == "__main__":
    sys.exit(run(GenerateConfig, main))
