"""What all parties share between two rounds: what checkpoints hold, and what who comes late is handed."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm import Collectives, FederationError, Version
from pellm_lightning.engine.updates import Updates
from pellm_lightning.privacy.processor import PrivateUpdates
from pellm_lightning.tensors import portable
from pellm_lightning.tensors import snapshot as durable

log = logging.getLogger(__name__)

# What a global state may weigh: an outer optimizer with a few vectors of its own, and words.
_MAX_VECTORS = 16
_MAX_WORDS = 1 << 28


def state_of(
    round: int,
    version: Version | None,
    short_rounds: int,
    lora: Mapping[str, Any] | None,
    updates: Updates,
    private: PrivateUpdates | None,
) -> dict[str, Any]:
    """Return the state as it lies in memory, to be looked at before anything goes on.

    Args:
        round: The round that comes.
        version: Which of the states of this round it is, between separate jobs.
        short_rounds: Rounds in a row, up to now, in which fewer than a quorum trained.
        lora: What the LoRA pairs were when the federation began.
        updates: The vectors, the outer optimizer and its schedule.
        private: Differential privacy, if any.
    """
    return {
        "round": round,
        "version": None if version is None else list(version),
        "short_rounds": short_rounds,
        "shapes": updates.layout.shapes,
        "lora": lora,
        "global": updates.global_,
        "outer_class": type(updates.optimizer).__name__,
        "outer_optimizer": updates.optimizer.state_dict(),
        "outer_scheduler": updates.schedule.state,
        "privacy": None if private is None else private.state_dict(),
        "carried": updates.carried,
    }


def copied(state: Mapping[str, Any], into: Tensor | None = None) -> dict[str, Any]:
    """Return a state that stays what it is while training goes on.

    Args:
        state: What ``state_of`` returned.
        into: Memory for the global vector, (D,) float32; None for new memory.
    """
    carried = state["carried"]
    return {
        **state,
        "global": state["global"].clone() if into is None else into.copy_(state["global"]),
        "carried": None if carried is None else carried.clone(),
        "outer_optimizer": copy.deepcopy(state["outer_optimizer"]),
    }


def restore_(state: Mapping[str, Any], updates: Updates, private: PrivateUpdates | None) -> None:
    """Go on from a state; round and version are the caller's.

    Raises:
        ValueError: If it is of other parameters or settings; it may come from a peer.
    """
    _check_shapes(state["shapes"], updates.layout.shapes)
    _check_settings(state, updates, private)
    updates.schedule.restore(state.get("outer_scheduler"), state["outer_optimizer"])
    if private is not None:
        private.load_state_dict(state["privacy"])
    if updates.carried is not None:
        updates.carried.copy_(state["carried"])
    updates.global_.copy_(state["global"])
    # A copy, since the optimizer goes on in the very tensors that it is given.
    updates.optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))


def _check_shapes(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if list(saved.items()) == list(ours.items()):
        return
    differ = sorted(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
    first = (
        f"the first that differs is {differ[0]!r}"
        if differ
        else "their order differs, as with another aggregation"
    )
    raise ValueError(
        f"The checkpoint's federated state is of {len(saved)} parameters, this module trains"
        f" {len(ours)}; {first}. Resume with the model, PEFT configuration, aggregation, include and"
        " exclude patterns of the checkpoint."
    )


def _check_settings(state: Mapping[str, Any], updates: Updates, private: PrivateUpdates | None) -> None:
    name = type(updates.optimizer).__name__
    if state.get("outer_class", name) != name:
        raise ValueError(
            f"The saved federated state is of the outer optimizer {state['outer_class']:.100}, this party"
            f" has {name}. Resume with the outer_optimizer of the checkpoint."
        )
    spent = state.get("privacy")
    if (spent is None) != (private is None):
        how = "with differential privacy, and is to go on without it, which would end its guarantee"
        if spent is None:
            how = "without differential privacy, and is to go on with it"
        raise ValueError(
            f"The federated state was saved {how}. Resume with the privacy of the checkpoint, or begin"
            " anew from its weights."
        )
    carried = state.get("carried")
    if getattr(carried, "shape", None) != getattr(updates.carried, "shape", None):
        raise ValueError(
            f"The federated state was saved {'without' if carried is None else 'with another'} vector beside"
            " the global parameters than"
            f" {updates.beside.method if updates.beside else 'plain averaging'} keeps. Resume with the drift"
            " correction of the checkpoint, or begin anew from its weights."
        )


def agree(
    federation: Collectives,
    state: Callable[[], Mapping[str, Any]],
    adopt: Callable[[Mapping[str, Any]], None],
    vector_bytes: int,
) -> list[int]:
    """Make sure that what every party computed for itself has the same bits at all of them.

    The parties compare checksums, 8 bytes each; those that differ from the first take over its state.

    Args:
        federation: The parties that meet; each calls this.
        state: Returns this party's state.
        adopt: Takes over another one.
        vector_bytes: Bytes of the global vector.

    Returns:
        The parties that differed, by their place among those that meet.

    Raises:
        FederationError: As ``hand_over``.
    """
    told = torch.zeros(federation.num_parties, dtype=torch.int64)
    told[federation.party] = portable.checksum(_tensors_in(state()))
    first, *others = federation.all_reduce_(told).tolist()
    differ = [False, *(other != first for other in others)]
    if any(differ):
        hand_over(federation, differ, state, adopt, vector_bytes)
    return [party for party, differs in enumerate(differ) if differs]


def _tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, and its numbers as float64, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, int | float):
        yield torch.tensor(state, dtype=torch.float64)
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)


def hand_over(
    federation: Collectives,
    behind: Sequence[bool],
    state: Callable[[], Mapping[str, Any]],
    adopt: Callable[[Mapping[str, Any]], None],
    vector_bytes: int,
) -> None:
    """Hand the newest global state to those who lack it; every party calls this.

    Args:
        federation: The parties that meet.
        behind: Party by party, whether it lacks the state; some do, some do not.
        state: Returns this party's state.
        adopt: Takes over another one.
        vector_bytes: Bytes of the global vector.

    Raises:
        FederationError: If the state is too large to be one, or cannot be taken over.
    """
    source, here = behind.index(False), federation.party
    packed = durable.pack(state()) if source == here else b""
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
        newest = durable.unpack(received.numpy().data)
        adopt(newest)
    except (ValueError, KeyError, TypeError) as error:  # a peer sent it, it may be anything
        raise FederationError(
            f"Party {federation.name} cannot take over the global state of party"
            f" {federation.called([source])}: {error}. Install the same version at all parties."
        ) from error
    log.info(
        "[party %s] takes over round %d from party %s",
        federation.name,
        newest["round"],
        federation.called([source]),
    )
