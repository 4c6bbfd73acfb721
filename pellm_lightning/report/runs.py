"""The fits whose records lie below a folder: which federations there were, and what each party recorded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pellm_lightning.report.formatting import count
from pellm_lightning.report.record import (
    FILE_NAME,
    End,
    Event,
    EventHeader,
    Round,
    Start,
    Validation,
    events,
    parse_event,
)

State = Literal["counted", "took part", "weight 0", "left out", "absent"]
"""Of a party in a round; "took part" where the exchange hides who counted."""
Metrics = dict[str, list[tuple[Validation, float]]]


@dataclass
class PartyRecord:
    """One party's record of its last fit and of its resumptions; ``read`` makes it.

    Example::

        record = read("runs/party-0/rounds.jsonl")
        record.rounds[0].update_norm
    """

    path: Path
    starts: list[Start] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    """Time of each start."""
    rounds: dict[int, Round] = field(default_factory=dict)
    """By index, in order; ``step`` includes the steps before a restart."""
    validations: list[Validation] = field(default_factory=list)
    end: End | None = None
    last_time: str = ""
    earlier_fits: int = 0
    """Fits in the same file that had begun from nothing before the last one."""
    foreign_lines: int = 0
    """Lines that another process has written into the file since the last start."""
    _run: str = ""
    _step_offset: int = 0
    """To be added to this process's steps: those of an earlier process that it did not resume."""
    seconds: float = 0.0
    """Duration of the fit, without the pauses between a stop and a resumption."""
    _seconds_before: float = 0.0

    @property
    def start(self) -> Start:
        """The last start."""
        return self.starts[-1]

    @property
    def party(self) -> int:
        """Index of the party."""
        return self.start.party

    @property
    def name(self) -> str:
        """Name of the party."""
        return self.start.name

    @property
    def failed(self) -> str | None:
        """The error with which the fit ended."""
        return self.end.failed if self.end else None

    @property
    def outcome(self) -> str:
        """How the fit ended: "failed", "finished" or "none recorded"."""
        return "failed" if self.failed is not None else "finished" if self.end else "none recorded"

    @property
    def steps(self) -> int:
        """Optimizer steps up to the last round."""
        return max((done.step for done in self.rounds.values()), default=0)

    @property
    def folder(self) -> Path:
        """The folder that the party's folder lies in, or the party's own if it is alone."""
        own = self.path.parent
        return own.parent if own.name == f"party-{self.party}" else own

    def add(self, header: EventHeader, event: Event) -> None:
        """Add the next event of the file."""
        if isinstance(event, Start):
            self._resume(header, event)
        elif not self.starts:
            raise ValueError("no start comes before it")
        elif header.run != self._run:
            self.foreign_lines += 1
            return
        elif isinstance(event, Round):
            self.rounds[event.round] = replace(event, step=event.step + self._step_offset)
        elif isinstance(event, Validation):
            self.validations.append(replace(event, step=event.step + self._step_offset))
        else:
            self.end = event
        self.last_time, self.seconds = header.time, self._seconds_before + header.elapsed_seconds

    def _resume(self, header: EventHeader, start: Start) -> None:
        """Drop what came after the round at which a start resumes."""
        self._seconds_before = self.seconds
        self._run, self.end, self.foreign_lines = header.run, None, 0
        self.starts.append(start)
        self.started.append(header.time)
        self.rounds = {index: done for index, done in self.rounds.items() if index < start.round}
        # A party that came back without a checkpoint counts its steps from 0 again.
        self._step_offset = max(0, self.steps - start.step)
        last = start.step + self._step_offset
        self.validations = [v for v in self.validations if v.round < start.round and v.step <= last]


