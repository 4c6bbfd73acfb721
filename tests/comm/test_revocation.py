"""Revocation lists: the authority's alone count, the newest counts, and they count while connections live."""

import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
from certificates import files, unreadable_lists

from pellm_lightning.comm.keys import make_ca, make_certificate, revoke, sign_request
from pellm_lightning.comm.revocation import RevocationFile, RevocationList
from pellm_lightning.comm.signing_keys import CertifiedKeys
from pellm_lightning.comm.tls import TLS, is_revoked, peer_name


@pytest.fixture
def office(tmp_path: Path) -> Path:
    make_ca(tmp_path)
    for name in ("a", "b", "rendezvous"):
        make_certificate(tmp_path, name)
    return tmp_path


def pair(one: TLS, other: TLS) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Two ends of one connection: the client's, of ``one``, and the server's."""
    ours, theirs = socket.socketpair()
    served: list[ssl.SSLSocket] = []
    thread = threading.Thread(
        target=lambda: served.append(other.server_context.wrap_socket(theirs, server_side=True))
    )
    thread.start()
    client = one.client_context.wrap_socket(ours)
    thread.join(10)
    return client, served[0]


def test_a_list_counts_for_connections_that_are_open(office: Path) -> None:
    own, other = files(office, "a"), files(office, "b")
    client, server = pair(own, other)
    with client, server:
        assert (peer_name(client), is_revoked(client)) == ("b", False)
        path = revoke(office, ["b"])
        assert path == office / "ca.crl"
        assert is_revoked(client)
        assert not is_revoked(server)
        with pytest.raises(ssl.SSLCertVerificationError, match="authority has revoked it"):
            peer_name(client)
    assert own.revoked == {other.serial}


def test_a_revoked_party_does_not_start(office: Path) -> None:
    own = files(office, "a")
    other = office / "copy.pem"
    other.write_bytes((office / "b.pem").read_bytes())
    revoke(office, ["b"])
    with pytest.raises(
        ValueError, match=r"copy\.pem is not accepted .*the federation's authority has revoked"
    ):
        TLS(str(other), str(office / "b.key"), str(office / "ca.pem"))
    revoke(office, ["a"])
    with pytest.raises(ValueError, match="the authority has revoked it"):
        CertifiedKeys(own)


def test_another_certificate_can_be_signed_at_once(office: Path) -> None:
    revoke(office, ["b"])
    assert (office / "b.pem.revoked").exists()
    sign_request(office, "b")
    assert files(office, "b").name == "b"


def test_lists_grow_and_the_newest_counts(office: Path) -> None:
    own = files(office, "a")
    serials = {files(office, name).serial for name in ("b", "rendezvous")}
    first = revoke(office, ["b", "b"]).read_bytes()
    revoke(office, ["rendezvous"])
    assert own.revoked == serials
    (office / "ca.crl").write_bytes(first)  # somebody brings back the old list
    assert own.revoked == serials
    assert own.revocations is not None
    assert not own.revocations.take(first)
    assert RevocationFile(office / "ca.crl", (office / "ca.pem").read_bytes()).newest is not None


def test_a_list_of_another_authority_does_not_count(office: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    make_ca(stranger)
    make_certificate(stranger, "b")
    foreign = revoke(stranger, ["b"]).read_bytes()
    with pytest.raises(ValueError, match="the federation's authority has not signed it"):
        RevocationList.parse(foreign, (office / "ca.pem").read_bytes())
    own = files(office, "a")
    assert own.revocations is not None
    (office / "ca.crl").write_bytes(foreign)
    assert not own.revoked
    assert "has not signed it" in own.revocations.problem
    with pytest.raises(ValueError, match=r"ca\.crl cannot be used: .*that `pellm keys revoke`"):
        files(office, "a")


def test_each_authority_has_its_own_newest_list(office: Path, tmp_path: Path) -> None:
    """During a rollover: the second authority's number is greater, and its list takes nothing back."""
    second, both = tmp_path / "second", tmp_path / "both"
    for folder in (second, both):
        make_ca(folder)
    for name in ("a", "b", "c"):
        make_certificate(second, name)
    old, new = ((folder / "ca.pem").read_bytes() for folder in (office, second))
    serials = [files(office, "b").serial, files(second, "b").serial, files(second, "c").serial]
    first = revoke(office, ["b"]).read_bytes()
    half = revoke(second, ["b"]).read_bytes()
    whole = revoke(second, ["c"]).read_bytes()
    known = RevocationFile(both / "ca.crl", old + new)
    assert [known.take(pem) for pem in (whole, first, half, first, whole)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert set(known.serials) == set(serials)
    known.keep()
    again = RevocationFile(both / "ca.crl", new + old)
    assert set(again.serials) == set(serials)
    assert again.newest is not None
    assert known.newest is not None
    assert again.newest.number == known.newest.number == 3
    with pytest.raises(ValueError, match="it cannot be read"):  # half a list changes nothing, also in a row
        RevocationFile(tmp_path / "none.crl", old + new).take(first + whole[:-40])
    (both / "ca.crl").write_bytes(half + first)
    assert set(RevocationFile(both / "ca.crl", old + new).serials) == set(serials[:2])
    assert set(known.serials) == set(serials)


@pytest.mark.parametrize("which", [0, 1])
def test_a_list_that_cannot_be_read_does_not_count(office: Path, tmp_path: Path, which: int) -> None:
    """Whoever signed it; a stranger's is not even looked into."""
    make_ca(tmp_path / "stranger")
    authorities = (office / "ca.pem").read_bytes()
    with pytest.raises(ValueError, match="the federation's authority has not signed it"):
        RevocationList.parse(unreadable_lists(tmp_path / "stranger")[which], authorities)
    with pytest.raises(ValueError, match="it cannot be read"):
        RevocationList.parse(unreadable_lists(office)[which], authorities)


@pytest.mark.parametrize(
    "content", [b"", b"half of a", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"]
)
def test_half_a_list_changes_nothing_in_a_run(office: Path, content: bytes) -> None:
    own = files(office, "a")
    revoke(office, ["b"])
    before = own.revoked
    assert len(before) == 1
    (office / "ca.crl").write_bytes(content)
    os.utime(office / "ca.crl", ns=(1, 1))
    assert own.revoked == before
    assert own.revocations is not None
    assert own.revocations.problem
    own.revocations.keep()
    assert own.revoked == before
    assert own.revocations.problem == ""


def test_what_cannot_be_revoked_is_named(office: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.pem is no certificate of c that this authority has issued"):
        revoke(office, ["c"])
    (office / "c.pem").write_bytes((office / "b.pem").read_bytes())
    with pytest.raises(ValueError, match="its common name is 'b', not 'c'"):
        revoke(office, ["c"])
    assert not (office / "ca.crl").exists()
