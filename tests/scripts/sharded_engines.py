"""What four processes do without Lightning for system/test_sharded.py: loops of one's own, FSDP1, ZeRO."""

import itertools
import json
from typing import Any

import torch
import torch.distributed as dist
from party_threads import dataset, linear
from sharded_parties import DILOCO, OUT, Parties

from pellm_lightning import PartyEnvironment
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.session import PartySession
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.integrations.federated_loop import FederatedLoop, save_trained
from pellm_lightning.loop.parameters import Parameters
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.tensors.selection import plain_name
from pellm_lightning.tensors.sharding import whole
from pellm_lightning.trainer.party_parameters.choice import gathered, party_parameters


def loop() -> Any:
    """Training loops of one's own in two parties of two, by FSDP2, by FSDP1 and by DDP."""
    answers = {}
    with Parties((2, 2)).entered() as parties:
        PartyEnvironment(num_parties=1).validate_settings(2, 1)
        for kind in ("fsdp", "fsdp1", "ddp"):
            net: Any = layers()
            trained = wrapped(net, kind)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
            topology = Topology(parties.party, parties.count, parties.rank, parties.size)
            callback: Any = parties.federated(f"loop {kind}")
            session = PartySession(topology, callback.connect)
            folder = OUT / "loop" / kind
            arguments = DILOCO | {"every_n_steps": 2, "folder": folder}
            arguments["parameters"] = Parameters(experimental=kind == "fsdp1")
            with FederatedLoop(trained, optimizer, session=session, **arguments) as federated:
                for step in range(5):
                    x, y = batch_of(step + 10 * parties.party, parties.rank, 2)
                    loss = torch.nn.functional.cross_entropy(trained(x), y)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    federated.after_step(samples=len(x), loss=loss)
                    with torch.no_grad():  # which leaves FSDP2's root gathered
                        trained(x)
            path = str(folder / f"{parties.party}.pt")
            save_trained(trained, path, step=5, epoch=0, leads=parties.rank == 0)
            dist.barrier()
            saved = torch.load(path)["parameters"]
            assert {name: x.shape for name, x in saved.items()} == {
                name: p.shape for name, p in layers().named_parameters()
            }
            with gathered(trained):
                vector = torch.cat([whole(p).flatten() for p in net.parameters()])
            assert torch.equal(vector, torch.cat([x.flatten() for x in saved.values()]))
            start, *_ = (folder / f"party-{parties.party}" / "rounds.jsonl").read_text().splitlines()
            assert json.loads(start)["parameters"] == json.loads(start)["leaving"] == vector.numel()
            answers[kind] = {"vector": vector, "weights": [done.weight for done in federated.rounds]}
    return answers


def wrapped(net: Any, kind: str) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "fsdp":
        for part in (net[0], net[2], net):
            fully_shard(part)
        return net
    net[0] = FullyShardedDataParallel(net[0], device_id=torch.device("cpu"), use_orig_params=True)
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)


def layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        linear(8, 12, seed=1), torch.nn.Tanh(), linear(12, 12, seed=2), torch.nn.ReLU(), linear(12, 3, seed=3)
    )


