"""What must agree before any tensor moves, compared as words."""

import json
from typing import Any

import pytest
import torch

from pellm_lightning.passport import PROTOCOL, Passport, base_digests, checksum, first_difference


def passport(**changes: Any) -> Passport:
    """A passport as it arrives: through JSON."""
    plain = {
        "protocol": PROTOCOL,
        "schema": [["a", [2, 3], "float32"], ["b", [4], "bfloat16"]],
        "lora": {"q.default": [8, 2.0]},
        "ranks_may_differ": False,
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
    assert first_difference([passport()]) is None
    assert first_difference([passport() for _ in range(3)]) is None


def test_a_party_that_does_not_check_its_base_differs_from_none() -> None:
    assert first_difference([passport(base=None), passport()]) is None
    assert first_difference([passport(), passport(base=None)]) is None


def test_files_of_its_own_are_no_difference() -> None:
    assert first_difference([passport(files=[f"host:/runs/party-{party}"]) for party in range(3)]) is None
    assert first_difference([passport(files=["host:/log", "host:/log"]), passport()]) is None


# ---- two parties that do not: in each case party 2 of three is the odd one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": PROTOCOL + 1}, ["Party 2", f"version {PROTOCOL + 1}", "party 0", "Install"]),
        (
            {"schema": [["a", [2, 3], "float32"]]},
            ["Party 0 trains parameter 'b', party 2 does not", "2 parameters at party 0, 1 at party 2"],
        ),
        (
            {"schema": [["a", [2, 3], "float32"], ["b", [4], "bfloat16"], ["c", [1], "float32"]]},
            ["Party 2 trains parameter 'c', party 0 does not"],
        ),
        (
            {"schema": [["a", [3, 2], "float32"], ["b", [4], "bfloat16"]]},
            ["'a' is float32 of shape [2, 3] at party 0", "float32 of shape [3, 2] at party 2"],
        ),
        (
            {"schema": [["a", [2, 3], "float32"], ["b", [4], "float16"]]},
            ["'b' is bfloat16 of shape [4] at party 0", "float16 of shape [4] at party 2", "precision"],
        ),
        (
            {"config": {"every_n_epochs": 2, "weighting": "samples"}},
            ["Party 0 has every_n_epochs=1, party 2 has every_n_epochs=2"],
        ),
        ({"config": {"every_n_epochs": 1}}, ["weighting='samples', party 2 has weighting=None"]),
        (
            {"base": {"embed": "01", "layer": "03"}},
            ["base model of party 2", "'layer'", "check_base=False"],
        ),
        ({"base": {"embed": "01"}}, ["base model of party 2", "'layer'"]),
        ({"base": {"adapter": "00", "embed": "03", "layer": "03"}}, ["base model of party 2", "'adapter'"]),
        ({"round": 7}, ["Party 0 starts at round 0, party 2 at round 7", "Resume"]),
        ({"checksum": 12}, ["Parties 0 and 2", "different global vectors"]),
    ],
)
def test_a_difference_names_party_thing_and_cure(changes: dict[str, Any], words: list[str]) -> None:
    message = first_difference([passport(), passport(), passport(**changes)])
    assert message is not None
    for word in words:
        assert word in message


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_no_two_parties_write_the_same_file(pair: tuple[int, int]) -> None:
    files = [[f"host:/runs/party-{party}"] for party in range(3)]
    for party in pair:
        files[party].append("host:/shared/logs")
    message = first_difference([passport(files=paths) for paths in files])
    assert message is not None
    assert f"Parties {pair[0]} and {pair[1]} would both write to 'host:/shared/logs'" in message


def test_the_cause_is_named_before_its_consequence() -> None:
    # Another LoRA rank makes the schema differ; that the base differs, too, is not what must be mended first.
    odd = passport(schema=[["a", [4, 3], "float32"]], base={}, round=1, files=["x"])
    assert "Party 0 trains parameter 'b'" in str(first_difference([passport(files=["x"]), odd]))


# ---- what the LoRA modules say


