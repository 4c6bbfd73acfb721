"""Preflight check of a launch: gathers what the parties are, measures with them, shows the findings."""

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pellm_lightning.callbacks.lightning_training import rehearse
from pellm_lightning.cli.doctor import show
from pellm_lightning.cli.doctor.checks import Finding, Seen, findings
from pellm_lightning.cli.doctor.facts import (
    UNREADABLE_FACTS,
    UNREADABLE_MEASURED,
    Facts,
    Measured,
    Rehearsal,
    error_text,
    read,
)
from pellm_lightning.comm import Collectives, Communicator, Federation, PartyLostError, Quorum
from pellm_lightning.comm.elastic.federation import ElasticFederation
from pellm_lightning.comm.elastic.membership import Membership
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun.store import store_from_env
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryValues

SIZES = (64 << 10, 1 << 20, 8 << 20)
"""Bytes of the vectors that are summed, as long as the one before took less than ``LONG_S``."""
LONG_S = 0.5
ROUNDS = 2

_TICKS = 10
_PREFIX = "doctor"
_BUILDING = "building its model"


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
    dry_run = DryRun(job, topology, wait_s, quorum)
    try:
        dry_run.connect()
        seen = dry_run.look(rehearsal, failure)
    except (RuntimeError, OSError, ImportError) as error:  # of a rendezvous that is away, or not ours
        show.show(None, [Finding("error", "rendezvous", error_text(error))])
        dry_run.close(together=False)
        return False
    found = findings(seen)
    # Each job has a terminal of its own; the parties of a launch share one.
    if job is not None or next(iter(seen.facts)) == dry_run.name:
        show.show(seen, found)
    dry_run.close()
    return all(finding.level != "error" for finding in found)


