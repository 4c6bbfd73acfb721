"""Tensors in shards (DTensor of FSDP2 and of tensor parallelism): what they are, and whole ones of them."""

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor lies in pieces over a party's processes, by the name of its type.

    torch.distributed.tensor need not be imported where nobody else has.
    """
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole one, any other as it is; all processes that have a piece call it.

    A piece that is kept on another device than the shards' mesh, as by CPU offload, is moved there first.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    sharded = tensor.detach()
    if sharded.device.type != sharded.device_mesh.device_type:  # type: ignore[attr-defined]
        sharded = sharded.to(sharded.device_mesh.device_type)  # type: ignore[attr-defined]
    gathered: Tensor = sharded.full_tensor()  # type: ignore[attr-defined]
    return gathered


def storage_key(tensor: Tensor) -> int:
    """Return the same number for tensors in the same memory: the address, which shards do not have."""
    return id(tensor) if is_sharded(tensor) else tensor.data_ptr()


def reshard(module: nn.Module) -> None:
    """Return the parameters of FSDP2's modules to their shards.

    After a forward pass without backward, as in validation, the root's parameters stay whole: plain tensors
    in place of the sharded ones, whose memory is freed later, and which what is written into the shards does
    not reach.
    """
    for part in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            part.reshard()  # type: ignore[operator]
