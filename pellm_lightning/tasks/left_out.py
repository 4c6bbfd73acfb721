"""Notes on dropped and truncated records, and errors for sources without samples."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from pellm_lightning.tasks.records import Record
from pellm_lightning.tasks.samples import Cut, Samples
from pellm_lightning.trainer.environment import topology_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Note:
    """Log message about a source.

    Args:
        text: The message.
        is_warning: Whether records or parts of responses are missing, not only the tail of packed texts.
    """

    text: str
    is_warning: bool


def note_on(source: str, made: Samples, blank: Sequence[Record], block_size: int) -> Note | None:
    """Return a note on the records of a source that are dropped or truncated; None if there are none.

    Args:
        source: What the records are, for example ``files``.
        made: The samples.
        blank: The records that were left out since their text, prompt or response is blank.
        block_size: Tokens in a block.
    """
    parts = [*_of_blank(blank), *_of_cuts(made.cuts, block_size)]
    is_warning = bool(parts) or bool(made.tail and not made.blocks)
    if made.tail:
        parts.append(
            f"the last {made.tail} of the {made.tail + made.blocks * block_size} tokens of {made.num_texts}"
            " packed texts fill no block and are left out"
        )
    if not parts:
        return None
    needed = max((cut.prompt + cut.response for cut in made.cuts), default=0)
    remedy = f" block_size={needed} would keep each record whole." if needed > block_size else ""
    return Note(f"{source}, at block_size={block_size}: {'; '.join(parts)}.{remedy}", is_warning)


class Notes:
    """Log messages about a party's data, each logged once, by the party's leader."""

    def __init__(self) -> None:
        self._waiting: list[Note] = []
        self._logged: set[str] = set()

    def add(self, note: Note | None) -> None:
        """Add a note, unless it was logged before."""
        if note is not None and note.text not in self._logged:
            self._waiting.append(note)
            self._logged.add(note.text)

    def log_at(self, trainer: Trainer | None, party: int) -> None:
        """Log the added notes in one line."""
        waiting, self._waiting = self._waiting, []
        # Lightning's rank-zero functions mean rank 0 of the launch until the callback's setup, after this.
        if waiting and (trainer is None or topology_of(trainer).is_leader):
            level = logging.WARNING if any(note.is_warning for note in waiting) else logging.INFO
            log.log(level, "Party %s: %s", party, " ".join(note.text for note in waiting))


def check_not_empty(party: int, source: str, made: Samples, block_size: int, is_split: bool = False) -> None:
    """Validate that a source has samples.

    Args:
        party: Index of the party.
        source: What the records are.
        made: The samples.
        block_size: Tokens in a block.
        is_split: Whether ``val_fraction`` has taken it from other records.

    Raises:
        ValueError: Says what would give one.
    """
    if made.samples:
        return
    problems, remedies = [], []
    if made.cuts:
        least, most = (pick(_learnable_from(cut) for cut in made.cuts) for pick in (min, max))
        whole = max(cut.prompt + cut.response for cut in made.cuts)
        problems.append(
            f"the prompts of its {len(made.cuts)} records leave no room for a response in a block of"
            f" block_size={block_size} tokens (the first: {made.cuts[0].where or 'a record'},"
            f" {made.cuts[0].prompt} tokens of prompt)"
        )
        remedies.append(
            f"a larger block_size: {whole} holds every record whole, {most} some of each, {least} some of one"
        )
    if made.num_texts:
        problems.append(
            f"its {made.num_texts} texts have {made.tail} tokens, too little text for a block of"
            f" block_size={block_size}"
        )
        smaller = f", or a block_size of at most {made.tail}" if made.tail > 1 and not made.cuts else ""
        remedies.append(f"more text{smaller}")
    if is_split:
        remedies.append(
            "a larger val_fraction, files of their own for validation (val_files), or val_fraction=0"
        )
    raise ValueError(
        f"Party {party} has no sample in {source}: {' and '.join(problems) or 'there is no text'}. Give"
        f" {'; or '.join(remedies) or 'it text'}."
    )


def _learnable_from(cut: Cut) -> int:
    """Return the least block size at which a token of the response is learned."""
    return max(cut.prompt, 1) + 1


def _of_blank(blank: Sequence[Record]) -> list[str]:
    if not blank:
        return []
    return [f"{counted(len(blank), 'blank record')} left out (the first: {blank[0].where})"]


def _of_cuts(cuts: Sequence[Cut], block_size: int) -> list[str]:
    parts = []
    left_out = [cut for cut in cuts if cut.is_left_out]
    shorter = [cut for cut in cuts if not cut.is_left_out]
    if left_out:
        parts.append(
            f"{counted(len(left_out), 'record')} left out, whose prompt leaves no room for a response,"
            f" {sum(cut.response for cut in left_out)} tokens of response (the first: {left_out[0].where})"
        )
    if shorter:
        lost = sum(cut.prompt + cut.response - block_size for cut in shorter)
        parts.append(
            f"{counted(len(shorter), 'response')} cut, by {lost} tokens in all and without an end-of-sequence"
            f" token (the first: {shorter[0].where})"
        )
    return parts


def counted(number: int, noun: str) -> str:
    """Return a count with its noun and verb: 1 record is, 2 records are."""
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"
