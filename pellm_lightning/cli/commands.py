"""Commands other than training: rendezvous of separate jobs, keys, report of a fit."""

import errno
import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from pellm_lightning.cli import config_files, errors, keys
from pellm_lightning.cli.new import new
from pellm_lightning.cli.usage import NO_TYPE_FITS, explained, refuse
from pellm_lightning.comm.relay.server import RelayQuotas
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.sockets import split_address
from pellm_lightning.comm.tls import TLS

NEEDS_JSONARGPARSE = "The command line needs the package jsonargparse: pip install 'pellm-lightning[cli]'."

log = logging.getLogger(__name__)


def rendezvous(
    listen: str,
    roster: str | None = None,
    tls: TLS | None = None,
    relay: bool = False,
    quotas: RelayQuotas | None = None,
) -> None:
    """Host the rendezvous where parties in separate jobs meet, until SIGTERM or SIGINT.

    It keeps everything in memory. Losing it loses nothing: it may be stopped and started again at any time.

    Args:
        listen: Address to listen on, host:port; only parties that reach this address can take part.
        roster: Names of all parties, separated by commas. Only certificates can enforce it.
        tls: Certificate named "rendezvous". Without one everybody who reaches the address may take part.
        relay: Also pass what parties send each other, encrypted from end to end, where neither can be dialed:
            then no party has to open a port.
        quotas: What one party can use of the relay.
    """
    with errors.checking_options():
        host, port = split_address(listen)
        if quotas is not None and not relay:
            raise ValueError("Quotas are given, but no relay that has them. Add --relay, or leave them out.")
        limits = (quotas or RelayQuotas()) if relay else None
        server = RendezvousServer(host, port, roster=keys.names_in(roster or ""), tls=tls, relay=limits)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.close())
    try:
        server.serve_forever()
    except OSError as error:
        raise ValueError(
            f"The rendezvous cannot listen on {listen}: {error.strerror}. {_fix_of(error)}"
        ) from error
    log.info("the rendezvous has closed")


def _fix_of(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "Stop what uses this port, often another rendezvous, or choose another port."
    if error.errno == errno.EACCES:
        return "Ports below 1024 are of the system: choose another port."
    return "The host must be a name or an address of this machine: `hostname -I` lists these."


def report(run_dir: Path, out: Path | None = None) -> None:
    """Write one HTML page, with all figures inside, that tells a fit from what its parties have recorded.

    Args:
        run_dir: Folder with the parties' rounds.jsonl, at any depth; fits of one party alone next to those of
            a federation are drawn for comparison.
        out: The page; by default report.html in that folder.
    """
    from pellm_lightning.report import page  # an optional dependency

    print(page.write(run_dir, out))


def main(words: Sequence[str]) -> None:
    """Run ``new``, ``rendezvous``, ``certs``, ``keys`` or ``report``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config_files.check_encoding(words)
    command, *rest = words
    if command == "rendezvous":  # jsonargparse wants a value for a flag
        ends = [*(word.startswith("-") for word in rest[1:]), True]
        pairs = zip(rest, ends, strict=False)
        rest = ["--relay=true" if word == "--relay" and is_flag else word for word, is_flag in pairs]
    component: Any = {
        "new": new,
        "rendezvous": rendezvous,
        "certs": keys.certs,
        "keys": {"new": keys.new, "sign": keys.sign, "revoke": keys.revoke},
        "report": report,
    }[command]
    auto_cli = _auto_cli()
    try:
        auto_cli(component, args=rest, as_positional=command in ("new", "report"), prog=f"pellm {command}")
    except ValueError as error:
        if NO_TYPE_FITS in str(error):  # of a dataclass that could not be built
            raise ValueError(explained(str(error))) from error
        raise


def _auto_cli() -> Any:
    """Return jsonargparse's ``auto_cli`` with a parser that reports an error in a few lines."""
    try:
        from jsonargparse import ArgumentParser, auto_cli  # an optional dependency
    except ImportError as error:
        raise ImportError(NEEDS_JSONARGPARSE) from error

    class Parser(ArgumentParser):
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.setdefault("parser_mode", config_files.register())
            super().__init__(*args, **settings)

        @override
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:
                super().error(message, ex)
            refuse(getattr(ex, "subcommand_parser", None) or self, message)

    return partial(auto_cli, parser_class=Parser)
