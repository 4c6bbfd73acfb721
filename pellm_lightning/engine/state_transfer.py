"""Transfer of the global state between parties: to one that lacks the newest, or whose bits differ."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm import Collectives, FederationError, PartyLostError
from pellm_lightning.tensors import portable, snapshot
from pellm_lightning.tensors.nested import leaves
from pellm_lightning.tensors.snapshot import Manifest

log = logging.getLogger(__name__)

# Upper limit of a global state: an outer optimizer with a few vectors of its own, and text.
_MAX_VECTORS = 16
_MAX_WORDS = 1 << 28
# Bytes of a state that are sent at a time.
_PIECE_BYTES = 1 << 25


def agree(
    federation: Collectives,
    state: Callable[[], Mapping[str, Any]],
    load_state: Callable[[Mapping[str, Any]], None],
    vector_bytes: int,
    memory: Tensor | None = None,
) -> list[int]:
    """Make sure that what every party computed for itself has the same bits at all of them.

    The parties compare checksums, 8 bytes each; those that differ from the first load its state.

    Args:
        federation: The parties that meet; each calls this.
        state: Returns this party's state.
        load_state: Loads another one.
        vector_bytes: Bytes of the global vector.
        memory: As in ``send_state``.

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
        send_state(federation, differ, state, load_state, vector_bytes, memory)
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
    memory: Tensor | None = None,
    *,
    source: int | None = None,
    digest: str = "",
) -> None:
    """Send the newest global state to the parties that lack it; every party calls this.

    It is sent piece by piece from where it lies to where it stays, so that nobody holds a further copy.

    Args:
        federation: The parties that meet.
        behind: Party by party, whether it lacks the state; some do, some do not.
        state: Returns this party's state.
        load_state: Loads another one.
        vector_bytes: Bytes of the global vector.
        memory: Flat memory that is free meanwhile, for a tensor of its size in the state that arrives; then
            ``load_state`` must copy that.
        source: Who sends it; by default the first that has it.
        digest: Of the state, for which a majority has voted; without it whatever is sent is loaded.

    Raises:
        PartyLostError: If what is sent is not that state.
        FederationError: If it cannot be loaded here.
    """
    source, here = behind.index(False) if source is None else source, federation.party
    manifest, tensors = Manifest.of(state()) if source == here else (None, [])
    text = _broadcast_text(federation, source, manifest.to_json() if manifest else "", vector_bytes)
    with _sent_by(federation, source):
        manifest = Manifest.from_json(text)
        sizes = manifest.sizes_bytes
    _check_size(federation, source, sum(sizes), vector_bytes)
    if behind[here]:
        with _sent_by(federation, source):
            tensors = manifest.new_tensors(memory)
    for index, size_bytes in enumerate(sizes):
        own = tensors[index].view(-1).view(torch.uint8) if tensors else None
        _send_(federation, source, behind, own, size_bytes)
    if not behind[here]:
        return
    with _sent_by(federation, source):
        newest = manifest.state(tensors)
        if digest not in ("", snapshot.digest(newest)):
            raise ValueError("its digest is not that for which the parties have voted")
    try:
        load_state(newest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a peer sent it, it may be anything
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


@contextmanager
def _sent_by(federation: Collectives, source: int) -> Iterator[None]:
    """Refuse what another party has sent, which may be anything, unless it is a state that can be read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PartyLostError(
            f"Party {federation.name} cannot take over the global state of party"
            f" {federation.called([source])}: {error}. It is not loaded, and another party is asked. Install"
            " the same version at all parties; look at that one's log, and at its disk.",
            parties=[federation.names[source]],
        ) from error


def _broadcast_text(federation: Collectives, source: int, text: str, vector_bytes: int) -> str:
    """Return the text of one party at all."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else None
    size = torch.tensor([0 if mine is None else mine.numel()], dtype=torch.int64)
    size_bytes = int(federation.broadcast_(size, source))  # nobody else has a say in it
    _check_size(federation, source, size_bytes, vector_bytes)
    shown = torch.empty(size_bytes, dtype=torch.uint8) if mine is None else mine
    with _sent_by(federation, source):
        return federation.broadcast_(shown, source).numpy().tobytes().decode()


def _send_(
    federation: Collectives, source: int, behind: Sequence[bool], values: Tensor | None, size_bytes: int
) -> None:
    """Send bytes from one party to those that are behind, into ``values``; others may have none."""
    nothing = torch.empty(0, dtype=torch.uint8)
    for start in range(0, size_bytes, _PIECE_BYTES):
        piece = nothing if values is None else values[start : start + _PIECE_BYTES]
        sends = source == federation.party
        parts = [piece if lacks and sends else piece[:0] for lacks in behind]
        sizes = [0] * len(behind)
        if behind[federation.party]:
            sizes[source] = len(piece)
        received = federation.all_to_all(parts, sizes)[source]
        if behind[federation.party]:
            piece.copy_(received)


def _check_size(federation: Collectives, source: int, size_bytes: int, vector_bytes: int) -> None:
    if not 0 <= size_bytes <= _MAX_VECTORS * vector_bytes + _MAX_WORDS:
        raise PartyLostError(
            f"Party {federation.called([source])} would send {size_bytes} bytes of global state, which"
            f" {vector_bytes} bytes of parameters cannot have. Install the same version at all parties.",
            parties=[federation.names[source]],
        )
