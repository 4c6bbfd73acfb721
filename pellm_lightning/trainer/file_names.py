"""Unique file names."""

import os
from collections.abc import Callable, Iterator


def numbered(path: str) -> Iterator[str]:
    """Yield a path, then with a number before its suffix: ``a.csv``, ``a-1.csv``, ``a-2.csv``..."""
    yield path
    stem, suffix = os.path.splitext(path)
    number = 0
    while True:
        number += 1
        yield f"{stem}-{number}{suffix}"


def unused(path: str, exists: Callable[[str], bool] = os.path.lexists) -> str:
    """Return the first of the ``numbered`` paths that does not exist."""
    return next(name for name in numbered(path) if not exists(name))
