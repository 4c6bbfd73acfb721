"""Checks of what the parties are and measured. Pure: facts in, findings out."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Literal

from pellm_lightning.cli.doctor.facts import Facts, Measured
from pellm_lightning.engine.compatibility import PartySpec, differences, shared_file
from pellm_lightning.report.formatting import count, grouped, size

CLOCKS_S = 2.0
"""By how much clocks may differ."""


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Example:
        >>> Finding("ok", "clocks", "Less than 0.1 s apart.").level
        'ok'
    """

    level: Literal["ok", "warning", "error"]
    topic: str
    """What was looked at, in a word or two."""
    says: str
    """What was found, and what to do if it is not good."""


ok, warning, error = (partial(Finding, level) for level in ("ok", "warning", "error"))


@dataclass(frozen=True)
class Seen:
    """All that was gathered about a launch.

    Example::

        findings(Seen(["a", "b"], {"a": Facts()}))
    """

    roster: Sequence[str]
    """Names of all parties."""
    facts: Mapping[str, Facts]
    """Of each party that answered."""
    silent: Sequence[str] = ()
    """Parties that came, but did not send their facts in time."""
    clocks: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each party's clock showed at the same moment."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """Of each party that measured; empty if none did."""
    wait_s: float = 30.0
    """Seconds that each was waited for."""


def findings(seen: Seen) -> list[Finding]:
    """Return all findings about a launch, good and bad."""
    checks = (_parties, _fit, _data, _versions, _alike, _files, _devices, _clocks, _network, _rounds)
    return [finding for check in checks for finding in check(seen)]


def _parties(seen: Seen) -> Iterator[Finding]:
    gone = [name for name in seen.roster if name not in seen.facts and name not in seen.silent]
    if gone:
        yield error(
            "parties",
            f"{_named(gone)} did not come within {seen.wait_s:g} s. See that it was started, with this roster"
            " and rendezvous, and look at the end of its log; wait longer by --wait_s.",
        )
    if seen.silent:
        yield error(
            "parties",
            f"{_named(seen.silent)} came, but did not read its data and build its model within"
            f" {seen.wait_s:g} s of the others. Look at its log; wait longer by --wait_s.",
        )
    if len(seen.roster) == 1:
        yield warning(
            "parties",
            "This is a federation of one party. Launch all: torchrun --nproc-per-node N, or separate jobs"
            " with a rendezvous.",
        )
    elif not gone and not seen.silent:
        hosts = len({facts.host for facts in seen.facts.values()})
        yield ok("parties", f"{_all(seen.roster).capitalize()} are there, on {count(hosts, 'host')}.")


def _fit(seen: Seen) -> Iterator[Finding]:
    failures = [(name, failure) for name, facts in seen.facts.items() for failure in facts.trouble]
    # Some errors concern the parties together, so that only the rounds show them.
    failures += [(name, measured.refused) for name, measured in seen.measured.items() if measured.refused]
    for failure, names in _by_text(failures):
        yield error("fit", f"{names} cannot begin: {failure}")


def _data(seen: Seen) -> Iterator[Finding]:
    for doubt, names in _by_text((name, doubt) for name, f in seen.facts.items() for doubt in f.doubts):
        yield warning(
            "data",
            f"{names} cannot read the data: {doubt} If prepare_data() makes them first, which is not run"
            " here, all is well.",
        )


def _versions(seen: Seen) -> Iterator[Finding]:
    good = True
    for package in sorted({package for facts in seen.facts.values() for package in facts.versions}):
        found = grouped((name, facts.versions.get(package, "none")) for name, facts in seen.facts.items())
        if len(found) == 1:
            continue
        good = False
        which = ", ".join(f"{version} at {_named(names)}" for version, names in found.items())
        install = f"Install the same at all parties: python -m pip install '{package}==...'."
        cure = "Give all parties the same." if package == "python" else install
        level = error if package == "pellm-lightning" else warning
        yield level("versions", f"{package} is {which}. {cure}")
    if good and len(seen.facts) > 1:
        torch = next(iter(seen.facts.values())).versions.get("torch", "unknown")
        yield ok("versions", f"The same at {_all(seen.facts)} (torch {torch}).")


