"""The training in Flower's deployment on this host."""

import shutil
import sys
from pathlib import Path

from peer_flower import deploy, stop, submit, wait_until
from training_task import Training


def main() -> None:
    training = Training.from_env()
    folder = Path(training.out)
    app = folder / "app"
    shutil.copytree(Path(__file__).parent / "flower_training_app", app)
    ports = tuple(map(int, sys.argv[1].split(",")))
    started = deploy(ports, training.parties, folder)
    try:
        submit(app, ports[0], folder)
        wait_until((folder / f"{training.rounds}.time").exists, started)
    finally:
        stop(started)


if __name__ == "__main__":
    main()
