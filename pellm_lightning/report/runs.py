"""What the records below a folder say, as plain values: which federations there were, and what they did."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pellm_lightning.report.record import NAME, events

State = Literal["counted", "took part", "weight 0", "left out", "absent"]
"""Of a party in a round; "took part" where the exchange hides who counted."""


@dataclass(frozen=True)
class Start:
    """A beginning of a fit, or its going on, at one party."""

    time: str
    round: int
    """Index of the round that came next."""
    step: int
    module: str
    device: str
    precision: str
    processes: int
    leaving: int
    """Parameters that leave the party each round, by number."""
    parameters: int
    """Parameters of the module, by number."""
    lora_modules: int
    host: str
    platform: str
    processors: int | None
    command: tuple[str, ...]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    config: str | None
    """YAML of the command line; None for a script."""


@dataclass(frozen=True)
class Round:
    """A round as one party has recorded it; None is what it does not know, or what was no finite number."""

    index: int
    step: int
    """Optimizer steps this party had made, those before a restart included."""
    parties: tuple[int, ...]
    """Who took part, by index in the federation."""
    excluded: tuple[int, ...]
    """Who was left out because of NaN or infinity."""
    trained_parties: float | None
    """How many have trained."""
    quorum: float | None
    """How many had to, for the round to move anything."""
    total_weight: float | None
    weight: float | None
    loss: float | None
    """Of all parties together."""
    local_loss: float | None
    training_seconds: float | None
    """Between the round before and this one, without what a round took: training and validation. None if this
    party missed the round before."""
    waited_seconds: float | None
    exchange_seconds: float | None
    stalled_seconds: float | None
    bytes_sent: float | None
    update_norm: float | None
    distance: float | None
    deviation: float | None
    worst_deviation: float | None
    worst_module: str | None
    epsilon: float | None
    clipping_norm: float | None
    compression_error: float | None
    outer_lr: float | None
    weights: Mapping[int, float]
    """By party; empty where the exchange hides them."""
    losses: Mapping[int, float]
    distances_before: Mapping[int, float]
    """Distances in the round before, by party."""


@dataclass(frozen=True)
class Validation:
    """Metrics of one validation."""

    round: int
    """Index of the last round before it; -1 before the first."""
    step: float
    """Optimizer steps before it; of several parties, their mean."""
    local: Mapping[str, float]
    mean: Mapping[str, float]


@dataclass(frozen=True)
class PartyRecord:
    """What one party has recorded of its last fit and of its resumptions."""

    path: Path
    party: int
    name: str
    roster: tuple[str, ...]
    """Names of all parties."""
    starts: tuple[Start, ...]
    rounds: Mapping[int, Round]
    """By index, in order."""
    validations: tuple[Validation, ...]
    ended: bool
    failed: str | None
    """Why the fit failed."""
    last_time: str
    seconds: float
    """How long it took, pauses between a stop and a resumption left out."""
    earlier_fits: int
    """Fits in the same file that had begun from nothing before the last one."""
    strays: int
    """Lines that another process has written into the file after the last start."""

    @property
    def start(self) -> Start:
        """Return the last start."""
        return self.starts[-1]


@dataclass(frozen=True)
class Fit:
    """A fit of a whole federation, as far as the records at hand tell of it."""

    folder: Path
    names: tuple[str, ...]
    """Of all parties, by index, those without a record here included."""
    records: Mapping[int, PartyRecord]
    """By party, in order; at least one."""

    @cached_property
    def narrator(self) -> PartyRecord:
        """Return the record that knows most rounds."""
        return max(self.records.values(), key=lambda record: (len(record.rounds), -record.party))

    @cached_property
    def rounds(self) -> dict[int, Round]:
        """Return each round by index, in order, seen by the narrator or by whoever else was there."""
        found: dict[int, Round] = {}
        for record in (self.narrator, *self.records.values()):
            found = {**record.rounds, **found}
        return dict(sorted(found.items()))

    @cached_property
    def validations(self) -> tuple[Validation, ...]:
        """Return those of the narrator, or of whoever has validated more often: not all parties need to."""
        return max((self.narrator, *self.records.values()), key=lambda r: len(r.validations)).validations

    @cached_property
    def joint_validations(self) -> list[Validation]:
        """Return those whose means are over all parties that were there, each at the mean of their steps.

        A mean is over those that validate at the same moment: with unlike epochs now one party, now another.
        """
        steps = {p: {_told(v): v.step for v in r.validations} for p, r in self.records.items()}
        found = []
        for one in self.validations:
            there = self.rounds[one.round].parties if one.round in self.rounds else ()
            of_party = {party: seen.get(_told(one)) for party, seen in steps.items() if seen}
            known = [step for step in of_party.values() if step is not None]
            if all(step is not None or party not in there for party, step in of_party.items()):
                found.append(replace(one, step=sum(known) / len(known)))
        return found

    def shared(self, what: str) -> dict[int, float]:
        """Return by round what is the same at all parties: an attribute of ``Round``."""
        return self._told(self.rounds.values(), what)

    def own(self, party: int, what: str) -> dict[int, float]:
        """Return by round what only a party itself knows; empty without its record."""
        return self._told(self.records[party].rounds.values(), what) if party in self.records else {}

    def losses(self, party: int) -> dict[int, float]:
        """Return a party's training loss by round, by its own record, else as it told others."""
        told = {r.index: r.losses[party] for r in self.rounds.values() if party in r.losses}
        return _sorted(told | self.own(party, "local_loss"))

    def weights(self, party: int) -> dict[int, float]:
        """Return a party's weight by round, 0 where it took part and did not count."""
        told = {r.index: r.weights[party] for r in self.rounds.values() if party in r.weights}
        return _sorted(told | self.own(party, "weight"))

    def distances(self, party: int) -> dict[int, float]:
        """Return by round how far a party's parameters were from the result."""
        # Fragments take turns: the round before is that of the same fragment.
        back = int(self.narrator.start.settings.get("fragments") or 1)
        told = {
            r.index - back: r.distances_before[party]
            for r in self.rounds.values()
            if party in r.distances_before
        }
        # Of who was away in that round it is of an older one.
        there = {k: v for k, v in told.items() if k in self.rounds and party in self.rounds[k].parties}
        return _sorted(there | self.own(party, "distance"))

    def state(self, party: int, index: int) -> State:
        """Tell what became of a party in a round."""
        done = self.rounds[index]
        if party in done.excluded:
            return "left out"
        if party not in done.parties:
            return "absent"
        weight = done.weights.get(party)
        if weight is None and party in self.records and index in self.records[party].rounds:
            weight = self.records[party].rounds[index].weight
        if weight is None:
            return "took part"
        return "counted" if weight > 0 else "weight 0"

    @property
    def short_rounds(self) -> list[int]:
        """Rounds that moved nothing, since fewer than a quorum trained in them."""
        return [
            index
            for index, done in self.rounds.items()
            if done.trained_parties is not None and done.quorum is not None
            if done.trained_parties < done.quorum
        ]

    def means(self) -> dict[str, list[tuple[Validation, float]]]:
        """Return each validation metric's mean over all parties, by name."""
        return _metrics((v, v.mean) for v in self.joint_validations)

    def local(self, party: int) -> dict[str, list[tuple[Validation, float]]]:
        """Return each validation metric of a party, by name; empty without its record."""
        record = self.records.get(party)
        return _metrics((v, v.local) for v in record.validations) if record else {}

    @staticmethod
    def _told(rounds: Iterable[Round], what: str) -> dict[int, float]:
        return {r.index: value for r in rounds if (value := getattr(r, what)) is not None}


