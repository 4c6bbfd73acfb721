"""Summary of a chain of certificates: who vouches for how many rounds, for people and model cards."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pellm_lightning.comm.evidence.certificate import Identity
from pellm_lightning.comm.evidence.chain import FILE_NAME, Chain


@dataclass(frozen=True)
class Voucher:
    """A party, and for what it vouches.

    Example:
        >>> Voucher("clinic-a", (), 0, 0, 0).signed
        0
    """

    name: str
    identities: tuple[Identity, ...]
    """As whom it has signed, in order."""
    member: int
    """Rounds in which it took part."""
    counted: int
    """Rounds whose result has its update."""
    signed: int
    """Rounds that it has signed."""


def vouchers(chain: Chain) -> list[Voucher]:
    """Return all parties of a chain, in the order of its last roster."""
    if not chain.certificates:
        return []
    member, counted, signed = Counter[str](), Counter[str](), Counter[str]()
    identities: dict[str, dict[str, Identity]] = {}
    for certificate in chain.certificates:
        member.update(certificate.statement.members)
        counted.update(certificate.statement.counted)
        signed.update(certificate.signatures.keys())
        for name, signature in certificate.signatures.items():
            identities.setdefault(name, {})[signature.identity] = chain.identities[signature.identity]
    last = chain.terms[chain.certificates[-1].statement.terms].roster
    names = [*last, *(name for name in member if name not in last)]
    return [
        Voucher(name, tuple(identities.get(name, {}).values()), member[name], counted[name], signed[name])
        for name in names
    ]


def write_evidence(folder: Path, text: str | None) -> list[str]:
    """Write a chain next to an adapter; return what the model card says of it.

    Args:
        folder: Of the adapter.
        text: The chain; None, or empty, if there is none.
    """
    if not text:
        (folder / FILE_NAME).unlink(missing_ok=True)  # of an earlier adapter in this folder
        return []
    (folder / FILE_NAME).write_text(text, encoding="utf-8", newline="\n")
    chain = Chain.parse(text)
    signers = [f"`{voucher.name}` {voucher.signed}" for voucher in vouchers(chain) if voucher.signed]
    return [
        f"`{FILE_NAME}` has signed certificates of its {len(chain.certificates)} rounds (signed by each"
        f" party: {', '.join(signers) or 'none'}); `pellm verify` checks them, and that this is their result."
    ]
