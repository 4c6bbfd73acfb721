"""Chains of round certificates: a good one holds; what is changed, left out or added is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evidence_chains import ROSTER, Parties
from hypothesis import given
from hypothesis import strategies as st

from pellm_lightning.comm.evidence.certificate import (
    EvidenceError,
    Identity,
    RoundStatement,
    canonical,
    encode,
)
from pellm_lightning.comm.evidence.chain import Chain, verify
from pellm_lightning.comm.evidence.summary import vouchers, write_evidence
from pellm_lightning.comm.keys import make_ca, make_certificate, revoke
from pellm_lightning.comm.revocation import RevocationFile
from pellm_lightning.comm.signing_keys import Authorities, SigningKey, TrustedKeys, key_in

PARTIES = Parties()
GOOD = PARTIES.chain()
TEXT = GOOD.text
TRUST = TrustedKeys(PARTIES.public)


def judged(text: str) -> None:
    verify(Chain.parse(text), TRUST)


def test_a_good_chain_holds_and_says_who_vouches() -> None:
    judged(TEXT)
    judged(PARTIES.chain(3, ["ab", "bc", "ac"]).text)
    assert Chain.parse(TEXT).text == TEXT
    found = vouchers(PARTIES.chain(3, ["ab", "bc", "ac"]))
    assert [(v.name, v.member, v.counted, v.signed) for v in found] == [
        ("a", 3, 3, 2),
        ("b", 3, 3, 2),
        ("c", 3, 0, 2),
    ]


# ---- anything that is changed


@given(st.integers(0, len(TEXT) - 1), st.integers(1, 127))
def test_any_changed_byte_is_refused(at: int, flip: int) -> None:
    changed = TEXT[:at] + chr(ord(TEXT[at]) ^ flip) + TEXT[at + 1 :]
    with pytest.raises(EvidenceError):
        judged(changed)


@given(st.integers(0, len(TEXT) - 1))
def test_any_byte_left_out_or_doubled_is_refused(at: int) -> None:
    for changed in (TEXT[:at] + TEXT[at + 1 :], TEXT[:at] + TEXT[at] + TEXT[at:]):
        with pytest.raises(EvidenceError):
            judged(changed)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, inner ones included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(place for key, part in inner for place in places(part, (*at, key)))]


LINES = [json.loads(line) for line in TEXT.splitlines()]
OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([*ROSTER, LINES[-1]["round"]["previous"], LINES[-1]["round"]["result"]]),
    st.lists(st.one_of(st.sampled_from(ROSTER), st.floats(0, 9)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.data())
def test_any_changed_field_is_refused(data: st.DataObject) -> None:
    """Written in the one form of evidence again, so that the form alone does not give it away."""
    number = data.draw(st.integers(0, len(LINES) - 1))
    lines = json.loads(json.dumps(LINES))
    *way, last = data.draw(st.sampled_from(places(lines[number])))
    holder = lines[number]
    for key in way:
        holder = holder[key]
    before = holder[last]
    new = data.draw(OTHERS)
    holder[last] = new
    try:
        written = canonical(lines[number])
    except ValueError:
        return  # NaN, which has no form
    if written == canonical(LINES[number]):
        return
    assert new is not before
    changed = [canonical(line) for line in LINES]
    changed[number] = written
    with pytest.raises(EvidenceError):
        judged("".join(f"{line}\n" for line in changed))


@given(st.permutations(range(len(LINES))))
def test_lines_in_another_order_are_refused(order: list[int]) -> None:
    lines = TEXT.splitlines()
    if order == sorted(order):
        return
    with pytest.raises(EvidenceError):
        judged("".join(f"{lines[place]}\n" for place in order))


TERMS = TEXT.splitlines()[0]
NUMBERS = [TERMS.replace("true", number) for number in ("NaN", "-Infinity", "1e999", "1E5")]
SPACED = [TERMS.replace(":", ": "), TERMS + "\r"]
NO_EVIDENCE = ["[]", "{}", '{"round":{},"signatures":{}}', "", "[" * 9999, *SPACED, *NUMBERS]


@pytest.mark.parametrize("text", [f"{line}\n" for line in NO_EVIDENCE])
def test_what_is_no_evidence_is_refused(text: str) -> None:
    with pytest.raises(EvidenceError, match="line 1 is no evidence"):
        Chain.parse(text)


# ---- changes that somebody with a key of his own signs again


def forged(change: Callable[[Chain], None], parties: Parties = PARTIES) -> str:
    chain = parties.chain()
    change(chain)
    return chain.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"round": 2}, "round 1 is missing: round 2 comes instead"),
        ({"round": 5}, "rounds 1 to 4 are missing"),
        ({"round": 0}, "round 0 comes where round 1 must be"),
        ({"previous": "0f"}, "round 1 does not follow what stands before it"),
        ({"run": "other"}, "round 1 is of another run"),
        ({"attempt": 1}, "or of an earlier attempt"),
        ({"base": "0f"}, "round 1 begins with other parameters than round 0 ended"),
        ({"members": ("a", "d", "b")}, r"members that are not on the roster.*\['d'\]"),
        ({"members": ("b", "a", "c")}, "or not in its order"),
        ({"counted": ("a", "c")}, "who counts is not who has a weight"),
        ({"counted": ("b", "a"), "weights": None}, "parties count that were no members"),
        ({"weights": (1.0,)}, "1 weights of 3 members"),
        ({"terms": "0f"}, "the terms that it refers to are missing"),
    ],
)
def test_what_cannot_be_is_refused_whoever_signs_it(fields: dict[str, Any], words: str) -> None:
    chain = PARTIES.chain(1)
    statement = PARTIES.following(chain.certificates[0].statement, **fields)
    chain.certificates.append(PARTIES.certificate(statement))
    with pytest.raises(EvidenceError, match=words):
        verify(Chain.parse(chain.text), TRUST)


def test_a_missing_round_is_named() -> None:
    for left_out, words in ((0, "round 0 is missing: round 1"), (1, "round 1 is missing: round 2")):
        chain = PARTIES.chain()
        del chain.certificates[left_out]
        with pytest.raises(EvidenceError, match=words):
            verify(Chain.parse(chain.text), TRUST)


def test_fewer_signatures_than_a_quorum_are_refused() -> None:
    text = PARTIES.chain(2, ["abc", "b"]).text
    with pytest.raises(EvidenceError, match="round 1: 1 signatures, but a quorum is 2; missing: a, c"):
        judged(text)


def grown(signers: str, rounds: int = 2, **terms: Any) -> Chain:
    """A good chain, and one more round by other terms."""
    chain, others = PARTIES.chain(rounds), Parties(**terms)
    chain.add_terms(others.terms)
    before = chain.certificates[-1].statement if rounds else None
    members = tuple(name for name in others.terms.roster if name in signers)
    told = {"members": members, "counted": members, "weights": None, "terms": others.terms.hash}
    base = before.result if before else "0f"
    statement = others.following(before, base=base, **told)
    chain.certificates.append(others.certificate(statement, signers))
    return chain


@pytest.mark.parametrize(
    ("signers", "terms"),
    [
        ("a", {"roster": ("a",), "quorum": 1}),
        ("a", {"quorum": 1}),
        ("a", {"quorum": 1, "settings": {}}),
        ("a", {"roster": ("a", "d", "e"), "quorum": 1}),
    ],
)
def test_who_is_no_quorum_cannot_change_the_terms(signers: str, terms: dict[str, Any]) -> None:
    """One party alone writes terms by which its own signature is enough."""
    verify(Chain.parse(grown("ab", **terms | {"roster": ROSTER}).text), TRUST)
    with pytest.raises(EvidenceError, match=r"round 2: it has other terms than round 1, .* the 2 .*: a$"):
        verify(Chain.parse(grown(signers, **terms).text), TRUST)


def test_a_quorum_can_change_the_terms() -> None:
    for terms in ({"roster": ("a", "b"), "quorum": 1}, {"settings": {"tls": False}}, {"roster": ("c", "b")}):
        chain = grown("bc" if "c" in terms.get("roster", ROSTER) else "ab", **terms)
        verify(Chain.parse(chain.text), TRUST)
        assert chain.certificates[-1].statement.terms != PARTIES.terms.hash


def test_a_party_that_was_no_member_does_not_vouch() -> None:
    chain = PARTIES.chain(1)
    statement = PARTIES.following(chain.certificates[0].statement, members=("a", "b"), weights=(8.0, 0.5))
    chain.certificates.append(PARTIES.certificate(statement))
    with pytest.raises(EvidenceError, match="round 1: 'c' has signed, but was no member"):
        verify(Chain.parse(chain.text), TRUST)


def test_a_foreign_key_is_refused_and_named() -> None:
    """A chain that strangers sign from beginning to end holds in itself, and not by the parties' keys."""
    text = Parties(seed=1).chain().text
    verify(Chain.parse(text))
    with pytest.raises(EvidenceError, match="round 0: the key of 'a' is not accepted: it is ed25519:"):
        judged(text)