def _alike(seen: Seen) -> Iterator[Finding]:
    """Compare what must be the same at all; of each kind show the first difference, and count the rest."""
    specs = _specs(seen)
    if len(specs) < 2:
        return
    found = _differences(specs)
    for (topic, _), messages in found.items():
        more = f" ({len(messages) - 1} more like this.)" if len(messages) > 1 else ""
        yield error(topic, messages[0] + more)
    differing = {topic for topic, _ in found}
    unchecked = [name for name, spec in specs.items() if spec["base"] is None]
    if unchecked:
        mixed = len(unchecked) < len(specs)
        cure = " The others compare it: give all parties the same." if mixed else ""
        level = error if mixed else warning
        yield level("base model", f"Not compared: {_named(unchecked)} has check_frozen=False.{cure}")
    elif "base model" not in differing:
        tensors = len(next(iter(specs.values()))["base"])
        yield ok("base model", f"The same at {_all(specs)}, every value of {tensors} frozen tensors.")
    if "settings" not in differing:
        yield ok("settings", f"The same at {_all(specs)}.")
    if not differing & {"parameters", "adapter"}:
        first = next(facts for facts in seen.facts.values() if facts.party_spec)
        share = 100 * first.parameters / max(first.of_parameters, 1)
        yield ok(
            "parameters",
            f"The same at {_all(specs)}: {first.parameters:,} of {first.of_parameters:,} leave a party"
            f" ({share:.3g} %).",
        )


def _specs(seen: Seen) -> dict[str, PartySpec]:
    return {name: facts.party_spec for name, facts in seen.facts.items() if facts.party_spec}


def _differences(specs: Mapping[str, PartySpec]) -> dict[tuple[str, str], list[str]]:
    """Return the differences from the first party, by topic and party; each setting by itself."""
    found: dict[tuple[str, str], list[str]] = {}
    first, *others = specs
    for name in others:
        try:
            messages = list(differences([specs[first], specs[name]], [first, name]))
        except (KeyError, TypeError, ValueError, AttributeError):  # of another version
            cure = "Install the same version at both."
            messages = [("protocol", f"Party {first} shows what party {name} cannot read. {cure}")]
        for topic, message in messages:
            apart = message if topic == "settings" else ""
            found.setdefault((topic, name + apart), []).append(message)
    return found


def _files(seen: Seen) -> Iterator[Finding]:
    specs = _specs(seen)
    if len(specs) < 2:
        return
    conflict = shared_file(list(specs.values()), list(specs))
    yield error("files", conflict) if conflict else ok("files", "Each party writes where no other writes.")


def _devices(seen: Seen) -> Iterator[Finding]:
    holders = grouped((name, facts.accelerator) for name, facts in seen.facts.items() if facts.accelerator)
    shared = {device: names for device, names in holders.items() if len(names) > 1}
    for device, names in shared.items():
        yield warning(
            "devices",
            f"{_named(names)} would all train on {device}. Give each its own: torchrun --virtual-local-rank,"
            " or CUDA_VISIBLE_DEVICES.",
        )
    if len({facts.processes for facts in seen.facts.values()}) > 1:
        each = ", ".join(f"{name}: {facts.processes}" for name, facts in seen.facts.items())
        yield warning(
            "devices",
            f"Parties have unlike numbers of processes ({each}). That works, but all wait for the slowest:"
            " rounds by every_n_seconds let each do what it can.",
        )
    elif holders and not shared:
        yield ok("devices", f"{len(holders)} accelerators, none of them shared.")


