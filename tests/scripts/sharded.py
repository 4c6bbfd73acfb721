"""What four processes do for system/test_sharded.py: parties in shards, and the same parties by DDP.

``sharded.py OUT PART...``; the answer of a part is saved as ``<part>-<rank>.pt``. One launch has parties of
several sizes one after the other, so each process is told by its environment which party it belongs to.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import sharded_engines
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from party_threads import Rounds, data, quiet_trainer
from sharded_module import ShardedModule
from sharded_parties import FEDAVG, OUT, RANK, Parties, error_of, fit, store

from pellm_lightning import FederatedAveraging, Overlap, PartyEnvironment, SeparateJobs
from pellm_lightning.aggregation import (
    Alternating,
    FrozenA,
    HeterogeneousRank,
    LowRankMean,
    Mean,
    Median,
    NormBound,
    ResidualMean,
    ShareA,
    TrimmedMean,
)
from pellm_lightning.callbacks.drift import SCAFFOLD
from pellm_lightning.comm import Membership
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.exchange import Quantized
from pellm_lightning.loop.parameters import Parameters
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.tensors.sharding import reshard, whole


def documented() -> Any:
    """The script of the page on sharded parties, as its reader starts it."""
    from document_blocks import blocks

    (script,) = [block.text for block in blocks("docs/sharded.md") if block.language == "python"]
    os.chdir(OUT)
    found: dict[str, Any] = {}
    exec(compile(script, "train.py", "exec"), found)
    (callback,) = [c for c in found["trainer"].callbacks if isinstance(c, FederatedAveraging)]
    module = found["trainer"].lightning_module
    reshard(module)
    vector = torch.cat([whole(p).flatten() for p in module.parameters()])
    dist.destroy_process_group()
    return {"vector": vector, "rounds": [(done.active_parties, done.weight) for done in callback.rounds]}


# ---- two parties of two processes


MATRIX: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "recomputed": {"module": {"recomputes": True}},
    "compiled": {"module": {"compiled": True}},
    "offloaded": {"module": {"offloads": True}},
    "clipped": {"trainer": {"gradient_clip_val": 0.1}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}, "batch": 2},
    "full": {"module": {"lora": False}},
    "full SGD": {"module": {"lora": False, "optimizer": "SGD", "lr": 0.1}},
    "overlap": {"overlap": Overlap(delay_steps=2)},
    "fragments": {"overlap": Overlap(fragments=2), "every_n_steps": 2},
    "reset": {"inner_optimizer_state": "reset"},
    "mean": {"aggregation": Mean()},
    "frozen A": {"aggregation": FrozenA(), **FEDAVG},
    "alternating": {"aggregation": Alternating(), **FEDAVG},
    "share A": {"aggregation": ShareA(), **FEDAVG},
    "power": {"aggregation": LowRankMean(solver="power")},
    "balanced": {"aggregation": LowRankMean(factorization="balanced"), **FEDAVG},
    "ranks": {"aggregation": HeterogeneousRank(), **FEDAVG},
    "quantised": {"exchange": Quantized(), "aggregation": Mean()},
    "private": {
        "privacy": GaussianMechanism(0.05, 0.0, distributed=False),
        "weighting": "uniform",
        "aggregation": Mean(),
    },
}
TENSOR_PARALLEL = ("fp32", "bf16-true", "full", "alternating", "overlap", "recomputed")


def matrix() -> Any:
    """Each case by FSDP2 and by DDP, some by tensor parallelism."""
    answers = {}
    with Parties((2, 2)).entered() as parties:
        for case in MATRIX:
            answers[case] = {kind: fit(parties, kind, **MATRIX[case]) for kind in ("fsdp", "ddp")}
        for case in TENSOR_PARALLEL:
            answers[case]["tp"] = fit(parties, "tp", **MATRIX[case])
        mixed = "fsdp" if parties.party == 0 else "tp"
        answers["fp32"]["mixed"] = fit(parties, mixed)
    return answers


def resumed() -> Any:
    """The whole, and resumed in the middle of the second round, from full and distributed checkpoints."""
    answers = {}
    with Parties((2, 2)).entered() as parties:
        for case, kind, options in (
            ("fsdp", "fsdp", {}),
            ("tp", "tp", {}),
            ("fsdp distributed", "fsdp", {"trainer": {"distributed": True}}),
            ("tp distributed", "tp", {"trainer": {"distributed": True}}),
            ("fsdp overlap", "fsdp", {"overlap": Overlap(delay_steps=2)}),
            ("fsdp adapter", "fsdp", {"parameters": Parameters(save_frozen=False)}),
            ("tp adapter", "tp", {"parameters": Parameters(save_frozen=False)}),
        ):
            first = fit(parties, kind, keep=True, **options)
            path = f"{first['dirpath']}/step=4.ckpt"
            answers[case] = first, fit(parties, kind, keep=True, ckpt_path=path, seed=10, **options)
    return answers


def refused() -> Any:
    """What cannot be federated ends in seconds, at all processes."""
    answers = {}
    # By the launcher's own environment: a strategy that spans both parties.
    answers["spans"] = error_of(
        lambda: quiet_trainer(
            OUT, [FederatedAveraging(timeout_s=600)], strategy=ModelParallelStrategy(4, 1), devices=4
        ).fit(ShardedModule(RANK), data(8, seed=RANK))
    )
    dist.destroy_process_group()
    answers["devices"] = error_of(
        lambda: quiet_trainer(
            OUT,
            [FederatedAveraging(timeout_s=600)],
            plugins=[PartyEnvironment(num_parties=2)],
            strategy=ModelParallelStrategy(4, 1),
            devices=4,
        ).fit(ShardedModule(RANK), data(8, seed=RANK))
    )
    with Parties((2, 2)).entered() as parties:
        for name, options in {
            "base": {"aggregation": ResidualMean(), **FEDAVG},
            "drift": {"callbacks": [SCAFFOLD()], **FEDAVG},
            "averaged": {
                "callbacks": [EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0)],
                "every_n_steps": None,
                "every_n_epochs": 1,
            },
            "left out": {
                "parameters": Parameters(save_frozen=False),
                "trainer": {"distributed": True},
            },
        }.items():
            answers[name] = error_of(lambda o=options: fit(parties, "fsdp", **o))
        # The base of one process of party 1 differs, in a shard that its leader does not hold.
        answers["differs"] = error_of(lambda: fit_differing(parties))
        answers["after"] = fit(parties, "fsdp")
    return answers


class Differing(ShardedModule):
    """Its frozen base differs in the last row, which another process than the leader holds."""

    def configure_model(self) -> None:
        if self.net is None and self.party == 1:
            import party_threads
            import sharded_module

            made = party_threads.linear

            def other(inputs: int, outputs: int, seed: int) -> Any:
                layer = made(inputs, outputs, seed)
                if seed == 2:
                    with torch.no_grad():
                        layer.weight[-1, -1] += 1
                return layer

            sharded_module.linear = other
            try:
                super().configure_model()
            finally:
                sharded_module.linear = made
        else:
            super().configure_model()


def fit_differing(parties: Parties) -> None:
    federated = parties.federated("differing", every_n_steps=3)
    trainer = parties.trainer("fsdp", OUT / "differing", [federated])
    trainer.fit(Differing(parties.party), parties.loader("fsdp", 4))


# ---- parties of other sizes


def robust() -> Any:
    """A party of two processes and two of one, under what needs three parties."""
    from secure_exchange import SecureAggregation

    answers: dict[str, Any] = {}
    with Parties((2, 1, 1)).entered() as parties:
        secure = {
            "signing_key": f"{OUT}/keys/{{party}}.key",
            "trusted_keys": str(OUT / "keys"),
        }
        for case, options in {
            "median": {"aggregation": Median()},
            "trimmed": {"aggregation": TrimmedMean()},
            "bound": {"aggregation": NormBound()},
            "secure": {"exchange": SecureAggregation(**secure)},
        }.items():
            answers[case] = {kind: fit(parties, kind, **options) for kind in ("fsdp", "ddp")}
    return answers


def uneven() -> Any:
    """A party of three processes, whose shards are uneven or empty, and one of one."""
    with Parties((3, 1)).entered() as parties:
        return {kind: fit(parties, kind, batch=6) for kind in ("fsdp", "ddp")}


def mesh() -> Any:
    """One party of four processes as a mesh of two by two, alone in its federation."""
    with Parties((4,)).entered() as parties:
        cases = {case: fit(parties, "2d", **MATRIX[case]) for case in ("fp32", "full", "bf16-true")}
        first = fit(parties, "2d", keep=True)
        path = f"{first['dirpath']}/step=4.ckpt"
        return cases | {"whole": first, "resumed": fit(parties, "2d", ckpt_path=path, seed=10)}


# ---- separate jobs


class Between(Callback):
    """Does something once it has joined the others, and before each batch."""

    def __init__(self, joined: Any, act: Any) -> None:
        self.joined, self.act = joined, act

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.joined()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.act(trainer.global_step)


def jobs() -> Any:
    """Parties of unlike kinds as separate jobs: FSDP2, tensor parallel, and a fifth process by itself.

    After round 0 the first fails, and the others wait until it is back; after round 2 the fifth process is
    killed, and after round 3 the second waits for it.
    """
    keys = store()
    codes: list[int] = []
    fifth = threading.Thread(target=run_fifth_process, args=[dict(os.environ), codes])
    if RANK == 0:
        server = RendezvousServer("127.0.0.1", 0).start()
        keys.set("rendezvous", server.address)
        fifth.start()
    with Parties((2, 2, 1)).entered() as parties:
        answer = of_job(parties, keys)
    keys.add("ended", 1)
    if RANK == 0:
        fifth.join()
        while keys.add("ended", 0) < 5:
            time.sleep(0.1)
    return answer | {"codes": codes}


def run_fifth_process(environ: dict[str, str], codes: list[int]) -> None:
    """Run this script's part as a process that torchrun does not know, and once more after its death."""
    for _ in range(2):
        python = os.environ.get("PYTHON_EXEC", sys.executable)
        words = [python, __file__, str(OUT), "jobs"]
        codes.append(subprocess.run(words, env=environ | {"RANK": "4"}, check=False).returncode)


