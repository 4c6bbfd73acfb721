"""The rounds of a contender whose parties are one process each, started together."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from payload import Party, Session


def own() -> tuple[Session, Party]:
    """Return the session and this process's party, with one thread for torch as everywhere here."""
    torch.set_num_threads(1)
    session = Session.from_env()
    return session, Party(session, int(os.environ["PARTY"]))


def rounds(
    party: Party, tensors: Callable[[], Sequence[torch.Tensor]], exchange: Callable[[], object]
) -> None:
    """Make the session's rounds; `tensors` is asked each time, since an exchange may put others in place."""
    for round in range(party.session.rounds):
        party.fill_(views(tensors()), round)
        party.ready(round)
        exchange()
        party.have(round, views(tensors()))


def views(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return the tensors' memory as arrays."""
    return [tensor.detach().numpy() for tensor in tensors]


def join_default_group(session: Session, party: Party) -> None:
    """Meet in torch's default group, over Gloo."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{session.ports[0]}",
        rank=party.party,
        world_size=session.parties,
    )
