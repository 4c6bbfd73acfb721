"""All that leaves a party in a round."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from manual_rounds import bits, random, started
from message_transcript import NotedStore, metadata_of, tapped
from party_threads import run_parties
from torch import Tensor

from pellm_lightning import Federation, RoundReport


def test_a_transcript_of_all_that_leaves(
    monkeypatch: pytest.MonkeyPatch, small_pieces: None, lane: str
) -> None:
    messages = tapped(monkeypatch)
    store = NotedStore()
    secret = torch.tensor([1234.5, 2345.5, 3456.5, 4567.5])
    size, num_parties = 50, 3
    starts = [random(party, size) for party in range(num_parties)]
    ends = [random(10 + party, size) for party in range(num_parties)]
    weights = [1.0, 3.0, 0.0]

    def act(federation: Federation) -> tuple[int, RoundReport, int]:
        party = federation.party
        trained, untrained = starts[party].clone(), secret.clone()
        aggregator = started(federation, {"w": trained}, frozen={"base": untrained})
        before = federation.bytes_sent
        trained.copy_(ends[party])
        report = aggregator.step(weights[party], loss=0.5)
        assert torch.equal(untrained, secret)
        return before, report, federation.bytes_sent

    results = run_parties(num_parties, act, store=store)
    check_words(store, [secret, *starts, *ends])
    for party, (first_sync, report, in_all) in enumerate(results):
        sent = [m for m in messages if m.party == party and m.sent]
        synchronised = [m.values for m in sent if m.collective == "broadcast"]
        header, *summed = [m for m in sent if m.collective != "broadcast"]
        assert all((m.collective == "shared memory") == (lane != "gloo") for m in summed)
        # The first synchronisation: party 0's trainable parameters; nothing of the others.
        assert len(synchronised) == (1 if party == 0 else 0)
        assert all(torch.equal(values, starts[0]) for values in synchronised)
        # The round: a header, then this party's share of its update, and the ballot right behind it.
        intent, metadata = metadata_of(header)
        tag = metadata.pop("tag")
        # There was no round before, so no distance; and nobody has said how many steps are left.
        facts = {"purpose": 1, "round": 0, "weight": weights[party], "fine": True, "loss": 0.5}
        unknown = {"exposed": [], "releases": 0, "distance": None, "steps_left": None}
        assert (intent, len(tag), metadata) == ("exchange", 16, facts | unknown)
        update, share = starts[0] - ends[party], weights[party] / sum(weights)
        norm = float(update.norm())
        if lane == "gloo":
            payload = torch.cat([m.values for m in summed])
            # anchor - x times the share, which is party 0's start minus the own end; exact zeros at weight 0.
            torch.testing.assert_close(payload[:size], share * update, rtol=1e-6, atol=1e-6)
            assert share or bits(payload[:size]) == bytes(4 * size)
            ballot = payload[size:]
            # That all its values are finite is told by the norm of its update.
            votes = [norm if other == party else 0.0 for other in range(num_parties)]
            assert ballot.tolist() == pytest.approx([*votes, 0.0, 0.5 * share, share, share])
        elif share:
            # anchor - x, the loss and the norm; the header has told by which share the others multiply them.
            shown, loss, told = (m.values for m in summed)
            assert bits(shown) == bits(update)
            assert (loss.tolist(), told.tolist()) == ([0.5], pytest.approx([norm]))
        else:
            assert not summed
        # Bytes are those handed over, no more and no fewer.
        assert in_all == sum(m.values.nbytes for m in sent)
        assert report.bytes_sent == in_all - first_sync, "the report must count all that its round has sent"
        assert first_sync == (4 * size if party == 0 else 0)


def check_words(store: NotedStore, tensors: Iterable[Tensor]) -> None:
    """No word in the store tells a value: there are only names, shapes, dtypes, settings, short digests."""
    # Under "lane" torch's Gloo groups tell each other their addresses.
    words = [value for key, value in store.written if "/lane" not in key]
    assert len(words) > 3
    assert all(len(word) < 1000 for word in words)
    for value in torch.cat(list(tensors)).tolist():
        assert not any(repr(value).encode() in word for word in words)
        assert not any(np.float32(value).tobytes() in word for word in words)


def test_a_second_exchange_is_counted_too(monkeypatch: pytest.MonkeyPatch, over_gloo: None) -> None:
    # In shared memory a party knows before it sends anything that it holds NaN.
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> tuple[RoundReport, RoundReport]:
        w = torch.zeros(100)
        aggregator = started(federation, {"w": w}, quorum=1)
        usual = aggregator.step(1)
        w.fill_(math.nan if federation.party == 1 else 1.0)
        return usual, aggregator.step(1)

    for usual, healed in run_parties(2, act):
        assert healed.excluded == (1,)
        assert usual.bytes_sent + 400 <= healed.bytes_sent <= 2 * usual.bytes_sent
    # A party that has NaN does not send them again: the last message of each party is the second exchange.
    updates = [message.values for message in messages if message.values.dtype is torch.float32]
    assert not any(values.isnan().any() for values in updates[-2:])
    assert any(values.isnan().any() for values in updates[:-2])
