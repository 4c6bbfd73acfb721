"""Commands other than training: rendezvous of separate jobs, certificates, keys, report of a fit."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pellm_lightning.cli.new import new
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.sockets import split_address
from pellm_lightning.comm.tls import TLS

NEEDS_JSONARGPARSE = "The command line needs the package jsonargparse: pip install 'pellm-lightning[cli]'."

log = logging.getLogger(__name__)


def rendezvous(listen: str, roster: str | None = None, tls: TLS | None = None) -> None:
    """Host the rendezvous where parties in separate jobs meet, until SIGTERM or SIGINT.

    It keeps everything in memory. Losing it loses nothing: it may be stopped and started again at any time.

    Args:
        listen: Address to listen on, host:port; only parties that reach this address can take part.
        roster: Names of all parties, separated by commas. Only certificates can enforce it.
        tls: Certificate named "rendezvous". Without one everybody who reaches the address may take part.
    """
    host, port = split_address(listen)
    server = RendezvousServer(host, port, roster=_names(roster or ""), tls=tls)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.close())
    try:
        server.serve_forever()
    except OSError as error:
        raise ValueError(
            f"The rendezvous cannot listen on {listen}: {error.strerror}. Stop what uses this port, often"
            " another rendezvous, or choose another port; the host must be an address of this machine."
        ) from error
    log.info("the rendezvous has closed")


def certs(directory: Path, names: str, days: float = 365) -> None:
    """Make a certificate for each name, and first the federation's own authority if there is none.

    Every host gets its own <name>.pem and <name>.key, and ca.pem; ca.key stays here, out of others' reach.

    Args:
        directory: Folder for the files.
        names: Names, separated by commas: all parties', and "rendezvous".
        days: For how many days the certificates are good.
    """
    from pellm_lightning.comm.certs import make_ca, make_certificate  # an optional dependency

    if not (directory / "ca.pem").exists():
        log.info("made %s", make_ca(directory))
    for name in _names(names):
        log.info("made %s", make_certificate(directory, name, days))


def new_keys(directory: Path, names: str) -> None:
    """Make a signing key for each name, for ``exchange.SecureAggregation``.

    Each party makes its own on its own host and hands out <name>.pub only, or the line that is printed, on a
    way that others can check. <name>.key stays where it is: whoever has it can be that party.

    Args:
        directory: Folder for the files.
        names: Names, separated by commas; often one.
    """
    from pellm_lightning.exchange.secure.signing_keys import generate_signing_key  # an optional dependency

    for name in _names(names):
        private, public = generate_signing_key(directory, name)
        log.info("made %s; keep it secret. For the peers of all parties:", private)
        print(f'"{name}": "{public}"')  # as YAML, where the party 0 of a launch would be a number


def report(run_dir: Path, out: Path | None = None) -> None:
    """Write one HTML page, with all figures inside, that tells a fit from what its parties have recorded.

    Args:
        run_dir: Folder with the parties' rounds.jsonl, at any depth; fits of one party alone beside those of
            a federation are drawn for comparison.
        out: The page; by default report.html in that folder.
    """
    from pellm_lightning.report import page  # an optional dependency

    print(page.write(run_dir, out))


def main(words: Sequence[str]) -> None:
    """Run ``new``, ``rendezvous``, ``certs``, ``keys`` or ``report``; print errors without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    command, *rest = words
    component: Any = {
        "new": new,
        "rendezvous": rendezvous,
        "certs": certs,
        "keys": {"new": new_keys},
        "report": report,
    }[command]
    try:
        auto_cli = _auto_cli()
        auto_cli(component, args=rest, as_positional=command in ("new", "report"), prog=f"pellm {command}")
    except (ValueError, ImportError, OSError) as error:
        sys.exit(str(error))


def _auto_cli() -> Any:
    try:
        from jsonargparse import auto_cli  # an optional dependency
    except ImportError as error:
        raise ImportError(NEEDS_JSONARGPARSE) from error
    return auto_cli


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
