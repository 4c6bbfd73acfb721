"""A certificate is revoked while jobs run: within a round the others continue without it, and say so."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import files, unreadable_lists
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from job_threads import World
from party_threads import in_threads

from pellm_lightning import Aggregator
from pellm_lightning.comm import TLS, ElasticFederation, FederationError, Membership
from pellm_lightning.comm.elastic.quorum_view import QuorumMember
from pellm_lightning.comm.elastic.revoked_members import RevokedMembers
from pellm_lightning.comm.keys import _authority as authority_of
from pellm_lightning.comm.keys import make_ca, make_certificate, revoke, sign_request
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer

ROSTER = ["p0", "p1", "p2", "p3"]


class Office:
    """An administrator's folder, and one for each party, on which nobody else writes."""

    def __init__(self, path: Path) -> None:
        self.path = path / "office"
        make_ca(self.path)
        for name in (*ROSTER, "rendezvous"):
            make_certificate(self.path, name)
            self.hand_out(name)

    def hand_out(self, name: str) -> TLS:
        own = self.path.parent / name
        own.mkdir(exist_ok=True)
        for file in (f"{name}.pem", f"{name}.key", "ca.pem"):
            shutil.copy(self.path / file, own)
        return files(own, name)

    def tls(self, name: str) -> TLS:
        return files(self.path.parent / name, name)

    def revoke(self, name: str, *told: str) -> None:
        """Revoke a certificate, and put the list beside the ca.pem of some."""
        path = revoke(self.path, [name])
        for other in told:
            shutil.copy(path, self.path.parent / other)

    def list_of(self, name: str) -> Path:
        return self.path.parent / name / "ca.crl"


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


@pytest.fixture
def world(office: Office) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**arguments: Any) -> World:
        worlds.append(World(4, tls=office.tls, round_timeout_s=20.0, **arguments))
        return worlds[-1]

    yield make
    for w in worlds:
        w.close()