def test_another_scaling_names_module_party_and_cure() -> None:
    # The same factors would be updates of another size.
    message = first_difference(
        [passport(), passport(), passport(lora={"q.default": [8, 0.7071067811865476]})]
    )
    assert message is not None
    for word in ("'q.default'", "scaling 2 ", "party 0", "0.707107 at party 2", "lora_alpha", "use_rslora"):
        assert word in message
    assert "HeterogeneousRank" in message


def test_scalings_may_differ_where_ranks_may() -> None:
    others = [passport(lora={"q.default": [rank, 16 / rank]}, ranks_may_differ=True) for rank in (8, 4, 16)]
    assert first_difference(others) is None


def test_a_scaling_that_differs_is_told_after_the_schema() -> None:
    # A rank that differs makes the scaling differ, too; the rank is what must be mended.
    odd = passport(schema=[["a", [4, 3], "float32"], ["b", [4], "bfloat16"]], lora={"q.default": [4, 4.0]})
    assert "'a' is float32 of shape [2, 3]" in str(first_difference([passport(), odd]))


def test_another_aggregation_is_told_before_the_schema_that_it_makes_differ() -> None:
    config = {"every_n_epochs": 1, "weighting": "samples"}
    ours = passport(
        config=config | {"aggregation": "HeterogeneousRank()"}, schema=[["a", ["rank", 3], "float32"]]
    )
    odd = passport(config=config | {"aggregation": "Mean()"}, schema=[["a", [2, 3], "float32"]])
    assert "aggregation='HeterogeneousRank()', party 1 has" in str(first_difference([ours, odd]))


@pytest.mark.parametrize("odd", [0, 1])
def test_a_module_that_only_some_parties_take_for_a_pair_is_a_difference(odd: int) -> None:
    # By default a module with an obstacle is left to the mean. If parties judge it differently, their vectors
    # have other orders, though names and shapes are the same.
    both = [passport(), passport()]
    both[odd] = passport(lora={})
    message = first_difference(both)
    assert message is not None, "their vectors would be mixed up, or Gloo abort a process"
    assert "'q.default'" in message


# ---- digests of the frozen base


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.zeros(0),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.float64),
        torch.ones(200, dtype=torch.uint8),
        torch.ones(3, dtype=torch.bool),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.empty(3, device="meta"),
    ],
)
def test_equal_tensors_have_equal_digests(tensor: torch.Tensor) -> None:
    assert digest(tensor) == digest(tensor.detach().clone())
    json.dumps(digest(tensor))


def test_a_digest_does_not_depend_on_the_memory_format() -> None:
    tensor = torch.arange(600.0).reshape(20, 30)
    assert digest(tensor) == digest(tensor.t().contiguous().t())


def test_shape_and_dtype_are_part_of_a_digest() -> None:
    zeros = torch.zeros(2, 3)
    others = [zeros.t(), zeros.reshape(6), zeros.to(torch.bfloat16), zeros.double(), torch.zeros(2, 3, 1)]
    assert len({digest(tensor) for tensor in [zeros, *others]}) == 6


@pytest.mark.parametrize("size", [1, 63, 64])
def test_every_value_of_a_small_tensor_is_seen(size: int) -> None:
    tensor = torch.zeros(size)
    digests = {digest(tensor)}
    for position in range(size):
        digests.add(digest(tensor.index_fill(0, torch.tensor(position), 1e-30)))
    assert len(digests) == size + 1


@pytest.mark.parametrize("size", [65, 100, 127, 128, 129, 1000, 12345])
def test_samples_reach_over_the_whole_tensor(size: int) -> None:
    # Another checkpoint differs in long stretches: one of a 32nd of the tensor, or 4 values, is not missed.
    tensor, stretch = torch.zeros(size), max(4, -(-size // 32))
    for start in range(size - stretch + 1):
        other = tensor.clone()
        other[start : start + stretch] = 1.0
        assert digest(other) != digest(tensor), (
            f"a change of {start}..{start + stretch} of {size} is not seen"
        )


def test_digests_keep_the_names() -> None:
    assert list(base_digests({"b": torch.zeros(1), "a": torch.zeros(1)})) == ["b", "a"]


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
    assert checksum(vector) == checksum(vector.clone())
    assert len({checksum(other) for other in [vector, *others]}) == 6
    json.dumps(checksum(vector))
