"""Rendezvous store that torchrun, or the usual environment variables, provide."""

import socket
from datetime import timedelta

import torch.distributed as dist

from pellm_lightning.comm.errors import PartyLostError
from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.topology import launch_environ

# A party learns of another's failure seconds before that one has ended and reported it.
_FIRST_HAND_S = 5.0
_CONNECT_S = 5.0
# torch 2.7's server drops who sends what fills its buffer of 4,096 bytes just so: a read of nothing more is
# the end to it. So it never has as many bytes before it answers.
_PIECE_BYTES = 3000


def launched() -> bool:
    """Whether a launcher set the variables that name a rendezvous and more than one process.

    Processes that Lightning starts by itself have no ``RANK``: they are one party.
    """
    environ = launch_environ()
    return {"MASTER_ADDR", "RANK"} <= environ.keys() and int(environ.get("WORLD_SIZE", 1)) > 1


def store_from_env(timeout_s: float) -> dist.Store:
    """Connect to the store named by ``MASTER_ADDR`` and ``MASTER_PORT``, torchrun's own if it hosts one.

    Without a launcher every process is alone, so the store lives in this process only.

    Raises:
        PartyLostError: If the store cannot be reached within ``timeout_s`` seconds.
    """
    if not launched():
        return dist.HashStore()
    environ = launch_environ()
    host, port, rank = environ["MASTER_ADDR"], environ.get("MASTER_PORT", ""), environ["RANK"]
    is_torchruns = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # As env:// does, which reads os.environ only, where a launch may be hidden.
        return dist.TCPStore(
            host,
            int(port),
            int(environ["WORLD_SIZE"]),
            is_master=rank == "0" and not is_torchruns,
            timeout=timedelta(seconds=timeout_s),
            multi_tenant=not is_torchruns,
        )
    except (TypeError, RuntimeError, ValueError) as error:
        raise PartyLostError(
            f"Rank {rank} could not reach the rendezvous at {host}:{port} within {timeout_s:g}"
            " s. Check that the host of rank 0 is up, that the port is open, and that MASTER_ADDR and"
            " MASTER_PORT agree. If the other parties have ended meanwhile, they have the result."
        ) from error


def claim_error(error: str, *, second_hand: bool) -> bool:
    """Claim an error: return whether this process is to print it on the terminal that it shares with others.

    The first that asks is, and so is who fails with another error. Who knows of an error second hand waits
    for the process whose own it is. Where torchrun hosts no store, or has ended, everybody is.

    Args:
        error: Digest of the error, the same at all processes that fail alike.
        second_hand: Whether it is about the failure of another party.
    """
    environ = launch_environ()
    key = f"error/{environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{environ.get('GROUP_RANK', 0)}"
    try:
        address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        # A client of torch's that finds nobody prints thirty lines of its own.
        socket.create_connection((address, port), _CONNECT_S).close()
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
        if second_hand and any(store.check([key]) for _ in polls(_FIRST_HAND_S)):
            return False
        mine = f"{environ['RANK']} {error}"
        claimer, _, claimed = store.compare_set(key, "", mine).decode().partition(" ")
    except (dist.DistError, OSError):
        return True
    return claimer == environ["RANK"] or (claimed != error and not second_hand)


def put_text(store: dist.Store, key: str, text: str) -> None:
    """Set a key that is not there yet to a text of any length, in pieces that a server answers one by one.

    The first piece says how many there are, and is set last: where the key is, the others are.

    Args:
        store: The store.
        key: Key for ``get_text`` and ``delete_text``.
        text: Text in ASCII, such as JSON.
    """
    pieces = [text[start : start + _PIECE_BYTES] for start in range(0, len(text), _PIECE_BYTES)]
    for index, piece in enumerate(pieces[1:], start=1):
        store.compare_set(f"{key}/{index}", "", piece)  # set() has no answer
    store.compare_set(key, "", f"{len(pieces)} {''.join(pieces[:1])}")


def get_text(store: dist.Store, key: str) -> str:
    """Return what ``put_text`` has set; wait for it as the store does."""
    count, _, text = store.get(key).decode().partition(" ")
    return text + "".join(store.get(f"{key}/{index}").decode() for index in range(1, int(count)))


def delete_text(store: dist.Store, key: str) -> None:
    """Delete what ``put_text`` has set."""
    count = int(store.get(key).decode().partition(" ")[0])
    for name in (key, *(f"{key}/{index}" for index in range(1, count))):
        store.delete_key(name)
