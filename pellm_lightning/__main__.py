"""Entry point of ``python -m pellm_lightning``."""

from pellm_lightning.cli import main

if __name__ == "__main__":
    main()
