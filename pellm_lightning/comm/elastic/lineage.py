"""Which parties belong together, and which of their versions stands: majorities decide, not pairs. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median_low
from typing import TYPE_CHECKING

from pellm_lightning.comm.communicator import Version

if TYPE_CHECKING:
    from pellm_lightning.comm.elastic.quorum_view import QuorumMember

# Numbers of attempts differ by less between parties, whatever has happened to them.
_MAX_ATTEMPTS_APART = 10**9


def belonging(entries: "Mapping[str, QuorumMember]", quorum: int) -> "dict[str, QuorumMember]":
    """Return those who can continue together: with the settings, and the state of the run, that most have.

    A party without a state belongs to any run. It is the same at all that see the same, so nobody who belongs
    is judged by one who does not.
    """
    same = _largest(entries, lambda entry: entry.digest, quorum)
    fresh = sum(entry.version is None for entry in same.values())
    with_state = {name: entry for name, entry in same.items() if entry.version}
    of_run = _largest(with_state, lambda entry: entry.version and entry.version.run_id, quorum - fresh)
    return {name: entry for name, entry in same.items() if not entry.version or name in of_run}


def _largest(
    entries: "Mapping[str, QuorumMember]", key: "Callable[[QuorumMember], object]", quorum: int
) -> "Mapping[str, QuorumMember]":
    """Return the entries of one key: that which a quorum has, or else most, or else most who were members."""
    groups: dict[object, dict[str, QuorumMember]] = {}
    for name, entry in entries.items():
        groups.setdefault(key(entry), {})[name] = entry

    def rank(group: "Mapping[str, QuorumMember]") -> tuple[bool, int, int]:
        return len(group) >= quorum, len(group), sum(entry.member for entry in group.values())

    return max(groups.values(), key=rank, default={})


def holders_needed(entries: "Mapping[str, QuorumMember]", num_parties: int, quorum: int) -> int:
    """Return how many of these parties must have a version that was committed.

    A quorum has made it durable before it was committed; of these only those can lack it here who are not
    here, or have no state.
    """
    absent = num_parties - sum(entry.version is not None for entry in entries.values())
    return max(1, quorum - absent)


def newest_version(entries: "Mapping[str, QuorumMember]", needed: int) -> tuple[Version, str] | None:
    """Return the newest version that can have been committed, and the digest that most report of it.

    What fewer than ``needed`` have, at this version or above, was committed by nobody: one party alone cannot
    make all others take its state by claiming a newer version.

    Args:
        entries: Of one run.
        needed: As ``holders_needed`` returns it.
    """
    versions = [entry.version for entry in entries.values() if entry.version]
    committed = [v for v in versions if sum(other >= v for other in versions) >= needed]
    if not committed:
        return None
    newest = max(committed)
    states = Counter(entry.state for entry in entries.values() if entry.version == newest)
    return newest, states.most_common(1)[0][0]


def last_attempt(attempts: Sequence[int]) -> int:
    """Return the greatest attempt that the parties know of, but none that is out of all proportion."""
    return min(max(attempts), median_low(attempts) + _MAX_ATTEMPTS_APART)
