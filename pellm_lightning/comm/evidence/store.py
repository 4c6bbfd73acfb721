"""Store of a party's certificates: those that are complete in a file, those that lack signatures apart."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pellm_lightning.comm.evidence.certificate import EvidenceError, RoundCertificate, RoundStatement
from pellm_lightning.comm.evidence.chain import FILE_NAME, Chain, lacking

log = logging.getLogger(__name__)

_PENDING = "evidence-pending.jsonl"
# Where signatures are missing for ever, memory must not grow for ever.
_MAX_PENDING = 1000


class CertificateStore:
    """Certificates of the present run: complete ones from round 0 on, then those that lack signatures.

    With a directory, memory does not grow with the complete ones.

    Args:
        directory: Where they are kept through a restart; None keeps them in memory.

    Example:
        >>> store = CertificateStore(None)
        >>> store.complete, store.head
        (0, None)
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._memory: list[RoundCertificate] = []
        self._written: set[str] = set()
        self.newest: RoundStatement | None = None
        """Statement of the last complete one."""
        self.pending: list[RoundCertificate] = []
        """Certificates after these, in order; the first ones may be missing."""
        self.context = Chain()
        """Terms and identities to which certificates refer."""

    @property
    def complete(self) -> int:
        """Index of the first round whose certificate is not complete."""
        return 0 if self.newest is None else self.newest.round + 1

    @property
    def head(self) -> str | None:
        """Hash of the last complete one's statement."""
        return None if self.newest is None else self.newest.hash

    @property
    def last(self) -> str | None:
        """Hash of the last statement that is known."""
        return self.pending[-1].statement.hash if self.pending else self.head

    def read(self) -> Chain:
        """Return the certificates that follow each other from round 0 on, the last perhaps not complete."""
        kept = self._memory
        if self._directory is not None and self.complete:
            kept = self._parsed(FILE_NAME).certificates
        chain = Chain(self.context.terms, self.context.identities, [*kept])
        for certificate in self.pending:
            if certificate.statement.previous != chain.head:
                break
            chain.certificates.append(certificate)
        return chain

    def load(self, head: str | None, *others: Chain) -> None:
        """Begin with all that is known of the chain that ends with a statement.

        Args:
            head: The statement's hash; None begins a new chain.
            others: Chains from elsewhere, to look into besides the files.
        """
        known: dict[str, RoundCertificate] = {}
        for chain in (self._parsed(FILE_NAME), self._parsed(_PENDING), *others):
            self.context.terms |= chain.terms
            self.context.identities |= chain.identities
            for certificate in chain.certificates:
                kept = known.setdefault(certificate.statement.hash, certificate)
                kept.signatures |= certificate.signatures
        found: list[RoundCertificate] = []
        while head is not None and head in known:
            found.append(known[head])
            head = found[-1].statement.previous
        self._replace(found[::-1], has_gap=head is not None)

    def add(self, certificate: RoundCertificate) -> None:
        """Add the certificate of the next round."""
        self.pending = [*self.pending[1 - _MAX_PENDING :], certificate]
        self.settle()

    def extend(self, chain: Chain) -> None:
        """Add verified certificates that follow the complete ones, in place of those that lack signatures."""
        self.context.terms |= chain.terms
        self.context.identities |= chain.identities
        waiting = {certificate.statement.hash: certificate.signatures for certificate in self.pending}
        for certificate in chain.certificates:
            certificate.signatures |= waiting.get(certificate.statement.hash, {})
        self.pending = [*chain.certificates]
        self.settle()

    def settle(self) -> None:
        """Write pending certificates: those that are complete, as far as none before lacks signatures."""
        whole = self._complete(self.pending, self.newest)
        if whole:
            self._append(whole)
            self.pending = self.pending[len(whole) :]
        self._write_pending()

    def _complete(
        self, certificates: Iterable[RoundCertificate], before: RoundStatement | None
    ) -> list[RoundCertificate]:
        """Return those that are complete, as far as each follows the one before."""
        whole: list[RoundCertificate] = []
        for certificate in certificates:
            follows = certificate.statement.previous == (None if before is None else before.hash)
            if not follows or lacking(certificate, self.context, before):
                break
            whole.append(certificate)
            before = certificate.statement
        return whole

    def _replace(self, found: Sequence[RoundCertificate], *, has_gap: bool) -> None:
        """Take certificates for the chain; set a file aside that has others."""
        whole = [] if has_gap else self._complete(found, None)
        self.pending, self._written = [*found[len(whole) :]], set()
        self.newest = whole[-1].statement if whole else None
        self._memory = [] if self._directory else whole
        if self._directory is not None and not has_gap:  # else the file may be a part of the chain
            lines = self.context.lines(whole, self._written)
            kept, path = self._parsed(FILE_NAME), self._directory / FILE_NAME
            text = "".join(f"{line}\n" for line in lines)
            if kept.certificates and kept.certificates[-1].statement.hash not in {
                c.statement.hash for c in whole
            }:
                path.replace(path.with_name(f"evidence-{kept.certificates[-1].statement.hash[:16]}.jsonl"))
            if text if not path.exists() else text != path.read_text(encoding="utf-8", errors="replace"):
                self._write(FILE_NAME, text)
        self._write_pending()

    def _append(self, certificates: Sequence[RoundCertificate]) -> None:
        """Write complete certificates behind the others, durably."""
        self.newest = certificates[-1].statement
        if self._directory is None:
            self._memory += certificates
            return
        lines = self.context.lines(certificates, self._written)
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / FILE_NAME).open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _write_pending(self) -> None:
        if self._directory is None:
            return
        if self.pending:
            lines = self.context.lines(self.pending, set())
            self._write(_PENDING, "".join(f"{line}\n" for line in lines))
        else:
            (self._directory / _PENDING).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        """Write a file in one step, durably."""
        directory = self._directory or Path()
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = directory / f"{name}.partial"
        with unfinished.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(directory / name)

    def _parsed(self, name: str) -> Chain:
        """Return the chain in a file, without a last line that a crash has cut off."""
        path = None if self._directory is None else self._directory / name
        if path is None or not path.exists():
            return Chain()
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            return Chain.parse(text[: text.rfind("\n") + 1])
        except EvidenceError as error:
            log.warning("%s is not used: %s. The other parties' copies take its place.", path, error)
            path.replace(path.with_name(f"{name}.damaged"))
            return Chain()
