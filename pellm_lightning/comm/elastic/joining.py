"""Joining the rendezvous: the two connections of a party, its name, and its first heartbeat."""

from collections.abc import Callable

import torch.distributed as dist

from pellm_lightning.comm.elastic.heartbeat import Heartbeat
from pellm_lightning.comm.elastic.join_quorum import RESULT
from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.register import (
    Fence,
    Register,
    RestartedError,
    UnreachableError,
    connect_register,
)
from pellm_lightning.comm.errors import PartyLostError


def join_rendezvous(
    connect: Callable[[], dist.Store], me: LocalParty, prefix: str, phase: str
) -> tuple[list[Register], Heartbeat]:
    """Connect to the rendezvous, and begin this party's heartbeat on a connection of its own.

    Args:
        connect: Makes a client of the rendezvous' store.
        me: This party.
        prefix: What all keys at the rendezvous begin with.
        phase: What this party does.

    Raises:
        PartyLostError: If the rendezvous cannot be reached.
    """
    registers: list[Register] = []
    try:
        for _ in range(2):
            registers.append(connect_register(connect, me.membership.wait_s, me.name, prefix))
        heartbeat = Heartbeat(registers[1], me, phase)
        registers[0].fence(Fence(me.name, me.incarnation))
        return registers, heartbeat
    except BaseException as error:
        for register in registers:
            register.close()
        if not isinstance(error, UnreachableError | RestartedError):
            raise
        raise PartyLostError(
            f"Party {me.name} could not join. {str(error).rstrip('.')}. If the federation has ended"
            f" meanwhile, {RESULT}"
        ) from error
