"""What must agree before any tensor moves, compared as words."""

import json
from typing import Any

import pytest
import torch

from pellm_lightning.engine.compatibility import (
    PROTOCOL,
    PartySpec,
    base_digests,
    common,
    first_difference,
)
from pellm_lightning.tensors.digest import bits_digest

PLAIN_KINDS = ["float32 of shape [2, 3]", "bfloat16 of shape [4]"]


def party_spec(**changes: Any) -> PartySpec:
    """A passport as it arrives: through JSON."""
    plain = {
        "protocol": PROTOCOL,
        "schema": [["a", "b"], PLAIN_KINDS],
        "lora": {"q.default": [8, 2.0, 1]},
        "ranks_may_differ": False,
        "adapters": {},
        "config": {"every_n_epochs": 1, "weighting": "samples"},
        "base": {"embed": "01", "layer": "02"},
        "round": 0,
        "checksum": None,
        "files": [],
    }
    return json.loads(json.dumps(plain | changes))


def digest(tensor: torch.Tensor) -> str:
    return base_digests({"tensor": tensor})["tensor"]


# ---- two parties that agree


def test_the_same_passports_do_not_differ() -> None:
    assert first_difference([party_spec()]) is None
    assert first_difference([party_spec() for _ in range(3)]) is None


def test_a_party_that_does_not_check_its_base_differs_from_none() -> None:
    assert first_difference([party_spec(base=None), party_spec()]) is None
    assert first_difference([party_spec(), party_spec(base=None)]) is None


def test_files_of_its_own_are_no_difference() -> None:
    assert first_difference([party_spec(files=[f"host:/runs/party-{party}"]) for party in range(3)]) is None
    assert first_difference([party_spec(files=["host:/log", "host:/log"]), party_spec()]) is None


# ---- two parties that do not: in each case party 2 of three is the odd one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": PROTOCOL + 1}, ["Party 2", f"version {PROTOCOL + 1}", "party 0", "Install"]),
        (
            {"schema": [["a"], ["float32 of shape [2, 3]"]]},
            ["Party 0 trains parameter 'b', party 2 does not", "2 parameters at party 0, 1 at party 2"],
        ),
        (
            {"schema": [["a", "b", "c"], [*PLAIN_KINDS, "float32 of shape [1]"]]},
            ["Party 2 trains parameter 'c', party 0 does not"],
        ),
        (
            {"schema": [["a", "b"], ["float32 of shape [3, 2]", "bfloat16 of shape [4]"]]},
            ["'a' is float32 of shape [2, 3] at party 0", "float32 of shape [3, 2] at party 2"],
        ),
        (
            {"schema": [["a", "b"], ["float32 of shape [2, 3]", "float16 of shape [4]"]]},
            ["'b' is bfloat16 of shape [4] at party 0", "float16 of shape [4] at party 2", "precision"],
        ),
        (
            {"config": {"every_n_epochs": 2, "weighting": "samples"}},
            ["Party 0 has every_n_epochs=1, party 2 has every_n_epochs=2"],
        ),
        ({"config": {"every_n_epochs": 1}}, ["weighting='samples', party 2 has weighting=None"]),
        (
            {"base": {"embed": "01", "layer": "03"}},
            ["base model of party 2", "'layer'", "check_frozen=False"],
        ),
        ({"base": {"embed": "01"}}, ["base model of party 2", "'layer'"]),
        ({"base": {"adapter": "00", "embed": "03", "layer": "03"}}, ["base model of party 2", "'adapter'"]),
        ({"round": 7}, ["Party 0 starts at round 0, party 2 at round 7", "Resume"]),
        ({"checksum": 12}, ["Parties 0 and 2", "different global vectors"]),
    ],
)
def test_a_difference_names_party_thing_and_cure(changes: dict[str, Any], words: list[str]) -> None:
    message = first_difference([party_spec(), party_spec(), party_spec(**changes)])
    assert message is not None
    for word in words:
        assert word in message


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_no_two_parties_write_the_same_file(pair: tuple[int, int]) -> None:
    files = [[f"host:/runs/party-{party}"] for party in range(3)]
    for party in pair:
        files[party].append("host:/shared/logs")
    message = first_difference([party_spec(files=paths) for paths in files])
    assert message is not None
    assert f"Parties {pair[0]} and {pair[1]} would both write to 'host:/shared/logs'" in message


def test_the_cause_is_named_before_its_consequence() -> None:
    # Another LoRA rank makes the schema differ; that the base differs, too, is not what must be mended first.
    odd = party_spec(schema=[["a"], ["float32 of shape [4, 3]"]], base={}, round=1, files=["x"])
    assert "Party 0 trains parameter 'b'" in str(first_difference([party_spec(files=["x"]), odd]))


# ---- what the LoRA modules say


def test_another_scaling_names_module_party_and_cure() -> None:
    # The same factors would be updates of another size.
    message = first_difference(
        [party_spec(), party_spec(), party_spec(lora={"q.default": [8, 0.7071067811865476, 1]})]
    )
    assert message is not None
    for word in ("'q.default'", "scaling 2 ", "party 0", "0.707107 at party 2", "lora_alpha", "use_rslora"):
        assert word in message
    assert "HeterogeneousRank" in message


def test_scalings_may_differ_where_ranks_may() -> None:
    others = [
        party_spec(lora={"q.default": [rank, 16 / rank, 1]}, ranks_may_differ=True) for rank in (8, 4, 16)
    ]
    assert first_difference(others) is None


