"""Noise of third-party packages: warnings, advertisements and progress bars that no user can act on."""

import logging
import os
import re
import sys
import warnings

_PACKAGES = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "peft",
    "datasets",
    "httpx",
)
_ADVERTISEMENT = re.compile("💡 Tip|TPU available: False")
# What packages tell one another of their next versions; no user of the command line has written it.
_INTERNAL = (
    r"(lightning|transformers|peft|torch|torchmetrics|datasets|huggingface_hub|bitsandbytes|jsonargparse)\b"
)
_NEEDLESS = "`loftq_config` specified but will be ignored"  # the default, given by name


def quieten() -> None:
    """Quieten third-party packages: in the first process of a host somewhat, in the others altogether.

    Errors are always shown. Warnings that are asked for by ``python -W`` are shown as asked. Call it before
    these packages are imported, since some read what is set here only then; and ``quieten_loggers`` after.
    """
    if not (_is_first() and sys.stderr.isatty()):
        _disable_progress_bars()
    if not _is_first():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns as PEFT imports it, quantised or not
    if not sys.warnoptions:
        _quieten_warnings(_is_first())


def quieten_loggers() -> None:
    """Quieten the loggers of packages that have been imported, which set their own levels at that."""
    if not _is_first():
        for name in _PACKAGES:
            logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_is_no_advertisement)
    logging.getLogger("transformers.modeling_utils").addFilter(_in_one_line)


def _is_first() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _disable_progress_bars() -> None:
    for package in ("HUB", "DATASETS"):
        os.environ.setdefault(f"HF_{package}_DISABLE_PROGRESS_BARS", "1")


def _quieten_warnings(first: bool) -> None:
    if not first:
        warnings.filterwarnings("ignore", module=_INTERNAL)
    warnings.filterwarnings("ignore", _NEEDLESS)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_INTERNAL)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not _ADVERTISEMENT.search(str(record.msg))


def _in_one_line(record: logging.LogRecord) -> bool:
    """Shorten what transformers reports of a loaded checkpoint: nine lines for the weights of a new head."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(record.msg))
    head = re.match(r"(\w+) LOAD REPORT from: (.*)", text)
    if head:
        keys: dict[str, list[str]] = {}
        for key, status in re.findall(r"^(\S+) *\| *([A-Z]{2,})\b", text, re.MULTILINE):
            keys.setdefault(status, []).append(key)
        listed = "; ".join(f"{status} {', '.join(names)}" for status, names in keys.items())
        record.msg, record.args = f"{head[1]} from {head[2]}: {listed}", ()
    return True
