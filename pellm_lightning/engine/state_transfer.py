"""Transfer of the global state between parties: to one that lacks the newest, or whose bits differ."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm import Collectives, FederationError
from pellm_lightning.tensors import portable, snapshot
from pellm_lightning.tensors.nested import leaves

log = logging.getLogger(__name__)

# Upper limit of a global state: an outer optimizer with a few vectors of its own, and text.
_MAX_VECTORS = 16
_MAX_WORDS = 1 << 28


def agree(
    federation: Collectives,
    state: Callable[[], Mapping[str, Any]],
    load_state: Callable[[Mapping[str, Any]], None],
    vector_bytes: int,
) -> list[int]:
    """Make sure that what every party computed for itself has the same bits at all of them.

    The parties compare checksums, 8 bytes each; those that differ from the first load its state.

    Args:
        federation: The parties that meet; each calls this.
        state: Returns this party's state.
        load_state: Loads another one.
        vector_bytes: Bytes of the global vector.

    Returns:
        The parties that differed, by their place among those that meet.

    Raises:
        FederationError: As ``send_state``.
    """
    checksums = torch.zeros(federation.num_parties, dtype=torch.int64)
    checksums[federation.party] = portable.checksum(_tensors_in(state()))
    first, *others = federation.all_reduce_(checksums).tolist()
    differ = [False, *(other != first for other in others)]
    if any(differ):
        send_state(federation, differ, state, load_state, vector_bytes)
    return [party for party, differs in enumerate(differ) if differs]


def _tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, and its numbers as float64, in order."""
    for leaf in leaves(state):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, int | float):
            yield torch.tensor(leaf, dtype=torch.float64)


def send_state(
    federation: Collectives,
    behind: Sequence[bool],
    state: Callable[[], Mapping[str, Any]],
    load_state: Callable[[Mapping[str, Any]], None],
    vector_bytes: int,
) -> None:
    """Send the newest global state to the parties that lack it; every party calls this.

    Args:
        federation: The parties that meet.
        behind: Party by party, whether it lacks the state; some do, some do not.
        state: Returns this party's state.
        load_state: Loads another one.
        vector_bytes: Bytes of the global vector.

    Raises:
        FederationError: If the state is too large to be one, or cannot be loaded.
    """
    source, here = behind.index(False), federation.party
    packed = snapshot.pack(state()) if source == here else b""
    size_bytes = int(federation.all_reduce_(torch.tensor([len(packed)], dtype=torch.int64)))
    if size_bytes > _MAX_VECTORS * vector_bytes + _MAX_WORDS:
        raise FederationError(
            f"Party {federation.called([source])} would send {size_bytes} bytes of global state, more than"
            f" {vector_bytes} bytes of parameters can have. Install the same version at all parties."
        )
    blob = torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)
    parts = [blob if lacks and source == here else blob[:0] for lacks in behind]
    sizes = [size_bytes if party == source and behind[here] else 0 for party in range(len(behind))]
    received = federation.all_to_all(parts, sizes)[source]
    if not behind[here]:
        return
    try:
        newest = snapshot.unpack(received.numpy().data)
        load_state(newest)
    except (ValueError, KeyError, TypeError) as error:  # a peer sent it, it may be anything
        raise FederationError(
            f"Party {federation.name} cannot load the global state of party"
            f" {federation.called([source])}: {error}. Install the same version at all parties."
        ) from error
    log.info(
        "[party %s] loads the state of round %d from party %s",
        federation.name,
        newest["round"],
        federation.called([source]),
    )
