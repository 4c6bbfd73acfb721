"""Entry point of ``python -m pellm_lightning``, which is ``pellm``."""

import sys

from pellm_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
