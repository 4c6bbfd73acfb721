"""Keys that two parties share: the standards' numbers, and everybody who would like to sit between them."""

import hashlib
import hmac
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import authority, elliptic, files, tls_of
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from party_threads import run_parties
from secure_exchange import keys, masked, signing_key_of
from torch import Tensor

from pellm_lightning import Federation, FederationError
from pellm_lightning.comm import signing_keys
from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey, TrustedKeys
from pellm_lightning.comm.tls import TLS
from pellm_lightning.exchange import SecureAggregation
from pellm_lightning.exchange.secure.key_agreement import agree, all_gather_bytes, shared_key

SOON_S = 8.0
N = 3


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 with SHA-256, from its text."""
    key = hmac.digest(salt, secret, hashlib.sha256)
    made, block = b"", b""
    for number in range(1, -(-size // 32) + 1):
        block = hmac.digest(key, block + info + bytes([number]), hashlib.sha256)
        made += block
    return made[:size]


def test_the_tests_own_hkdf_is_that_of_rfc_5869() -> None:
    # Appendix A.1.
    made = hkdf(bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert made.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_shared_keys_are_x25519_and_hkdf_as_the_standards_have_them() -> None:
    # RFC 7748, section 6.1.
    alice = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    bob = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    publics = {
        alice: "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        bob: "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    }
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    expected = hkdf(bytes.fromhex(shared), b"transcript", b"pellm-lightning/secure-aggregation/2|1|4", 16)
    for mine, other, one, two in ((alice, bob, 1, 4), (bob, alice, 4, 1)):
        fresh = X25519PrivateKey.from_private_bytes(bytes.fromhex(mine))
        assert fresh.public_key().public_bytes_raw().hex() == publics[mine]
        public = bytes.fromhex(publics[other])
        assert shared_key(fresh, public, b"transcript", one, two) == expected
        assert shared_key(fresh, public, b"another", one, two) != expected
        assert shared_key(fresh, public, b"transcript", one, 5) != expected


def test_a_key_of_small_order_is_refused() -> None:
    fresh = X25519PrivateKey.generate()
    for point in (bytes(32), (1).to_bytes(32, "little")):
        with pytest.raises(FederationError, match="Party 2 sent a public key of small order"):
            shared_key(fresh, point, b"", 0, 2)


Twist = Callable[[int, Tensor], None]


class Lying:
    """A federation of which somebody changes what a sum of rows comes back as.

    Args:
        federation: What it really is.
        twists: What is done to the result of each sum, in turn, given the number of the party that reads it.
    """

    def __init__(self, federation: Federation, *twists: Twist) -> None:
        self._federation, self._twists = federation, list(twists)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._federation, name)

    def all_reduce_(self, x: Tensor) -> Tensor:
        self._federation.all_reduce_(x)
        if self._twists:
            self._twists.pop(0)(self._federation.party, x)
        return x


def honest(party: int, rows: Tensor) -> None:
    pass


def row_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.int64)


def agreed(
    federation: Any, which: str = "ours", peers: TrustedKeys | None = None, settings: str = "same"
) -> dict[int, bytes]:
    own = signing_key_of(federation.name, which)
    return agree(federation, own, peers or TrustedKeys(keys()), settings)


def test_two_and_only_two_have_each_key_and_each_time_another() -> None:
    def act(federation: Federation) -> list[dict[int, bytes]]:
        return [agreed(federation) for _ in range(3)]

    parties = run_parties(4, act)
    for attempt in range(3):
        for one in range(4):
            assert parties[one][attempt].keys() == {0, 1, 2, 3} - {one}
            for other in parties[one][attempt]:
                assert parties[one][attempt][other] == parties[other][attempt][one]
    assert len({key for party in parties for of_it in party for key in of_it.values()}) == 3 * 6


def test_all_hear_what_all_tell() -> None:
    told = run_parties(
        3, lambda federation: all_gather_bytes(federation, bytes([federation.party + 250] * 16), 16)
    )
    assert told == [[bytes([250] * 16), bytes([251] * 16), bytes([252] * 16)]] * 3


# ---- refused


def refused(act: Callable[[Federation], Any]) -> list[str]:
    """Return what the parties raise, each of them, soon."""
    began = time.monotonic()
    said = run_parties(N, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert all(isinstance(error, FederationError) for error in said), said
    return [str(error) for error in said]


def test_a_stranger_is_named() -> None:
    said = refused(lambda f: agreed(f, "strangers" if f.party == 1 else "ours"))
    pinned = signing_key_of("1").public_key
    assert "Party 0 cannot authenticate party 1: this round's keys and members are not signed" in said[0]
    assert pinned in said[0]


def test_two_parties_with_each_others_keys_are_refused() -> None:
    def act(federation: Federation) -> Any:
        other = {0: "1", 1: "0", 2: "2"}[federation.party]
        return agree(federation, signing_key_of(other), TrustedKeys(keys()), "same")

    assert any("cannot authenticate party" in words for words in refused(act))


@pytest.mark.parametrize("party", range(N))
def test_a_key_that_was_swapped_for_all_in_the_same_way_is_noticed_by_its_owner(party: int) -> None:
    """All would sign the same false key, its owner too, and the liar could open what others mask by it."""
    liar = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def swap(_: int, rows: Tensor) -> None:
        rows[party] = row_of(liar)

    said = refused(lambda f: agreed(Lying(f, swap)))
    assert f"What party {party} sent to the others came back modified." in said[party]


def test_keys_that_were_swapped_for_all_but_their_owners_are_signed_by_nobody() -> None:
    liar = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def swap(reader: int, rows: Tensor) -> None:
        for party in range(N):
            if party != reader:
                rows[party] = row_of(liar)

    assert any("cannot authenticate party" in words for words in refused(lambda f: agreed(Lying(f, swap))))


def test_two_keys_in_each_others_place_are_refused() -> None:
    def swap(reader: int, rows: Tensor) -> None:
        if reader == 0:
            rows[[1, 2]] = rows[[2, 1]]

    assert "Party 0 cannot authenticate" in refused(lambda f: agreed(Lying(f, swap)))[0]


def test_a_recorded_meeting_cannot_be_played_again() -> None:
    recorded: list[Tensor] = []

    def record(reader: int, rows: Tensor) -> None:
        if reader == 0:
            recorded.append(rows.clone())

    run_parties(N, lambda f: agreed(Lying(f, record, record)))
    shown, signed = recorded

    def replay(rows_then: Tensor) -> Twist:
        def twist(reader: int, rows: Tensor) -> None:
            for party in range(N):
                if party != reader:
                    rows[party] = rows_then[party]

        return twist

    for twists in ([replay(shown), replay(signed)], [honest, replay(signed)]):
        said = refused(lambda f, twists=twists: agreed(Lying(f, *twists)))
        assert any("cannot authenticate party" in words for words in said)


def test_signatures_that_were_changed_are_refused() -> None:
    def garble(reader: int, rows: Tensor) -> None:
        rows[(reader + 1) % N] += 1

    assert any(
        "cannot authenticate" in words for words in refused(lambda f: agreed(Lying(f, honest, garble)))
    )


def test_parties_that_were_told_different_things_do_not_agree() -> None:
    said = refused(lambda f: agreed(f, settings="0, 1, 2 count" if f.party == 0 else "0 and 2 count"))
    assert any("cannot authenticate party" in words for words in said)


def test_the_exchange_has_its_settings_and_the_round_signed() -> None:
    def act(federation: Federation, mine: Any, view: str) -> None:
        mine.open(federation, lambda: None, view)

    for mine, view in ((masked(bits=32), "same"), (masked(), "other")):
        differs = {2: (mine, view)}
        said = refused(lambda f, differs=differs: act(f, *differs.get(f.party, (masked(), "same"))))
        assert any("cannot authenticate party" in words for words in said)


def test_two_who_meet_are_too_few() -> None:
    said = run_parties(2, lambda f: masked().open(f, lambda: None), may_fail=True)
    assert all("needs 3 parties, only 2 take part" in str(error) for error in said)


# ---- keys by certificate


def certified(federation: Any, tls: TLS | None = None, key: TLS | None = None) -> dict[int, bytes]:
    """Agree by certificates: this party's own, or another one, or with the key of another one."""
    tls = tls or tls_of(federation.name)
    return agree(federation, SigningKey((key or tls).key), CertifiedKeys(tls), "same")


