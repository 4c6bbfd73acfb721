"""Collectives of LoRA factors: gather to each pair's owner or to all, scatter results, all-reduce.

With a lossy exchange factors are sent as differences from the round's anchors: these are small, and so are
their rounding errors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Factors, Part, Parts, RoundContext, Term
from pellm_lightning.comm import Collectives
from pellm_lightning.tensors.portable import checksum


def owned(num_pairs: int, federation: Collectives) -> list[int]:
    """Return the indices of the pairs that this party owns, i.e. computes for all: every N-th."""
    return list(range(federation.party, num_pairs, federation.num_parties))


def to_owners(pairs: Sequence[Factors], context: RoundContext, parts: Parts) -> dict[int, list[Term]]:
    """Gather each pair's factors at its owner; return the terms of the pairs owned by this party.

    A party sends and receives as much as in a reduce-scatter, (N - 1) / N of its factors, and computes one
    N-th of the pairs.

    Args:
        pairs: All pairs.
        context: The round; only participants send.
        parts: The factors that were trained in this round; the other equals the anchor's at every party.
    """
    federation = context.federation
    of_owners = [pairs[party :: federation.num_parties] for party in range(federation.num_parties)]
    sizes = [_sizes(of_owner, parts, context)[federation.party] for of_owner in of_owners]
    mine = _packed([pair for of_owner in of_owners for pair in of_owner], parts, context).split(sizes)
    indices = owned(len(pairs), federation)
    received = federation.all_to_all(mine, _sizes([pairs[k] for k in indices], parts, context))
    return _terms(pairs, indices, received, context, parts)


def to_all(pairs: Sequence[Factors], context: RoundContext, parts: Parts) -> dict[int, list[Term]]:
    """Gather all factors at all parties; return the terms of every pair."""
    mine = _packed(pairs, parts, context)
    received = context.federation.all_gather(mine, _sizes(pairs, parts, context))
    return _terms(pairs, range(len(pairs)), received, context, parts)


def from_owners(
    pairs: Sequence[Factors], results: dict[int, tuple[Tensor, Tensor]], federation: Collectives
) -> list[tuple[Tensor, Tensor]]:
    """Gather the results (B, A) of all owners at all parties, in float32."""
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
    """All-reduce each tensor in ``dtype``; return the sums in float64."""
    vector = federation.all_reduce_(flat([term.to(dtype) for term in terms]))
    return [part.double() for part in split(vector, [term.shape for term in terms])]


def synchronize_(
    tensors: Sequence[Tensor], federation: Collectives, tolerance: torch.dtype | None = None
) -> None:
    """Make tensors that every party computed redundantly bitwise equal at all parties, in place.

    Linear algebra in float64, rounded to float32, gives the same bits on nearly all processors and numbers of
    threads. So the parties compare checksums, and only where these differ party 0's tensor is broadcast.

    Args:
        tensors: Results of the same computation, of equal shapes at all parties.
        federation: Collectives of the round's members.
        tolerance: Dtype to round to before comparison; smaller differences are kept. None: compare all bits.
    """
    checksums = torch.zeros(federation.num_parties, len(tensors), dtype=torch.int64)
    mine = [checksum([tensor if tolerance is None else tensor.to(tolerance)]) for tensor in tensors]
    checksums[federation.party] = torch.tensor(mine, dtype=torch.int64)
    federation.all_reduce_(checksums)
    for tensor, of_parties in zip(tensors, checksums.T.tolist(), strict=True):
        if len(set(of_parties)) > 1:
            federation.broadcast_(tensor)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate all values to one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


def split(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a vector into tensors of the given shapes."""
    parts = vector.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _packed(pairs: Sequence[Factors], parts: Parts, context: RoundContext) -> Tensor:
    if not context.share > 0:
        return torch.zeros(0)
    party, lossy = context.federation.party, context.federation.lossy
    packed, with_b, with_a = [], Part.B in parts, Part.A in parts
    for pair in pairs:
        anchors = _anchors_of(pair, party) if lossy else (None, None)
        for sent, factor, anchor in zip((with_b, with_a), (pair.b, pair.a), anchors, strict=True):
            if sent:
                factor = factor.detach().to("cpu", torch.float32)
                packed.append(factor if anchor is None else factor - anchor)
    return flat(packed)


def _anchors_of(pair: Factors, party: int) -> tuple[Tensor, Tensor]:
    """Return a party's factors (B, A) at the start of the round: the anchors at its rank and scaling."""
    rank, ratio = pair.ranks[party], pair.scaling / pair.scalings[party]
    return pair.anchor_b.cpu()[:, :rank] * ratio, pair.anchor_a.cpu()[:rank]


def _shapes(pair: Factors, party: int) -> tuple[torch.Size, torch.Size]:
    rank = pair.ranks[party]
    return torch.Size((pair.anchor_b.shape[0], rank)), torch.Size((rank, pair.anchor_a.shape[1]))


def _sizes(pairs: Sequence[Factors], parts: Parts, context: RoundContext) -> list[int]:
    """Return how many numbers each party sends of some pairs."""
    sizes, with_b, with_a = [], Part.B in parts, Part.A in parts
    for party, share in enumerate(context.shares):
        shapes = [_shapes(pair, party) for pair in pairs] if share > 0 else []
        sizes.append(sum(b.numel() * with_b + a.numel() * with_a for b, a in shapes))
    return sizes


def _terms(
    pairs: Sequence[Factors],
    indices: Sequence[int],
    received: Sequence[Tensor],
    context: RoundContext,
    parts: Parts,
) -> dict[int, list[Term]]:
    terms: dict[int, list[Term]] = {k: [] for k in indices}
    with_b, with_a, lossy = Part.B in parts, Part.A in parts, context.federation.lossy
    for party, values in enumerate(received):
        if context.shares[party] == 0:
            continue
        both = [_shapes(pairs[k], party) for k in indices]
        shapes = [shape for b, a in both for crosses, shape in ((with_b, b), (with_a, a)) if crosses]
        sent = iter(split(values, shapes))
        for k in indices:
            pair = pairs[k]
            anchors = _anchors_of(pair, party) if lossy else None
            # The anchor rounded to the parameters' dtype, as the parties had it.
            b = next(sent) if with_b else pair.anchor_b.to("cpu", pair.b.dtype)
            a = next(sent) if with_a else pair.anchor_a.to("cpu", pair.a.dtype)
            if anchors is not None:
                b = b + anchors[0] if with_b else b
                a = a + anchors[1] if with_a else a
            terms[k].append(Term(context.shares[party], pair.scalings[party], b, a))
    return terms
