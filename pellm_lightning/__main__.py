"""Entry point of ``python -m pellm_lightning``."""

import sys

from pellm_lightning.cli import errors, federated_cli, noise


def main() -> None:
    """Run a command on results, or else what ``FederatedCLI`` runs."""
    noise.quieten()
    if sys.argv[1:2] and sys.argv[1] in ("export", "evaluate"):
        from pellm_lightning.cli import results  # imports more than training needs

        results.main(sys.argv[1:])
    else:
        federated_cli.main()


if __name__ == "__main__":
    with errors.reported():
        main()