def test_a_member_that_is_revoked_is_left_out_within_a_round(
    world: Callable[..., World], office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """One party alone has the list; all others take it over as they join, the revoked one as well."""
    w = world(rounds=999)
    w.start(pace_s=0.02)
    w.until(lambda: w.counts("p3"))
    office.revoke("p3", "p1")
    began = w.reached
    gone = w.lives[3].join()
    assert isinstance(gone.error, FederationError)
    assert "The certificate of party p3 was revoked by the federation's authority" in str(gone.error)
    w.lives.remove(gone)
    w.until(lambda: w.reached > began + 4)
    w.finish()
    after = [e for e in w.settled if e.round > began + 2]
    assert after
    assert all("p3" not in entry.members for entry in after)
    assert "continues without party p3: " in caplog.text  # it may have left before, by the same list
    assert all(office.list_of(name).exists() for name in ("p0", "p1", "p2"))
    w.judged()


def test_a_revoked_party_that_is_always_too_early_learns_it_from_the_view(
    world: Callable[..., World], office: Office
) -> None:
    """The view of the others is there before it looks again at who has joined."""
    w = world(rounds=999)
    w.start("p0", "p1", "p2", pace_s=0.02)
    others = ("member/@p0", "member/@p1", "member/@p2")
    (early,) = w.start("p3", twist=lambda key, value: None if key.endswith(others) else value)
    w.until(lambda: w.counts("p3"))
    office.revoke("p3", "p1")
    assert "was revoked by the federation's authority" in str(early.join(10).error)
    w.lives.remove(early)
    w.finish()


def test_a_made_up_list_harms_nobody(
    world: Callable[..., World], office: Office, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A party shows lists that it has made itself, or that nobody can read."""
    make_ca(tmp_path / "stranger")
    lists = [*unreadable_lists(tmp_path / "stranger"), *unreadable_lists(office.path), b"no list"]
    w = world(rounds=999)
    lives = w.start(pace_s=0.02)
    w.until(lambda: w.counts("p3"))
    assert lives[3].federation is not None
    tracker = lives[3].federation._revoked
    made_up = type("MadeUp", (type(tracker),), {"pem": property(lambda self: next(shown))})
    shown = cycle(made.decode() for made in lists)
    tracker.__class__ = made_up
    began = w.reached
    w.until(lambda: w.reached > began + 6)
    w.finish()
    assert "received a revocation list that does not count: the federation's authority has not" in caplog.text
    assert "received a revocation list that does not count: it cannot be read" in caplog.text
    assert not any(office.list_of(name).exists() for name in ROSTER)


def test_a_list_too_long_to_pass_on_counts_where_it_lies(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """An institution's authority revokes more certificates than those of the federation."""
    ca, key = authority_of(office.path)
    now = datetime.now(timezone.utc)
    builder = x509.CertificateRevocationListBuilder(ca.subject, now, ca.not_valid_after_utc)
    builder = builder.add_extension(x509.CRLNumber(7), critical=False)
    for serial in [*range(1 << 100, (1 << 100) + 2000), office.tls("p3").serial]:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    office.list_of("p0").write_bytes(builder.sign(key, None).public_bytes(serialization.Encoding.PEM))
    members = RevokedMembers("p0", office.tls("p0"))
    member = QuorumMember(1, "now", "host:1", "digest", None, 0, "", "exchange", "", False, {})
    entry = replace(member, serial=members.serial, revoked=members.pem)
    assert QuorumMember.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    gone = replace(member, serial=RevokedMembers("p3", office.tls("p3")).serial)
    assert [*members.without({"p0": entry, "p3": gone})] == ["p0"]
    assert members.pem == ""
    assert caplog.text.count("too long to pass on: put it next to ca.pem at every party") == 1


def test_with_a_new_certificate_the_party_comes_back(world: Callable[..., World], office: Office) -> None:
    w = world(rounds=999)
    w.start("p0", "p1", "p2", pace_s=0.02)
    old = office.tls("p3")
    office.revoke("p3", "p0")
    (refused,) = w.start("p3")
    refused.join()
    assert "was revoked by the federation's authority" in str(refused.error)
    w.lives.remove(refused)
    (office.path.parent / "p3" / "ca.crl").unlink(missing_ok=True)
    sign_request(office.path, "p3")
    assert office.hand_out("p3").serial != old.serial
    w.start("p3", pace_s=0.02)
    w.until(lambda: w.counts("p3"))
    w.finish()


def test_a_party_that_conceals_its_certificate_gets_no_connection(
    world: Callable[..., World], office: Office
) -> None:
    """It joins with another's number, and is left out once its connections show the certificate."""
    w = world(rounds=999, exchange_timeout_s=0.8)
    w.start("p0", "p1", "p2", pace_s=0.02)
    (liar,) = w.start("p3", pace_s=0.02)
    w.until(lambda: w.counts("p3"))
    assert liar.federation is not None
    tracker = liar.federation._revoked
    tracker._file = None
    concealed = type("Concealing", (type(tracker),), {"serial": property(lambda self: "1f")})
    tracker.__class__ = concealed
    office.revoke("p3", "p0", "p1", "p2")
    began = w.reached
    w.until(lambda: w.reached > began + 6 and not w.counts("p3", since=w.reached - 3), timeout_s=30)
    liar.stop()
    liar.join()
    w.lives.remove(liar)
    w.finish()


def test_the_rendezvous_refuses_a_revoked_certificate_at_once(office: Office) -> None:
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=office.tls("rendezvous")) as server:
        stores = {
            name: RendezvousStore(server.address, tls=office.tls(name), retry_s=2) for name in ROSTER[:2]
        }
        for store in stores.values():
            store.compare_set("key", "", "value")
        office.revoke("p1", "rendezvous")
        with pytest.raises(FederationError, match=r"does not admit this party \(as 'p1'.*nor been revoked"):
            stores["p1"].compare_set("key", "value", "another")
        with pytest.raises(FederationError, match="does not admit this party"):
            RendezvousStore(server.address, tls=office.tls("p1"), retry_s=2)
        assert stores["p0"].get("key") == b"value"
        for store in stores.values():
            store.close()


def test_a_revoked_rendezvous_is_no_rendezvous(office: Office) -> None:
    office.revoke("rendezvous", "p0")
    with (
        RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=office.tls("rendezvous")) as server,
        pytest.raises(
            FederationError, match="its certificate is not accepted: the federation's authority has"
        ),
    ):
        RendezvousStore(server.address, tls=office.tls("p0"), retry_s=2)


def test_a_party_alone_may_be_revoked(office: Office) -> None:
    """Nobody is there to leave it out: its own list says so."""
    store = torch.distributed.HashStore()
    federation = ElasticFederation(
        lambda: store, "p0", ["p0"], membership=Membership(wait_s=5), tls=office.tls("p0")
    )
    aggregator = Aggregator(federation, {"w": torch.zeros(2)})
    aggregator.start()
    aggregator.step(1.0)
    office.revoke("p0", "p0")
    with pytest.raises(FederationError, match="The certificate of party p0 was revoked"):
        aggregator.step(1.0)
    federation.abort()


def test_the_rendezvous_alone_can_end_a_revoked_party(
    office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """Two parties over the real one, whose list is the only one: the heartbeat ends as the rounds do."""
    names = ROSTER[:2]
    with RendezvousServer("127.0.0.1", 0, roster=names, tls=office.tls("rendezvous")) as server:
        failed: dict[str, BaseException] = {}

        def party(name: str) -> None:
            tls = office.tls(name)
            membership = Membership(heartbeat_ttl_s=0.6, wait_s=2.0)
            federation = ElasticFederation(
                lambda: RendezvousStore(server.address, tls=tls, retry_s=1),
                name,
                names,
                membership=membership,
                tls=tls,
            )
            aggregator = Aggregator(federation, {"w": torch.zeros(2)})
            try:
                aggregator.start()
                while True:
                    aggregator.step(1.0)
                    if name == names[1] and aggregator.round == 3:
                        office.revoke(name, "rendezvous")
            except FederationError as error:
                failed[name] = error
            federation.abort()

        in_threads([partial(party, name) for name in names])
    assert "does not admit this party (as 'p1'" in str(failed["p1"])
    assert "missing: p1" in str(failed["p0"])