@dataclass(frozen=True)
class Fit:
    """A fit of a whole federation, as far as it is known from the records at hand.

    Example::

        fit = find("runs").fit
        fit.shared("loss")  # {0: 2.3, 1: 1.9}

    Attributes that are named as text may be of a part: "deviation.total".
    """

    folder: Path
    names: tuple[str, ...]
    """Of all parties, by index, those without a record here included."""
    records: Mapping[int, PartyRecord]
    """By party, in order; at least one."""

    @cached_property
    def main_record(self) -> PartyRecord:
        """The record with most rounds."""
        return max(self.records.values(), key=lambda record: (len(record.rounds), -record.party))

    @cached_property
    def rounds(self) -> dict[int, Round]:
        """Each round by index, in order, from the main record or that of a party that was there."""
        found: dict[int, Round] = {}
        for record in (self.main_record, *self.records.values()):
            found = {**record.rounds, **found}
        return dict(sorted(found.items()))

    @cached_property
    def validations(self) -> list[Validation]:
        """Those of the main record, or of the party that validated more often: not all parties need to."""
        return max((self.main_record, *self.records.values()), key=lambda r: len(r.validations)).validations

    @cached_property
    def joint_validations(self) -> list[Validation]:
        """Those whose means are over all parties that were there, each at the mean of their steps.

        A mean is over the parties that validate at the same moment: with epochs of different length these
        differ from one validation to the next.
        """
        steps = {p: {_identity(v): v.step for v in r.validations} for p, r in self.records.items()}
        found = []
        for one in self.validations:
            there = self.rounds[one.round].parties if one.round in self.rounds else ()
            of_party = {party: seen.get(_identity(one)) for party, seen in steps.items() if seen}
            known = [step for step in of_party.values() if step is not None]
            if all(step is not None or party not in there for party, step in of_party.items()):
                found.append(replace(one, step=sum(known) / len(known)))
        return found

    def shared(self, attribute: str) -> dict[int, float]:
        """Return by round an attribute of ``Round`` that is the same at all parties."""
        return _known((index, _number(done, attribute)) for index, done in self.rounds.items())

    def own(self, party: int, attribute: str) -> dict[int, float]:
        """Return by round an attribute that only a party itself knows; empty without its record."""
        rounds = self.records[party].rounds if party in self.records else {}
        return _known((index, _number(done, attribute)) for index, done in rounds.items())

    def recorded(self, attribute: str) -> dict[int, list[float]]:
        """Return by round an attribute's values at the parties whose records have it."""
        found: dict[int, list[float]] = {index: [] for index in self.rounds}
        for party in self.records:
            for index, value in self.own(party, attribute).items():
                found[index].append(value)
        return {index: values for index, values in found.items() if values}

    def mean(self, attribute: str) -> dict[int, float]:
        """Return by round the mean of an attribute over the parties whose records have it."""
        return {index: fmean(values) for index, values in self.recorded(attribute).items()}

    @cached_property
    def epsilon(self) -> dict[int, float]:
        """Privacy budget spent by round, the highest that is recorded."""
        return {index: max(values) for index, values in self.recorded("epsilon").items()}

    def losses(self, party: int) -> dict[int, float]:
        """Return a party's training loss by round, from its own record, else as it was sent to others."""
        return _known((self._sent(party, "losses") | self.own(party, "local_loss")).items())

    def weights(self, party: int) -> dict[int, float]:
        """Return a party's weight by round, 0 where it took part and did not count."""
        return _known((self._sent(party, "weights") | self.own(party, "weight")).items())

    def shares(self) -> dict[int, list[float]]:
        """Return by round how much each party's update counted, of sum 1 or less, where that is known of all.

        It is the party's share of the weights, or the weight that a robust rule has given its update.
        """
        weights = [self.weights(party) for party in range(len(self.names))]
        found = {}
        for index, done in self.rounds.items():
            if done.influence:
                found[index] = [
                    _of_party(done, "influence", party) or 0.0 for party in range(len(self.names))
                ]
                continue
            of_round = [weight.get(index, 0.0) for weight in weights]
            # A sum without the hidden weights would be wrong.
            if sum(of_round) > 0 and math.isclose(sum(of_round), done.total_weight, rel_tol=1e-3):
                found[index] = [weight / sum(of_round) for weight in of_round]
        return found

    def distances(self, party: int) -> dict[int, float]:
        """Return by round the distance of a party's parameters from the result."""
        # Fragments take turns: the previous round is that of the same fragment.
        back = int(self.main_record.start.settings.get("fragments") or 1)
        sent = {index - back: value for index, value in self._sent(party, "distances").items()}
        # From a party that was absent in that round, it is the distance in an older one.
        there = {k: v for k, v in sent.items() if k in self.rounds and party in self.rounds[k].parties}
        return _known((there | self.own(party, "distance")).items())

    def state(self, party: int, index: int) -> State:
        """Return what became of a party in a round."""
        done = self.rounds[index]
        if party in done.excluded:
            return "left out"
        if party not in done.parties:
            return "absent"
        weight = _of_party(done, "weights", party)
        if weight is None and party in self.records and index in self.records[party].rounds:
            weight = self.records[party].rounds[index].weight
        if weight is None:
            return "took part"
        return "counted" if weight > 0 else "weight 0"

    def took_part(self, party: int) -> int:
        """Return the number of rounds that a party took part in, from its own record if there is one."""
        rounds = self.records[party].rounds if party in self.records else self.rounds
        return sum(party in done.parties for done in rounds.values())

    def in_state(self, index: int, *states: State) -> list[str]:
        """Return the names of the parties that were in one of some states in a round."""
        return [name for party, name in enumerate(self.names) if self.state(party, index) in states]

    def rounds_in_state(self, state: State) -> dict[str, int]:
        """Return the number of rounds in which each party was in a state, by name, where it is above 0."""
        states = {name: [self.state(k, index) for index in self.rounds] for k, name in enumerate(self.names)}
        return {name: seen.count(state) for name, seen in states.items() if state in seen}

    @property
    def short_rounds(self) -> list[int]:
        """Rounds that moved nothing, since fewer than a quorum trained in them."""
        return [index for index, done in self.rounds.items() if done.trained_parties < done.quorum]

    def means(self) -> Metrics:
        """Return each validation metric's mean over all parties, by name."""
        return _metrics((v, v.mean) for v in self.joint_validations)

    def local(self, party: int) -> Metrics:
        """Return each validation metric of a party, by name; empty without its record."""
        record = self.records.get(party)
        return _metrics((v, v.local) for v in record.validations) if record else {}

    def _sent(self, party: int, attribute: str) -> dict[int, float]:
        """Return by round a party's entry of an attribute that the parties send each other."""
        return _known((index, _of_party(done, attribute, party)) for index, done in self.rounds.items())


