"""``python -m flax_resnetv2 PRESET``: what a net consists of; see ``cli.describe``."""

import sys

from flax_resnetv2.cli import describe

if __name__ == "__main__":
    sys.exit(describe())
