"""The notice board: what parties tell each other in words, through the rendezvous store."""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pellm_lightning.comm.errors import PartyLostError
from pellm_lightning.comm.polling import polls

log = logging.getLogger(__name__)

_GOODBYE_S = 30.0


class StoreCoordinator:
    """Small words that every party can read: what it compares, where it is, why it left.

    The store is asked again and again rather than waited for, since a waiting client can notice nothing else
    and prints warnings of its own.

    Args:
        store: A store whose keys are this federation's own.
        party: This party.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late.
    """

    def __init__(self, store: dist.Store, party: int, num_parties: int, timeout_s: float) -> None:
        self.party = party
        self.num_parties = num_parties
        self.timeout_s = timeout_s
        self.phase = "joining"
        """What this party does, for error messages."""
        self._store = store
        self._said = 0
        self._last_said: str | None = None

    def enter(self, phase: str) -> None:
        """Say what this party does from now on."""
        self.phase = phase
        with self._reached():
            self._store.set(f"at/{self.party}", phase)

    def arrive(self) -> None:
        """Say that this party is here, and wait for all.

        Raises:
            PartyLostError: If a party does not come within ``timeout_s``.
        """
        with self._reached():
            self._store.set(f"here/{self.party}", "1")
            self._wait_for("here/{}", "join the federation")

    def all_gather_json(self, key: str, value: object) -> list[Any]:
        """Tell every party ``value``; return all values in the order of the parties.

        Raises:
            PartyLostError: If a party says nothing within ``timeout_s``.
        """
        said = f"said/{self._said}/{key}/{{}}"
        with self._reached():
            self._store.set(said.format(self.party), json.dumps(value))
            self._wait_for(said, f"tell its {key}")
            values = [json.loads(self._store.get(said.format(p))) for p in range(self.num_parties)]
            # Whoever speaks now has read what was said before, so that can go.
            if self._last_said is not None:
                self._store.delete_key(self._last_said)
        self._said += 1
        self._last_said = said.format(self.party)
        return values

    def say_why(self, reason: str) -> None:
        """Leave the reason for going where the others will look; what was said first stands."""
        # Without the store nobody can be told, and the error that ends this party matters more.
        with contextlib.suppress(dist.DistNetworkError):
            if not self._store.check([f"left/{self.party}"]):
                self._store.set(f"left/{self.party}", json.dumps(f"{self.phase}: {reason}"))

    def raise_if_somebody_left(self, error: BaseException | None = None) -> None:
        """Raise what the first party that left has said, if one did."""
        with contextlib.suppress(dist.DistNetworkError):
            for party in range(self.num_parties):
                if party != self.party and self._store.check([f"left/{party}"]):
                    reason = json.loads(self._store.get(f"left/{party}"))
                    raise PartyLostError(
                        f"Party {party} left the federation while {reason}. Party {self.party} stops too, its"
                        " parameters are those of the last completed round plus its own local steps. Mend"
                        " the cause and resume all parties from their last checkpoints."
                    ) from error

    def gave_up(self, waiting: str = "") -> PartyLostError:
        """Return the error of this party's patience; the late party shall find the reason when it comes."""
        said = f"it waited {self.timeout_s:g} s {waiting or 'for ' + self._elsewhere()}"
        self.say_why(said)
        return PartyLostError(
            f"Party {self.party} gave up while {self.phase}: {said}. Look at the log of who is missing, check"
            f" that all {self.num_parties} parties run and reach the same rendezvous, or raise timeout_s"
            " above the time by which the slowest party's local steps outlast the fastest's."
        )

    def part_together(self) -> None:
        """Return when no party needs the others any more; the store's host (often party 0) returns last."""
        # Whoever hosts the store may have gone already: it needed nobody any more.
        with contextlib.suppress(dist.DistNetworkError):
            self._store.set(f"done/{self.party}", "1")
            self._wait_for_goodbye("done/{}")
            self._store.set(f"gone/{self.party}", "1")
            if self.party == 0:
                self._wait_for_goodbye("gone/{}")

    def _wait_for(self, key: str, what: str) -> None:
        """Wait until every party has set ``key``; raise when one has left or the time is over."""
        for _ in polls(self.timeout_s):
            missing = self._missing(key)
            if not missing:
                return
            self.raise_if_somebody_left()
        raise self.gave_up(f"for party {', '.join(map(str, missing))} to {what}")

    def _wait_for_goodbye(self, key: str) -> None:
        for _ in polls(_GOODBYE_S):
            missing = self._missing(key)
            if all(self._store.check([f"left/{party}"]) for party in missing):
                break
        if missing:
            silent = ", ".join(map(str, missing))
            log.warning("[party %d] party %s left without a goodbye", self.party, silent)

    def _missing(self, key: str) -> list[int]:
        return [party for party in range(self.num_parties) if not self._store.check([key.format(party)])]

    def phases(self) -> dict[int, str]:
        """Return what each party has last said that it does; nobody whom the store does not know."""
        at = {}
        with contextlib.suppress(dist.DistNetworkError):
            for party in range(self.num_parties):
                if self._store.check([f"at/{party}"]):
                    at[party] = self._store.get(f"at/{party}").decode()
        return at

    def _elsewhere(self) -> str:
        """Return which parties do something else than this one, and what."""
        others = [f"party {party} ({phase})" for party, phase in self.phases().items() if phase != self.phase]
        return " and ".join(others) or "another party"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError as error:
            raise PartyLostError(
                f"Party {self.party} lost the federation while {self.phase}: the rendezvous is gone"
                f" ({error}). The process that hosts it, often party 0's or its launcher, has ended: look at"
                " the end of its log."
            ) from error
