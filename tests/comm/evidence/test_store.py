"""The store of certificates: through a crash, with signatures that come late, and over a fork."""

from pathlib import Path

import pytest
from evidence_chains import ROSTER, Parties

from pellm_lightning.comm.evidence.chain import FILE_NAME, Chain, verify
from pellm_lightning.comm.evidence.store import CertificateStore

PARTIES = Parties()


def begun(directory: Path | None, head: str | None = None, *others: Chain) -> CertificateStore:
    store = CertificateStore(directory)
    store.context.add_terms(PARTIES.terms)
    for identity in PARTIES.identities.values():
        store.context.add_identity(identity)
    store.load(head, *others)
    return store


@pytest.fixture(params=["file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "state" if request.param == "file" else None


def test_a_chain_grows_and_is_what_is_exported(directory: Path | None) -> None:
    store, chain = begun(directory), PARTIES.chain(4)
    for place, certificate in enumerate(chain.certificates):
        store.add(certificate)
        assert (store.complete, store.head) == (place + 1, certificate.statement.hash)
    assert store.read().text == chain.text
    assert not store.pending
    if directory is not None:
        assert (directory / FILE_NAME).read_text() == chain.text
        assert not store._memory, "memory grows with the rounds"


def test_a_restart_continues_the_chain(tmp_path: Path) -> None:
    chain = PARTIES.chain(4)
    store = begun(tmp_path)
    for certificate in chain.certificates[:2]:
        store.add(certificate)
    again = begun(tmp_path, chain.certificates[1].statement.hash)
    for certificate in chain.certificates[2:]:
        again.add(certificate)
    assert (tmp_path / FILE_NAME).read_text() == chain.text


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_crash_while_writing_costs_the_last_certificates_only(tmp_path: Path, cut: int) -> None:
    chain = PARTIES.chain(4)
    store = begun(tmp_path)
    for certificate in chain.certificates:
        store.add(certificate)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text()[:-cut])
    again = begun(tmp_path, chain.head)
    assert again.complete == 0, "the state is of a round whose certificate is gone"
    again.load(chain.head, chain)  # another party's copy
    assert path.read_text() == chain.text
    assert again.complete == 4


def test_signatures_that_come_late_complete_a_chain(directory: Path | None) -> None:
    store, chain = begun(directory), PARTIES.chain(3, ["a", "abc", "ab"])
    for certificate in chain.certificates:
        store.add(certificate)
    assert store.complete == 0
    assert len(store.pending) == 3
    if directory is not None:  # they are not lost
        store = begun(directory, chain.head)
        assert len(store.pending) == 3
    first = store.pending[0]
    first.signatures["c"] = PARTIES.sign(first.statement, "c")
    store.settle()
    assert (store.complete, store.pending) == (3, [])
    verify(store.read())


def test_other_terms_are_complete_by_those_before(directory: Path | None) -> None:
    """What counts as complete here is what is verified elsewhere."""
    store, chain, others = begun(directory), PARTIES.chain(1), Parties(quorum=1)
    store.context.add_terms(others.terms)
    store.add(chain.certificates[0])
    following = others.following(chain.certificates[0].statement)
    store.add(others.certificate(following, "c"))
    assert store.complete == 1
    store.pending[0].signatures["a"] = others.sign(following, "a")
    store.settle()
    assert store.complete == 2
    verify(store.read())


def test_a_fork_is_set_aside_and_not_lost(tmp_path: Path) -> None:
    """All resume an older checkpoint: what a quorum had signed after it stays, under another name."""
    chain = PARTIES.chain(4)
    store = begun(tmp_path)
    for certificate in chain.certificates:
        store.add(certificate)
    older = Chain(chain.terms, chain.identities, chain.certificates[:2])
    again = begun(tmp_path, older.head, older)
    again.add(PARTIES.certificate(PARTIES.following(older.certificates[-1].statement, attempt=9)))
    verify(Chain.parse((tmp_path / FILE_NAME).read_text()))
    (aside,) = tmp_path.glob("evidence-*.jsonl")
    assert aside.read_text() == chain.text
    assert aside.name.startswith(f"evidence-{chain.head:.16}")


def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_text('{"round": 1}\n')
    store = begun(tmp_path)
    assert store.complete == 0
    assert "line 1 is no evidence" in caplog.text
    assert (tmp_path / f"{FILE_NAME}.damaged").exists()


def test_where_signatures_are_missing_for_ever_memory_is_bounded() -> None:
    store = begun(None)
    before = None
    for _ in range(1100):
        before = PARTIES.following(before)
        store.add(PARTIES.certificate(before, ROSTER[:1]))
    assert len(store.pending) == 1000
