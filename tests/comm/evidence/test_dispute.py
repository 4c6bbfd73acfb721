"""Disputes over a round: what proves that a member equivocated, and what proves nothing."""

import json
from dataclasses import replace
from typing import Any

import pytest
from evidence_chains import Parties
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm.evidence.certificate import EvidenceError, RoundStatement
from pellm_lightning.comm.evidence.chain import Chain
from pellm_lightning.comm.evidence.dispute import dispute_of, equivocators, verify_dispute

PARTIES = Parties()
OWN = PARTIES.following(None)
OTHER = replace(OWN, result="f" * 64)


def vote(name: str, statement: RoundStatement) -> dict[str, Any]:
    signature = PARTIES.sign(statement, name)
    return {"term": 1, "digest": "d", "statement": statement.text, "signature": signature.value}


def dispute(**votes: list[dict[str, Any]]) -> Chain:
    return dispute_of(votes, OWN, PARTIES.identities)


def test_two_statements_of_one_party_prove_that_it_equivocated() -> None:
    found = dispute(a=[vote("a", OWN)], b=[vote("b", OTHER), vote("b", OWN)], c=[vote("c", OWN)])
    assert equivocators(found) == ["b"]
    kept = Chain.parse(found.text)
    first, *statements, last = verify_dispute(kept, PinnedKeys())
    assert first == (
        "Attempt 1 at round 0 of run 1f/1/2e: its members have signed 2 statements, which differ in result."
    )
    assert sorted(line.split("): ")[1] for line in statements) == ["a, b, c", "b"]
    assert last == "b has signed more than one: it equivocated."


class PinnedKeys:
    """The keys of the parties, as each has pinned them."""

    def refusal(self, name: str, key: str, certificate: bytes | None) -> str | None:
        return None if PARTIES.public.get(name) == key else "it is another key"


def test_results_of_different_parties_prove_no_lie() -> None:
    found = dispute(a=[vote("a", OWN)], b=[vote("b", OTHER)])
    assert equivocators(found) == []
    assert verify_dispute(found)[-1].startswith("Nobody has signed more than one")


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(["statement", "signature"]), JSON, JSON)
def test_whatever_else_a_peer_votes_is_no_part_of_it(field: str, new: Any, inner: Any) -> None:
    good = vote("b", OTHER)
    for changed in (new, json.dumps(new), json.dumps(json.loads(OTHER.text) | {"result": inner})):
        found = dispute(a=[vote("a", OWN)], b=[good | {field: changed}], stranger=[good])
        assert [sorted(c.signatures) for c in found.certificates] == [["a"]]


@pytest.mark.parametrize("fields", [{"attempt": 3}, {"run": "another"}])
def test_a_statement_of_another_attempt_is_no_part_of_it(fields: dict[str, Any]) -> None:
    """A party signs one in each attempt, so these contradict nothing."""
    other = replace(OTHER, **fields)
    assert len(dispute(b=[vote("b", OWN), vote("b", other)]).certificates) == 1
    forged = dispute(b=[vote("b", OWN)])
    forged.certificates.append(PARTIES.certificate(other, ["b"]))
    with pytest.raises(EvidenceError, match="not of one attempt"):
        verify_dispute(forged)


def test_a_dispute_that_does_not_hold_is_refused() -> None:
    good = dispute(a=[vote("a", OWN)], b=[vote("b", OTHER)])
    one, two = sorted(good.certificates, key=lambda certificate: sorted(certificate.signatures))

    def with_(*certificates: Any) -> Chain:
        return Chain({}, good.identities, [*certificates])

    foreign = Parties(seed=9)
    cases: list[tuple[Chain, str]] = [
        (with_(one), "not two statements that differ"),
        (with_(one, one, two), "not two statements that differ"),
        (with_(one, replace(two, signatures={})), "nobody has signed"),
        (with_(one, replace(two, signatures=one.signatures)), "the signature of 'a' does not fit"),
        (with_(one, replace(two, signatures={"c": two.signatures["b"]})),
         "the signature of 'c' is by an unknown or another's key"),
    ]  # fmt: skip
    for chain, words in cases:
        with pytest.raises(EvidenceError, match=words):
            verify_dispute(chain)
    forged = dispute_of({"b": [vote_of(foreign, "b", OWN), vote_of(foreign, "b", OTHER)]}, OWN,
                        foreign.identities)  # fmt: skip
    assert equivocators(forged) == ["b"]
    with pytest.raises(EvidenceError, match="the key of 'b' is not accepted: it is another key"):
        verify_dispute(forged, PinnedKeys())


def vote_of(parties: Parties, name: str, statement: RoundStatement) -> dict[str, Any]:
    return {"statement": statement.text, "signature": parties.sign(statement, name).value}
