"""Reader of configuration files that refuses what YAML parsers change silently."""

from collections.abc import Iterator
from typing import Any

MODE = "checked-yaml"
"""Name of this reader among the parser modes of jsonargparse."""


def register() -> str:
    """Register the reader with jsonargparse, an optional dependency; return its name."""
    import yaml
    from jsonargparse import set_loader

    set_loader(MODE, load, exceptions=(yaml.YAMLError,))
    return MODE


def load(text: str, path: str = "") -> Any:
    """Load a configuration file, or a value of the command line.

    YAML parsers take the last of two equal keys: a second ``trainer:`` would remove all of the first.

    Args:
        text: The content.
        path: The file, if it is one with options by name.

    Raises:
        yaml.YAMLError: Names the file, the line and what is wrong.
    """
    import yaml
    from jsonargparse import get_loader

    try:
        value = get_loader("yaml")(text)
        twice = next(_duplicates(yaml.compose(text, Loader=yaml.SafeLoader)), None) if "\n" in text else None
    except yaml.YAMLError as error:
        raise yaml.YAMLError(f"{path or 'the file'}{_place_and_reason(error)}") from error
    if twice is not None:
        name, line, before = twice
        raise yaml.YAMLError(
            f"{path or 'the file'}, line {line}: {name!r} is there twice, first in line {before}; only the last"
            " would count. Merge the two."
        )
    if path and not isinstance(value, dict):
        found = f"holds a {type(value).__name__}" if text.strip() else "is empty"
        raise yaml.YAMLError(f"{path} {found}. Write options by name, as `trainer: {{max_epochs: 3}}`.")
    return value


def _place_and_reason(error: Any) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:  # of single characters
        return f" is no text in YAML: {getattr(error, 'reason', error)}"
    # Its second mark is where a bracket or a quotation mark was opened, often the cause.
    context = getattr(error, "context_mark", None)
    opened = f" ({error.context} from line {context.line + 1})" if context and error.context else ""
    return f", line {mark.line + 1}, column {mark.column + 1}: is not YAML: {problem}{opened}"


def _duplicates(node: Any) -> Iterator[tuple[str, int, int]]:
    """Yield each key that a mapping has twice, with its line and that of the first."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    yield key.value, line, seen[key.value]
                seen.setdefault(key.value, line)
            yield from _duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _duplicates(value)
