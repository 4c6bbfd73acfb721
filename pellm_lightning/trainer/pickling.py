"""Pickling of callbacks: their own state, without references to the fit."""

from typing import Any

# Lightning sets these on callbacks during a fit and never removes them: they reference the module.
_SET_BY_LIGHTNING = ("log", "log_dict")


def own_state(callback: object, **replaced: Any) -> dict[str, Any]:
    """Return a callback's attributes for ``__getstate__``.

    Args:
        callback: The callback.
        **replaced: Attributes to replace in the copy, by name.
    """
    return {name: value for name, value in vars(callback).items() if name not in _SET_BY_LIGHTNING} | replaced
