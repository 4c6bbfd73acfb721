"""Reader of configuration files that refuses what YAML parsers change silently."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pellm_lightning.cli.errors import UsageError
from pellm_lightning.comm.errors import did_you_mean

MODE = "checked-yaml"
"""Name of this reader among the parser modes of jsonargparse."""
_GROUPS = {"federated": "every_n_epochs: 1", "trainer": "max_epochs: 3"}
"""Sections of options, each with an example."""
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


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

    where = f"{path}, line" if path else "line"
    try:
        value = get_loader("yaml")(text)
        twice = next(_duplicates(yaml.compose(text, Loader=yaml.SafeLoader)), None) if "\n" in text else None
    except yaml.YAMLError as error:
        raise yaml.YAMLError(f"{where} {_line_and_reason(error, text)}") from error
    if twice is not None:
        name, line, before = twice
        raise yaml.YAMLError(
            f"{where} {line}: {name!r} is there twice, first in line {before}; only the last"
            " would count. Merge the two."
        )
    if path and not isinstance(value, dict):
        found = f"holds a {type(value).__name__}" if text.strip() else "is empty"
        raise yaml.YAMLError(f"{path} {found}. Write options by name, as `trainer: {{max_epochs: 3}}`.")
    if path and (problem := next(_misshapen(value), None)):
        raise yaml.YAMLError(f"{path}: {problem}")
    return value


def _misshapen(config: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the shape of a configuration, which parsers would fail on or ignore."""
    for name, value in config.items():
        if name in _GROUPS and not isinstance(value, dict | str):  # a text is the path of a file
            found = "nothing" if value is None else f"{value!r:.60}"
            yield f"{name!r} holds {found}. Write its options by name, as `{name}: {{{_GROUPS[name]}}}`."
        if isinstance(value, dict):
            yield from _misspelt(value, name)


def _misspelt(value: Any, where: str) -> Iterator[str]:
    """Yield each key that was meant to be class_path or init_args."""
    parts: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        meant = did_you_mean(str(name), _OF_A_CLASS) if isinstance(value, dict) else ""
        if meant and name not in _OF_A_CLASS and value.keys() & set(_OF_A_CLASS):
            yield f"{where!r} has {name!r}.{meant}"
        if isinstance(part, dict | list):
            yield from _misspelt(part, f"{where}.{name}")


def _line_and_reason(error: Any, text: str) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:  # of single characters
        return f"1 or below: is no text in YAML: {getattr(error, 'reason', error)}"
    # Its second mark is where a bracket or a quotation mark was opened, often the cause.
    context = getattr(error, "context_mark", None)
    opened = f" ({error.context} from line {context.line + 1})" if context and error.context else ""
    line = next(islice(text.splitlines(), mark.line, None), "")
    tab = ". Indent by blanks, not tabs" if line.lstrip(" ").startswith("\t") else ""
    return f"{mark.line + 1}, column {mark.column + 1}: is not YAML: {problem}{opened}{tab}"


def check_encoding(words: Sequence[str]) -> None:
    """Check that the configuration files among the words of a command line are UTF-8.

    Raises:
        UsageError: Names the file and the line.
    """
    for before, word in zip(["", *words], words, strict=False):
        name, _, value = word.rpartition("=")
        path = Path(value)
        is_config = path.suffix in (".yaml", ".yml", ".json") or {name, before} & {"--config", "-c"}
        if not is_config or not path.is_file():
            continue
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UsageError(
                f"{path}, line {line}: is not UTF-8 text: byte 0x{content[error.start]:02x}. Save it as"
                " UTF-8, or convert it: iconv -f CP1252 -t UTF-8 OLD > NEW (Windows often writes CP1252)."
            ) from error


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
