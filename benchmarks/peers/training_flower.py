"""The training in Flower: its deployment on this host, or its simulation with as many Ray actors as cores."""

import shutil
import sys
from pathlib import Path

from peer_flower import deploy, stop, submit, wait_until
from training_task import Training


def main() -> None:
    training = Training.from_env()
    if sys.argv[1] == "simulation":
        simulate(training)
        return
    folder = Path(training.out)
    app = folder / "app"
    shutil.copytree(Path(__file__).parent / "flower_training_app", app)
    ports = tuple(map(int, sys.argv[2].split(",")))
    started = deploy(ports, training.parties, folder)
    try:
        submit(app, ports[0], folder)
        wait_until((folder / f"{training.rounds}.time").exists, started)
    finally:
        stop(started)


def simulate(training: Training) -> None:
    from flwr.simulation import run_simulation

    sys.path.insert(0, str(Path(__file__).parent / "flower_training_app"))
    from training_app import client, server

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, training.parties, backend_config={"client_resources": resources})


if __name__ == "__main__":
    main()
