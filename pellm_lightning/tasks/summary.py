"""Summary of a party's data: what was read, cut and left out, and errors for sources without samples."""

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer

from pellm_lightning.comm.topology import Topology
from pellm_lightning.tasks.samples import TextSamples
from pellm_lightning.tasks.store import Stored
from pellm_lightning.trainer.environment import shares_terminal, topology_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """Line of the summary.

    Args:
        source: What the records are, for example ``files``.
        records: Number of records that were read.
        samples: Number of samples made of them.
        tokens: Number of tokens in these.
        cut: Number of samples that lack their end.
        left_out: Number of records of which nothing is used.
        note: What exactly is lost, and what would keep it.
        is_loss: Whether records or their ends are missing, not only the tail of packed texts.
    """

    source: str
    records: int
    samples: int
    tokens: int
    cut: int = 0
    left_out: int = 0
    note: str = ""
    is_loss: bool = False


class Summary:
    """Table of a party's sources, logged by its leader; each line once."""

    def __init__(self) -> None:
        self._waiting: list[Line] = []
        self._logged: dict[Line, None] = {}

    def add(self, line: Line) -> None:
        """Add a line, unless it was logged before."""
        if line not in self._logged:
            self._waiting.append(line)
            self._logged[line] = None

    def log_at(
        self, trainer: Trainer | None, party: int, limit: str, folder: Path | None, parts: str
    ) -> None:
        """Log the added lines: as one table, or in one line if several parties share the terminal.

        Args:
            trainer: Tells which process of the party leads it.
            party: Index of the party.
            limit: The limit of a sample's length.
            folder: Folder that keeps what is made of the data, and gets the table too; None if none is kept.
            parts: Table of who holds what in a simulation.
        """
        waiting, self._waiting = self._waiting, []
        topology = Topology() if trainer is None else topology_of(trainer)
        # Lightning's rank-zero functions mean rank 0 of the launch until the callback's setup, after this.
        if not waiting or not topology.is_leader:
            return
        level = logging.WARNING if any(line.is_loss for line in waiting) else logging.INFO
        text = _text(party, limit, waiting, parts)
        if folder is not None:
            file = folder / f"summary-{party}.txt"
            file.write_text(f"{_text(party, limit, list(self._logged), parts)}\n", encoding="utf-8")
        if folder is not None and shares_terminal(topology):
            more = "More, and who holds what," if parts else "More"
            text = f"[party {party}] {'; '.join(map(_short, waiting))}. {more} in {file}."
        elif folder is not None:
            text += f"\nCached, with the texts, in {folder}."
        log.log(level, "%s", text)


def _text(party: int, limit: str, lines: Sequence[Line], parts: str) -> str:
    notes = [f"{line.source}: {line.note}" for line in lines if line.note]
    return "\n".join(filter(None, [table(party, limit, lines), *notes, parts]))


def _short(line: Line) -> str:
    lost = [f"{n:,} {what}" for n, what in ((line.cut, "cut"), (line.left_out, "left out")) if n]
    return ", ".join([f"{line.source}: {line.records:,} records", f"{line.tokens:,} tokens", *lost])


def table(party: int, limit: str, lines: Sequence[Line]) -> str:
    """Return the lines as a table of text."""
    head = (f"Party {party}, {limit}", "records", "samples", "tokens", "cut", "left out")
    rows = [head, *((str(c) if isinstance(c, str) else f"{c:,}" for c in astuple(n)[:6]) for n in lines)]
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in zip(*columns, strict=True)
    )


