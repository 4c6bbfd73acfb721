"""Three parties hold the presidential messages of three eras and fine-tune one language model together.

Prepares texts and model, trains each party alone, trains all of them federated, evaluates the base model and
every adapter on every era, and leaves a table, a picture, the numbers and a page about the fits in
runs/presidents.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = Path("runs/presidents")
PARTIES = range(3)
QUICK = [
    "--trainer.limit_train_batches=2",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--federated.every_n_steps=1",
]
# Each process would import for longer than it takes two training steps: all are forked from one that has
# imported everything and computed nothing. Not where a system library may have started threads by then.
START = "forkserver" if sys.platform == "linux" else "spawn"


class Demo:
    """The stages, each made of commands that could be typed as well.

    Args:
        quick: Two steps instead of the whole training, to see that everything works.
    """

    def __init__(self, quick: bool) -> None:
        self.seconds: dict[str, float] = {}
        cores = os.cpu_count() or 1
        self.together, self.each = cores, max(1, cores // len(PARTIES))
        self.config = f"--config={HERE / 'presidents.yaml'}"
        self.fit = ["fit", self.config, *(QUICK if quick else [])]
        self.batches = ["--trainer.limit_test_batches=1"] if quick else []
        self.processes: Any = get_context(START)
        if START == "forkserver":
            self.processes.set_forkserver_preload(["imports"])

    def run(self) -> None:
        """Go through all stages."""
        print("Three parties fine-tune one language model: about 5 minutes on two free cores.")
        with self.stage("1/4 Unpack the model and write each party's texts", about_s=20):
            wait({"prepare.py": self.start(prepare)})
        with self.stage("2/4 Train each party alone, the three side by side", about_s=80):
            self.train_alone()
        with self.stage("3/4 Train the three parties federated", about_s=95):
            self.train_federated()
        with self.stage("4/4 Evaluate the base model and every adapter on every era", about_s=70):
            self.evaluate()

    def train_alone(self) -> None:
        """Train three federations of one; party 0 shows its bar, the others write theirs into a file."""
        logs = [None, *(FOLDER / f"alone-{party}.log" for party in PARTIES[1:])]
        print(f"The bar is party 0's; the others write into {' and '.join(map(str, logs[1:]))}.", flush=True)
        parties = {}
        for party, log in zip(PARTIES, logs, strict=True):
            # Without validation, which nobody would watch.
            words = [*self.fit, f"--data.party={party}", "--trainer.limit_val_batches=0"]
            words += [f"--trainer.default_root_dir={FOLDER}/alone-{party}"]
            parties[f"party {party}"] = self.start(pellm, words, self.each, log)
        wait(parties)

    def train_federated(self) -> None:
        """Launch the same configuration as a federation of three; this is what torchrun does."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "presidents"}
        launch = LaunchConfig(1, 1, len(PARTIES), **rendezvous, max_restarts=0, start_method=START)
        try:
            elastic_launch(launch, pellm)(self.fit, self.each)
        except ChildFailedError as error:
            raise SystemExit(f"Stopped: {error}") from error

    def evaluate(self) -> None:
        """Measure the base model and all adapters on every era's held-out messages."""
        from prepare import ERAS, adapters  # only now: the first lines should not wait for transformers

        words = ["evaluate", self.config, "--data.batch_size=8", *self.batches]
        words += [f"--parties={len(PARTIES)}", "--names", *ERAS, f"--out={FOLDER}/evaluated.json"]
        words += ["--adapters", *(f"{name}={folder}" for name, folder in adapters(FOLDER).items())]
        wait({"evaluate": self.start(pellm, words, self.together)})

    def start(self, function: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Start a function in a process of its own."""
        process: BaseProcess = self.processes.Process(target=function, args=arguments)
        process.start()
        return process

    @contextmanager
    def stage(self, title: str, about_s: int) -> Iterator[None]:
        """Announce a stage, and note how long it took."""
        print(f"\n=== {title} (about {about_s} s)", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - begin, 1)


def wait(processes: dict[str, BaseProcess]) -> None:
    """Wait until all processes have ended; if one fails, end the others and the demo."""
    running = {process.sentinel: name for name, process in processes.items()}
    while running:
        for ended in connection.wait(list(running)):
            name = running.pop(ended)
            process = processes[name]
            process.join()
            if process.exitcode:
                for other in processes.values():
                    other.terminate()
                raise SystemExit(
                    f"Stopped: {name} ended with status {process.exitcode}."
                    f" What it says is above, or in {FOLDER}/*.log."
                )


# ---- what the processes run


def prepare() -> None:
    """Be ``python examples/presidents/prepare.py runs/presidents``."""
    from prepare import write

    write(FOLDER)


def pellm(words: Sequence[str], threads: int, log: Path | None = None) -> None:
    """Be ``python -m pellm_lightning *words``, which says what it says to the terminal or into ``log``."""
    import torch

    from pellm_lightning.cli.main import main as run_command

    if log is not None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)  # OMP_NUM_THREADS was read when torch was imported
    sys.argv = ["pellm", *words]
    if status := run_command():
        sys.exit(status)


def set_environment() -> None:
    """Set no hub, and a terminal free of other libraries' notes, for all processes."""
    os.environ |= {
        "OMP_WAIT_POLICY": "PASSIVE",  # a waiting thread gives its core away: others may need it
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="where to make runs/presidents")
    parser.add_argument("--quick", action="store_true", help="two training steps, to see that it works")
    options = parser.parse_args()
    os.chdir(options.root)
    set_environment()
    demo = Demo(options.quick)
    begin = time.monotonic()
    demo.run()
    import report  # only now: the first lines should not wait for matplotlib

    from pellm_lightning.report import page

    report.write(FOLDER, demo.seconds)
    # What `python -m pellm_lightning report runs/presidents` writes.
    written = page.write(FOLDER)
    print(f"\nTook {time.monotonic() - begin:.0f} s. Table, picture and numbers: {FOLDER.resolve()}")
    print(f"Round by round, each party alone next to the federation, for a browser: {written}")


if __name__ == "__main__":
    main()
