"""Certificates of a federation for tests."""

import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pellm_lightning.comm.keys import make_ca, make_certificate
from pellm_lightning.comm.tls import TLS

_making = threading.Lock()
_kept: list[TemporaryDirectory[str]] = []


def authority(which: str = "ours") -> Path:
    """The folder of a certificate authority, the same one for all tests of this process."""
    with _making:  # parties are threads
        return _authority(which)


@cache
def _authority(which: str) -> Path:
    _kept.append(TemporaryDirectory())
    directory = Path(_kept[-1].name)
    make_ca(directory)
    return directory


def tls_of(name: str, which: str = "ours") -> TLS:
    """The certificate of ``name``; another authority than "ours" is a stranger's."""
    directory = authority(which)
    with _making:
        if not (directory / f"{name}.pem").exists():
            make_certificate(directory, name)
    return files(directory, name)


def files(directory: Path, name: str) -> TLS:
    return TLS(*(str(directory / file) for file in (f"{name}.pem", f"{name}.key", "ca.pem")))