def test_certificates_agree_on_the_keys_that_pinned_ones_would() -> None:
    parties = run_parties(4, certified)
    for one in range(4):
        for other in parties[one]:
            assert parties[one][other] == parties[other][one]
    assert len({key for of_it in parties for key in of_it.values()}) == 6


def test_a_certificate_of_a_foreign_authority_is_no_identity() -> None:
    said = refused(lambda f: certified(f, tls_of("1", "theirs") if f.party == 1 else None))
    assert "Party 0 cannot authenticate the others: the certificate of party 1 is not accepted" in said[0]
    assert "authority has not issued it" in said[0]


def test_a_certificate_of_another_name_is_no_identity() -> None:
    """Party 1 shows party 2's certificate, whose key it lacks; or a good one, of a name that is not its."""
    for shown in ("2", "rendezvous"):
        said = refused(lambda f, shown=shown: certified(f, tls_of(shown) if f.party == 1 else None))
        assert f"party 1 is not accepted: its common name is {shown!r}, not '1'" in said[0]


def test_a_certificate_without_its_key_is_worth_nothing() -> None:
    said = refused(lambda f: certified(f, key=tls_of("1", "theirs") if f.party == 1 else None))
    assert "Party 0 cannot authenticate party 1: this round's keys and members are not signed" in said[0]


