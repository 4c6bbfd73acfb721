"""What is found in what the parties tell. Pure: facts in, findings out."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pellm_lightning.cli.doctor.facts import Facts, Measured
from pellm_lightning.engine.compatibility import PartySpec, differences, shared_file
from pellm_lightning.report import formatting

CLOCKS_S = 2.0
"""By how much clocks may differ."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "error"]
    topic: str
    """What was looked at, in a word or two."""
    says: str
    """What was found, and what to do if it is not good."""


@dataclass(frozen=True)
class Seen:
    """What was seen of a launch."""

    roster: Sequence[str]
    """Names of all parties."""
    facts: Mapping[str, Facts]
    """Of each party that told."""
    silent: Sequence[str] = ()
    """Who came, but did not tell its facts in time."""
    clocks: Mapping[str, float] = field(default_factory=dict)
    """By how many seconds each clock is ahead of the first party's."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """Of each party that measured; empty if it was not come to that."""
    wait_s: float = 30.0
    """How long was waited for each."""


def findings(seen: Seen) -> list[Finding]:
    """Return all that is to be said about a launch, what is good and what is not."""
    looks = (_parties, _own_trouble, _versions, _alike, _files, _devices, _clocks, _network, _rounds)
    return [finding for look in looks for finding in look(seen)]


def _parties(seen: Seen) -> Iterator[Finding]:
    gone = [name for name in seen.roster if name not in seen.facts and name not in seen.silent]
    if gone:
        yield Finding(
            "error",
            "parties",
            f"{_named(gone)} did not come within {seen.wait_s:g} s. See that it was started, with this roster"
            " and rendezvous, and look at the end of its log; wait longer by --wait_s.",
        )
    if seen.silent:
        yield Finding(
            "error",
            "parties",
            f"{_named(seen.silent)} came, but did not read its data and build its model within"
            f" {seen.wait_s:g} s of the others. Look at its log; wait longer by --wait_s.",
        )
    if len(seen.roster) == 1:
        yield Finding(
            "warning",
            "parties",
            "This is a federation of one party. Launch all: torchrun --nproc-per-node N, or separate jobs"
            " with a rendezvous.",
        )
    elif not gone and not seen.silent:
        hosts = len({facts.host for facts in seen.facts.values()})
        where = "1 host" if hosts == 1 else f"{hosts} hosts"
        yield Finding("ok", "parties", f"{_all(len(seen.roster)).capitalize()} are there, on {where}.")


def _own_trouble(seen: Seen) -> Iterator[Finding]:
    told = [(name, trouble) for name, facts in seen.facts.items() for trouble in facts.trouble]
    # Of the parties together only rounds could tell.
    told += [(name, measured.refused) for name, measured in seen.measured.items() if measured.refused]
    for trouble, names in _by_words(told):
        yield Finding("error", "fit", f"{_named(names)} cannot begin: {_ended(trouble)}")
    for doubt, names in _by_words((name, doubt) for name, f in seen.facts.items() for doubt in f.doubts):
        yield Finding(
            "warning",
            "data",
            f"{_named(names)} cannot read the data: {_ended(doubt)} If prepare_data() makes them first, which"
            " is not run here, all is well.",
        )


def _versions(seen: Seen) -> Iterator[Finding]:
    packages = sorted({package for facts in seen.facts.values() for package in facts.versions})
    good = True
    for package in packages:
        having: dict[str, list[str]] = {}
        for name, facts in seen.facts.items():
            having.setdefault(facts.versions.get(package, "none"), []).append(name)
        if len(having) > 1:
            good = False
            which = ", ".join(f"{version} at {_named(names)}" for version, names in having.items())
            ours = package == "pellm-lightning"
            yield Finding(
                "error" if ours else "warning",
                "versions",
                f"{package} is {which}. Install the same at all parties: python -m pip install"
                f" '{package}==...'."
                if package != "python"
                else f"{package} is {which}. Give all parties the same.",
            )
    if good and len(seen.facts) > 1:
        torch = next(iter(seen.facts.values())).versions.get("torch", "unknown")
        yield Finding("ok", "versions", f"The same at {_all(len(seen.facts))} (torch {torch}).")


def _alike(seen: Seen) -> Iterator[Finding]:
    """Compare what must be the same at all parties; of each kind tell the first, and count the rest."""
    shown: dict[str, PartySpec] = {name: f.party_spec for name, f in seen.facts.items() if f.party_spec}
    if len(shown) < 2:
        return
    told: dict[tuple[str, str], list[str]] = {}
    names = list(shown)
    for name in names[1:]:
        for topic, message in _differences(shown[names[0]], shown[name], names[0], name):
            apart = message if topic == "settings" else ""
            told.setdefault((topic, name + apart), []).append(message)
    for (topic, _), messages in told.items():
        more = f" ({len(messages) - 1} more like this.)" if len(messages) > 1 else ""
        yield Finding("error", topic, messages[0] + more)
    differing = {topic for topic, _ in told}
    bases = [party_spec["base"] for party_spec in shown.values()]
    unchecked = [name for name, party_spec in shown.items() if party_spec["base"] is None]
    if unchecked:
        mixed = "" if len(unchecked) == len(shown) else " The others compare it: give all parties the same."
        yield Finding(
            "warning" if not mixed else "error",
            "base model",
            f"Not compared: {_named(unchecked)} has check_frozen=False.{mixed}",
        )
    elif "base model" not in differing:
        count = len(bases[0])
        yield Finding(
            "ok", "base model", f"The same at {_all(len(shown))}, every value of {count} frozen tensors."
        )
    if "settings" not in differing:
        yield Finding("ok", "settings", f"The same at {_all(len(shown))}.")
    if not differing & {"parameters", "adapter"}:
        size = next(facts for facts in seen.facts.values() if facts.party_spec)
        share = 100 * size.parameters / max(size.of_parameters, 1)
        yield Finding(
            "ok",
            "parameters",
            f"The same at {_all(len(shown))}: {size.parameters:,} of {size.of_parameters:,} leave a party"
            f" ({share:.3g} %).",
        )


def _differences(first: PartySpec, other: PartySpec, base: str, party: str) -> list[tuple[str, str]]:
    try:
        return list(differences([first, other], [base, party]))
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        unlike = f"Party {base} shows what party {party} cannot read. Install the same version at both."
        return [("protocol", unlike)]


def _files(seen: Seen) -> Iterator[Finding]:
    shown = {name: f.party_spec for name, f in seen.facts.items() if f.party_spec}
    if len(shown) < 2:
        return
    conflict = shared_file(list(shown.values()), list(shown))
    if conflict:
        yield Finding("error", "files", conflict)
    else:
        yield Finding("ok", "files", "Each party writes where no other writes.")


def _devices(seen: Seen) -> Iterator[Finding]:
    holders: dict[str, list[str]] = {}
    for name, facts in seen.facts.items():
        if facts.accelerator is not None:
            holders.setdefault(facts.accelerator, []).append(name)
    shared = {device: names for device, names in holders.items() if len(names) > 1}
    for device, names in shared.items():
        yield Finding(
            "warning",
            "devices",
            f"{_named(names)} would all train on {device}. Give each its own: torchrun --virtual-local-rank,"
            " or CUDA_VISIBLE_DEVICES.",
        )
    sizes = {facts.processes for facts in seen.facts.values()}
    if len(sizes) > 1:
        each = ", ".join(f"{name}: {facts.processes}" for name, facts in seen.facts.items())
        yield Finding(
            "warning",
            "devices",
            f"Parties have unlike numbers of processes ({each}). That works, but all wait for the slowest:"
            " rounds by every_n_seconds let each do what it can.",
        )
    elif holders and not shared:
        yield Finding("ok", "devices", f"{len(holders)} accelerators, none of them shared.")


def _clocks(seen: Seen) -> Iterator[Finding]:
    if len(seen.clocks) < 2:
        return
    middle = statistics.median_low(seen.clocks.values())
    far = {name: ahead - middle for name, ahead in seen.clocks.items() if abs(ahead - middle) > CLOCKS_S}
    for name, ahead in far.items():
        way = "ahead" if ahead > 0 else "behind"
        yield Finding(
            "warning",
            "clocks",
            f"The clock of party {name} is {abs(ahead):.1f} s {way}. Let NTP or chrony set it: certificates"
            " are good from and until a time, and logs are read side by side.",
        )
    if not far:
        apart = max(seen.clocks.values()) - min(seen.clocks.values())
        yield Finding("ok", "clocks", f"Less than {max(apart, 0.1):.1f} s apart.")


def _network(seen: Seen) -> Iterator[Finding]:
    for trouble, names in _by_words((name, m.trouble) for name, m in seen.measured.items() if m.trouble):
        yield Finding("error", "network", f"{_named(names)}, measuring with the others: {_ended(trouble)}")
    lost = [name for name in seen.facts if seen.measured and name not in seen.measured]
    if lost:
        yield Finding(
            "error",
            "network",
            f"{_named(lost)} was lost while sums were measured. Look at the end of its log.",
        )
    latencies = [m.latency_s for m in seen.measured.values() if m.latency_s is not None]
    speeds = [m.bytes_per_s for m in seen.measured.values() if m.bytes_per_s is not None]
    if latencies and speeds and not lost and not any(map(_failed, seen.measured.values())):
        size = max(measured.summed_bytes for measured in seen.measured.values())
        yield Finding(
            "ok",
            "network",
            f"A sum over all parties takes {_seconds(max(latencies))}, and {min(speeds) / 1e6:.3g} MB a"
            f" second (of {formatting.size(size)}).",
        )
    elif not seen.measured and len(seen.roster) > 1:
        yield Finding("warning", "network", "Not measured: that needs all parties.")


def _rounds(seen: Seen) -> Iterator[Finding]:
    timed = [m for m in seen.measured.values() if m.rounds_s]
    if timed:
        best = max(min(measured.rounds_s) for measured in timed)
        count = len(timed[0].rounds_s)
        sent = max(measured.round_bytes for measured in timed)
        yield Finding(
            "ok",
            "round",
            f"Takes {_seconds(best)} and sends {formatting.size(sent)} a party: {count} rounds made, of which"
            " nothing is kept.",
        )
        return
    speeds = [m.bytes_per_s for m in seen.measured.values() if m.bytes_per_s]
    size = max((facts.size_bytes for facts in seen.facts.values()), default=0)
    if not speeds or not size or any(map(_failed, seen.measured.values())):
        return
    expected = (
        f"{formatting.size(size)} of float32 would take about {_seconds(size / min(speeds))} uncompressed"
    )
    if any(finding.level == "error" for finding in findings(replace(seen, measured={}))):
        yield Finding("ok", "round", f"{expected}; none was made, since the parties must be mended first.")
    else:
        yield Finding(
            "warning",
            "round",
            f"{expected}, too long to make one here. Send fewer bytes, or less often:"
            " docs/howto/slow_links.md.",
        )


def _by_words(told: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Return what parties told, and who told it: often all the same."""
    found: dict[str, list[str]] = {}
    for name, said in told:
        found.setdefault(said, []).append(name)
    return list(found.items())


def _failed(measured: Measured) -> bool:
    return bool(measured.trouble or measured.refused)


def _named(names: Sequence[str]) -> str:
    return f"Party {names[0]}" if len(names) == 1 else f"Parties {', '.join(names)}"


def _all(count: int) -> str:
    return "both parties" if count == 2 else f"all {count} parties"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes"


def _ended(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."