def _clocks(seen: Seen) -> Iterator[Finding]:
    if len(seen.clocks) < 2:
        return
    middle = statistics.median_low(seen.clocks.values())
    far = {name: clock - middle for name, clock in seen.clocks.items() if abs(clock - middle) > CLOCKS_S}
    for name, ahead in far.items():
        way = "ahead" if ahead > 0 else "behind"
        yield warning(
            "clocks",
            f"The clock of party {name} is {abs(ahead):.1f} s {way}. Let NTP or chrony set it: certificates"
            " are good from and until a time, and logs are read side by side.",
        )
    if not far:
        apart = max(seen.clocks.values()) - min(seen.clocks.values())
        yield ok("clocks", f"Less than {max(apart, 0.1):.1f} s apart.")


def _network(seen: Seen) -> Iterator[Finding]:
    measured = seen.measured
    for failure, names in _by_text((name, m.trouble) for name, m in measured.items() if m.trouble):
        yield error("network", f"{names}, measuring with the others: {failure}")
    lost = [name for name in seen.facts if measured and name not in measured]
    if lost:
        yield error(
            "network", f"{_named(lost)} was lost while sums were measured. Look at the end of its log."
        )
    latencies = [m.latency_s for m in measured.values() if m.latency_s is not None]
    speeds = [m.bytes_per_s for m in measured.values() if m.bytes_per_s is not None]
    if latencies and speeds and not lost and not _failed(seen):
        summed = size(max(m.summed_bytes for m in measured.values()))
        yield ok(
            "network",
            f"A sum over all parties takes {_seconds(max(latencies))}, and {min(speeds) / 1e6:.3g} MB a"
            f" second (of {summed}).{_ways(seen)}",
        )
    elif not measured and len(seen.roster) > 1:
        yield warning("network", "Not measured: that needs all parties.")


def _ways(seen: Seen) -> str:
    """Say which pairs are connected how, if any is not connected directly."""
    pairs = [*combinations(seen.roster, 2)]
    relayed = [(a, b) for a, b in pairs if a in seen.measured and b in seen.measured[a].relayed]
    direct = [pair for pair in pairs if pair not in relayed]
    if not relayed:
        return ""
    ways = (("by the relay", relayed), ("directly", direct))
    return "".join(
        f" Connected {way}: {', '.join('-'.join(pair) for pair in found)}." for way, found in ways if found
    )


def _rounds(seen: Seen) -> Iterator[Finding]:
    timed = [m for m in seen.measured.values() if m.rounds_s]
    if timed:
        best = max(min(m.rounds_s) for m in timed)
        sent = size(max(m.round_bytes for m in timed))
        yield ok(
            "round",
            f"Takes {_seconds(best)} and sends {sent} a party: {len(timed[0].rounds_s)} rounds made, of which"
            " nothing is kept.",
        )
        return
    speeds = [m.bytes_per_s for m in seen.measured.values() if m.bytes_per_s]
    crosses = max((facts.size_bytes for facts in seen.facts.values()), default=0)
    if not speeds or not crosses or _failed(seen):
        return
    seconds = _seconds(crosses / min(speeds))
    expected = f"{size(crosses)} of float32 would take about {seconds} uncompressed"
    if any(finding.level == "error" for finding in findings(replace(seen, measured={}))):
        yield ok("round", f"{expected}; none was made, since the parties must be mended first.")
    else:
        yield warning(
            "round",
            f"{expected}, too long to make one here. Send fewer bytes, or less often:"
            " docs/howto/slow_links.md.",
        )


def _by_text(messages: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each message as a sentence, and the parties that sent it: often all the same."""
    ends = (".", "!", "?")
    return [
        (text if text.endswith(ends) else f"{text}.", _named(names))
        for text, names in grouped(messages).items()
    ]


def _failed(seen: Seen) -> bool:
    return any(m.trouble or m.refused for m in seen.measured.values())


def _named(names: Sequence[str]) -> str:
    return f"Party {names[0]}" if len(names) == 1 else f"Parties {', '.join(names)}"


def _all(parties: Sequence[str] | Mapping[str, object]) -> str:
    return "both parties" if len(parties) == 2 else f"all {len(parties)} parties"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes"
