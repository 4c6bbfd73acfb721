"""What whoever hosts the rendezvous can read: docs/who_sees_what.md lists it."""

import contextlib
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from trainer_jobs import ROSTER, Jobs

from pellm_lightning.comm.keys import make_key
from pellm_lightning.exchange import SecureAggregation


class ReadStore(dist.HashStore):
    """A store that keeps all that was ever written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def set(self, key: str, value: str) -> None:
        self.written.append(json.loads(value))
        super().set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with contextlib.suppress(json.JSONDecodeError):  # the name of the store's life is no JSON
            self.written.append(json.loads(desired))
        return super().compare_set(key, expected, desired)


def fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields in what was written, at any depth."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key, inner
        yield from fields(inner)
    for inner in value if isinstance(value, list) else ():
        yield from fields(inner)


def told(tmp_path: Path, **arguments: Any) -> dict[str, list[Any]]:
    """Fit three jobs; return all values of each field that their rendezvous has held."""
    jobs = Jobs(tmp_path)
    jobs.store = ReadStore()
    own = {name: {key: make(name) for key, make in arguments.items()} for name in ROSTER}
    logger = {"logger": CSVLogger(tmp_path)}
    jobs.run(**{name: {"samples": 16, "arguments": own[name]} | logger for name in ROSTER})
    assert not [result for result in jobs.results.values() if isinstance(result, BaseException)], jobs.results
    found: dict[str, list[Any]] = {}
    for key, value in fields(jobs.store.written):
        found.setdefault(key, []).append(value)
    numbers = {number for value in jobs.store.written for number in _numbers(value)}
    for result in jobs.results.values():
        assert not numbers & {float(x) for x in result.vector()}, "a parameter"
    return found


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, float) and not value.is_integer():
        yield value


def test_without_secure_aggregation(tmp_path: Path) -> None:
    found = told(tmp_path)
    assert set(found["weight"]) == {0.0, 8.0}, "two batches of four in each round, and none for metrics"
    for figure in ("loss", "distance", "steps_left"):
        assert any(value is not None for value in found[figure]), figure
    assert {metric for said in found["metrics"] if isinstance(said, dict) for metric in said} == {"val_loss"}
    assert any(
        said and math.isfinite(said["val_loss"][0]) for said in found["metrics"] if isinstance(said, dict)
    )
    assert any(paths for paths in found["files"]), "digests of them"
    assert not any(socket.gethostname() in path for paths in found["files"] for path in paths)
    assert any(schema for schema in found["schema"]), "names of parameters"
    assert found["address"]


def test_with_secure_aggregation_sums_are_not_there(tmp_path: Path) -> None:
    for name in ROSTER:
        make_key(tmp_path / "keys", name)
    keys = str(tmp_path / "keys")
    found = told(
        tmp_path,
        exchange=lambda name: SecureAggregation(signing_key=f"{keys}/{name}.key", trusted_keys=keys),
        quorum=lambda name: 3,
    )
    assert set(found["weight"]) <= {0.0, 1.0, None}, "and what is expected of the fit is not told"
    for figure in ("loss", "distance", "steps_left", "steps", "steps_per_epoch"):
        assert not [value for value in found[figure] if value is not None], figure
    # Of the metrics the names, also among the facts of the fit.
    assert not [said for said in found["metrics"] if isinstance(said, dict)]
    assert any("val_loss" in names["finite"] for names in found["names"])
