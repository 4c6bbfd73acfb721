"""Secure aggregation for tests: keys of all parties, generated once."""

import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pellm_lightning.comm.keys import make_key
from pellm_lightning.comm.signing_keys import SigningKey
from pellm_lightning.exchange import SecureAggregation

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
        make_key(folder, str(party))
        make_key(folder, f"p{party}")
    return folder


def masked(**arguments: Any) -> SecureAggregation:
    """Secure aggregation for any party, by our keys if no others are given."""
    return SecureAggregation(
        **{"signing_key": f"{keys()}/{{party}}.key", "trusted_keys": str(keys())} | arguments
    )


def signing_key_of(name: str, which: str = "ours") -> SigningKey:
    return SigningKey(keys(which) / f"{name}.key")
