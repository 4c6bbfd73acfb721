"""The commands ``keys`` and ``certs``: keys, requests and certificates of parties and rendezvous."""

import logging
from pathlib import Path

from pellm_lightning.cli import errors
from pellm_lightning.comm.tls import check_name

log = logging.getLogger(__name__)


def new(directory: Path, names: str) -> None:
    """Make a key for each name, on the host that uses it, and the request for its certificate.

    <name>.key stays where it is: whoever has it can be that party. <name>.csr is public: the administrator
    signs it, or all parties pin it. The printed line is the same key as text, to compare over the telephone.

    Args:
        directory: Folder for the files.
        names: Names, separated by commas; often one, a party's or "rendezvous".
    """
    from pellm_lightning.comm.keys import make_key  # an optional dependency

    for name in _checked(names):
        private, public = make_key(directory, name)
        log.info("made %s; keep it secret. Send %s.csr, and compare:", private, name)
        print(f'"{name}": "{public}"')  # as YAML, where the party 0 of a launch would be a number


def sign(directory: Path, names: str, days: float = 365) -> None:
    """Sign the request of each name; make the federation's own authority first if there is none.

    For the administrator. Whoever sent <name>.csr gets <name>.pem and ca.pem back; ca.key stays here, out of
    others' reach. Compare the printed keys with those of the parties: a request may come from anybody.

    Args:
        directory: Folder with the requests <name>.csr, and for the authority and the certificates.
        names: Names, separated by commas: parties', and "rendezvous".
        days: For how many days the certificates are good.
    """
    from pellm_lightning.comm.keys import make_ca, public_text, read_public_key, sign_request

    public = {name: public_text(read_public_key(directory / f"{name}.csr")) for name in _checked(names, days)}
    if not (directory / "ca.pem").exists():
        log.info("made %s", make_ca(directory))
    for name, key in public.items():
        log.info("made %s", sign_request(directory, name, days))
        print(f'"{name}": "{key}"')


def revoke(directory: Path, names: str) -> None:
    """Revoke the certificates of names, for the administrator: a stolen key, or a party that has left.

    This writes ca.crl. Put it next to ca.pem at the rendezvous and any party: these refuse the certificates
    at once, and tell all others with the next round. <name>.pem is set aside; a new request can be signed.

    Args:
        directory: Folder with the authority and the certificates.
        names: Names, separated by commas.
    """
    from pellm_lightning.comm.keys import revoke

    print(revoke(directory, _checked(names)))


def certs(directory: Path, names: str, days: float = 365) -> None:
    """Make all keys, the authority and all certificates on this host: for a trial only.

    Here all private keys are in one place. Between institutions each makes its own, by ``keys new``.

    Args:
        directory: Folder for the files.
        names: Names, separated by commas: all parties', and "rendezvous".
        days: For how many days the certificates are good.
    """
    from pellm_lightning.comm.keys import make_ca, make_certificate

    checked = _checked(names, days)
    if not (directory / "ca.pem").exists():
        log.info("made %s", make_ca(directory))
    for name in checked:
        log.info("made %s", make_certificate(directory, name, days))


def names_in(text: str) -> list[str]:
    """Return the names in a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _checked(names: str, days: float = 1) -> list[str]:
    """Return the names in a list, each once; they and the days are checked before anything is made."""
    found = list(dict.fromkeys(names_in(names)))
    if not found:
        raise errors.UsageError(f"names={names!r} has no name. Give one or several, separated by commas.")
    if not days > 0:
        raise errors.UsageError(f"days={days} must be positive.")
    with errors.checking_options():
        for name in found:
            check_name(name)
    return found