@dataclass(frozen=True)
class Findings:
    """What a folder holds."""

    folder: Path
    fit: Fit
    alone: tuple[Fit, ...]
    """Fits of one party each, to compare with."""
    notes: tuple[str, ...] = ()
    """What was found and is not shown, and why."""


def find(folder: str | Path) -> Findings:
    """Read all records below a folder.

    Raises:
        ValueError: If there is none, a file is none, or there are several federations and none is the one to
            show.
    """
    folder = Path(folder)
    paths = sorted(folder.rglob(NAME)) if folder.is_dir() else []
    if not paths:
        raise ValueError(
            f"There is no {NAME} in {folder} or below it. Each party of a fit writes one with"
            " FederatedAveraging(record=True), which is the default, into the Trainer's default_root_dir"
            " (below party-<k>/ if there are several). Name that folder; fast_dev_run writes none."
        )
    fits = _together([read(path) for path in paths])
    joint = [fit for fit in fits if len(fit.names) > 1]
    alone = tuple(fit for fit in fits if len(fit.names) == 1)
    if not joint and len(alone) == 1:
        return Findings(folder, alone[0], (), tuple(_notes(alone[0])))
    # Of one folder, what is older is left over from a federation of other parties.
    chosen = max(joint, key=lambda fit: fit.narrator.last_time, default=None)
    if chosen is None or any(fit.folder != chosen.folder for fit in joint):
        places = "\n".join(f"  {fit.folder}: {len(fit.names)} parties" for fit in (joint or alone))
        alone_only = "fits of one party each and no federation to compare them with"
        what = "several federations" if joint else alone_only
        raise ValueError(f"Below {folder} there are {what}. Name the folder of one:\n{places}")
    left_over = [
        f"{record.path.relative_to(folder)} is of another fit, last written {record.last_time}, and is not"
        " shown."
        for fit in joint
        if fit is not chosen
        for record in fit.records.values()
    ]
    return Findings(folder, chosen, alone, (*left_over, *_notes(chosen)))