def test_a_certificate_that_was_swapped_on_the_way_is_noticed() -> None:
    """Even if it is a good one of the same name, such as an older one of which the key was stolen."""
    other = row_of(CertifiedKeys(_another("1")).shown)

    def swap(reader: int, rows: Tensor) -> None:
        if reader != spared:
            rows[1, 4:] = other

    spared = -1
    said = refused(lambda f: certified(Lying(f, swap)))
    assert "What party 1 sent to the others came back modified." in said[1]
    spared = 1
    assert any("cannot authenticate party" in words for words in refused(lambda f: certified(Lying(f, swap))))


@cache
def _another(name: str) -> TLS:
    """Another certificate of a name by our authority, of another key."""
    folder = authority() / "renewed"
    folder.mkdir(exist_ok=True)
    for file in ("ca.pem", "ca.key"):
        (folder / file).write_bytes((authority() / file).read_bytes())
    return files(make_certificate(folder, name).parent, name)


class _InFiveDays(signing_keys.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "signing_keys.datetime":
        return signing_keys.datetime.fromtimestamp(super().now(tz).timestamp() + 5 * 86400, tz)


def test_an_expired_certificate_is_refused_in_the_middle_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ca(tmp_path)
    for name, days in (("0", 9.0), ("1", 1.0), ("2", 9.0)):
        make_certificate(tmp_path, name, days)
    of_parties = [files(tmp_path, str(party)) for party in range(N)]
    monkeypatch.setattr(signing_keys, "datetime", _InFiveDays)
    said = refused(lambda f: certified(f, of_parties[f.party]))
    assert all("certificate of party 1 is not accepted: it is good from" in words for words in said), said


@pytest.mark.parametrize("shown", [b"", b"\xff\xff", b"\0\x10" + bytes(16), b"\x01\0" + b"0" * 256])
def test_what_is_no_certificate_is_refused_by_name(shown: bytes) -> None:
    row = row_of(shown.ljust(2048, b"\0"))

    def garble(reader: int, rows: Tensor) -> None:
        if reader == 0:
            rows[2, 4:] = row

    assert "the certificate of party 2 is not accepted" in refused(lambda f: certified(Lying(f, garble)))[0]


# ---- which keys an exchange takes


def opened(exchange: SecureAggregation, tls: Callable[[str], TLS] | None = tls_of) -> list[Any]:
    def act(federation: Federation) -> Any:
        federation.tls = tls and tls(federation.name)
        exchange.check(federation)
        return exchange.open(federation, lambda: None).all_reduce_(torch.ones(3))

    return run_parties(N, act, may_fail=True)


def test_an_exchange_takes_the_certificates_of_the_federation() -> None:
    for own in opened(SecureAggregation()):
        torch.testing.assert_close(own, torch.full((3,), 3.0))


def test_keys_may_be_pinned_although_there_are_certificates() -> None:
    """Then the authority, whoever that is, can impersonate nobody."""
    pinned = {str(party): SigningKey(tls_of(str(party)).key).public_key for party in range(N)}
    for own in opened(SecureAggregation(trusted_keys=pinned)):
        torch.testing.assert_close(own, torch.full((3,), 3.0))


def test_the_authority_can_impersonate_a_party_unless_keys_are_pinned() -> None:
    forged = _another("1")
    assert len(run_parties(N, lambda f: certified(f, forged if f.party == 1 else None))) == N
    pinned = TrustedKeys({str(party): SigningKey(tls_of(str(party)).key).public_key for party in range(N)})

    def act(federation: Federation) -> Any:
        own = forged if federation.party == 1 else tls_of(federation.name)
        return agree(federation, SigningKey(own.key), pinned, "same")

    assert "Party 0 cannot authenticate party 1" in refused(act)[0]


def test_an_exchange_without_keys_and_without_certificates_is_refused() -> None:
    for exchange, missing in (
        (SecureAggregation(), "signing_key"),
        (SecureAggregation(trusted_keys=keys()), "signing_key"),
        (SecureAggregation(signing_key=f"{keys()}/{{party}}.key"), "trusted_keys"),
    ):
        for error in opened(exchange, None):
            assert f"SecureAggregation has no {missing}, and there are no certificates" in str(error)


def test_the_key_must_be_that_of_the_certificate() -> None:
    for error in opened(SecureAggregation(signing_key=f"{keys()}/{{party}}.key")):
        assert "or its certificate, has ed25519:" in str(error)


def test_a_certificate_of_another_kind_of_key_needs_a_key_beside_it(tmp_path: Path) -> None:
    make_ca(tmp_path)
    kinds = {name: elliptic(tmp_path, name) for name in "012"}
    for error in opened(SecureAggregation(), kinds.__getitem__):
        assert "is no Ed25519 key, but" in str(error)
    for error in opened(SecureAggregation(signing_key=f"{keys()}/{{party}}.key"), kinds.__getitem__):
        assert "cannot be used for secure aggregation: its key is no Ed25519 key" in str(error)
    own = SecureAggregation(signing_key=f"{keys()}/{{party}}.key", trusted_keys=keys())
    for total in opened(own, kinds.__getitem__):
        torch.testing.assert_close(total, torch.full((3,), 3.0))
