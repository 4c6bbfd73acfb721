"""Tensors in shards, here of one process: what they are, whole ones of them, FSDP2 after a validation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pellm_lightning.tensors.sharding import is_sharded, reshard, storage_key, whole


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh() -> Any:
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


def test_whole_tensors_of_shards() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = torch.arange(6.0).view(3, 2).requires_grad_()
    sharded = distribute_tensor(plain.detach(), mesh(), [Shard(0)])
    assert (is_sharded(plain), is_sharded(sharded), is_sharded(nn.Parameter(sharded))) == (False, True, True)
    assert not is_sharded(whole(sharded))
    assert torch.equal(whole(sharded), plain)
    assert whole(plain).data_ptr() == plain.data_ptr()
    assert not whole(nn.Parameter(sharded)).requires_grad


def test_tied_tensors_are_known_by_their_storage_and_tied_shards_by_themselves() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = torch.zeros(2)
    assert storage_key(plain) == storage_key(plain.view(1, 2))
    first, other = (distribute_tensor(torch.zeros(2), mesh(), [Shard(0)]) for _ in range(2))
    assert first.data_ptr() == other.data_ptr() == 0, "why it is needed"
    assert storage_key(first) == storage_key(first)
    assert storage_key(first) != storage_key(other)


def test_fsdp2_is_back_in_its_shards() -> None:
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(2, 3))
    fully_shard(net, mesh=mesh())
    reshard(net)  # also before anything was gathered
    sharded = dict(net.named_parameters())
    with torch.no_grad():
        net(torch.ones(1, 2))
    assert not any(map(is_sharded, net.parameters())), "why it is needed"
    reshard(net)
    assert {name: id(p) for name, p in net.named_parameters()} == {n: id(p) for n, p in sharded.items()}
    reshard(nn.Linear(2, 1))