def text_line(source: str, samples: TextSamples, filled: Stored, blank: Stored) -> Line:
    """Return the line on a source of texts and conversations.

    Args:
        source: What the records are.
        samples: The samples.
        filled: The records that they were made of.
        blank: The records without content.
    """
    size, over = samples.block_size, ~samples.is_document & (samples.lengths > samples.block_size)
    gone, cut = ~samples.is_document & ~samples.learnable, over & samples.learnable
    tail = samples.stream - samples.blocks * size
    parts = _blank("record", blank)
    if gone.any():
        answers = int((samples.lengths - samples.first)[gone].sum())
        parts.append(
            f"{counted(int(gone.sum()), 'record')} left out, whose prompt leaves no room for a response,"
            f" {answers} tokens of response (the first: {filled.where(int(gone.argmax()))})"
        )
    if cut.any():
        parts.append(
            f"{counted(int(cut.sum()), 'response')} cut, by {int((samples.lengths - size)[cut].sum())} tokens"
            f" in all and without an end-of-sequence token (the first: {filled.where(int(cut.argmax()))})"
        )
    is_loss = bool(parts) or bool(tail and not samples.blocks)
    if tail:
        parts.append(
            f"the last {tail} of the {samples.stream} tokens of {int(samples.is_document.sum())} packed texts"
            " fill no block and are left out"
        )
    note = f"{'; '.join(parts)}." if parts else ""
    if over.any():
        note += f" block_size={int(samples.lengths[over].max())} would keep each record whole."
    left_out = len(blank) + int(gone.sum())
    records = len(filled) + len(blank)
    return Line(source, records, len(samples), samples.num_tokens, int(cut.sum()), left_out, note, is_loss)


def labelled_line(source: str, lost: Sequence[int], filled: Stored, blank: Stored, max_length: int,
                  tokens: int) -> Line:  # fmt: skip
    """Return the line on a source of labelled texts.

    Args:
        source: What the rows are.
        lost: Number of tokens that each text lacks at its end.
        filled: The rows with a text.
        blank: The others.
        max_length: Tokens of a text.
        tokens: Number of tokens of all samples.
    """
    parts, cut = _blank("row", blank), np.flatnonzero(lost)
    if len(cut):
        first = filled.where(int(cut[0]))
        parts.append(
            f"{counted(len(cut), 'text')} cut, by {sum(lost)} tokens (the first: {first});"
            f" max_length={max_length + max(lost)} would keep each whole"
        )
    note = f"{'; '.join(parts)}." if parts else ""
    records = len(filled) + len(blank)
    return Line(source, records, len(filled), tokens, len(cut), len(blank), note, bool(parts))


def check_not_empty(
    party: int, source: str, samples: TextSamples, filled: Stored, is_split: bool = False
) -> None:
    """Validate that a source has samples.

    Args:
        party: Index of the party.
        source: What the records are.
        samples: The samples.
        filled: The records that they were made of.
        is_split: Whether ``val_fraction`` has taken it from other records.

    Raises:
        ValueError: Says what would give one.
    """
    if len(samples):
        return
    size, singles = samples.block_size, np.flatnonzero(~samples.is_document)
    texts = len(samples.lengths) - len(singles)
    problems, remedies = [], []
    if len(singles):
        prompts = samples.first[singles]
        learnable = np.maximum(prompts, 1) + 1
        problems.append(
            f"the prompts of its {len(singles)} records leave no room for a response in a block of"
            f" block_size={size} tokens (the first: {filled.where(int(singles[0]))}, {prompts[0]} tokens of"
            " prompt)"
        )
        remedies.append(
            f"a larger block_size: {samples.lengths[singles].max()} holds every record whole,"
            f" {learnable.max()} some of each, {learnable.min()} some of one"
        )
    if texts:
        problems.append(
            f"its {texts} texts have {samples.stream} tokens, too little text for a block of"
            f" block_size={size}"
        )
        smaller = f", or a block_size of at most {samples.stream}" if samples.stream > 1 else ""
        remedies.append(f"more text{'' if len(singles) else smaller}")
    if is_split:
        remedies.append(
            "a larger val_fraction, files of their own for validation (val_files), or val_fraction=0"
        )
    raise ValueError(
        f"Party {party} has no sample in {source}: {' and '.join(problems) or 'there is no text'}. Give"
        f" {'; or '.join(remedies) or 'it text'}."
    )


def _blank(noun: str, blank: Stored) -> list[str]:
    return [f"{counted(len(blank), f'blank {noun}')} left out (the first: {blank.where(0)})"] if blank else []


def counted(number: int, noun: str) -> str:
    """Return a count with its noun and verb: 1 record is, 2 records are."""
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"
