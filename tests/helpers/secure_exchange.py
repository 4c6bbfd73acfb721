"""A masked exchange for tests: keys of all parties that tests have, made once."""

import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pellm_lightning.exchange import SecureAggregation
from pellm_lightning.exchange.secure.signing_keys import SigningKey, make_identity

_making = threading.Lock()
_kept: list[TemporaryDirectory[str]] = []


def keys(which: str = "ours") -> Path:
    """The folder with everybody's keys, by index ("0") and by name ("p0"); another one is strangers'."""
    with _making:  # parties are threads
        return _keys(which)


@cache
def _keys(which: str) -> Path:
    _kept.append(TemporaryDirectory())
    folder = Path(_kept[-1].name)
    for party in range(9):
        make_identity(folder, str(party))
        make_identity(folder, f"p{party}")
    return folder


def masked(**arguments: Any) -> SecureAggregation:
    """A masked exchange for any party, of our keys if no others are given."""
    return SecureAggregation(**{"identity": f"{keys()}/{{party}}.key", "peers": str(keys())} | arguments)


def identity_of(name: str, which: str = "ours") -> SigningKey:
    return SigningKey(keys(which) / f"{name}.key")
