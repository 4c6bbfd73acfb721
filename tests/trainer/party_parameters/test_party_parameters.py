"""Parameters as whole tensors, here of one process; of several: system/test_sharded.py."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from party_threads import linear
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.trainer.party_parameters import choice
from pellm_lightning.trainer.party_parameters.base import LocalParameters
from pellm_lightning.trainer.party_parameters.choice import (
    gathered,
    is_gathered_at_once,
    party_parameters,
    unwrapped,
)

PARTY = Party(Topology())


@pytest.fixture(autouse=True)
def any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is the same with every torch."""
    monkeypatch.setattr(choice, "OLDEST_TORCH", "2.0")


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def net() -> nn.Sequential:
    layers = nn.Sequential(linear(4, 3, seed=1), nn.Tanh(), linear(3, 2, seed=2))
    layers[0].requires_grad_(False)
    return layers


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_those_of_one_process_are_read_and_written_where_they_are() -> None:
    module = net()
    with gathered(module):
        values = party_parameters(PARTY, module, trained(module))
    assert isinstance(values, LocalParameters)
    values.read_()
    values.write_()
    assert {name: id(x) for name, x in values.tensors.items()} == {
        name: id(p) for name, p in trained(module).items()
    }
    assert values.frozen_state(module).keys() == frozen_state(module).keys()


def test_shards_are_copied_and_given_back(mesh: Any) -> None:
    module, plain = net(), net()
    root: Any = torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    assert not is_gathered_at_once(root)
    with gathered(root):
        values = party_parameters(PARTY, root, trained(module))
    values.read_()
    for name, p in trained(plain).items():
        assert torch.equal(values.tensors[name], p)
        assert type(values.tensors[name]) is torch.Tensor
    # Training goes on: what was read stays.
    x = torch.ones(5, 4)
    root(x).sum().backward()
    optimizer = torch.optim.SGD([p for p in root.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    optimizer.zero_grad()
    for name, p in trained(plain).items():
        assert torch.equal(values.tensors[name], p)
        values.tensors[name].mul_(3)
        p.data.mul_(3)
    with torch.no_grad():  # which leaves FSDP2's root gathered
        root(x)
    values.write_()
    with torch.no_grad():
        assert torch.equal(root(x), plain(x))
    # The optimizer steps what was written.
    for each in (root, plain):
        each(x).sum().backward()
    optimizer.step()
    torch.optim.SGD(list(trained(plain).values()), lr=1.0).step()
    values.read_()
    for name, p in trained(plain).items():
        torch.testing.assert_close(values.tensors[name], p.detach(), rtol=0, atol=1e-6)


def test_a_frozen_base_in_shards_has_the_digests_of_a_whole_one(mesh: Any) -> None:
    module = net()
    root: Any = torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    with torch.no_grad():  # which leaves the root gathered
        root(torch.ones(1, 4))
    with gathered(root):
        values = party_parameters(PARTY, root, trained(module))
    assert base_digests(values.frozen_state(module)) == base_digests(frozen_state(net()))


# ---- what is refused


def fsdp1(module: nn.Module, **options: Any) -> nn.Module:
    """The module under FSDP1 in a world of one, where it says that it has nothing to shard."""
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return FullyShardedDataParallel(module, device_id=cpu, **{"use_orig_params": True} | options)


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_a_module_whose_shards_are_elsewhere_is_refused(mark: str) -> None:
    """DeepSpeed's optimizer would overwrite what a round has written, from masters that it does not see."""
    module = net()
    setattr(module[2].weight, mark, None)
    for act in (gathered, lambda root: party_parameters(PARTY, root, trained(root), experimental=True)):
        with pytest.raises(ValueError, match=r"of the parameter '2\.weight' outside of this Sequential"):
            act(module)


def test_what_lies_inside_of_fsdp1_is_refused_and_the_outermost_taken(mesh: Any) -> None:
    module = net()
    module[0] = fsdp1(module[0])
    root = fsdp1(module)
    with pytest.raises(ValueError, match="Give the module as FSDP1, DeepSpeed or Fabric has wrapped it"):
        gathered(module)
    assert unwrapped(root) is module
    assert is_gathered_at_once(root)
    with gathered(root):
        with pytest.raises(ValueError, match=r"by FSDP1 have not been run .*experimental=True\) to try it"):
            party_parameters(PARTY, root, trained(module))
        with pytest.raises(ValueError, match="writes into 1 frozen base"):
            party_parameters(PARTY, root, trained(module), [torch.zeros(2)], experimental=True)
        values = party_parameters(PARTY, root, trained(module), experimental=True)
    values.read_()
    for name, p in trained(net()).items():
        assert torch.equal(values.tensors[name], p)


def test_flat_parameters_are_refused(mesh: Any) -> None:
    module = nn.Sequential(linear(4, 3, seed=1))
    with pytest.raises(ValueError, match=r"flat parameter .* use_orig_params=True"):
        gathered(fsdp1(module, use_orig_params=False))


def test_shards_of_an_older_torch_need_consent(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    root: Any = torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    monkeypatch.setattr(choice, "OLDEST_TORCH", "99.0")
    with pytest.raises(ValueError, match=r"by DTensor were tried with torch 99\.0 and newer, and this is"):
        party_parameters(PARTY, root, trained(module))
    party_parameters(PARTY, root, trained(module), experimental=True)


def test_a_quantised_base_in_shards_is_refused(mesh: Any) -> None:
    class Quantised(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight.absmax"] = torch.ones(1)

    module = nn.Sequential(Quantised(4, 3), linear(3, 2, seed=2))
    module[0].requires_grad_(False)
    with gathered(module):
        party_parameters(PARTY, module, trained(module))
    root: Any = torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    with pytest.raises(ValueError, match=r"quantised \('0\.weight\.absmax'\) and sharded"):
        party_parameters(PARTY, root, trained(module))
