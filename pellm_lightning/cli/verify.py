"""Verify the evidence next to an adapter, offline; neither torch nor Lightning is imported."""

import argparse
from collections.abc import Collection, Sequence
from itertools import chain as concatenated
from pathlib import Path
from typing import TYPE_CHECKING

from pellm_lightning.cli.usage import Parser
from pellm_lightning.comm.evidence.certificate import EvidenceError, FederationTerms
from pellm_lightning.comm.evidence.chain import FILE_NAME, Chain, Trust, verify
from pellm_lightning.comm.evidence.dispute import verify_dispute
from pellm_lightning.comm.evidence.summary import Voucher, vouchers
from pellm_lightning.tensors.parameters_digest import Part, parameters_digest, parts_in

if TYPE_CHECKING:
    from collections.abc import Iterator

_WEIGHTS = "adapter_model.safetensors"


def main(words: Sequence[str]) -> None:
    """Run ``pellm verify``."""
    options = parser().parse_args(words[1:])
    check = verified_dispute if options.folder.is_file() else verified
    for line in check(options.folder, options.trust):
        print(line)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = Parser(
        prog="pellm verify",
        description="Check the signed evidence next to an adapter, offline: every round, every signature, and"
        " that the adapter is the result of the last round. Exits with an error if anything does not hold.",
        allow_abbrev=False,
    )
    made.add_argument(
        "folder",
        type=Path,
        help=f"folder of the adapter, with {FILE_NAME}; or a dispute-<attempt>.jsonl from a state_dir, which"
        " shows what the members of an attempt have signed whose results differ",
    )
    made.add_argument(
        "--trust",
        type=Path,
        help="the federation's ca.pem, with ca.crl next to it if there is one, or a folder with <name>.csr or"
        " <name>.pem of all parties; without it keys are taken from the evidence itself, whoever made it",
    )
    return made