def test_a_signature_under_anothers_name_is_refused() -> None:
    chain = PARTIES.chain(1)
    signatures = chain.certificates[0].signatures
    signatures["b"] = signatures["a"]
    with pytest.raises(EvidenceError, match="the signature of 'b' is by an unknown or another's key"):
        verify(chain, TRUST)
    signatures["b"] = PARTIES.sign(chain.certificates[0].statement, "a", by=PARTIES.identities["b"])
    with pytest.raises(EvidenceError, match="the signature of 'b' does not fit"):
        verify(chain, TRUST)


def test_what_no_round_refers_to_is_refused() -> None:
    stray = canonical({"identity": json.loads(Identity("d", "ed25519:", None, "1").text)})
    with pytest.raises(EvidenceError, match="the lines are not in the one order and form"):
        judged(TEXT + stray + "\n")


def test_a_file_that_was_cut_off_is_refused() -> None:
    with pytest.raises(EvidenceError, match="its last line has no end: it was cut off"):
        judged(TEXT[:-1])


# ---- certified keys


@pytest.fixture
def certified(tmp_path: Path) -> tuple[Path, Chain]:
    """A chain of parties that an authority has certified."""
    make_ca(tmp_path)
    parties = Parties()
    for name in ROSTER:
        path = make_certificate(tmp_path, name)
        pem = path.read_text().splitlines()[1:-1]
        der = "".join(pem)
        key = SigningKey(path.with_suffix(".key"))
        parties.identities[name] = Identity(name, key.public_key, der, "0.1.0")
        parties.keys[name] = key._key
    return tmp_path, parties.chain()


