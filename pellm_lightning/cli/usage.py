"""Usage errors: what a parser refuses, in a few lines, with the name that was probably meant."""

import inspect
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from pellm_lightning.cli import errors
from pellm_lightning.comm.errors import did_you_mean

NO_TYPE_FITS = "Does not validate against any of the Union subtypes"
"""In jsonargparse's messages; what does not fit has a reason for each type."""

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_VALUE = re.compile(r"\s+Given value type: .*\n\s*Given value: (.*)$")
# Of a union of types the one that nobody meant, and what a string might also have been.
_IDLE = ("NoneType", "not accessible or invalid", NO_TYPE_FITS)
_MAX_VALUE = 60


class CommandParser(LightningArgumentParser):
    """Parser that reports an error in a few lines; torchrun's summary shows it.

    Example:
        >>> parser = CommandParser(prog="pellm fit")
        >>> isinstance(parser, LightningArgumentParser)
        True
    """

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a part of a value is tried as one of several types
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        errors.print_error(explained(message, parser), f"All options: {prog} --help")
        sys.exit(errors.USAGE)


def explained(message: str, parser: ArgumentParser | None = None) -> str:
    """Return a parser's message without what does not help, and with the name that may have been meant.

    Args:
        message: Of jsonargparse.
        parser: Whose options were parsed.
    """
    keys = _KEY.findall(message)
    text, value = _KEY.sub("", message), ""
    given = _VALUE.search(text)
    if given:
        text, value = text[: given.start()], given[1]
    reasons = [" ".join(part.split()) for part in re.split(r"\n\s*- ", "\n" + text.strip())]
    reasons = [reason for reason in reasons if reason and not any(idle in reason for idle in _IDLE)]
    reasons = list(dict.fromkeys(map(_plain, reasons))) or [" ".join(text.split())]
    if "Literal[" in text and "." not in value:  # one of few words was meant, and no class
        reasons = [reason for reason in reasons if not reason.startswith("there is no class")]
    expected = [reason.removeprefix("expected ") for reason in reasons if reason.startswith("expected ")]
    if len(expected) > 1:
        reasons = [reason for reason in reasons if not reason.startswith("expected ")]
        reasons.append(f"expected {' or '.join(expected)}")
    said = ": ".join(filter(None, [".".join(keys), "; ".join(reasons)]))
    is_short = 0 < len(value) <= _MAX_VALUE and not re.match(r"\w*[({]", value)
    if is_short and not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said):
        said += f", got {value!r}"
    end = "" if said.endswith(("?", ".")) else "."
    return f"{said}{end}{_suggestion(message, value, parser)}"


def _plain(reason: str) -> str:
    """Return a reason without the notation of Python's types."""
    reason = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", reason)
    reason = re.sub(r"Expected an? (?=<class|typing)", "expected ", reason)
    reason = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", reason)
    reason = re.sub(r"typing\.Literal\[([^]]*)\]", r"\1", reason)
    reason = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", reason)
    return re.sub(r"\. Got value: (.*)$", r", got '\1'", reason)


def _suggestion(message: str, value: str, parser: ArgumentParser | None) -> str:
    """Return the sentence with the name that may have been meant; "" if none is close."""
    options = [option for action in parser._actions for option in action.option_strings] if parser else []
    unknown = re.search(r"nrecognized arguments: (-\S+?)(?:[=\s]|$)", message)
    if unknown:
        return did_you_mean(unknown[1], options)
    unknown = re.search(r"does not accept option '([^']+)'", message)
    if unknown:
        return did_you_mean(unknown[1], [option.lstrip("-") for option in options])
    unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if unknown:
        return did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2]))
    if "File does not exist" in message:
        path = Path(message.rpartition("'")[0].rpartition("'")[2])
        siblings = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
        return did_you_mean(path.stem, (other.stem for other in siblings))
    return _suggested_class(message) or did_you_mean(value, re.findall(r"'([^']+)'", _literals(message)))


def _suggested_class(message: str) -> str:
    argument = re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
    if argument:
        kind = _attribute(argument[1])
        return did_you_mean(argument[2], inspect.signature(kind).parameters if callable(kind) else ())
    attribute = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if attribute:
        return did_you_mean(attribute[2], dir(sys.modules.get(attribute[1])))
    module = re.search(r"No module named '([\w.]+)'", message)
    if module:
        folders = (Path(folder or ".") for folder in sys.path)
        return did_you_mean(
            module[1], {path.stem for folder in folders if folder.is_dir() for path in folder.iterdir()}
        )
    name = re.search(r"dot import path string: (\S+)", message)
    if name:
        bases = [_attribute(base) for base in re.findall(r"<?class '([\w.]+)'|(?<=\[)[\w.]+(?=\])", message)]
        classes = {kind for base in bases or [Optimizer, LRScheduler] for kind in _subclasses(base)}
        return did_you_mean(name[1], (kind.__name__ for kind in classes))
    return ""


def _literals(message: str) -> str:
    return " ".join(re.findall(r"Literal\[([^]]*)\]", message))


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _subclasses(base: Any) -> Iterable[type]:
    found: list[type] = base.__subclasses__() if isinstance(base, type) else []
    for kind in found:
        yield kind
        yield from _subclasses(kind)
