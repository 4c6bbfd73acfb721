"""Parameters as whole tensors, here of one process; of several: system/test_sharded.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from party_threads import linear
from torch import nn

from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.compatibility import base_digests
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.trainer.party_parameters.base import LocalParameters
from pellm_lightning.trainer.party_parameters.choice import gathered, party_parameters

PARTY = Party(Topology())


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