@dataclass(frozen=True)
class Findings:
    """The fits below a folder: a federation, and fits of single parties to compare it with.

    Example::

        find("runs").fit.names  # ("berlin", "oslo")
    """

    folder: Path
    fit: Fit
    baselines: tuple[Fit, ...]
    """Fits of one party each."""
    notes: tuple[str, ...] = ()
    """Which records are not shown, and why."""


def find(folder: str | Path) -> Findings:
    """Read all records below a folder.

    Raises:
        ValueError: If there is no record, a file is no record, or there are several federations.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob(FILE_NAME)) if folder.is_dir() else []
    if not paths:
        raise ValueError(
            f"There is no {FILE_NAME} in {folder} or below it. Each party of a fit writes one with"
            " FederatedAveraging(record=True), which is the default, into the Trainer's default_root_dir"
            " (below party-<k>/ if there are several). Name that folder; fast_dev_run writes none."
        )
    fits = _grouped([read(path) for path in paths])
    joint = [fit for fit in fits if len(fit.names) > 1]
    baselines = tuple(fit for fit in fits if len(fit.names) == 1)
    if not joint and len(baselines) == 1:
        return Findings(folder, baselines[0], (), tuple(_notes(baselines[0])))
    # Of several federations in one folder, the older ones are left over from other parties.
    chosen = max(joint, key=lambda fit: fit.main_record.last_time, default=None)
    if chosen is None or any(fit.folder != chosen.folder for fit in joint):
        places = "\n".join(f"  {fit.folder}: {len(fit.names)} parties" for fit in (joint or baselines))
        single = "fits of one party each and no federation to compare them with"
        raise ValueError(
            f"Below {folder} there are {'several federations' if joint else single}. Name the folder of"
            f" one:\n{places}"
        )
    left_over = [
        f"{record.path.relative_to(folder)} is of another fit, last written {record.last_time}, and is not"
        " shown."
        for fit in joint
        if fit is not chosen
        for record in fit.records.values()
    ]
    return Findings(folder, chosen, baselines, (*left_over, *_notes(chosen)))


def read(path: str | Path) -> PartyRecord:
    """Read one party's record.

    A start at round 0 and step 0 begins a new fit. Any other resumes: it replaces what had come after the
    round at which it resumes.

    Raises:
        ValueError: If the file is no record.
    """
    record = PartyRecord(Path(path))
    for number, line in enumerate(events(path), 1):
        try:
            header, event = parse_event(line)
            if record.starts and isinstance(event, Start) and event.round == event.step == 0:
                record = PartyRecord(record.path, earlier_fits=record.earlier_fits + 1)
            record.add(header, event)
        except ValueError as error:
            raise ValueError(
                f"{path}, event {number} is not as a fit writes it ({error}). If the file was edited, restore"
                " it; else move it away."
            ) from error
    if not record.starts:
        raise ValueError(
            f"{path} does not begin with the start of a fit: it is no whole record. Move it away."
        )
    return record


def _grouped(records: Sequence[PartyRecord]) -> list[Fit]:
    """Group the records of the same fit, wherever they lie: their rounds agree."""
    fits: list[dict[int, PartyRecord]] = []
    # First those with most rounds: parties that came and went may have rounds in common with these only.
    for record in sorted(records, key=lambda record: -len(record.rounds)):
        # First those in the same folder: two fits with the same seed may agree.
        near = sorted(fits, key=lambda fit: next(iter(fit.values())).folder != record.folder)
        same = next((fit for fit in near if _same_fit(fit, record)), None)
        if same is None:
            fits.append({record.party: record})
        else:
            same[record.party] = record
    return [
        Fit(first.folder, first.start.parties, dict(sorted(fit.items())))
        for fit in fits
        for first in [next(iter(fit.values()))]
    ]


def _same_fit(fit: Mapping[int, PartyRecord], record: PartyRecord) -> bool:
    first, roster = next(iter(fit.values())), record.start.parties
    if record.party in fit or first.start.parties != roster or len(roster) == 1:
        return False
    other = max(fit.values(), key=lambda other: len(other.rounds.keys() & record.rounds.keys()))
    common = other.rounds.keys() & record.rounds.keys()
    if not common:  # one of them failed early, or came late
        return first.folder == record.folder
    one, two = (r.rounds[max(common)] for r in (other, record))
    alike = [(one.loss, two.loss), (one.total_weight, two.total_weight)]
    return one.parties == two.parties and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)) for a, b in alike
    )


def _notes(fit: Fit) -> list[str]:
    """Return what the files of a fit hold that is not shown."""
    notes = []
    if most := max(record.earlier_fits for record in fit.records.values()):
        fits = count(most, "earlier fit")
        notes.append(f"The same files also hold {fits}, which began anew: not shown.")
    if foreign := {r.path.relative_to(fit.folder): n for r in fit.records.values() if (n := r.foreign_lines)}:
        lines = ", ".join(f"{number:,} lines of {name}" for name, number in foreign.items())
        notes.append(
            f"Another process wrote into the same files after this fit had begun: {lines} are not shown. Give"
            " each fit a default_root_dir of its own."
        )
    return notes


def _known(values: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """Return values by round, in order, without those that are unknown, NaN or infinite."""
    return {index: v for index, v in sorted(values) if v is not None and math.isfinite(v)}


def _number(done: Round, attribute: str) -> float | None:
    value: Any = done
    for name in attribute.split("."):
        value = None if value is None else getattr(value, name)
    number: float | None = value
    return number


def _of_party(done: Round, attribute: str, party: int) -> float | None:
    """Return a party's entry of a tuple that has one for each party of a round; None if it is hidden."""
    values: Sequence[float | None] = getattr(done, attribute)
    return values[done.parties.index(party)] if values and party in done.parties else None


def _metrics(validations: Iterable[tuple[Validation, Mapping[str, float]]]) -> Metrics:
    found: Metrics = {}
    for validation, values in validations:
        for name, value in values.items():
            if math.isfinite(value):
                found.setdefault(name, []).append((validation, value))
    return found


def _identity(validation: Validation) -> tuple[int, frozenset[tuple[str, float]]]:
    """Return what is equal, to the bit, at all parties of a validation."""
    return validation.round, frozenset((k, v) for k, v in validation.mean.items() if math.isfinite(v))
