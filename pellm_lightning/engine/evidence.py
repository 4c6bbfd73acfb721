"""Evidence of rounds: each party states what a round did, signs that, and keeps what a quorum has signed."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellm_lightning.comm import FederationError, PartyLostError, Version
from pellm_lightning.comm.evidence.certificate import (
    EvidenceError,
    FederationTerms,
    Identity,
    RoundCertificate,
    RoundStatement,
    Signature,
    weights_of,
)
from pellm_lightning.comm.evidence.chain import Chain, is_signed, refused, verify
from pellm_lightning.comm.evidence.dispute import dispute_of, equivocators
from pellm_lightning.comm.evidence.signer import RoundSigner
from pellm_lightning.comm.evidence.store import CertificateStore
from pellm_lightning.engine.compatibility import PROTOCOL
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.coordination import Header
from pellm_lightning.engine.participants import Participants
from pellm_lightning.exchange import SecureAggregation
from pellm_lightning.tensors.flat_buffer import Layout
from pellm_lightning.tensors.parameters_digest import parameters_digest
from pellm_lightning.tensors.snapshot import bytes_of, dtype_code

log = logging.getLogger(__name__)

# Terms of some million parameters; and of a round per party its name, three times, weight and signature.
_MAX_BYTES = 1 << 28
_MAX_SIGNER_BYTES = 1 << 10
# Signatures that a party shows as it joins: what a meeting has not completed, later ones hardly do.
_MAX_SHOWN = 16


class EvidenceKeeper:
    """Evidence of one party: states and signs rounds, gathers the others' signatures, keeps the certificates.

    Only separate jobs leave evidence: they vote on each round, and the vote carries the signature. All of
    them state each round if they have keys, for TLS or secure aggregation, so that the statement is a part of
    the global state on which they vote.

    Args:
        context: What the aggregator works with.
        directory: Where certificates are kept through a restart; None keeps them in memory.
    """

    def __init__(self, context: EngineContext, directory: Path | None) -> None:
        federation = context.federation
        self.is_on = federation.may_lose_parties and (
            context.exchange.is_secure or federation.tls is not None
        )
        """Whether rounds are stated."""
        self._context, self._federation = context, federation
        self._signer = _signer(context) if self.is_on else None
        self._store = CertificateStore(directory if self.is_on else None)
        self._saved = Chain()
        self._signers: dict[str, Identity] = {}
        self._shown: dict[str, Any] = {}
        self._directory = directory
        self._stated: RoundStatement | None = None
        if self._signer is not None:
            self._signers[federation.name] = self._signer.identity
            federation.keep_votes = self.keep_votes
        self._base = ""
        self._layout: Layout | None = None
        self._terms: FederationTerms | None = None
        self._refused: set[str] = set()

    @property
    def identity(self) -> dict[str, Any] | None:
        """This party as a signer, for the others; None if it signs nothing."""
        return None if self._signer is None else json.loads(self._signer.identity.text)

    @property
    def text(self) -> str | None:
        """The chain of certificates up to now, as it is exported; None without evidence."""
        return None if self._signer is None else self._store.read().text

    # ---- a restart

    def load(self, text: str | None) -> None:
        """Remember the chain in a checkpoint, for ``resume``."""
        try:
            self._saved = Chain.parse(text or "")
        except EvidenceError as error:
            raise ValueError(
                f"The checkpoint's evidence cannot be read: {error}. Take another one."
            ) from error

    def resume(self, statement: RoundStatement | None) -> None:
        """Continue the chain that ends with the statement in the global state of this party."""
        if self._signer is not None:
            self._store.load(None if statement is None else statement.hash, self._saved)
            self._saved = Chain()
            self._pend(statement)

    # ---- a meeting

    def shown(self) -> dict[str, Any]:
        """Return what this party shows as it joins: which certificates it has, and signatures for others."""
        if self._signer is None:
            return {}
        own = self._federation.name
        signed = {
            c.statement.hash: c.signatures[own].value
            for c in self._store.pending[-_MAX_SHOWN:]
            if own in c.signatures
        }
        return {"held": [self._store.complete, self._store.head], "signatures": signed}

    def hear(self, headers: Mapping[str, Header]) -> None:
        """Add the signatures that others show to certificates that lack some."""
        heard = False
        for name, header in headers.items():
            shown = header.evidence.get("signatures")
            signatures = shown if isinstance(shown, dict) else {}
            for certificate in self._store.pending:
                value = signatures.get(certificate.statement.hash)
                if isinstance(value, str) and name not in certificate.signatures:
                    heard |= self._take(certificate, name, value)
        if heard:
            self._store.settle()

    def synchronize(
        self,
        headers: Mapping[str, Header],
        identities: Sequence[Any],
        statement: RoundStatement | None,
        result: str | None,
    ) -> None:
        """Send the certificates to members that lack some; every member calls this.

        Args:
            headers: Of the members.
            identities: What each of them has shown of itself as a signer.
            statement: The last one in the global state.
            result: Digest of the global parameters if this party has just received them.

        Raises:
            PartyLostError: If what is received does not hold: another member is asked in the next attempt.
            FederationError: If a quorum has sent such.
        """
        if not self.is_on:
            return
        self._learn(headers, identities)
        self.hear(headers)
        held = {name: _held(header) for name, header in headers.items()}
        rounds = 0 if statement is None else statement.round + 1
        keep = {name: place for name, place in held.items() if place is not None}
        whole = [name for name, place in keep.items() if not headers[name].behind and place[0] == rounds > 0]
        lacking = {name: place for name, place in keep.items() if headers[name].behind or place[0] < rounds}
        if whole and lacking:
            version = self._federation.version(0)
            source = whole[version.attempt % len(whole) if version else 0]
            self._send(source, lacking, statement, result)
        elif self._signer is not None and statement is not None and self._store.last != statement.hash:
            self._store.load(statement.hash)
            self._pend(statement)

    # ---- a round

    def begin(self, statement: RoundStatement | None, layout: Layout, vector: Tensor) -> None:
        """Note what a round starts from."""
        if self.is_on:
            self._store.context.add_terms(self._terms_of(layout))
            self._base = digest(layout, vector) if statement is None else statement.result

    def state_round(
        self,
        before: RoundStatement | None,
        participants: Participants,
        version: Version,
        epsilon: float | None,
        layout: Layout,
        vector: Tensor,
    ) -> RoundStatement | None:
        """Return the statement of the round that made a version; None where no evidence is left."""
        if not self.is_on:
            return None
        context, names = self._context, self._federation.names
        return RoundStatement(
            run=version.run_id,
            round=version.round - 1,
            attempt=version.attempt,
            members=tuple(names),
            counted=tuple(n for n, weight in zip(names, participants.weights, strict=True) if weight > 0),
            weights=None if context.exchange.is_secure else weights_of(participants.weights),
            base=self._base,
            result=digest(layout, vector),
            rule=repr(context.plan.rule),
            epsilon=_rounded(epsilon),
            protocol=PROTOCOL,
            terms=self._terms_of(layout).hash,
            previous=None if before is None else before.hash,
        )

    def sign(self, statement: RoundStatement | None) -> str:
        """Return this party's signature of a statement; empty if there is nothing to sign."""
        if self._signer is None or statement is None or statement.hash == self._store.last:
            return ""
        self._stated = statement
        return self._signer.sign(statement).value

    def keep_votes(self, votes: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Keep what members have signed of an attempt whose results differ; return a sentence about it.

        Args:
            votes: By member, all that were seen; a peer may have written anything.

        Returns:
            Who equivocated, and in which file the proof is; "" if there is nothing that two have signed.
        """
        if self._stated is None:
            return ""
        dispute = dispute_of(votes, self._stated, self._signers)
        if len(dispute.certificates) < 2:
            return ""
        twice = equivocators(dispute)
        said = f" Party {', '.join(twice)} has signed two different statements of it." if twice else ""
        if self._directory is None:
            return said
        path = self._directory / f"dispute-{self._stated.attempt}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dispute.text, encoding="utf-8", newline="")
        except OSError as error:
            return f"{said} What the members have signed cannot be kept ({error})."
        return f"{said} What the members have signed is in {path}; `pellm verify {path}` checks it."

    def record(self, statement: RoundStatement | None, signatures: Mapping[str, Any]) -> None:
        """Keep the certificate of a round that was committed.

        Args:
            statement: The statement.
            signatures: By member; a peer may have sent anything, and there are none if this party has not
                learned the decision.

        Raises:
            FederationError: If it cannot be written.
        """
        if self._signer is None or statement is None or statement.hash == self._store.last:
            return
        certificate = RoundCertificate(statement)
        self._add(certificate, self._federation.name, self._signer.sign(statement))
        for name in statement.members:
            if isinstance(signatures.get(name), str) and name not in certificate.signatures:
                self._take(certificate, name, signatures[name])
        try:
            self._store.add(certificate)
        except OSError as error:
            raise FederationError(
                f"Party {self._federation.name} cannot keep the certificate of round {statement.round}:"
                f" {error}. Free space or correct the permissions there, and start this party again: the"
                " round stands, and the other parties have its certificate."
            ) from error

    # ---- small parts

    def _pend(self, statement: RoundStatement | None) -> None:
        """Keep a statement of the global state that has no certificate, signed again by a member of it."""
        if statement is None or statement.hash == self._store.last:
            return
        certificate = RoundCertificate(statement)
        if self._signer is not None and self._federation.name in statement.members:
            self._add(certificate, self._federation.name, self._signer.sign(statement))
        self._store.add(certificate)

    def _add(self, certificate: RoundCertificate, name: str, signature: Signature) -> None:
        self._store.context.add_identity(self._signers[name])
        certificate.signatures[name] = signature

    def _take(self, certificate: RoundCertificate, name: str, value: str) -> bool:
        """Add another party's signature if it is one; return whether it is."""
        identity, statement = self._signers.get(name), certificate.statement
        if identity is None or name not in statement.members:
            return False
        signature = Signature(identity.hash, value)
        try:
            fits = is_signed(statement.hash, signature.raw, identity)
        except EvidenceError:
            fits = False
        if fits:
            self._add(certificate, name, signature)
            return True
        log.warning(
            "[party %s] Round %d: the signature of party %s is not one of this round by its key, and does not"
            " count. Install the same version at both, and look at that party.",
            self._federation.name,
            statement.round,
            name,
        )
        return False

    def _learn(self, headers: Mapping[str, Header], identities: Sequence[Any]) -> None:
        """Note as whom the members sign, as far as their keys are trusted."""
        for name, shown in zip(headers, identities, strict=True):
            if self._signer is None or shown is None or shown == self._shown.get(name):
                continue
            self._shown[name] = shown
            self._signers.pop(name, None)
            try:
                identity = Identity.from_json(shown)
                why = refused(identity, self._signer.trust)
                why = why if identity.name == name else "it is another party's"
            except EvidenceError as error:
                why = str(error)
            if why is None:
                self._signers[name] = identity
            else:
                log.warning(
                    "[party %s] The signatures of party %s do not count: its key is not accepted (%s).",
                    self._federation.name,
                    name,
                    why,
                )

    def _send(
        self,
        source: str,
        lacking: Mapping[str, tuple[int, str | None]],
        statement: RoundStatement | None,
        result: str | None,
    ) -> None:
        """Send from one member to each that lacks some the certificates after those that it has."""
        federation = self._federation
        here, places = federation.name, {name: place for place, name in enumerate(federation.names)}
        packed = dict.fromkeys(places, b"")
        if here == source:
            chain = self._store.read()
            packed |= {name: _after(chain, *held) for name, held in lacking.items()}
        parts = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in packed.values()]
        sizes = torch.tensor([len(data) for data in packed.values()])
        federation.broadcast_(sizes, places[source])
        rounds = 0 if statement is None else statement.round + 1
        for size in map(int, sizes):
            if not 0 <= size <= _MAX_BYTES + rounds * len(federation.roster) * _MAX_SIGNER_BYTES:
                raise PartyLostError(
                    f"Party {source} would send {size} bytes of evidence, which {rounds} rounds cannot have."
                    " Another one is asked. Install the same version at all parties.",
                    parties=[source],
                )
        incoming = [int(sizes[places[here]]) if name == source else 0 for name in places]
        received = federation.all_to_all(parts, incoming)[places[source]]
        if here in lacking:
            self._take_over(source, received.numpy().tobytes(), statement, result)

    def _take_over(
        self,
        source: str,
        data: bytes,
        statement: RoundStatement | None,
        result: str | None,
    ) -> None:
        """Check what was received, and continue with it; what this party has already is not checked again."""
        store = self._store
        try:
            newer = Chain.parse(data.decode())
            links = [*(c.statement.previous for c in newer.certificates), newer.head]
            before = store.newest if store.head in links else None
            later = newer.certificates[links.index(store.head) if before else 0 :]
            chain = Chain(newer.terms | store.context.terms, newer.identities, later)
            first = later[0].statement.round if later else 0
            verify(chain, None if self._signer is None else self._signer.trust, first, before)
            if statement is None or newer.head != statement.hash:
                raise EvidenceError(
                    "it does not end with the round of the state that this party has received"
                )
            if result is not None and result != statement.result:
                raise EvidenceError("the parameters that this party has received are others than were signed")
        except (EvidenceError, UnicodeDecodeError) as error:
            self._refused.add(source)
            # Fewer than a quorum may be damaged or lie; if more do, it is this party that is wrong.
            kind = FederationError if len(self._refused) >= self._federation.quorum else PartyLostError
            raise kind(
                f"Party {self._federation.name} cannot accept the evidence that party {source} has sent:"
                f" {error}. Give all parties the same trusted_keys or ca.pem; if they have, party"
                f" {source} is damaged or lies, and another one is asked while fewer than a quorum do so.",
                parties=[source],
            ) from error
        self._refused.clear()
        if before is None:
            store.load(newer.head, newer)
        else:
            store.extend(chain)
        log.info("[party %s] checked the evidence of %d rounds", self._federation.name, len(later))

    def _terms_of(self, layout: Layout) -> FederationTerms:
        if self._terms is None or layout is not self._layout:
            self._layout = layout
            settings = {**self._context.settings, **self._federation.settings}
            codes = zip(layout.shapes.items(), layout.dtypes, strict=True)
            parameters = sorted((name, dtype_code(dtype), tuple(shape)) for (name, shape), dtype in codes)
            self._terms = FederationTerms(
                tuple(self._federation.roster),
                self._federation.quorum,
                {name: _plain(value) for name, value in settings.items()},
                tuple(parameters),
            )
        return self._terms


