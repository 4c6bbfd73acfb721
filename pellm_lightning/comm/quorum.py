"""Quorum: number of parties that must take part before a result counts for all."""

from typing import Literal, TypeAlias

Quorum: TypeAlias = Literal["majority"] | int


def check_quorum(quorum: object) -> None:
    """Check the argument of that name, as far as it can be without knowing the parties.

    Raises:
        ValueError: If it is neither "majority" nor a whole number above 0.
    """
    if quorum == "majority" or (isinstance(quorum, int) and not isinstance(quorum, bool) and quorum >= 1):
        return
    raise ValueError(f"quorum={quorum!r} must be 'majority' or a whole number of parties, 1 or more.")


def resolve_quorum(quorum: Quorum, num_parties: int) -> int:
    """Return the number of parties that a quorum is.

    Args:
        quorum: "majority", more than half of the parties, or a number.
        num_parties: How many parties there are, present or not.

    Raises:
        ValueError: If it is more than there are.

    Example:
        >>> resolve_quorum("majority", 4), resolve_quorum(1, 4)
        (3, 1)
    """
    check_quorum(quorum)
    if quorum == "majority":
        return num_parties // 2 + 1
    if quorum > num_parties:
        raise ValueError(
            f"quorum={quorum} is more than the {num_parties} {'party' if num_parties == 1 else 'parties'} of"
            f" the federation, so no round could ever count. Give 1 to {num_parties}, or 'majority'."
        )
    return quorum
