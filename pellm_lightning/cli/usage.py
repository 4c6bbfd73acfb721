"""Usage errors: what a parser refuses, in a few lines, with the name that was probably meant."""

import inspect
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from typing_extensions import override

from pellm_lightning.cli import errors
from pellm_lightning.comm.errors import did_you_mean

NO_TYPE_FITS = "Does not validate against any of the Union subtypes"
"""In jsonargparse's messages; what does not fit has a reason for each type."""

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_VALUE = re.compile(r"\s+Given value type: .*\n\s*Given value: (.*?)(?=\n\s+- |$)", re.MULTILINE)
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
# A class for an argument that takes a function, such as an optimizer; then what jsonargparse says of it.
_CALLABLE = re.compile(
    r"Type typing\.Callable\[.* expects a function or a callable class: ((?:.|\n)*?)"
    r"\. Got value: (?:Namespace\(class_path='([^']+)'.*|(.*))"
)
_FORMS = re.compile(r"Not a valid subclass of (\w+)(?:\s+Subclass types expect one of:(?:\n\s+- a .*)+)?")
# Of a union of types the one that nobody meant, and what a string might also have been.
_IDLE = rf"NoneType|not accessible or invalid|{NO_TYPE_FITS}|':$|^$"
_CLASS = r"Problem with given class_path '[^']+':"
_NO_CLASS = re.compile(
    r"Problem with given class_path 'lightning\.Lightning(?:Data)?Module': Option '([\w.]+)' is not accepted"
)
_OPTIMIZING = ("torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler")
_MAX_VALUE, _MAX_NAMES = 60, 8


class Parser(ArgumentParser):
    """Parser that reports an error in a few lines."""

    @override
    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def refuse(parser: ArgumentParser, message: str, command: str | None = None) -> NoReturn:
    """Report in a few lines what a parser does not accept, and exit; torchrun's summary shows it.

    Args:
        parser: Whose options were parsed.
        message: Of argparse or jsonargparse.
        command: The command of ``parser`` that was given, if it has several.
    """
    prog = " ".join(filter(None, [parser.prog.replace(" [options]", ""), command]))
    errors.print_error(explained(message, parser), f"All options: {prog} --help")
    sys.exit(errors.USAGE)


def explained(message: str, parser: ArgumentParser | None = None) -> str:
    """Return a parser's message without what does not help, and with the name that may have been meant.

    Args:
        message: Of jsonargparse.
        parser: Whose options were parsed.
    """
    message = _CALLABLE.sub(_as_class, message)
    if missing := _REQUIRED.fullmatch(message):
        return _missing(missing[1], parser)
    keys = _KEY.findall(message)
    text = _KEY.sub("", message)
    values = _VALUE.findall(text)  # the first is the innermost
    text = _FORMS.sub(r"expected \1", _VALUE.sub("", text))
    reasons = [" ".join(part.split()) for part in re.split(r"\n\s*- ", "\n" + text.strip())]
    reasons = [reason for reason in reasons if not re.search(_IDLE, reason)]
    reasons = list(dict.fromkeys(map(_plain, reasons))) or [" ".join(text.split())]
    value = next(iter([*re.findall(r", got '(.*)'$", reasons[0]), *values]), "")
    said = ": ".join(filter(None, [".".join(keys), "; ".join(_telling(reasons, message, value))]))
    is_short = 0 < len(value) <= _MAX_VALUE and not re.match(r"\[?\w*[({]", value)
    if is_short and not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said):
        said += f", got {value!r}"
    end = "" if said.endswith(("?", ".")) else "."
    return f"{said}{end}{_suggestion(message, value, parser)}"


def _as_class(found: re.Match[str]) -> str:
    """Return what jsonargparse says of a class in other places."""
    reason, class_path, value = found.groups()
    if class_path is None:
        return f"{reason}. Got value: {value}"
    return f"Problem with given class_path '{class_path}': {reason}"


def _telling(reasons: list[str], message: str, value: str) -> list[str]:
    """Return the reasons that tell something, with the types in one of them."""
    if "Literal[" in message and "." not in value:  # one of few words was meant, and no class
        reasons = [reason for reason in reasons if not reason.startswith("there is no class")]
    expected = [reason.removeprefix("expected ") for reason in reasons if reason.startswith("expected ")]
    # What is wrong with a value of the right type; then the other types need not be listed.
    precise = [reason for reason in reasons if not reason.startswith(("expected ", "there is no class"))]
    if precise or len(expected) < 2:
        return precise or reasons
    others = [reason for reason in reasons if not reason.startswith("expected ")]
    return [*others, f"expected {' or '.join(expected)}"]