def digest(layout: Layout, vector: Tensor) -> str:
    """Return the digest of a global vector, (D,) float32, as it is written into the parameters."""
    dtypes = dict(zip(layout.names, layout.dtypes, strict=True))

    def parts() -> Any:
        for name, view in layout.views(vector).items():
            written = view.detach().to("cpu", getattr(torch, dtypes[name])).contiguous()
            yield name, dtype_code(dtypes[name]), list(view.shape), bytes_of(written)

    return parameters_digest(parts())


def _signer(context: EngineContext) -> RoundSigner | None:
    """Return the signer by the keys that a party has: of secure aggregation, else of TLS."""
    federation = context.federation
    try:
        if isinstance(context.exchange, SecureAggregation):
            return RoundSigner(federation.name, *context.exchange.credentials(federation))
        from pellm_lightning.comm.signing_keys import CertifiedKeys, SigningKey

        tls = federation.tls
        if tls is None:
            return None
        return RoundSigner(federation.name, SigningKey(tls.key, tls.contents["key"]), CertifiedKeys(tls))
    except (ImportError, ValueError) as error:
        log.warning("[party %s] signs no evidence of the rounds: %s", federation.name, error)
        return None


def _held(header: Header) -> tuple[int, str | None] | None:
    """Return up to which round a peer says that it has certificates, and the hash of the last.

    None if it keeps none.
    """
    held = header.evidence.get("held")
    if held is None:
        return None
    if not isinstance(held, list) or len(held) != 2 or not isinstance(held[0], int):
        return 0, None
    return held[0], held[1] if isinstance(held[1], str) else None


def _after(chain: Chain, count: int, head: str | None) -> bytes:
    """Return the lines of the certificates from round ``count`` on, of all if those before are others."""
    same = any(c.statement.hash == head for c in chain.certificates)
    later = [c for c in chain.certificates if not same or c.statement.round >= count]
    return "".join(f"{line}\n" for line in chain.lines(later, set())).encode()


def _rounded(epsilon: float | None) -> float | None:
    """Return epsilon with the digits on which all parties' arithmetic agrees; None for infinity."""
    return None if epsilon is None or not math.isfinite(epsilon) else float(f"{epsilon:.6g}")


def _plain(value: Any) -> Any:
    """Return a setting as finite JSON."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
