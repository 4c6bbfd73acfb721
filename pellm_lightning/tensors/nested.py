"""Traversal of nested containers: batches of a DataLoader, state dicts."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested mappings, lists, tuples and dataclasses, in order."""
    if isinstance(value, Tensor):  # most are, and the other questions take longer
        yield value
        return
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, list | tuple):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = vars(value).values()
    else:
        yield value
        return
    for item in items:
        yield from leaves(item)
