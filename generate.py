"""python generate.py -y out/hyena.pt -W 512: generate images with trained students swapped in. See --help."""

import sys

from sd_hyena.generate.__main__ import command

if __name__ == "__main__":
    sys.exit(command())
