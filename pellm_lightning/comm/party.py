"""Party: the processes of one party, of which the leader communicates with other parties."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pellm_lightning.comm.errors import FederationError, TooFewPartiesError
from pellm_lightning.comm.topology import Topology

P = ParamSpec("P")
T = TypeVar("T")


class Party:
    """Processes of one party, which are torch's default process group if there are several.

    Every process of the party must call each method. What they send each other is pickled: they belong to
    one institution, and trust each other. Between parties nothing is.

    Args:
        topology: Party and rank of this process.
        device: Device of this process.

    Example:
        >>> Party(Topology()).on_leader(max, 1, 2)
        2
    """

    def __init__(self, topology: Topology, device: torch.device | str = "cpu") -> None:
        self.topology = topology
        self.device = device

    def on_leader(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``act`` in the leader; return its result, or raise its error, in all processes of the party.

        Raises:
            TooFewPartiesError: In all processes, if ``act`` raises it: each can then save what it has.
            FederationError: In the others, if ``act`` raises another error.
        """
        if self.topology.party_size == 1:
            return act(*args, **kwargs)
        result: T | None = None
        error: Exception | None = None
        for_others: FederationError | None = None
        if self.topology.is_leader:
            try:
                result = act(*args, **kwargs)
            except TooFewPartiesError as caught:
                error, for_others = caught, TooFewPartiesError(str(caught))
            except Exception as caught:
                leader = f"the leader of party {self.topology.party}"
                text = f"{leader.capitalize()} failed: {type(caught).__name__}: {caught}"
                error, for_others = caught, FederationError(text, by=leader)
        sent: list[Any] = [result, for_others]
        dist.broadcast_object_list(sent)
        result, for_others = sent
        if error is not None:
            raise error
        if for_others is not None:
            raise for_others
        return result

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the party's processes."""
        if self.topology.party_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast_(self, x: Tensor) -> Tensor:
        """Broadcast the leader's ``x``, in place."""
        if self.topology.party_size > 1:
            dist.broadcast(x, 0)
        return x


def signature(run_id: str | None, party: int) -> str | None:
    """Return the mark of a party's checkpoints in a federation of separate jobs; None in one launch.

    Args:
        run_id: Identifier of the federation, constant over restarts of its parties.
        party: Index of the party.
    """
    return None if not run_id else f"party {party} of {run_id}"
