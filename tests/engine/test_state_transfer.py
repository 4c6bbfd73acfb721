"""The newest state on its way to those who lack it: piece by piece, whole or refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from party_threads import run_parties

from pellm_lightning import Federation
from pellm_lightning.comm import FederationError, PartyLostError
from pellm_lightning.engine import state_transfer
from pellm_lightning.engine.state_transfer import send_state
from pellm_lightning.tensors import snapshot
from pellm_lightning.tensors.snapshot import Manifest

BEHIND = [True, False, True, False]
"""The first that has it is party 1; party 3 just looks on."""


def state(size: int = 101) -> dict[str, Any]:
    return {
        "round": 3,
        "global": torch.linspace(0, 1, size),
        "fragments": [{"momentum": torch.ones(37, dtype=torch.bfloat16), "step": torch.tensor(4.0)}],
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0),
    }


def received(memory: torch.Tensor | None = None, size: int = 101, **options: Any) -> list[Any]:
    def act(federation: Federation) -> Mapping[str, Any] | None:
        loaded: list[Mapping[str, Any]] = []
        mine = partial(state, size) if not BEHIND[federation.party] else dict
        free = memory if federation.party == 2 else None
        send_state(federation, BEHIND, mine, loaded.append, options.get("vector_bytes", 404), free)
        return loaded[0] if loaded else None

    return run_parties(4, act, may_fail=True)


@pytest.mark.parametrize("piece_bytes", [8, 56, 1 << 20])
def test_whatever_the_pieces_those_who_lack_it_get_it(
    piece_bytes: int, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_transfer, "_PIECE_BYTES", piece_bytes)
    memory = torch.zeros(101)
    first, source, second, looks_on = received(memory)
    assert source is looks_on is None
    for one in (first, second):
        assert snapshot.digest(one) == snapshot.digest(state())
    assert second["global"].data_ptr() == memory.data_ptr()
    assert first["global"].data_ptr() != memory.data_ptr()


@pytest.mark.parametrize("limit", [10, 3000], ids=["its text", "its tensors"])
def test_a_state_that_is_too_large_is_refused_by_all_before_it_is_sent(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_transfer, "_MAX_WORDS", limit)
    monkeypatch.setattr(state_transfer, "_send_", lambda *arguments: pytest.fail("something was sent"))
    for said in received(size=1000, vector_bytes=0):
        assert isinstance(said, FederationError)
        assert isinstance(said, PartyLostError) or "would send" in str(said)


def test_what_arrives_changed_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Manifest.of

    def other(values: Mapping[str, Any]) -> Any:
        manifest, tensors = of(values)
        return replace(manifest, digest="0" * 64), tensors

    monkeypatch.setattr(Manifest, "of", other)
    for party, said in enumerate(received()):
        assert not BEHIND[party] or "its digest does not match its content" in str(said)


@pytest.mark.parametrize(
    "shape",
    [[4.0], [True], ["4"], [-4], [2**70, 0], [2**53, 0], [2**52, 0, 2**52], "4", {"4": 4}, 4, None],
    ids=str,
)
def test_tensors_that_cannot_be_are_refused_and_their_sender_is_named(
    shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all that receive them: an error of another kind would end each, and no other holder is asked."""
    monkeypatch.setattr(Manifest, "to_json", lambda manifest: json.dumps(["{}", {"t0": ["F32", shape]}, ""]))
    said = received()
    for party, error in enumerate(said):
        if BEHIND[party]:
            assert isinstance(error, PartyLostError), repr(error)
            assert error.parties == ("1",) or "left" in str(error)
    assert any(error.parties == ("1",) for error in said if isinstance(error, PartyLostError))


def test_a_size_that_cannot_be_is_refused_and_its_sender_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Federation.broadcast_

    def lies(self: Federation, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return honest(self, x.fill_(-5) if x.dtype is torch.int64 and self.party == source else x, source)

    monkeypatch.setattr(Federation, "broadcast_", lies)
    for error in received():
        assert isinstance(error, PartyLostError), repr(error)
        assert "Party 1 would send -5 bytes" in str(error) or "left" in str(error)
