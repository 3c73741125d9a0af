"""python train.py -t IN01 -W 512: distil self-attentions of a checkpoint into Hyena operators. See --help."""

import sys

from sd_hyena.distil.__main__ import command

if __name__ == "__main__":
    sys.exit(command())
