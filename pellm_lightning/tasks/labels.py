"""Labels of texts: one name however they are written, and their indices."""

import re
from collections.abc import Sequence

from pellm_lightning.tasks.columns import has_content

Label = str | bool | int | float
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0*)?")
_YAML_BOOLS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def label_name(label: Label) -> str:
    """Return the canonical name of a label, as files or YAML may write it differently.

    ``1``, ``1.0`` and ``"1.0"`` are one label, as pandas and JSON write the same number, and so are ``True``,
    ``true`` and ``"TRUE"``; blanks around a name do not count. ``007`` is a name.
    """
    if isinstance(label, bool):
        return str(label).lower()
    name = str(label).strip()
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = _WHOLE.fullmatch(name)
    return str(int(whole[1])) if whole else name


def label_names(labels: object) -> list[str]:
    """Validate the argument ``labels`` and return the names.

    Raises:
        ValueError: If it is no list of labels, or two of them are one.
    """
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(f"labels={labels!r} must be a list of labels, in the order of their indices.")
    for label in labels:
        if not isinstance(label, str | bool | int | float) or not has_content(label):
            raise ValueError(f"labels={labels!r} holds {label!r}: each label must be a text or a number.")
    names = [label_name(label) for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"labels={labels!r} names {twice} more than once (1, 1.0 and '1' are one label). Name each once."
        )
    return names


def index_labels(
    labels: Sequence[str], names: Sequence[str], party: int, places: Sequence[str], are_bools: bool = False
) -> dict[str, int]:
    """Return the index of each label, by the label.

    Args:
        labels: The label of each row.
        names: All labels, in the order of their indices.
        party: Index of the party.
        places: File and line of each row.
        are_bools: Whether ``names`` came as true and false, as YAML reads yes and no without quotes.

    Raises:
        ValueError: Names the labels that are not listed, and where they are.
    """
    index = {name: number for number, name in enumerate(names)}
    if are_bools:
        index |= {word: index[name] for word, name in _YAML_BOOLS.items() if name in index}
    found = [index.get(label, index.get(label.lower(), -1) if are_bools else -1) for label in labels]
    unknown: dict[str, str] = {}
    for number, label, where in zip(found, labels, places, strict=True):
        if number < 0:
            unknown.setdefault(label, where)
    if unknown:
        first = ", ".join(f"{label!r} at {where}" for label, where in sorted(unknown.items())[:5])
        raise ValueError(
            f"Party {party} has the labels {sorted(unknown)}, which are not among {list(names)} (first:"
            f" {first}). Add them to labels, at every party, or correct the rows."
        )
    return dict(zip(labels, found, strict=True))
