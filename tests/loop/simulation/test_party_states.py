"""States of parties in memory, and beyond a bound on disk."""

from pathlib import Path

import torch

from pellm_lightning.loop.simulation.party_states import PartyStates


def state(party: int) -> dict[str, object]:
    return {"own": {"weight": torch.full((10,), float(party))}, "round": party}


def values(states: PartyStates) -> dict[int, float]:
    return {party: float(of["own"]["weight"][0]) for party, of in states.state_dict().items()}


def test_what_has_no_room_lies_on_disk(tmp_path: Path) -> None:
    states = PartyStates(tmp_path / "parties", memory_bytes=2 * 40)
    for party in range(5):
        states.put(party, state(party))
    assert sorted(path.name for path in (tmp_path / "parties").iterdir()) == [
        "party-0.pt",
        "party-1.pt",
        "party-2.pt",
    ]
    assert values(states) == {party: float(party) for party in range(5)}
    taken = states.pop(1)
    assert taken is not None
    assert torch.equal(taken["own"]["weight"], torch.ones(10))
    assert 1 not in states
    assert states.pop(1) is None
    states.put(1, taken)  # now the newest
    assert values(states) == {party: float(party) for party in range(5)}
    states.clear()
    assert not [*(tmp_path / "parties").iterdir()]


def test_a_state_that_is_put_again_replaces_the_old_one(tmp_path: Path) -> None:
    states = PartyStates(tmp_path, memory_bytes=0)
    states.put(3, state(3))
    states.put(3, state(8))
    assert values(states) == {3: 8.0}


def test_states_of_a_checkpoint_replace_all(tmp_path: Path) -> None:
    states, others = PartyStates(tmp_path / "a", 40), PartyStates(tmp_path / "b", 1e9)
    states.put(1, state(1))
    states.put(2, state(2))
    others.put(7, state(7))
    others.load_state_dict(states.state_dict())
    assert values(others) == {1: 1.0, 2: 2.0}