def _missing(names: str, parser: ArgumentParser | None) -> str:
    """Return the sentence on required arguments: names as on the command line."""
    actions = parser._actions if parser else []
    options = {action.dest: action.option_strings[-1] for action in actions if action.option_strings}
    # Of the parser of all commands the name begins with that of the command.
    given = [re.sub(r"^\w+\.", "--", name) for name in names.split(", ")]
    missing = " and ".join(options.get(name, name) for name in given)
    end = ", or --config with a file that has it" if "config" in options or "." in names else ""
    one = len(given) == 1
    return f"{missing} {'is' if one else 'are'} missing. Give {'it' if one else 'them'}{end}."


def _plain(reason: str) -> str:
    """Return a reason without the notation of Python's types."""
    reason = re.sub(rf"({_CLASS}\s*)+(?={_CLASS})", "", reason)  # the innermost class
    path = re.search(r"Unexpected import path format: (\S*/\S*|\S+\.(?:ya?ml|json))$", reason)
    if path:
        return f"there is no file {path[1]}; a relative path is seen from {Path.cwd()}"
    reason = _NO_CLASS.sub(r"has no class_path, the class that takes '\1'", reason)
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
    unknown = re.search(r"^Subcommand .* does not accept option '([^']+)'", message)
    if unknown:
        return _closest(unknown[1], [option.lstrip("-") for option in options])
    if "is not accepted before subcommand" in message:
        return " Options stand behind the command: pellm COMMAND --config run.yaml"
    unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if unknown:
        return did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2]))
    if "File does not exist" in message:
        path = Path(message.rpartition("'")[0].rpartition("'")[2])
        siblings = path.parent.glob(f"*{path.suffix}") if path.parent.is_dir() else ()
        return did_you_mean(path.stem, (other.stem for other in siblings))
    return _suggested_class(message) or did_you_mean(value, re.findall(r"'([^']+)'", _literals(message)))


def _suggested_class(message: str) -> str:
    argument = re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message)
    if argument:
        names = _arguments(_attribute(argument[1]))
        name = argument[2].partition(".")[0]
        return did_you_mean(name, [*names, "class_path", "init_args"]) or _listed(names)
    field = re.search(r"class_path '([\w.]+)':\s+Group '(\w+)' does not accept option '(\w+)'", message)
    if field:
        names = _arguments(get_type_hints(_attribute(field[1])).get(field[2]))
        return did_you_mean(field[3], names) or _listed(names)
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
        bases += map(_attribute, _OPTIMIZING)  # arguments that take a function do not say of which class
        classes = {kind for base in bases for kind in _subclasses(base)}
        return did_you_mean(name[1], (kind.__name__ for kind in classes))
    return ""


def _closest(name: str, known: list[str]) -> str:
    """Return the sentence with the known name that was meant: as a whole, or as far as one is unknown."""
    parts, meant = name.split("."), did_you_mean(name, known)
    for depth in range(1, len(parts) + 1):
        at_depth = {".".join(other.split(".")[:depth]) for other in known}
        part = ".".join(parts[:depth])
        if not meant and part not in at_depth:
            return did_you_mean(part, at_depth)
    return meant


def _listed(names: list[str]) -> str:
    """Return the sentence with the names that a class takes, the first of them if there are many."""
    own = [name for name in names if name not in ("args", "kwargs", "options", "params")]
    more = ", ..." if len(own) > _MAX_NAMES else ""
    return f" It takes {', '.join(own[:_MAX_NAMES])}{more}." if own else ""


def _literals(message: str) -> str:
    return " ".join(re.findall(r"Literal\[([^]]*)\]", message))


def _arguments(kind: Any) -> list[str]:
    return list(inspect.signature(kind).parameters) if callable(kind) else []


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _subclasses(base: Any) -> Iterable[type]:
    found: list[type] = base.__subclasses__() if isinstance(base, type) else []
    for kind in found:
        yield kind
        yield from _subclasses(kind)