def test_a_scaling_that_differs_is_told_after_the_schema() -> None:
    # A rank that differs makes the scaling differ, too; the rank is what must be mended.
    schema = [["a", "b"], ["float32 of shape [4, 3]", "bfloat16 of shape [4]"]]
    odd = party_spec(schema=schema, lora={"q.default": [4, 4.0, 1]})
    assert "'a' is float32 of shape [2, 3]" in str(first_difference([party_spec(), odd]))


def test_another_aggregation_is_told_before_the_schema_that_it_makes_differ() -> None:
    config = {"every_n_epochs": 1, "weighting": "samples"}
    ours = party_spec(
        config=config | {"aggregation": "HeterogeneousRank()"},
        schema=[["a"], ["float32 of shape ['rank', 3]"]],
    )
    odd = party_spec(config=config | {"aggregation": "Mean()"}, schema=[["a"], ["float32 of shape [2, 3]"]])
    assert "aggregation='HeterogeneousRank()', party 1 has" in str(first_difference([ours, odd]))


@pytest.mark.parametrize("odd", [0, 1])
def test_a_module_that_only_some_parties_take_for_a_pair_is_a_difference(odd: int) -> None:
    # By default a module with an obstacle is left to the mean. If parties judge it differently, their vectors
    # have other orders, though names and shapes are the same.
    both = [party_spec(), party_spec()]
    both[odd] = party_spec(lora={})
    message = first_difference(both)
    assert message is not None, "their vectors would be mixed up, or Gloo abort a process"
    assert "'q.default'" in message


# ---- what the PEFT configurations say


LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
FIXED = {"peft_type": "VERA", "r": 8, "projection_prng_key": 0}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (LORA, {"trainable_token_indices": [3]}, ["no trainable_token_indices", "[3] at party 2"]),
        (LORA, {"bias": "all"}, ["bias='none' at party 0", "bias='all' at party 2"]),
        (FIXED, {"projection_prng_key": 1}, ["projection_prng_key=0 at party 0", "=1 at party 2"]),
        (FIXED, {"r": 4}, ["r=8 at party 0", "r=4 at party 2"]),
    ],
)
def test_another_adapter_configuration_names_field_values_and_cure(
    config: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    one, odd = {"adapters": {"default": config}}, {"adapters": {"default": config | changes}}
    for free in (False, True):
        same = {"ranks_may_differ": free}
        message = first_difference(
            [party_spec(**one, **same), party_spec(**one, **same), party_spec(**odd, **same)]
        )
        assert message is not None
        for word in ("adapter 'default'", *words, "Give both the same PEFT configuration"):
            assert word in message


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 4},
        {"lora_alpha": 32},
        {"rank_pattern": {"q": 2}},
        {"alpha_pattern": {"q": 2}},
        {"use_rslora": True},
    ],
)
def test_ranks_and_alphas_may_differ_where_the_rule_allows_it(changes: dict[str, Any]) -> None:
    one, odd = {"adapters": {"default": LORA}}, {"adapters": {"default": LORA | changes}}
    message = first_difference([party_spec(**one), party_spec(**odd)])
    assert message is not None
    assert next(iter(changes)) in message
    assert first_difference([party_spec(**part, ranks_may_differ=True) for part in (one, odd)]) is None
    shared = [common(party_spec(**part, ranks_may_differ=True)) for part in (one, odd)]
    assert shared[0] == shared[1]


def test_an_adapter_that_one_party_alone_has_is_told_by_its_parameters() -> None:
    assert first_difference([party_spec(adapters={"own": LORA}), party_spec()]) is None


def test_a_rank_by_own_data_is_told_of() -> None:
    eva = {"adapters": {"default": LORA | {"init_lora_weights": "eva"}}}
    odd = party_spec(schema=[["a", "b"], ["float32 of shape [4, 3]", "bfloat16 of shape [4]"]], **eva)
    message = str(first_difference([party_spec(**eva), odd]))
    assert "'a' is float32 of shape [2, 3]" in message
    assert "rho=1.0" in message


# ---- digests of the frozen base


def test_digests_keep_the_names() -> None:
    assert list(base_digests({"b": torch.zeros(1), "a": torch.zeros(1)})) == ["b", "a"]


@pytest.mark.parametrize("size", [1, 64, 65, 1000, 12345])
def test_every_value_counts(size: int) -> None:
    tensor = torch.zeros(size)
    for position in {0, size // 3, size // 2, size - 1}:
        assert digest(tensor.index_fill(0, torch.tensor(position), 1e-30)) != digest(tensor)


# ---- checksum of the global vector


def test_a_checksum_tells_vectors_apart() -> None:
    # Each of the others has the same sum as the vector, or the same sum of bits.
    vector = torch.tensor([1.0, 2.0, 3.0, 0.0])
    others = [
        vector.flip(0),
        torch.tensor([2.0, 1.0, 3.0, 0.0]),
        torch.tensor([1.0, 2.0, 3.0, -0.0]),
        torch.nextafter(vector, torch.tensor([9.0, 0.0, 9.0, -9.0])),
        vector[:3],
    ]
    assert bits_digest(vector) == bits_digest(vector.clone())
    assert len({bits_digest(other) for other in [vector, *others]}) == 6
    json.dumps(bits_digest(vector))


@pytest.mark.parametrize("ranks_may_differ", [False, True])
def test_other_numbers_of_experts_are_named_and_in_what_must_agree(ranks_may_differ: bool) -> None:
    ours = party_spec(ranks_may_differ=ranks_may_differ)
    theirs = party_spec(ranks_may_differ=ranks_may_differ, lora={"q.default": [8, 2.0, 4]})
    said = first_difference([ours, theirs])
    assert said is not None
    assert "'q.default' holds 1 experts at party 0 but 4 at party 1" in said
    assert common(ours) != common(theirs)
