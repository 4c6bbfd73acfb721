"""How factors cross between parties: to the party that owns a pair, to all, or in sums.

Where an exchange rounds what is gathered, factors cross as differences from those that every party started
the round from: these are small, and so is what rounding them loses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Factors, Part, Parts, RoundContext, Term
from pellm_lightning.comm import Collectives
from pellm_lightning.tensors.digest import bits_digest


def owned(num_pairs: int, federation: Collectives) -> list[int]:
    """Return the indices of the pairs that this party computes for all: every N-th."""
    return list(range(federation.party, num_pairs, federation.num_parties))


def to_owners(pairs: Sequence[Factors], counting: RoundContext, parts: Parts) -> dict[int, list[Term]]:
    """Send each pair's factors to the party that owns the pair; return the terms of those owned here.

    A party sends and receives what a reduce-scatter would move, (N - 1) / N of its factors, and computes for
    one N-th of the pairs.

    Args:
        pairs: All pairs.
        counting: Who counts; who does not sends nothing.
        parts: The factors that changed in this round; the other is the anchor's at every party.
    """
    federation = counting.federation
    mine = [
        _packed(pairs[party :: federation.num_parties], parts, counting)
        for party in range(federation.num_parties)
    ]
    indices = owned(len(pairs), federation)
    sizes = [sum(_size(pairs[k], party, parts) for k in indices) for party in _all(counting)]
    sizes = [size if counting.shares[party] > 0 else 0 for party, size in enumerate(sizes)]
    received = federation.all_to_all(mine, sizes)
    return _terms(pairs, indices, received, counting, parts)


def to_all(pairs: Sequence[Factors], counting: RoundContext, parts: Parts) -> dict[int, list[Term]]:
    """Send all factors to all parties; return the terms of every pair."""
    mine = _packed(pairs, parts, counting)
    sizes = [sum(_size(pair, party, parts) for pair in pairs) for party in _all(counting)]
    sizes = [size if counting.shares[party] > 0 else 0 for party, size in enumerate(sizes)]
    received = counting.federation.all_gather(mine, sizes)
    return _terms(pairs, range(len(pairs)), received, counting, parts)


def from_owners(
    pairs: Sequence[Factors], results: dict[int, tuple[Tensor, Tensor]], federation: Collectives
) -> list[tuple[Tensor, Tensor]]:
    """Give all parties the results (B, A) that the owners of the pairs computed, in float32."""
    shapes = [(pair.anchor_b.shape, pair.anchor_a.shape) for pair in pairs]
    of_party = [range(party, len(pairs), federation.num_parties) for party in range(federation.num_parties)]
    sizes = [sum(shapes[k][0].numel() + shapes[k][1].numel() for k in indices) for indices in of_party]
    anchors = [(pair.anchor_b.cpu(), pair.anchor_a.cpu()) for pair in pairs]
    mine = flat(
        [
            factor.float() - anchor if federation.lossy else factor.float()
            for k in of_party[federation.party]
            for factor, anchor in zip(results[k], anchors[k], strict=True)
        ]
    )
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, values in zip(of_party, federation.all_gather(mine, sizes), strict=True):
        parts = iter(split(values, [shape for k in indices for shape in shapes[k]]))
        found.update({k: (next(parts), next(parts)) for k in indices})
    if federation.lossy:
        found = {k: (b + anchors[k][0], a + anchors[k][1]) for k, (b, a) in found.items()}
    return [found[k] for k in range(len(pairs))]


def summed(terms: Sequence[Tensor], federation: Collectives, dtype: torch.dtype) -> list[Tensor]:
    """Return the sums over the parties of each tensor, in float64; ``dtype`` is what crosses."""
    vector = federation.all_reduce_(flat([term.to(dtype) for term in terms]))
    return [part.double() for part in split(vector, [term.shape for term in terms])]


def agree_(tensors: Sequence[Tensor], federation: Collectives, within: torch.dtype | None = None) -> None:
    """Make sure, in place, that what every party computed for itself has the same bits at all of them.

    Linear algebra in float64, rounded to float32, nearly always gives the same bits whatever the processor
    and its number of threads. Nearly: the parties compare digests, and take party 0's where one differs.

    Args:
        tensors: What each party computed, the same shapes at all.
        federation: The parties.
        within: Compare what is left after rounding to this dtype; smaller differences stay. None: any bit.
    """
    digests = torch.zeros(federation.num_parties, len(tensors), dtype=torch.int64)
    # A digest is unsigned, int64 is not.
    mine = [int(bits_digest(tensor if within is None else tensor.to(within)), 16) >> 1 for tensor in tensors]
    digests[federation.party] = torch.tensor(mine, dtype=torch.int64)
    federation.all_reduce_(digests)
    for tensor, of_parties in zip(tensors, digests.T.tolist(), strict=True):
        if len(set(of_parties)) > 1:
            federation.broadcast_(tensor)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


def split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the vector's values as tensors of the given shapes."""
    parts = vector.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _all(counting: RoundContext) -> range:
    return range(counting.federation.num_parties)


def _packed(pairs: Sequence[Factors], parts: Parts, counting: RoundContext) -> Tensor:
    if not counting.share > 0:
        return torch.zeros(0)
    party, lossy = counting.federation.party, counting.federation.lossy
    packed = []
    for pair in pairs:
        both = [(Part.B, pair.b), (Part.A, pair.a)]
        starts = _starts(pair, party) if lossy else (None, None)
        for (part, factor), start in zip(both, starts, strict=True):
            if part in parts:
                factor = factor.detach().to("cpu", torch.float32)
                packed.append(factor if start is None else factor - start)
    return flat(packed)


def _starts(pair: Factors, party: int) -> tuple[Tensor, Tensor]:
    """Return what a party's factors (B, A) began as: the anchors, cut to its rank and in its scaling."""
    rank, ratio = pair.ranks[party], pair.scaling / pair.scalings[party]
    return pair.anchor_b.cpu()[:, :rank] * ratio, pair.anchor_a.cpu()[:rank]


def _shapes(pair: Factors, party: int) -> tuple[torch.Size, torch.Size]:
    rank = pair.ranks[party]
    return torch.Size((pair.anchor_b.shape[0], rank)), torch.Size((rank, pair.anchor_a.shape[1]))


def _size(pair: Factors, party: int, parts: Parts) -> int:
    b, a = _shapes(pair, party)
    return b.numel() * (Part.B in parts) + a.numel() * (Part.A in parts)


def _terms(
    pairs: Sequence[Factors],
    indices: Sequence[int],
    received: Sequence[Tensor],
    counting: RoundContext,
    parts: Parts,
) -> dict[int, list[Term]]:
    terms: dict[int, list[Term]] = {k: [] for k in indices}
    for party, values in enumerate(received):
        if counting.shares[party] == 0:
            continue
        shapes = [_shapes(pairs[k], party) for k in indices]
        sent = iter(
            split(
                values,
                [shape for b, a in shapes for part, shape in ((Part.B, b), (Part.A, a)) if part in parts],
            )
        )
        for k in indices:
            pair = pairs[k]
            starts = _starts(pair, party) if counting.federation.lossy else None
            # As the parameters hold the anchor, which rounds it.
            b = next(sent) if Part.B in parts else pair.anchor_b.to("cpu", pair.b.dtype)
            a = next(sent) if Part.A in parts else pair.anchor_a.to("cpu", pair.a.dtype)
            if starts is not None:
                b = b + starts[0] if Part.B in parts else b
                a = a + starts[1] if Part.A in parts else a
            terms[k].append(Term(counting.shares[party], pair.scalings[party], b, a))
    return terms