def read(path: str | Path) -> PartyRecord:
    """Read one party's record.

    A start at round 0 and step 0 begins a new fit. Any other resumes: it takes the place of what had come
    after the round at which it goes on.

    Raises:
        ValueError: If the file is no record.
    """
    path, story = Path(path), _RecordParser()
    number = 0
    try:
        for event in events(path):
            number += 1
            if story.starts and event["event"] == "start" and event["round"] == event["step"] == 0:
                story = _RecordParser(earlier_fits=story.earlier_fits + 1)
            story.hear(event)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, event {number} is not as a fit writes it ({error!r}). If the file was edited, restore"
            " it; else move it away."
        ) from error
    if not story.starts:
        raise ValueError(
            f"{path} does not begin with the start of a fit: it is no whole record. Move it away."
        )
    return story.record(path)


@dataclass
class _RecordParser:
    """A record while it is read."""

    who: Mapping[str, Any] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    rounds: dict[int, Round] = field(default_factory=dict)
    validations: list[Validation] = field(default_factory=list)
    ended: bool = False
    failed: str | None = None
    last_time: str = ""
    steps_before: int = 0
    """To be added to this process's steps: those of an earlier one that it did not resume."""
    seconds_before: float = 0.0
    elapsed: float = 0.0
    trained_since: float = 0.0
    next: int = 0
    """Index of the round that comes."""
    earlier_fits: int = 0
    strays: int = 0

    def hear(self, event: Mapping[str, Any]) -> None:
        what = event["event"]
        if what != "start" and not self.starts:
            raise KeyError("no start before it")
        if what != "start" and event.get("run", self.who.get("run")) != self.who.get("run"):
            self.strays += 1
            return
        self.last_time = str(event["time"])
        if what == "start":
            self._start(event)
        self.elapsed = _number(event, "elapsed_seconds") or 0.0
        if what == "start":
            self.trained_since, self.next = self.elapsed, self.starts[-1].round
        elif what == "round":
            done = self._round(event)
            self.rounds[done.index] = done
            self.next = done.index + 1
            self.trained_since = self.elapsed
        elif what == "validation":
            last = max(self.rounds, default=self.starts[-1].round - 1)
            step = int(event["step"]) + self.steps_before
            self.validations.append(Validation(last, step, _numbers(event["local"]), _numbers(event["mean"])))
        elif what == "end":
            self.ended = True
            self.failed = None if event["failed"] is None else str(event["failed"])

    def _start(self, event: Mapping[str, Any]) -> None:
        start = _start(event)
        self.who = event
        self.starts.append(start)
        self.strays = 0
        self.rounds = {index: done for index, done in self.rounds.items() if index < start.round}
        made = max((done.step for done in self.rounds.values()), default=0)
        # A party that came back without a checkpoint counts its steps from 0 again.
        self.steps_before = max(0, made - start.step)
        resumed_at = start.step + self.steps_before
        self.validations = [v for v in self.validations if v.round < start.round and v.step <= resumed_at]
        self.seconds_before += self.elapsed
        self.ended, self.failed = False, None

    def _round(self, event: Mapping[str, Any]) -> Round:
        parties = tuple(int(party) for party in event["parties"])
        deviation = event["deviation"] or {}
        stalled = _number(event, "stalled_seconds")
        index = int(event["round"])
        trained = max(0.0, self.elapsed - self.trained_since - (stalled or 0.0))
        known: dict[str, Any] = {
            "index": index,
            "step": int(event["step"]) + self.steps_before,
            "parties": parties,
            "excluded": tuple(int(party) for party in event["excluded"]),
            "training_seconds": trained if index == self.next else None,
            "exchange_seconds": _number(event, "seconds"),
            "stalled_seconds": stalled,
            "deviation": _number(deviation, "total"),
            "worst_deviation": _number(deviation, "worst"),
            "worst_module": str(deviation["worst_module"]) if deviation else None,
            "weights": _by_party(parties, event["weights"]),
            "losses": _by_party(parties, event["losses"]),
            "distances_before": _by_party(parties, event["distances"]),
        }
        # All else are figures that a record holds under the same names.
        known |= {f.name: _number(event, f.name) for f in fields(Round) if f.name not in known}
        return Round(**known)

    def record(self, path: Path) -> PartyRecord:
        return PartyRecord(
            path=path,
            party=int(self.who["party"]),
            name=str(self.who["name"]),
            roster=tuple(str(name) for name in self.who["parties"]),
            starts=tuple(self.starts),
            rounds=_sorted(self.rounds),
            validations=tuple(self.validations),
            ended=self.ended,
            failed=self.failed,
            last_time=self.last_time,
            seconds=self.seconds_before + self.elapsed,
            earlier_fits=self.earlier_fits,
            strays=self.strays,
        )


