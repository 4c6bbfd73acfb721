"""Three parties hold the presidential messages of three eras and fine-tune one language model together.

Prepares texts and model, evaluates the base model, trains each party alone, trains all of them federated,
evaluates every adapter on every era, and leaves a table, a picture, the numbers and a page about the fits in
runs/presidents.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

HERE = Path(__file__).resolve().parent
FOLDER = Path("runs/presidents")
PARTIES = range(3)
QUICK = [
    "--trainer.limit_train_batches=2",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--federated.every_n_steps=1",
]


class Demo:
    """The stages, each made of commands that could be typed as well.

    Args:
        root: Where ``runs/presidents`` is made; every command runs there.
        quick: Two steps instead of the whole training, to see that everything works.
    """

    def __init__(self, root: Path, quick: bool) -> None:
        self.root = root.resolve()
        self.seconds: dict[str, float] = {}
        cores = os.cpu_count() or 1
        self.together, self.each = environment(cores), environment(max(1, cores // len(PARTIES)))
        self.fit = ["fit", f"--config={HERE / 'presidents.yaml'}", *(QUICK if quick else [])]
        self.batches = ["--trainer.limit_test_batches=1"] if quick else []

    def run(self) -> None:
        """Go through all stages."""
        print("Three parties fine-tune one language model: about 5 minutes on two free cores.")
        with self.stage("1/5 Unpack the model and write each party's texts", about_s=20):
            self.call([str(HERE / "prepare.py"), str(FOLDER)], self.together)
        with self.stage("2/5 Evaluate the base model on the three eras", about_s=20):
            self.evaluate("base")
        with self.stage("3/5 Train each party alone, the three side by side", about_s=95):
            self.train_alone()
        with self.stage("4/5 Train the three parties federated", about_s=110):
            self.train_federated()
        with self.stage("5/5 Evaluate every adapter on every era", about_s=60):
            self.evaluate("adapters")

    def train_alone(self) -> None:
        """Train three federations of one; party 0 shows its bar, the others write theirs into a file."""
        print(
            f"The bar is party 0's; the others write into {FOLDER}/alone-1.log and alone-2.log.", flush=True
        )
        processes = [self.start_alone(party) for party in PARTIES]
        for party, process in enumerate(processes):
            if process.wait() != 0:
                for other in processes:
                    other.terminate()
                raise SystemExit(
                    f"Stopped: party {party} failed. Its words are above or in alone-{party}.log."
                )

    def start_alone(self, party: int) -> subprocess.Popen[bytes]:
        """Start one party's training without a launcher, and without validation, which nobody would watch."""
        command = [
            "-m",
            "pellm_lightning",
            *self.fit,
            f"--data.party={party}",
            "--trainer.limit_val_batches=0",
        ]
        command += [f"--trainer.default_root_dir={FOLDER}/alone-{party}"]
        if party == 0:
            return self.start(command, self.each)
        with (self.root / FOLDER / f"alone-{party}.log").open("w") as log:
            return self.start(command, self.each, log)

    def train_federated(self) -> None:
        """Launch the same configuration as a federation of three; this is what torchrun does."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(PARTIES)}"]
        self.call([*launcher, "-m", "pellm_lightning", *self.fit], self.each)

    def evaluate(self, what: Literal["base", "adapters"]) -> None:
        """Measure the base model or all adapters on every era's held-out messages."""
        from prepare import ERAS, adapters  # only now: the first lines should not wait for transformers

        command = ["-m", "pellm_lightning", "evaluate", f"--config={HERE / 'presidents.yaml'}"]
        command += [f"--parties={len(PARTIES)}", "--names", *ERAS, f"--out={FOLDER / what}.json"]
        if what == "adapters":
            command += ["--no-base", "--adapters", *(f"{k}={v}" for k, v in adapters(FOLDER).items())]
        self.call([*command, "--data.batch_size=8", *self.batches], self.together)

    def call(self, command: list[str], env: dict[str, str]) -> None:
        """Run a Python command to its end."""
        if status := self.start(command, env).wait():
            raise SystemExit(f"Stopped: {' '.join(command[:3])} ... ended with status {status}.")

    def start(
        self, command: list[str], env: dict[str, str], log: TextIO | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a Python command; it speaks to the terminal, or into ``log``."""
        errors = None if log is None else subprocess.STDOUT
        return subprocess.Popen([sys.executable, *command], cwd=self.root, env=env, stdout=log, stderr=errors)

    @contextmanager
    def stage(self, title: str, about_s: int) -> Iterator[None]:
        """Announce a stage, and note how long it took."""
        print(f"\n=== {title} (about {about_s} s)", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - begin, 1)


def environment(threads: int) -> dict[str, str]:
    """Return a command's environment: its threads, no hub, and a terminal free of other libraries' notes."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a waiting thread gives its core away: others may need it
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="where to make runs/presidents")
    parser.add_argument("--quick", action="store_true", help="two training steps, to see that it works")
    options = parser.parse_args()
    demo = Demo(options.root, options.quick)
    begin = time.monotonic()
    demo.run()
    import report  # only now: the first lines should not wait for matplotlib

    from pellm_lightning.report import page

    report.write(demo.root / FOLDER, demo.seconds)
    # What `python -m pellm_lightning report runs/presidents` writes.
    told = page.write(demo.root / FOLDER)
    print(f"\nTook {time.monotonic() - begin:.0f} s. Table, picture and numbers: {demo.root / FOLDER}")
    print(f"Round by round, each party alone beside the federation, for a browser: {told}")


if __name__ == "__main__":
    main()