def batch_of(step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = dataset(6, seed=step).tensors
    return x[rank::size], y[rank::size]


def own_step(module: Any, optimizer: Any, step: int, rank: int = 0, size: int = 1) -> None:
    x, y = batch_of(step, rank, size)
    torch.nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def written(values: Any, reference: torch.nn.Module) -> None:
    """Change the whole tensors at the leader as a round would; every process changes the reference alike."""
    values.read_()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if not p.requires_grad:
                continue
            p.mul_(0.5).add_(0.25)
            if name in values.tensors:
                values.tensors[name].mul_(0.5).add_(0.25)
    values.write_()


def seen(values: Any) -> torch.Tensor:
    values.read_()
    return torch.cat([x.flatten() for x in values.tensors.values()] or [torch.zeros(0)]).float().clone()


def vector_of(reference: torch.nn.Module) -> torch.Tensor:
    named = sorted(reference.named_parameters())
    return torch.cat([p.detach().flatten() for _, p in named if p.requires_grad])


def fsdp1() -> Any:
    """FSDP1 over three processes: two steps, a round, one step, against one process with all samples."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    with Parties((3, 1)).entered() as parties:
        if parties.size == 1:
            return None
        PartyEnvironment(num_parties=1).validate_settings(3, 1)
        reference, net, cpu = layers(), layers(), torch.device("cpu")
        for module in (reference, net):
            module[0].requires_grad_(False)
        for index in (0, 2):
            net[index] = FSDP(net[index], device_id=cpu, use_orig_params=True)
        root = FSDP(net, device_id=cpu, use_orig_params=True)
        party = Party(Topology(0, 1, parties.rank, 3))
        with gathered(root):
            named = {plain_name(name): p for name, p in net.named_parameters() if p.requires_grad}
            values = party_parameters(party, root, named, experimental=True)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (root, reference)]
        digests = base_digests(values.frozen_state(net)), base_digests(frozen_state(reference))
        answer: dict[str, Any] = {"kind": type(values).__name__, "digests": digests}
        for step in range(3):
            if step == 2:
                written(values, reference)
                answer["written"] = seen(values), vector_of(reference)
            own_step(root, optimizers[0], step, parties.rank, 3)
            own_step(reference, optimizers[1], step)
        return answer | {"stepped": (seen(values), vector_of(reference))}


def zero() -> Any:
    """ZeRO 1 to 3 over two processes, in fp32 and bf16: two steps, a round, one step."""
    import deepspeed

    answers = {}
    with Parties((2, 2)).entered() as parties:
        PartyEnvironment(num_parties=1).validate_settings(2, 1)
        party = Party(Topology(0, 1, parties.rank, 2))
        # It would be compiled, which takes minutes; Gloo sums as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        for stage, half in itertools.product((1, 2, 3), (False, True)):
            reference = layers()
            config = {
                "train_micro_batch_size_per_gpu": 3,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": half},
            }
            module = layers()
            made = torch.optim.AdamW(module.parameters(), lr=0.05)
            engine = deepspeed.initialize(model=module, optimizer=made, config=config)[0]
            with gathered(engine):
                parameters = dict(module.named_parameters())
                values = party_parameters(party, engine, parameters, experimental=True)
            answer: dict[str, Any] = {"kind": type(values).__name__}
            for step in range(3):
                if step == 2:
                    values.read_()
                    for tensor in values.tensors.values():  # at the leader
                        tensor.mul_(0.5).add_(0.25)
                    for name, tensor in values.tensors.items():
                        reference.get_parameter(name).data.copy_(tensor)
                    values.write_()
                    answer["wanted"], answer["written"] = vector_of(reference), seen(values)
                    x = batch_of(9, 0, 1)[0]
                    shown = engine(x.bfloat16() if half else x).detach().float()
                    answer["forward"] = shown, reference(x).detach()
                x, y = batch_of(step, parties.rank, 2)
                loss = torch.nn.functional.cross_entropy(engine(x.bfloat16() if half else x).float(), y)
                engine.backward(loss)
                engine.step()
            answer["stepped"] = seen(values)
            answer["federated"] = federated(engine, parties, f"zero {stage} {half}", half)
            answers[f"{stage} {'bf16' if half else 'fp32'}"] = answer
    return answers


def federated(engine: Any, parties: Parties, name: str, half: bool) -> dict[str, torch.Tensor]:
    """Two more steps, with a round after each; return what would be kept below a quorum."""
    topology = Topology(parties.party, parties.count, parties.rank, parties.size)
    session = PartySession(topology, parties.federated(name).connect)  # type: ignore[attr-defined]
    settings = {"every_n_steps": 1, "record": False, "on_nonfinite": "raise"}
    consent = Parameters(experimental=True)
    with FederatedLoop(engine, session=session, parameters=consent, **settings) as rounds:
        for step in range(2):
            x, y = batch_of(step + 10 * parties.party, parties.rank, 2)
            loss = torch.nn.functional.cross_entropy(engine(x.bfloat16() if half else x).float(), y)
            engine.backward(loss)
            engine.step()
            rounds.after_step(len(x), loss)
    path = str(OUT / f"{name} {parties.party}.pt")
    save_trained(engine, path, step=2, epoch=0, leads=parties.rank == 0)
    dist.barrier()
    return torch.load(path)["parameters"]
