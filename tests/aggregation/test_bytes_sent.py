"""What a round of each rule sends, counted by hand."""

from typing import Any

import pytest
from lora_oracles import Round, adapter, drift, frozen, measuring, modules, random, run_rounds

from pellm_lightning.aggregation import (
    Aggregation,
    Alternating,
    FrozenA,
    LowRankMean,
    Mean,
    ResidualMean,
    ShareA,
    Stacking,
)
from pellm_lightning.comm.torchrun.federation import SLOT_BYTES

SIZES = {"k": (6, 5), "q": (4, 7), "v": (5, 5)}
RANK = 2
WEIGHTS = [1.0, 3.0, 0.7]
N = len(WEIGHTS)


def rounds_of(rule: Aggregation, **arguments: Any) -> list[list[Round]]:
    bases = [frozen(5, SIZES) for _ in WEIGHTS]
    return run_rounds(
        rule,
        lambda party: adapter(party, SIZES, RANK) | {"head.weight": random(party, 3, 4)},
        drift(0.3),
        weights=WEIGHTS,
        lora=lambda party: modules(bases[party]),
        **arguments,
    )


FACTORS_A = sum(RANK * n for _, n in SIZES.values())
FACTORS_B = sum(m * RANK for m, _ in SIZES.values())
HEAD_SIZE = 3 * 4
# A header's slot, and flags: four float32 numbers, and one of each party.
WORDS = SLOT_BYTES + 4 * (N + 4)
MEAN = WORDS + 4 * (FACTORS_A + FACTORS_B + HEAD_SIZE)
# Of the power iteration each module's two r x r matrices and a norm, and each party's checksums: of each
# module's columns, of its decomposition, and of the result.
SMALL = 8 * len(SIZES) * (2 * RANK**2 + 1) + 8 * N * (2 * len(SIZES) + 1)

SENT: dict[str, tuple[Aggregation, list[int]]] = {
    "Mean": (Mean(), [MEAN, MEAN]),
    "FrozenA": (FrozenA(), [MEAN - 4 * FACTORS_A] * 2),
    "Alternating": (Alternating(), [MEAN - 4 * FACTORS_A, MEAN - 4 * FACTORS_B]),
    "ShareA": (ShareA(), [MEAN - 4 * (FACTORS_B + HEAD_SIZE)] * 2),
    "LowRankMean, power": (LowRankMean("power"), [MEAN + SMALL] * 2),
    # The second step sends the factors again, and the digests of its columns.
    "LowRankMean, 2 steps": (
        LowRankMean("power", steps=2),
        [MEAN + SMALL + 4 * (FACTORS_A + FACTORS_B) + 8 * N * len(SIZES)] * 2,
    ),
    # A party sends the factors that others own, and what it made of its own.
    "LowRankMean, exact": (LowRankMean("exact"), [MEAN] * 2),
    # The mean, all factors to all, a digest of each base by each party, and two float64 norms of each.
    "ResidualMean": (ResidualMean(), [MEAN + 4 * (FACTORS_A + FACTORS_B) + 8 * len(SIZES) * (N + 2)] * 2),
    # All factors to all, digests of each base and each new A, and the norms.
    "Stacking": (Stacking(), [MEAN + 8 * len(SIZES) * (2 * N + 2)] * 2),
}


@pytest.mark.parametrize("case", SENT)
def test_a_round_sends_what_its_rule_needs(case: str, over_gloo: None) -> None:
    rule, expected = SENT[case]
    for of_party in rounds_of(measuring(rule, False), rounds=2):
        assert [done.report.bytes_sent for done in of_party] == expected


@pytest.mark.parametrize(
    ("rule", "crossing"),
    [(Mean(), "AB"), (FrozenA(), "B"), (LowRankMean("power"), "AB"), (LowRankMean("exact"), "")],
    ids=["Mean", "FrozenA", "LowRankMean, power", "LowRankMean, exact"],
)
def test_measuring_sends_what_changed_to_the_owners(rule: Aggregation, crossing: str) -> None:
    # Of the factors that its round changed a party sends those of the modules that others own (module k is
    # party k's), and of each module two float64 norms. The exact solver's owners have the factors anyway.
    measured = rounds_of(rule)
    unmeasured = rounds_of(measuring(rule, False))
    for party, (of_party, without) in enumerate(zip(measured, unmeasured, strict=True)):
        others = [size for k, size in enumerate(SIZES.values()) if k != party]
        factors = sum(RANK * (m * ("B" in crossing) + n * ("A" in crossing)) for m, n in others)
        extra = of_party[0].report.bytes_sent - without[0].report.bytes_sent
        assert extra == 4 * factors + 8 * 2 * len(SIZES)
