"""Rendezvous store that torchrun, or the usual environment variables, provide."""

import os
from datetime import timedelta

import torch.distributed as dist

from pellm_lightning.comm.errors import PartyLostError


def launched() -> bool:
    """Whether a launcher set the variables that name a rendezvous and more than one process.

    Processes that Lightning starts by itself have no ``RANK``: they are one party.
    """
    return {"MASTER_ADDR", "RANK"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def store_from_env(timeout_s: float) -> dist.Store:
    """Connect to the store named by ``MASTER_ADDR`` and ``MASTER_PORT``, torchrun's own if it hosts one.

    Without a launcher every process is alone, so the store lives in this process only.

    Raises:
        PartyLostError: If the store cannot be reached within ``timeout_s`` seconds.
    """
    if not launched():
        return dist.HashStore()
    try:
        rendezvous: tuple[dist.Store, int, int] = next(
            dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PartyLostError(
            f"Rank {os.environ.get('RANK')} could not reach the rendezvous at {address} within {timeout_s:g}"
            " s. Check that the host of rank 0 is up, that the port is open, and that MASTER_ADDR and"
            " MASTER_PORT agree. If the other parties have ended meanwhile, the result is in their run folders."
        ) from error
    return rendezvous[0]
