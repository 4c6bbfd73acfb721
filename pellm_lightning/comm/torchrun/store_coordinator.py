"""Coordination of parties through the rendezvous store: barriers, JSON values, reasons for leaving."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from pellm_lightning.comm.errors import PartyLostError
from pellm_lightning.comm.polling import ROUND_S, Reminder, polls
from pellm_lightning.comm.topology import launch_environ
from pellm_lightning.comm.torchrun.processes import how_ended, this_process
from pellm_lightning.comm.torchrun.store import delete_text, get_text, put_text

log = logging.getLogger(__name__)

_LEAVE_S = 30.0
_MONITOR_EVERY_S = 0.25
_JOIN_S = 1.0


class StoreCoordinator:
    """Key-value messages that every party can read: what is compared, what each does, why it left.

    The store is polled rather than waited for, since a waiting client can notice nothing else and prints
    warnings of its own.

    Args:
        store: A store whose keys are this federation's own.
        party: This party.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late.
        interrupt: Called at each poll; what it raises ends the waiting.

    Example::

        coordinator = StoreCoordinator(store, party=0, num_parties=2, timeout_s=60)
        coordinator.wait_for_all()
        devices = coordinator.gather_json("device", "cuda:0")
    """

    def __init__(
        self,
        store: dist.Store,
        party: int,
        num_parties: int,
        timeout_s: float,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self.party = party
        self.num_parties = num_parties
        self.timeout_s = timeout_s
        self.phase = "joining"
        """What this party does, for error messages."""
        self._interrupt = interrupt
        self._store = store
        self._gathers = 0
        self._last_key: str | None = None
        self._published: str | None = None
        self._monitor: threading.Thread | None = None
        self._closed = threading.Event()
        self._reminder: Reminder | None = None  # of the collective that this party is blocked in

    def enter(self, phase: str) -> None:
        """Publish what this party does from now on; others see it a moment later.

        A thread does it: to write to the store takes as long as the sums of a small round.
        """
        self.phase = phase
        self._start_monitor()

    def wait_for_all(self) -> None:
        """Announce this party, and wait until all have done so: a barrier.

        Raises:
            PartyLostError: If a party does not join within ``timeout_s``.
        """
        with self._reached():
            put_text(self._store, f"here/{self.party}", json.dumps(this_process()))
            self._wait_for("here/{}", "join the federation")

    def gather_json(self, key: str, value: object) -> list[Any]:
        """Publish ``value``; return all parties' values in order.

        Raises:
            PartyLostError: If a party publishes nothing within ``timeout_s``.
        """
        keys = f"gather/{self._gathers}/{key}/{{}}"
        with self._reached():
            put_text(self._store, keys.format(self.party), json.dumps(value))
            self._wait_for(keys, f"send its {key}")
            values = [json.loads(get_text(self._store, keys.format(p))) for p in range(self.num_parties)]
            # A party that takes part in this gather has read the one before, so that can go.
            if self._last_key is not None:
                delete_text(self._store, self._last_key)
        self._gathers += 1
        self._last_key = keys.format(self.party)
        return values

    def publish_reason(self, reason: str) -> None:
        """Publish why this party leaves, where the others will look; the first reason stands."""
        # Without the store nobody can know, and the error that ends this party matters more.
        with contextlib.suppress(dist.DistNetworkError):
            if not self._store.check([f"left/{self.party}"]):
                put_text(self._store, f"left/{self.party}", json.dumps(f"{self.phase}: {reason}"))

    def raise_if_left(self, error: BaseException | None = None) -> None:
        """Raise the reason of the first party that has left, if one has."""
        with contextlib.suppress(dist.DistNetworkError):
            for party in range(self.num_parties):
                if party != self.party and self._store.check([f"left/{party}"]):
                    reason = json.loads(get_text(self._store, f"left/{party}"))
                    raise PartyLostError(
                        f"Party {party} left the federation while {reason}. Party {self.party} also"
                        " stops, its parameters are those of the last completed round plus its own local"
                        " steps. Fix the cause and resume all parties from their last checkpoints.",
                        parties=(str(party),),
                        by=str(party),
                    ) from error

    def ended(self) -> dict[int, str]:
        """Return how the processes of other parties have ended, as far as this host knows."""
        found = {}
        with contextlib.suppress(dist.DistError):
            for party in range(self.num_parties):
                if party != self.party and self._store.check([f"here/{party}"]):
                    how = how_ended(json.loads(get_text(self._store, f"here/{party}")))
                    found.update({party: how} if how else {})
        return found

    def timed_out(self, waiting: str = "", late: Sequence[int] = ()) -> PartyLostError:
        """Return the error of this party's timeout, and publish it: the late party shall find the reason."""
        # Who does something else, unless it is known who has sent nothing.
        phases = dict.fromkeys(late, "not heard of") | self.phases()
        elsewhere = {} if waiting else {party: phases[party] for party in late} or self._late()
        reason = f"it waited {self.timeout_s:g} s {waiting or 'for ' + _doing(elsewhere)}"
        self.publish_reason(reason)
        return PartyLostError(
            f"Party {self.party} gave up while {self.phase}: {reason}. Look at the log of who is missing,"
            f" check that all {self.num_parties} parties run and reach the same rendezvous, or raise"
            " timeout_s above the time by which the slowest party's local steps outlast the fastest's.",
            parties=[str(party) for party in late or elsewhere],
        )

    def leave_together(self) -> None:
        """Return when no party needs the others any more; the store's host (often party 0) returns last."""
        # The store's host may have left already: it needed nobody any more.
        with contextlib.suppress(dist.DistNetworkError):
            self._store.set(f"done/{self.party}", "1")
            self._wait_to_leave("done/{}")
            self._store.set(f"gone/{self.party}", "1")
            if self.party == 0:
                self._wait_to_leave("gone/{}")

    def phases(self) -> dict[int, str]:
        """Return what each party last published that it does; no party that the store does not know."""
        at = {}
        with contextlib.suppress(dist.DistNetworkError):
            for party in range(self.num_parties):
                if self._store.check([f"at/{party}"]):
                    at[party] = self._store.get(f"at/{party}").decode()
        return at

    def _wait_for(self, key: str, what: str) -> None:
        """Wait until every party has set ``key``; raise when one has left or the time is over."""
        reminder = Reminder()
        for _ in polls(self.timeout_s):
            missing = self._missing(key)
            if not missing:
                return
            if reminder.due() and self._reminds(missing):
                log.warning(
                    "[party %d] waits for %s: %d of %d are here, up to %g s",
                    self.party,
                    _called(missing),
                    self.num_parties - len(missing),
                    self.num_parties,
                    self.timeout_s,
                )
            self.raise_if_left()
            self._interrupt()
        raise self.timed_out(f"for {_called(missing)} to {what}", missing)

    def _reminds(self, missing: Collection[int]) -> bool:
        """Whether this party logs for whom it and others wait, since they may share a terminal."""
        first = next(party for party in range(self.num_parties) if party not in missing)
        return self.party == first or launch_environ().get("LOCAL_RANK") == "0"

    def _wait_to_leave(self, key: str) -> None:
        for _ in polls(_LEAVE_S):
            missing = self._missing(key)
            if all(self._store.check([f"left/{party}"]) for party in missing):
                break
        if missing:
            silent = ", ".join(map(str, missing))
            log.warning("[party %d] party %s did not leave together with the others", self.party, silent)

    def _missing(self, key: str) -> list[int]:
        return [party for party in range(self.num_parties) if not self._store.check([key.format(party)])]

    def _late(self) -> dict[int, str]:
        """Return what each party does that does something else than this one, of which it may know less."""
        phases = self.phases() | {self.party: self.phase}
        return {party: phase for party, phase in phases.items() if phase != self.phase}

    @contextlib.contextmanager
    def waiting(self, first_s: float = ROUND_S) -> Iterator[None]:
        """Let a thread log for whom this party waits, if it is blocked in a collective for long."""
        self._start_monitor()
        self._reminder = Reminder(first_s)
        try:
            yield
        finally:
            self._reminder = None

    def close(self) -> None:
        """End the thread of ``enter`` and ``waiting``."""
        self._closed.set()
        if self._monitor is not None:
            self._monitor.join(_JOIN_S)  # it may be blocked in a store that is gone

    def _start_monitor(self) -> None:
        """Start the thread; one for all rounds, since to start it takes as long as a small round."""
        if self._monitor is None and self.num_parties > 1 and not self._closed.is_set():
            monitor = threading.Thread(target=self._watch, name="waiting for parties", daemon=True)
            monitor.start()
            self._monitor = monitor  # only now, since another thread may close what it finds here

    def _watch(self) -> None:
        while not self._closed.wait(_MONITOR_EVERY_S):
            with contextlib.suppress(dist.DistError):  # who needs the store will notice
                self._publish_phase()
                self._remind()

    def _publish_phase(self) -> None:
        phase = self.phase
        if phase != self._published:
            self._store.set(f"at/{self.party}", phase)
            self._published = phase

    def _remind(self) -> None:
        reminder = self._reminder
        if reminder is None or not reminder.due():
            return
        late = self._late()
        if late and self._reminds(late):
            log.warning("[party %d] waits for %s", self.party, _doing(late))

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


def _doing(phases: Mapping[int, str]) -> str:
    return " and ".join(f"party {party} ({phase})" for party, phase in phases.items()) or "another party"


def _called(parties: Sequence[int]) -> str:
    return f"party {', '.join(map(str, parties))}"
