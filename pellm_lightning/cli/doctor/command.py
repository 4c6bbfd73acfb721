"""The doctor's visit: gather, measure, tell."""

import contextlib
import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pellm_lightning.cli.doctor import show
from pellm_lightning.cli.doctor.checks import Finding, Seen, findings
from pellm_lightning.cli.doctor.facts import Facts, Measured, Rehearsal, heard_facts, heard_measured, in_words
from pellm_lightning.cli.doctor.inquiry import Survey, clocks
from pellm_lightning.comm import Collectives, Communicator, Federation, PartyLostError, Quorum
from pellm_lightning.comm.elastic.register import Register, RestartedError, UnreachableError
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun.store import store_from_env
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryValues

log = logging.getLogger(__name__)

SIZES = (64 << 10, 1 << 20, 8 << 20)
"""Bytes of the vectors that are summed, as long as the one before took less than ``LONG_S``."""
LONG_S = 0.5
ROUNDS = 2

_TICKS = 10


def examine(
    job: SeparateJobs | None,
    topology: Topology,
    rehearsal: Rehearsal | None,
    failure: Exception | None = None,
    wait_s: float = 30.0,
    quorum: Quorum = "majority",
) -> bool:
    """Check a launch together with the other parties; show what was found, and return whether it may train.

    Nothing is written but to the terminal, and no step is made. No party is waited for longer than ``wait_s``
    at a time.

    Args:
        job: How this party joins separate jobs; None if all parties come from one launch.
        topology: Where this process stands. Of a party's processes only the first looks.
        rehearsal: What would be trained; None if it could not be built.
        failure: Why not.
        wait_s: Seconds to wait for a party.
        quorum: How many parties separate jobs need to meet.

    Raises:
        ValueError: If ``wait_s`` is not positive.
    """
    if not wait_s > 0:
        raise ValueError(f"wait_s={wait_s} must be positive, in seconds.")
    if not topology.is_leader:
        return True
    visit = DryRun(job, topology, wait_s, quorum)
    try:
        visit.connect()
        seen = visit.look(rehearsal, failure)
    except _GONE as error:
        found = [Finding("error", "rendezvous", in_words(error))]
        show.tell(None, found)
        return False
    found = findings(seen)
    # Each job has a terminal of its own; the parties of a launch share one.
    if job is not None or visit.inquiry.present[0] == visit.name:
        show.tell(seen, found)
    visit.part()
    return all(finding.level != "error" for finding in found)


_GONE = (RuntimeError, OSError, ImportError, UnreachableError, RestartedError)
"""What a rendezvous that is not there, or not ours, is told by; torch's errors are RuntimeErrors."""


class DryRun:
    """One party's part in the examination.

    Args:
        job: How this party joins separate jobs, or None.
        topology: Where this process stands.
        wait_s: Seconds to wait for a party.
        quorum: How many parties separate jobs need to meet.
    """

    inquiry: Survey

    def __init__(
        self, job: SeparateJobs | None, topology: Topology, wait_s: float, quorum: Quorum = "majority"
    ) -> None:
        self.job = job
        self.quorum = quorum
        self.topology = topology
        self.wait_s = wait_s
        self.roster = list(job.roster) if job else [str(party) for party in range(topology.num_parties)]
        self.name = job.name if job else str(topology.party)
        self._store: Any = None

    def connect(self, store: Any = None) -> None:
        """Reach the place where the parties meet.

        Raises:
            RuntimeError, FederationError: If it is out of reach, or does not admit this party.
        """
        if store is None:
            store = self.job.connect() if self.job else store_from_env(self.wait_s)
        self._store = store
        self.inquiry = Survey(Register(store), self.name, self.roster)

    def look(self, rehearsal: Rehearsal | None, failure: Exception | None) -> Seen:
        """Gather what the parties tell, and measure with them if all are there."""
        inquiry, wait_s = self.inquiry, self.wait_s
        present = inquiry.meet(wait_s)
        mine = Facts(trouble=[in_words(failure)]) if failure is not None else Facts()
        if rehearsal is not None:
            mine = rehearsal.facts(self.roster, self.topology.party, self._shared)
        answers = inquiry.ask("facts", asdict(mine), wait_s)
        silent = [name for name in present if name not in answers]
        seen = Seen(
            self.roster,
            {name: heard_facts(answer.value) for name, answer in answers.items()},
            silent=silent,
            # Those who waited in vain come to this at different times, which would pass for other clocks.
            clocks={} if silent else clocks(inquiry, wait_s),
            wait_s=wait_s,
        )
        if len(answers) < len(self.roster) or len(self.roster) == 1:
            return seen
        healthy = all(finding.level != "error" for finding in findings(seen))
        measured = self._measured(rehearsal if healthy else None)
        results = inquiry.ask("measured", asdict(measured), 2 * wait_s)
        return replace(
            seen, measured={name: heard_measured(answer.value) for name, answer in results.items()}
        )

    def part(self) -> None:
        """Leave when all are through: a launcher ends all others as soon as one ends with an error."""
        with contextlib.suppress(*_GONE):
            self.inquiry.part(self.wait_s)
        if hasattr(self._store, "close"):
            self._store.close()

    @property
    def _shared(self) -> Mapping[str, Any]:
        """What separate jobs were told of the federation, and must be the same at all."""
        if self.job is None:
            return {}
        quorum = self.job.membership.quorum(self.quorum, self.roster)
        return {"roster": ", ".join(self.roster), "quorum": quorum}

    def _measured(self, rehearsal: Rehearsal | None) -> Measured:
        federation: Communicator | None = None
        try:
            federation = self._joined()
            measured = measure(federation, rehearsal, patience_s=self.wait_s / 4)
            federation.close()
        except Exception as error:
            if federation is not None:
                federation.abort(in_words(error))
            # Federations and networks fail with RuntimeErrors and OSErrors.
            if isinstance(error, ValueError | MisconfigurationException):
                return Measured(refused=in_words(error))
            return Measured(trouble=in_words(error))
        return measured

    def _joined(self) -> Communicator:
        if self.job is not None:
            return self.job.rehearse(
                f"doctor/{'-'.join(self.inquiry.numbers)}"[:100], self.wait_s, self.quorum
            )
        return Federation(self._store, self.topology.party, self.topology.num_parties, timeout_s=self.wait_s)