def of_job(parties: Parties, keys: Any) -> dict[str, Any]:
    name, kind = (("a", "fsdp"), ("b", "tp"), ("c", "single"))[parties.party]
    address, root = keys.get("rendezvous").decode(), OUT / "jobs"

    def life(joined: Any, act: Any) -> dict[str, Any]:
        membership = Membership(heartbeat_ttl_s=2, wait_s=60, round_timeout_s=60)
        job = SeparateJobs(
            f"tcp://{address}", name, ["a", "b", "c"], membership=membership, state_dir=str(root / name)
        )
        federated = FederatedAveraging(every_n_steps=2, weighting="uniform", jobs=job)
        logger, net = Rounds(), ShardedModule(parties.party)
        trainer = parties.trainer(
            kind, root, [federated, Between(joined, act)], logger=logger, log_every_n_steps=1, max_epochs=3
        )
        trainer.fit(net, parties.loader(kind, 4), data(8, seed=9))
        rounds = [(done.round, done.active_parties, done.weight) for done in federated.rounds]
        return {"vector": net.vector(), "rounds": rounds}

    def fails(step: int) -> None:
        if step == 3:
            raise OSError("disk full")

    def waits(step: int) -> None:
        if step == 2:
            keys.get("a is back")  # waits until it is set
        if step == 8:
            keys.get("c is back")
        if step == 6 and name == "c":
            os.kill(os.getpid(), signal.SIGKILL)

    def nothing(*_: Any) -> None:
        pass

    if name == "a":
        failed = error_of(lambda: life(nothing, fails))
        return {"failed": failed} | life(lambda: keys.set("a is back", "yes"), nothing)
    if name == "c" and keys.add("lives of c", 1) == 2:
        return life(lambda: keys.set("c is back", "yes"), nothing)
    return life(nothing, waits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for part in sys.argv[2:]:
        started = time.monotonic()
        try:
            answer = (globals().get(part) or getattr(sharded_engines, part))()
        except BaseException:
            (OUT / f"{part}-{RANK}.txt").write_text(traceback.format_exc())
            raise
        torch.save(answer, OUT / f"{part}-{RANK}.pt")
        if RANK == 0:
            print(f"{part}: {time.monotonic() - started:.1f} s", flush=True)