def authorities(folder: Path) -> Authorities:
    revoked = RevocationFile(folder / "ca.crl", (folder / "ca.pem").read_bytes())
    return Authorities((folder / "ca.pem").read_bytes(), lambda: revoked.serials)


def test_keys_that_the_authority_certifies_are_accepted(
    certified: tuple[Path, Chain], tmp_path: Path
) -> None:
    folder, chain = certified
    verify(Chain.parse(chain.text), authorities(folder))
    make_ca(tmp_path / "other")
    with pytest.raises(
        EvidenceError, match="key of 'a' is not accepted: of its certificate: the federation's"
    ):
        verify(chain, authorities(tmp_path / "other"))
    with pytest.raises(EvidenceError, match="it comes without a certificate: pin the parties' keys"):
        verify(GOOD, authorities(folder))


def test_a_certificate_of_another_key_does_not_make_a_key_a_partys(certified: tuple[Path, Chain]) -> None:
    folder, chain = certified
    identity = next(i for i in chain.identities.values() if i.name == "a")
    parties = Parties()
    parties.identities["a"] = Identity("a", parties.public["a"], identity.certificate, "0.1.0")
    for trust in (None, authorities(folder)):
        with pytest.raises(
            EvidenceError, match="key of 'a' is not accepted: its certificate has another key"
        ):
            verify(parties.chain(), trust)
    with pytest.raises(ValueError, match="of its certificate"):
        key_in(b"no certificate", "a")


def test_signatures_of_a_revoked_certificate_are_refused(certified: tuple[Path, Chain]) -> None:
    folder, chain = certified
    revoke(folder, ["b"])
    with pytest.raises(EvidenceError, match=r"key of 'b' is not accepted.*the authority has revoked it"):
        verify(chain, authorities(folder))


# ---- beside an adapter


def test_what_the_model_card_says(tmp_path: Path) -> None:
    (said,) = write_evidence(tmp_path, PARTIES.chain(3, ["ab", "bc", "ac"]).text)
    assert "3 rounds (signed by each party: `a` 2, `b` 2, `c` 2)" in said
    assert (tmp_path / "evidence.jsonl").read_text() == PARTIES.chain(3, ["ab", "bc", "ac"]).text
    assert write_evidence(tmp_path, None) == []
    assert not (tmp_path / "evidence.jsonl").exists()


def test_statements_hold_what_json_can(tmp_path: Path) -> None:
    statement = GOOD.certificates[0].statement
    assert RoundStatement.from_json(json.loads(statement.text)) == statement
    assert encode(b"\0" * 64) == "A" * 86 + "=="