def verified(folder: Path, trusted: Path | None = None) -> list[str]:
    """Verify the evidence in a folder; return what it proves, in lines.

    Args:
        folder: Of an adapter.
        trusted: Certificate of the authority, or a folder with the parties' keys; None trusts the file.

    Raises:
        EvidenceError: If it does not hold.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise EvidenceError(
            f"{folder} has no {FILE_NAME}. Only separate jobs with keys leave evidence, and `pellm export`"
            " puts it next to the adapter."
        )
    try:
        chain = Chain.parse(path.read_bytes().decode())
        if not chain.certificates:
            raise EvidenceError("it has no round")
        trust, names = (None, []) if trusted is None else _trust_in(trusted)
        verify(chain, trust)
        _check_rosters(chain, names, trusted)
        matched = _check_adapter(folder, chain)
    except (EvidenceError, UnicodeDecodeError) as error:
        raise EvidenceError(
            f"{path} does not hold: {error}. Do not rely on this adapter; ask the parties for the chain that"
            " their own `pellm export` writes."
        ) from error
    return [*_said(chain, trusted), matched]


def verified_dispute(path: Path, trusted: Path | None = None) -> list[str]:
    """Verify a dispute over a round; return what it proves, in lines.

    Args:
        path: The file.
        trusted: As in ``verified``.

    Raises:
        EvidenceError: If it does not hold.
    """
    try:
        dispute = Chain.parse(path.read_bytes().decode())
        lines = verify_dispute(dispute, None if trusted is None else _trust_in(trusted)[0])
    except (EvidenceError, UnicodeDecodeError) as error:
        raise EvidenceError(f"{path} does not hold: {error}. It proves nothing about any party.") from error
    keys = sorted(f"  {identity.name}: {identity.key}" for identity in dispute.identities.values())
    return [*lines, _whose(trusted), *keys]


def _trust_in(path: Path) -> tuple[Trust, list[str]]:
    """Return whose keys are trusted, and the parties if their keys are pinned."""
    from pellm_lightning.comm.revocation import RevocationFile  # these need the package cryptography
    from pellm_lightning.comm.signing_keys import Authorities, TrustedKeys

    if path.is_dir():
        pinned = TrustedKeys(path)
        return pinned, pinned.names
    try:
        pem = path.read_bytes()
        revoked = RevocationFile(path.with_suffix(".crl"), pem)
        return Authorities(pem, lambda: revoked.serials), []
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--trust {path} is neither a folder with the parties' keys nor the authority's certificate:"
            f" {error}. Give one of them."
        ) from error


def _check_rosters(chain: Chain, names: Collection[str], folder: Path | None) -> None:
    """Raise unless all pinned parties are on one of the rosters.

    A majority of them has then signed such a round, and with it all that came before; what came after, they
    have signed or agreed to. Of a roster with fewer, a few could have made the whole chain for themselves.
    """
    rosters = [set(terms.roster) for _, terms in _terms_of(chain)]
    largest = max(rosters, key=lambda roster: len(roster.intersection(names)))
    if not largest.issuperset(names):
        raise EvidenceError(
            f"no round in it has all {len(names)} parties of {folder} on its roster: it lacks"
            f" {', '.join(name for name in names if name not in largest)}. So the others could have made it"
            " alone. Take keys out of the folder that have no part in this run"
        )


def _terms_of(chain: Chain) -> "Iterator[tuple[int, FederationTerms]]":
    """Yield the rounds from which on other terms hold, with these."""
    before: str | None = None
    for certificate in chain.certificates:
        statement = certificate.statement
        if statement.terms != before:
            yield statement.round, chain.terms[statement.terms]
        before = statement.terms


# ---- the adapter


def _check_adapter(folder: Path, chain: Chain) -> str:
    """Raise unless the adapter in a folder is the result of the last round; return what was compared."""
    last = chain.certificates[-1].statement
    files = sorted(folder.glob(_WEIGHTS)) or sorted(folder.glob(f"*/{_WEIGHTS}"))
    if not files:
        raise EvidenceError(f"there is no {_WEIGHTS} to compare with the result of round {last.round}")
    if len(sorted(folder.glob(f"*/{_WEIGHTS}"))) > 1:
        files = sorted(folder.glob(f"*/{_WEIGHTS}"))  # what lies at the root then is their sum
    terms = chain.terms[last.terms]
    names = _certified_names(files, terms)

    def parts() -> "Iterator[Part]":
        for file in files:
            for name, dtype, shape, data in parts_in(file):
                yield names[file, name], dtype, shape, data

    try:
        found = parameters_digest(parts())
    except ValueError as error:
        raise EvidenceError(str(error).rstrip(".")) from error
    if found != last.result:
        raise EvidenceError(
            f"the adapter is not the result of round {last.round}, whose digest is {last.result[:16]}...:"
            f" it has {found[:16]}.... It was changed, or trained on alone after that round"
        )
    listed = ", ".join(str(file.relative_to(folder)) for file in files)
    return f"{listed}: its {len(names)} tensors are the result of round {last.round}, bit for bit."


def _certified_names(files: Sequence[Path], terms: FederationTerms) -> dict[tuple[Path, str], str]:
    """Return the name by which the parties certified each tensor in the files.

    PEFT leaves the adapter's own name, and ``modules_to_save``, out of the names in a file.
    """
    found = {(file, name) for file in files for name, *_ in _parts_in(file)}
    certified = [name for name, _, _ in terms.parameters]
    # Several have a folder each, by name, which for one called "base" is taken.
    folders = {file: file.parent.name for file in files} if len(files) > 1 else {}
    adapters = {file: "base" if name == "base-adapter" else name for file, name in folders.items()}
    pieces = dict.fromkeys(concatenated(["default"], *(name.split(".") for name in certified)))
    for adapter in pieces:
        names: dict[tuple[Path, str], str] = {}
        for name in certified:
            parts = name.replace("_orig_mod.", "").split(".")
            parts = parts[parts.index("base_model") :] if "base_model" in parts else parts
            for file in files:
                own = adapters.get(file, adapter)
                if own in parts:
                    short = [part for part in parts if part not in (own, "modules_to_save")]
                    names[file, ".".join(short)] = name
        if names.keys() == found and len(names) == len(certified):
            return names
        if adapters:
            break
    raise EvidenceError(
        f"the {len(found)} tensors of the adapter are not the {len(certified)} that the parties trained, by"
        " their names"
    )


def _parts_in(file: Path) -> "Iterator[Part]":
    try:
        yield from parts_in(file)
    except ValueError as error:
        raise EvidenceError(str(error).rstrip(".")) from error


# ---- what it says


def _said(chain: Chain, trusted: Path | None) -> list[str]:
    """Return what a chain that holds proves, in lines."""
    first, last = chain.certificates[0].statement, chain.certificates[-1].statement
    terms = chain.terms[last.terms]
    fewest = min(len(certificate.signatures) for certificate in chain.certificates)
    hidden = "hidden by secure aggregation" if last.weights is None else "in the evidence"
    lines = [
        f"{len(chain.certificates)} rounds of run {last.run}: each follows the one before, and is signed by"
        f" {fewest} or more of {len(terms.roster)} parties (a quorum is {terms.quorum}).",
        f"From parameters {first.base[:16]}... to {last.result[:16]}..., by {last.rule}; weights are"
        f" {hidden}; epsilon {'not bounded' if last.epsilon is None else f'{last.epsilon:.4g}'}.",
    ]
    shown: tuple[object, ...] = ()
    for round, of in _terms_of(chain):
        if (of.roster, of.quorum) != shown:
            lines.append(_named(round, of))
        shown = of.roster, of.quorum
    lines.append(_whose(trusted))
    width = max(len(name) for name in terms.roster)
    return lines + [_row(voucher, width) for voucher in vouchers(chain)]


def _whose(trusted: Path | None) -> str:
    """Return whose keys they are, as far as that was checked."""
    if trusted is None:
        return (
            "WHOSE KEYS THESE ARE IS NOT CHECKED: give --trust ca.pem, or --trust with a folder of the"
            " parties' keys, or compare the keys below with the parties."
        )
    own = "" if trusted.is_dir() else " Whether the roster was theirs, only they can tell."
    return f"The keys are those of the parties, by {trusted}.{own}"


def _named(round: int, terms: FederationTerms) -> str:
    """Return who had to agree from a round on."""
    number, of = terms.quorum, len(terms.roster)
    line = f"From round {round} on the roster was {', '.join(terms.roster)}; a quorum, {number} of {of}."
    if number == 1:
        line += " One party alone can make such a chain."
    elif 2 * number <= of:
        line += " That is no majority: two such chains can exist."
    return line


def _row(voucher: Voucher, width: int) -> str:
    keys = ", ".join(f"{identity.key} (version {identity.software})" for identity in voucher.identities)
    return (
        f"  {voucher.name:<{width}}  signed {voucher.signed}, took part in {voucher.member}, counts in"
        f" {voucher.counted}{f'; {keys}' if keys else ''}"
    )