def measure(federation: Communicator, rehearsal: Rehearsal | None, *, patience_s: float) -> Measured:
    """Measure sums over all parties, then rounds as the fit would make them.

    Args:
        federation: The joined parties; all must call this.
        rehearsal: What would be trained, or None to make no rounds.
        patience_s: Seconds that a round may be expected to take; if it is more, none is made.

    Raises:
        FederationError: If a party is lost or late.
    """
    federation.enter("measuring sums")
    copies = {} if rehearsal is None else rehearsal.copies()
    aggregator = None
    if rehearsal is not None:
        aggregator = rehearsal.callback.factory.rehearsal(
            federation, rehearsal.trainer, rehearsal.module, copies
        )
    if federation.may_lose_parties:
        if aggregator is not None:  # before all meet: who is slow would be taken for another
            aggregator.handshake()
        members = federation.join_quorum("exchange", None, {}).members
        missing = [name for name in federation.roster if name not in members]
        if missing:
            raise PartyLostError(
                f"Party {', '.join(missing)} did not come to measure.", parties=tuple(missing)
            )
    latency_s, seconds, size = _sums(federation)
    federation.commit("sums")
    rounds_s: list[float] = []
    sent = 0
    if aggregator is not None:
        expected_s = 4 * sum(copy.numel() for copy in copies.values()) * seconds / size
        if expected_s <= patience_s:
            rounds_s, sent = _rounds(aggregator)
    return Measured(latency_s, size / seconds, size, rounds_s, sent)


def _sums(federation: Collectives) -> tuple[float, float, int]:
    """Return the seconds of a smallest sum, and of the largest that was tried, and its bytes; all alike."""
    federation.all_reduce_(torch.zeros(1))  # connections may be made by the first
    latency_s = statistics.median(_timed(federation, torch.zeros(1)) for _ in range(_TICKS))
    for size in SIZES:
        vector = torch.zeros(size // 4)
        mine = min(_timed(federation, vector), _timed(federation, vector))
        # Clocks and luck differ, and all must continue or stop together.
        seconds = (
            float(federation.all_reduce_(torch.tensor([mine], dtype=torch.float64))) / federation.num_parties
        )
        if seconds > LONG_S:
            break
    return latency_s, seconds, size


def _timed(federation: Collectives, vector: Tensor) -> float:
    before = time.perf_counter()
    federation.all_reduce_(vector)
    return time.perf_counter() - before


def _rounds(aggregator: Aggregator) -> tuple[list[float], int]:
    """Make rounds of which nothing is kept; return the seconds of each, and the bytes sent in the last."""
    aggregator.start()
    reports = []
    for _ in range(ROUNDS):
        carried = {name: torch.zeros_like(part) for name, part in aggregator.carried.items()}
        reports.append(aggregator.step(1.0, contribution=AuxiliaryValues(vector=carried)))
    for _ in aggregator.drain():
        pass
    return [report.seconds for report in reports], reports[-1].bytes_sent