def _start(event: Mapping[str, Any]) -> Start:
    return Start(
        time=str(event["time"]),
        round=int(event["round"]),
        step=int(event["step"]),
        module=str(event["module"]),
        device=str(event["device"]),
        precision=str(event["precision"]),
        processes=int(event["processes"]),
        leaving=int(event["leaving"]),
        parameters=int(event["parameters"]),
        lora_modules=int(event["lora_modules"]),
        host=str(event["host"]),
        platform=str(event["platform"]),
        processors=event["processors"],
        command=tuple(str(word) for word in event["command"]),
        versions={str(name): str(text) for name, text in event["versions"].items()},
        settings=dict(event["settings"]),
        config=None if event["config"] is None else str(event["config"]),
    )


def _together(records: Sequence[PartyRecord]) -> list[Fit]:
    """Put records of the same fit together, wherever they lie: their rounds say the same."""
    fits: list[dict[int, PartyRecord]] = []
    # First those that know most rounds: parties that came and went have perhaps none in common but with them.
    for record in sorted(records, key=lambda record: -len(record.rounds)):
        # Those beside it first: two fits with the same seed may say the same.
        near = sorted(fits, key=lambda fit: _folder(fit) != _folder({record.party: record}))
        for fit in near:
            if _same_fit(fit, record):
                fit[record.party] = record
                break
        else:
            fits.append({record.party: record})
    return [Fit(_folder(fit), next(iter(fit.values())).roster, dict(sorted(fit.items()))) for fit in fits]


def _same_fit(fit: Mapping[int, PartyRecord], record: PartyRecord) -> bool:
    if record.party in fit or next(iter(fit.values())).roster != record.roster or len(record.roster) == 1:
        return False
    other = max(fit.values(), key=lambda other: len(other.rounds.keys() & record.rounds.keys()))
    common = other.rounds.keys() & record.rounds.keys()
    if not common:  # one of them failed early, or came late
        return _folder(fit) == _folder({record.party: record})
    one, two = (r.rounds[max(common)] for r in (other, record))
    alike = [(one.loss, two.loss), (one.total_weight, two.total_weight)]
    return one.parties == two.parties and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)) for a, b in alike
    )


def _folder(fit: Mapping[int, PartyRecord]) -> Path:
    """Return the folder that the party's folder lies in, or the party's own if it is alone."""
    record = next(iter(fit.values()))
    own = record.path.parent
    return own.parent if own.name == f"party-{record.party}" else own


def _notes(fit: Fit) -> list[str]:
    """Return what the files hold besides."""
    notes = []
    if most := max(record.earlier_fits for record in fit.records.values()):
        fits = "1 earlier fit" if most == 1 else f"{most} earlier fits"
        notes.append(f"The same files also hold {fits}, which began anew: not shown.")
    if strays := {str(r.path.relative_to(fit.folder)): r.strays for r in fit.records.values() if r.strays}:
        lines = ", ".join(f"{count:,} lines of {name}" for name, count in strays.items())
        notes.append(
            f"Another process wrote into the same files after this fit had begun: {lines} are not shown. Give"
            " each fit a default_root_dir of its own."
        )
    return notes


def _number(of: Mapping[str, Any], name: str) -> float | None:
    value = of.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, no number")
    return float(value) if math.isfinite(value) else None


def _numbers(of: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): value for name in of if (value := _number(of, name)) is not None}


def _by_party(parties: Sequence[int], values: Sequence[Any]) -> dict[int, float]:
    return {
        party: number
        for party, value in zip(parties, values, strict=False)
        if (number := _number({"value": value}, "value")) is not None
    }


def _metrics(
    validations: Iterable[tuple[Validation, Mapping[str, float]]],
) -> dict[str, list[tuple[Validation, float]]]:
    found: dict[str, list[tuple[Validation, float]]] = {}
    for validation, values in validations:
        for name, value in values.items():
            found.setdefault(name, []).append((validation, value))
    return found


def _told(validation: Validation) -> tuple[int, frozenset[tuple[str, float]]]:
    """Return what is equal, to the bit, at all parties of a validation."""
    return validation.round, frozenset(validation.mean.items())


def _sorted(by_index: Mapping[int, Any]) -> dict[int, Any]:
    return dict(sorted(by_index.items()))