class DryRun:
    """One party's part in the preflight check.

    What is compared goes through an ``ElasticFederation`` of its own, also between the parties of one launch,
    since it continues with those that come; what is measured, through the fit's own communicator.

    Example::

        dry_run = DryRun(None, Topology(party=0, num_parties=3), wait_s=30)
        dry_run.connect()
        seen = dry_run.look(rehearsal, failure=None)
        dry_run.close()

    Args:
        job: How this party joins separate jobs, or None.
        topology: Where this process stands.
        wait_s: Seconds to wait for a party.
        quorum: How many parties separate jobs need to meet.
    """

    survey: ElasticFederation
    _store: Any

    def __init__(
        self, job: SeparateJobs | None, topology: Topology, wait_s: float, quorum: Quorum = "majority"
    ) -> None:
        self.job = job
        self.quorum = quorum
        self.topology = topology
        self.wait_s = wait_s
        self.roster = list(job.roster) if job else [str(party) for party in range(topology.num_parties)]
        self.name = job.name if job else str(topology.party)
        self.now = time.time
        """This party's clock."""
        self._resources = contextlib.ExitStack()

    def connect(self, store: Any = None) -> None:
        """Reach the place where the parties meet.

        Raises:
            RuntimeError, FederationError: If it is out of reach, or does not admit this party.
        """
        client: Any
        if self.job is not None:
            client = self._resources.enter_context(contextlib.closing(self.job.connect()))
        else:
            client = self._store = store or store_from_env(self.wait_s)
        patience = replace(
            self.job.membership if self.job else Membership(),
            wait_s=self.wait_s,
            round_timeout_s=self.wait_s,
            on_party_loss="continue",
            accept_split_brain=True,  # whoever comes compares
        )
        # Below a prefix, so that no federation of separate jobs is disturbed.
        self.survey = ElasticFederation(
            client.clone if self.job else lambda: client,
            self.name,
            self.roster,
            quorum=1,
            membership=patience,
            prefix=f"{_PREFIX}/",
        )
        self._resources.callback(self.survey.close)
        self.survey.enter(_BUILDING)

    def look(self, rehearsal: Rehearsal | None, failure: Exception | None) -> Seen:
        """Gather what the parties are, and measure with them if all are there."""
        mine = Facts(trouble=(error_text(failure),)) if failure is not None else Facts()
        if rehearsal is not None:
            mine = rehearsal.facts(self.roster, self.topology.party, self._shared)
        self.survey.handshake(asdict(mine), "", lambda *_: None)
        present = self._gather("ready", True)
        phases = self.survey.phases()
        silent = [name for name in self.roster if name not in present and phases[name] == _BUILDING]
        # All have come out of the last gather at the same moment, but for those who waited in vain.
        clocks = {} if silent else self._gather("clock", self.now())
        facts = {self.name: mine}
        if len(present) > 1:
            specs = zip(self.survey.names, self.survey.party_specs(), strict=True)
            facts = {name: read(spec, UNREADABLE_FACTS) for name, spec in specs}
        seen = Seen(
            self.roster,
            facts,
            silent=silent,
            clocks={name: read(clock, 0.0) for name, clock in clocks.items()},
            wait_s=self.wait_s,
        )
        if len(seen.facts) < len(self.roster) or len(self.roster) == 1:
            return seen
        healthy = all(finding.level != "error" for finding in findings(seen))
        results = self._gather("measured", asdict(self._measured(rehearsal if healthy else None)))
        return replace(
            seen, measured={name: read(value, UNREADABLE_MEASURED) for name, value in results.items()}
        )

    def close(self, *, together: bool = True) -> None:
        """Leave when all are done: a launcher ends all others as soon as one ends with an error."""
        if together:
            with contextlib.suppress(RuntimeError, OSError):
                self._gather("done", True)
        self._resources.close()

    def _gather(self, key: str, value: object) -> dict[str, Any]:
        """Return the values of those who are there, by name; of this party alone if they take too long."""
        until = time.monotonic() + self.wait_s + self.survey.membership.heartbeat_ttl_s

        def check_time() -> None:
            if time.monotonic() > until:
                raise TimeoutError

        self.survey.interrupt = check_time
        try:
            values = self.survey.gather_json(key, value)
        except TimeoutError:
            return {self.name: value}
        return dict(zip(self.survey.names, values, strict=True))

    @property
    def _shared(self) -> Mapping[str, Any]:
        """Settings of separate jobs that must be the same at all parties."""
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
                federation.abort(error_text(error))
            # Federations and networks fail with RuntimeErrors and OSErrors.
            if isinstance(error, ValueError | MisconfigurationException):
                return Measured(refused=error_text(error))
            return Measured(trouble=error_text(error))
        return measured

    def _joined(self) -> Communicator:
        if self.job is not None:
            run_id = self.survey.version(0).run_id  # which no other check ever has
            return self.job.rehearse(f"{_PREFIX}/{run_id}", self.wait_s, self.quorum)
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
        aggregator = rehearse(
            rehearsal.callback.factory, federation, rehearsal.trainer, rehearsal.module, copies
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
    relayed = tuple(federation.relayed)
    federation.commit("sums")
    rounds_s: tuple[float, ...] = ()
    sent = 0
    if aggregator is not None:
        expected_s = 4 * sum(copy.numel() for copy in copies.values()) * seconds / size
        if expected_s <= patience_s:
            rounds_s, sent = _rounds(aggregator)
    return Measured(latency_s, size / seconds, size, rounds_s, sent, relayed=relayed)


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


def _rounds(aggregator: Aggregator) -> tuple[tuple[float, ...], int]:
    """Make rounds of which nothing is kept; return the seconds of each, and the bytes sent in the last."""
    aggregator.start()
    reports = []
    for _ in range(ROUNDS):
        carried = {name: torch.zeros_like(part) for name, part in aggregator.carried.items()}
        reports.append(aggregator.step(1.0, contribution=AuxiliaryValues(vector=carried)))
    for _ in aggregator.drain():
        pass
    return tuple(report.seconds for report in reports), reports[-1].bytes_sent
