"""python train.py -t IN01 -W 512: distil self-attentions of a checkpoint into Hyena operators. See --help."""

import sys

from sd_hyena.options.command import run
from sd_hyena.options.train_config import TrainConfig


def main(config: TrainConfig) -> None:
    from sd_hyena.distil.training import train

    train(config)


if __name__ == "__main__":
    sys.exit(run(TrainConfig, main))
