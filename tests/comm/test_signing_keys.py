"""Who a party is: a key of its own, and everybody's public keys pinned."""

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from party_threads import run_parties
from secure_exchange import keys, masked, signing_key_of

from pellm_lightning import Federation
from pellm_lightning.comm.keys import make_ca, make_key, public_text, read_public_key, sign_request
from pellm_lightning.comm.signing_keys import SigningKey, TrustedKeys
from pellm_lightning.exchange import SecureAggregation


# RFC 8032, section 7.1, tests 1 and 2: secret key, public key, message, signature.
@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_signatures_are_ed25519_as_rfc_8032_has_it(
    tmp_path: Path, secret: str, public: str, message: str, signature: str
) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    (tmp_path / "a.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    signing_key = SigningKey(tmp_path / "a.key")
    words = f"ed25519:{base64.b64encode(bytes.fromhex(public)).decode()}"
    assert signing_key.public_key == words
    assert signing_key.sign(bytes.fromhex(message)).hex() == signature
    trusted = TrustedKeys({"a": words})
    assert trusted.verify("a", bytes.fromhex(signature), bytes.fromhex(message))
    assert not trusted.verify("a", bytes.fromhex(signature), bytes.fromhex(message) + b"x")
    assert not trusted.verify("a", bytes(64), bytes.fromhex(message))


def test_a_folder_may_hold_requests_or_certificates(tmp_path: Path) -> None:
    """Who signed a certificate, and whether it is still good, does not matter: its key is pinned."""
    private, words = make_key(tmp_path / "new", "clinic-a")
    assert SigningKey(private).public_key == words
    assert words not in private.read_text()
    assert make_key(tmp_path / "new", "clinic-b")[1] != words
    make_key(tmp_path / "new", "rendezvous")
    pinned = TrustedKeys(tmp_path / "new")
    assert pinned.get("clinic-a") == words
    make_ca(tmp_path / "new")
    sign_request(tmp_path / "new", "clinic-a")
    assert TrustedKeys(tmp_path / "new").fingerprint == pinned.fingerprint
    (tmp_path / "new/clinic-a.csr").unlink()
    assert TrustedKeys(tmp_path / "new").fingerprint == pinned.fingerprint
    assert TrustedKeys(tmp_path / "new").get("rendezvous") is None


def test_a_folder_with_two_keys_of_one_party_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path, "a")
    make_ca(tmp_path)
    sign_request(tmp_path, "a")
    (tmp_path / "a.csr").unlink()
    (tmp_path / "a.key").unlink()
    make_key(tmp_path, "a")
    with pytest.raises(ValueError, match=r"a\.pem has another key than the a\.csr"):
        TrustedKeys(tmp_path)


def test_what_is_no_identity_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read.*keys"):
        SigningKey(tmp_path / "none.key")
    (tmp_path / "words.key").write_text("words")
    with pytest.raises(ValueError, match="cannot be read"):
        SigningKey(tmp_path / "words.key")
    other = generate_private_key(SECP256R1())
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (tmp_path / "other.key").write_bytes(other.private_bytes(*pem, serialization.NoEncryption()))
    with pytest.raises(ValueError, match="is no Ed25519 key"):
        SigningKey(tmp_path / "other.key")
    locked = Ed25519PrivateKey.generate().private_bytes(
        *pem, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked.key").write_bytes(locked)
    with pytest.raises(ValueError, match="cannot be read"):
        SigningKey(tmp_path / "locked.key")


GOOD = "ed25519:" + base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        ({}, "holds no public keys"),
        ({"a": "abc"}, "public key of party a is no key .it does not begin with 'ed25519:'"),
        ({"a": "ed25519:abc"}, "public key of party a is no key"),
        ({"a": "ed25519:" + base64.b64encode(bytes(31)).decode()}, "public key of party a is no key"),
        ({"a": 7}, "public key of party a is no key"),
        ({"a": GOOD, "b": GOOD}, "Parties a and b have the same public key"),
    ],
)
def test_malformed_peers_are_refused_by_name(peers: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrustedKeys(peers)


def test_an_empty_folder_holds_no_peers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no public keys"):
        TrustedKeys(tmp_path)


def test_the_fingerprint_tells_any_difference() -> None:
    a, b, c = (signing_key_of(name).public_key for name in "012")
    same = {TrustedKeys({"a": a, "b": b}).fingerprint, TrustedKeys({"b": b, "a": a}).fingerprint}
    assert len(same) == 1
    others = [{"a": b, "b": a}, {"a": a, "c": b}, {"a": a, "b": b, "c": c}, {"a": a}]
    assert not same & {TrustedKeys(other).fingerprint for other in others}


def test_peers_may_be_in_words_or_in_a_folder() -> None:
    words = {path.stem: public_text(read_public_key(path)) for path in keys().glob("*.csr")}
    assert repr(masked(trusted_keys=words)) == repr(masked())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 16}, "bits=16 must be 32 or 64"),
        ({"fractional_bits": 0}, "fractional_bits=0 must be an integer from 1 to 56"),
        ({"fractional_bits": 57}, "from 1 to 56"),
        ({"fractional_bits": 25, "bits": 32}, "from 1 to 24"),
        ({"fractional_bits": True}, "fractional_bits=True"),
    ],
)
def test_settings_are_checked_when_they_are_made(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masked(**arguments)


def test_all_that_must_be_equal_is_in_its_words() -> None:
    ours = masked()
    peers = {str(party): signing_key_of(str(party)).public_key for party in range(3)}
    others = [masked(bits=32), masked(fractional_bits=20), masked(trusted_keys=peers)]
    assert len({repr(exchange) for exchange in (ours, *others)}) == 4
    assert repr(masked(signing_key="elsewhere")) == repr(ours), "each keeps its key where it likes"


# ---- refused before a federation begins


def refused(num_parties: int, exchange: SecureAggregation) -> list[str]:
    def act(federation: Federation) -> str:
        with pytest.raises(ValueError, match="part") as caught:
            exchange.check(federation)
        return str(caught.value)

    return run_parties(num_parties, act)


def test_two_parties_are_too_few() -> None:
    for words in refused(2, masked()):
        assert "needs 3 parties, not 2" in words
        assert "subtracting its own" in words


def test_a_party_without_a_pinned_key_is_named() -> None:
    peers = {str(party): signing_key_of(str(party)).public_key for party in range(2)}
    for words in refused(4, masked(trusted_keys=peers)):
        assert "trusted_keys has no public key of party 2, 3." in words


def test_anothers_key_is_no_identity() -> None:
    for party, words in enumerate(refused(3, masked(signing_key=f"{keys('strangers')}/{{party}}.key"))):
        assert f"of party {party} has the public key ed25519:" in words
        assert signing_key_of(str(party)).public_key in words
