"""What of a callback goes into a pickle or a copy: its own state, and nothing of the fit around it."""

from typing import Any

# Lightning gives these to the callbacks of a fit and leaves them there: they hold the module.
_LIGHTNINGS = ("log", "log_dict")


def own_state(callback: object, **replaced: Any) -> dict[str, Any]:
    """Return a callback's attributes for ``__getstate__``.

    Args:
        callback: The callback.
        **replaced: Attributes that belong to this process, and what stands for them in a copy.
    """
    return {name: value for name, value in vars(callback).items() if name not in _LIGHTNINGS} | replaced
