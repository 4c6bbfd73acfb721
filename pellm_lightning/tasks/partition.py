"""Partition of one data set over simulated parties.

Pure, deterministic functions that return a sorted list of indices per party; every sample belongs to exactly
one party.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pellm_lightning.comm.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Partition = Literal["iid", "dirichlet", "key"]


def iid(num_samples: int, num_parties: int, seed: int = 0, min_per_party: int = 1) -> list[list[int]]:
    """Partition randomly; sizes differ by at most one.

    Raises:
        ValueError: When there are fewer samples than ``num_parties * min_per_party``.
    """
    _check_enough(num_samples, num_parties, min_per_party)
    order = np.random.default_rng(seed).permutation(num_samples)
    return [sorted(order[party::num_parties].tolist()) for party in range(num_parties)]


def dirichlet(
    labels: Sequence[Hashable], num_parties: int, alpha: float, seed: int = 0, min_per_party: int = 1
) -> list[list[int]]:
    """Partition with label skew.

    For each label, the shares of the N parties are drawn as p ~ Dirichlet(α, ..., α) (Hsu et al. 2019,
    arXiv:1909.06335): a small α leaves a label to few parties, a large one approaches `iid`. A party that is
    short of ``min_per_party`` then takes samples, drawn at random, from whoever holds most.

    Args:
        labels: The label of each sample.
        num_parties: N.
        alpha: α > 0.
        seed: Of the draw.
        min_per_party: Samples that every party gets at least.

    Raises:
        ValueError: When α is not positive, or there are fewer samples than ``num_parties * min_per_party``.
    """
    _check_enough(len(labels), num_parties, min_per_party)
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} should be above 0.")
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(num_parties)]
    for indices in _by_label(labels).values():
        shares = generator.dirichlet([alpha] * num_parties)
        cuts = np.rint(shares.cumsum()[:-1] * len(indices)).astype(int)
        for part, chunk in zip(parts, np.split(generator.permutation(indices), cuts), strict=True):
            part.extend(chunk.tolist())
    _fill_up_(parts, min_per_party, generator)
    return [sorted(part) for part in parts]


def by_key(keys: Sequence[Hashable], parties: int | Mapping[Hashable, int]) -> list[list[int]]:
    """Partition by a natural key (author, hospital, device, year): samples of one key stay together.

    Args:
        keys: The key of each sample.
        parties: A mapping from key to party; or how many parties, and the keys are dealt so that the parties'
            sizes are even: the largest key first, each to the party that holds least.

    Raises:
        ValueError: When the mapping lacks a key, or a party would hold nothing.
    """
    owner = _deal(Counter(keys), parties) if isinstance(parties, int) else parties
    missing = sorted({repr(key) for key in keys if key not in owner})
    if missing:
        raise ValueError(f"No party is named for the keys {', '.join(missing[:5])}. Add them to the mapping.")
    num_parties = parties if isinstance(parties, int) else max(owner.values(), default=-1) + 1
    parts = [[i for i, key in enumerate(keys) if owner[key] == party] for party in range(num_parties)]
    empty = [party for party, part in enumerate(parts) if not part]
    if empty or not parts:
        raise ValueError(
            f"The {len(set(keys))} keys leave parties {empty} of {num_parties} without a sample. "
            "Take fewer parties or a finer key."
        )
    return parts


def divide(
    groups: Sequence[Hashable], num_parties: int, how: Partition, alpha: float, seed: int
) -> list[list[int]]:
    """Partition by the labels or keys of samples; "iid" does not look at them."""
    if how == "key":
        return by_key(groups, num_parties)
    if how == "dirichlet":
        return dirichlet(groups, num_parties, alpha, seed)
    return iid(len(groups), num_parties, seed)


def check_num_parties(num_parties: int, party: int | None, topology: Topology) -> None:
    """Validate that partition and federation have the same number of parties.

    A single process may be given one party's part by ``party``, to look at it alone.

    Args:
        num_parties: Parts of the division.
        party: Whose part is asked for; None means the process's own.
        topology: Where the process stands in the federation.

    Raises:
        ValueError: Names both numbers.
    """
    index = topology.party if party is None else party
    if topology.num_parties != num_parties and (party is None or topology.num_parties > 1):
        fate = "have no part" if topology.num_parties > num_parties else "leave rows that nobody trains"
        raise ValueError(
            f"data.num_parties={num_parties} divides the rows into {num_parties} parts, and the federation"
            f" has {topology.num_parties} (this is party {topology.party}): it would {fate}. Give both the"
            f" same number: launch {num_parties} parties (torchrun --nproc-per-node), or set"
            f" --data.num_parties {topology.num_parties}. To look at one part alone, in one"
            " process, give --data.party."
        )
    if not 0 <= index < num_parties:
        raise ValueError(
            f"Party {index} has no part of num_parties={num_parties}: the count has to be the federation's,"
            " and parties count from 0."
        )
    if topology.num_parties > 1 and index != topology.party:
        raise ValueError(
            f"data.party={index} is given to party {topology.party} of a federation of {num_parties}: its own"
            " part of the rows would be trained by nobody. Leave data.party out."
        )


def label_table(labels: Sequence[Hashable], parts: Sequence[Sequence[int]]) -> str:
    """Return a text table of the numbers of samples by party and label."""
    names = list(_by_label(labels))
    rows = [["party", *map(str, names), "total"]]
    for party, part in enumerate(parts):
        held = Counter(labels[i] for i in part)
        rows.append([str(party), *(str(held[name]) for name in names), str(len(part))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def plot_labels(labels: Sequence[Hashable], parts: Sequence[Sequence[int]]) -> Figure:
    """Draw one bar per party, stacked by label. Save it with ``figure.savefig``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_labels needs the package matplotlib: pip install 'pellm-lightning[plots]'."
        ) from error

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    parties = [f"party {party}" for party in range(len(parts))]
    left = np.zeros(len(parts))
    for name in _by_label(labels):
        held = np.array([sum(labels[i] == name for i in part) for part in parts])
        axes.barh(parties, held, left=left, label=str(name))
        left += held
    axes.invert_yaxis()
    axes.set_xlabel("samples")
    figure.legend(loc="outside upper center", ncols=8, frameon=False)
    return figure


def _check_enough(num_samples: int, num_parties: int, min_per_party: int) -> None:
    if num_parties < 1:
        raise ValueError(f"num_parties={num_parties} should be at least 1.")
    if num_samples < num_parties * min_per_party:
        raise ValueError(
            f"{num_samples} samples cannot give each of {num_parties} parties at least "
            f"min_per_party={min_per_party}. Take fewer parties, a smaller minimum, or more samples."
        )


def _by_label(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Map each label to the indices of its samples, labels in sorted order."""
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return dict(sorted(groups.items(), key=lambda item: (type(item[0]).__name__, str(item[0]))))


def _fill_up_(parts: list[list[int]], minimum: int, generator: np.random.Generator) -> None:
    """Move random samples from the richest party to the poorest until each holds ``minimum``."""
    while len(poorest := min(parts, key=len)) < minimum:
        richest = max(parts, key=len)
        poorest.append(richest.pop(int(generator.integers(len(richest)))))


def _deal(sizes: Counter[Hashable], num_parties: int) -> dict[Hashable, int]:
    held = [0] * num_parties
    owner: dict[Hashable, int] = {}
    for key, size in sizes.most_common():
        owner[key] = held.index(min(held))
        held[owner[key]] += size
    return owner
