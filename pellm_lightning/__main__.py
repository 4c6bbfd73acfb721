"""Entry point of ``python -m pellm_lightning``."""

import sys

from pellm_lightning import cli


def main() -> None:
    """Run a command on results, or else what ``cli.main`` runs."""
    if sys.argv[1:2] and sys.argv[1] in ("export", "evaluate"):
        from pellm_lightning.results import command  # imports more than training needs

        command.main(sys.argv[1:])
    else:
        cli.main()


if __name__ == "__main__":
    main()
