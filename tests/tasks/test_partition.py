from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.tasks.partition import by_key, dirichlet, iid, label_table, plot_labels

Labels = st.lists(st.sampled_from("abcd"), min_size=12, max_size=60)


def assert_exact_cover(parts: list[list[int]], num_samples: int) -> None:
    assert sorted(index for part in parts for index in part) == list(range(num_samples))
    assert all(part == sorted(part) for part in parts)


@given(num_samples=st.integers(5, 200), num_parties=st.integers(1, 5), seed=st.integers(0, 9))
def test_iid_covers_exactly_and_evenly(num_samples: int, num_parties: int, seed: int) -> None:
    parts = iid(num_samples, num_parties, seed)
    assert_exact_cover(parts, num_samples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == iid(num_samples, num_parties, seed)


@given(
    labels=Labels,
    num_parties=st.integers(1, 4),
    alpha=st.floats(1e-3, 1e3),
    minimum=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_dirichlet_covers_exactly_with_a_minimum(
    labels: list[str], num_parties: int, alpha: float, minimum: int, seed: int
) -> None:
    parts = dirichlet(labels, num_parties, alpha, seed, min_per_party=minimum)
    assert_exact_cover(parts, len(labels))
    assert min(map(len, parts)) >= minimum
    assert parts == dirichlet(labels, num_parties, alpha, seed, min_per_party=minimum)


def test_a_small_alpha_gives_few_parties_a_label_and_a_large_one_all_alike() -> None:
    labels = ["a"] * 300 + ["b"] * 300
    skewed = dirichlet(labels, 3, alpha=0.01, seed=1)
    even = dirichlet(labels, 3, alpha=1e4, seed=1)
    # alpha=0.01 leaves nearly all of a label to a single party; alpha=1e4 draws shares of 1/3 +- 0.3 %.
    for label in "ab":
        assert max(sum(labels[i] == label for i in part) for part in skewed) > 270
    assert all(abs(Counter(labels[i] for i in part)["a"] - 100) <= 5 for part in even)


def test_other_seeds_divide_otherwise() -> None:
    assert iid(50, 2, seed=0) != iid(50, 2, seed=1)
    assert dirichlet(["a"] * 50, 2, 1.0, seed=0) != dirichlet(["a"] * 50, 2, 1.0, seed=1)


@given(keys=Labels, num_parties=st.integers(1, 3))
def test_by_key_keeps_keys_together(keys: list[str], num_parties: int) -> None:
    if len(set(keys)) < num_parties:
        with pytest.raises(ValueError, match="without a sample"):
            by_key(keys, num_parties)
        return
    parts = by_key(keys, num_parties)
    assert_exact_cover(parts, len(keys))
    held = [{keys[i] for i in part} for part in parts]
    assert sum(map(len, held)) == len(set(keys))


def test_by_key_deals_the_largest_key_first_to_whoever_holds_least() -> None:
    # c: 4 -> party 0; a: 3 -> party 1; b: 2 -> party 1, which holds 3 < 4.
    assert by_key("cccc" + "aaa" + "bb", 2) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_by_key_follows_a_mapping() -> None:
    assert by_key(["x", "y", "x", "z"], {"x": 1, "y": 0, "z": 0}) == [[1, 3], [0, 2]]


def test_by_key_names_what_its_mapping_lacks() -> None:
    with pytest.raises(ValueError, match="No party is named for the keys 'z'"):
        by_key(["x", "z"], {"x": 0})
    with pytest.raises(ValueError, match=r"leave parties \[0\] of 2"):
        by_key(["x"], {"x": 1})


def test_an_impossible_minimum_is_refused() -> None:
    with pytest.raises(ValueError, match="5 samples cannot give each of 3 parties at least min_per_party=2"):
        iid(5, 3, min_per_party=2)
    with pytest.raises(ValueError, match="min_per_party=1"):
        dirichlet(["a"], 2, alpha=1.0)
    with pytest.raises(ValueError, match="num_parties=0"):
        iid(5, 0)
    with pytest.raises(ValueError, match=r"alpha=0\.0 should be above 0"):
        dirichlet(["a"], 1, alpha=0.0)


def test_the_table_tells_who_holds_what() -> None:
    table = label_table(["pos", "neg", "pos"], [[0, 2], [1]])
    assert table.splitlines() == [
        "party  neg  pos  total",
        "    0    0    2      2",
        "    1    1    0      1",
    ]


def test_the_plot_has_a_bar_of_each_label_for_each_party() -> None:
    axes = plot_labels(["pos", "neg", "pos"], [[0, 2], [1]]).axes[0]
    assert [[bar.get_width() for bar in label] for label in axes.containers] == [[0, 1], [2, 0]]
