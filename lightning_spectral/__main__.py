"""`python -m lightning_spectral` is `lightning-spectral`."""

import sys

from lightning_spectral.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
