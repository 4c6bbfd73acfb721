"""What a party keeps of its own from round to round, where what crosses is not all that it wanted to say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ErrorFeedback:
    """The residuals of one party: what its codes have lost, to be sent with the next ones.

    They are in units of the sum, after the update was multiplied by the party's share: what is owed is owed
    to the sum of the round in which it was lost, whatever the party counts in the round that pays it.

    Nothing changes before ``commit``: an attempt that is made again begins from the same residuals.

    Args:
        vector: What is summed in each round, (D,) float32; its buckets are known by where they lie in it.
        keeps: Whether there are residuals at all; they take 8 bytes for each number of the vector.
    """

    def __init__(self, vector: Tensor, *, keeps: bool) -> None:
        size = len(vector)
        self._vector = vector
        self.keeps = keeps
        self.round = 0
        self.counting: list[bool] = []
        """Who counts in the present attempt, in the order of those that meet."""
        self.legs = 0
        """How often something was gathered in the present attempt."""
        self._kept = torch.zeros(size if keeps else 0)
        self._next = torch.zeros(size if keeps else 0)
        self._touched: list[slice] = []
        self._squares = [0.0, 0.0]
        self._restored = False
        self._buffers: dict[str, Tensor] = {}

    @property
    def error(self) -> float | None:
        """2-norm of what the codes of the present attempt lost, relative to what they say; None if none."""
        lost, whole = self._squares
        return math.sqrt(lost / whole) if whole > 0 else None

    def begin(self, round: int, counting: Sequence[bool]) -> None:
        """Begin to send what a round sums; what an attempt before has lost is forgotten."""
        self.discard()
        self.round = round
        self.counting = list(counting)

    def discard(self) -> None:
        """Forget an attempt that does not stand."""
        self._touched, self.counting, self._squares, self.legs = [], [], [0.0, 0.0], 0

    def commit(self) -> None:
        """Keep what the attempt has lost, since its round stands."""
        for place in self._touched:
            # A value that is not finite was left out of the round, or spoils it everywhere; not the next one.
            if math.isfinite(float(self._next[place].sum())):
                self._kept[place].copy_(self._next[place])
        if self.counting:
            self._restored = False
        self._touched, self.counting = [], []

    def place(self, bucket: Tensor) -> int | None:
        """Return where a bucket begins in the vector, None if it is of another."""
        if bucket.untyped_storage().data_ptr() != self._vector.untyped_storage().data_ptr():
            return None
        return int(bucket.storage_offset()) - int(self._vector.storage_offset())

    def owed(self, start: int, stop: int) -> Tensor | None:
        """Return the residuals of a range of the vector, None without."""
        return self._kept[start:stop] if self.keeps else None

    def lost(self, start: int, stop: int) -> Tensor | None:
        """Return where to write what a range of the vector loses now, None if nobody wants to know."""
        if not self.keeps:
            return None
        self._touched.append(slice(start, stop))
        return self._next[start:stop]

    def note(self, lost: Tensor, whole: Tensor) -> None:
        """Count what a code has lost of what."""
        self._squares[0] += float(torch.dot(lost, lost))
        self._squares[1] += float(torch.dot(whole, whole))

    def buffer(self, name: str, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return memory for a purpose, the same again and again: new memory costs more than filling it."""
        kept = self._buffers.get(name)
        if kept is None or len(kept) < size:
            kept = self._buffers[name] = torch.empty(size, dtype=dtype)
        return kept[:size]

    # ---- in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return this party's own state; nobody else may go on from it."""
        return {"residuals": self._kept.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: If it is of a vector of another length.
        """
        residuals = state["residuals"]
        if not self.keeps or not len(residuals):
            return
        if residuals.shape != self._kept.shape:
            raise ValueError(
                f"The checkpoint's residuals of error feedback are {len(residuals)} numbers, but the"
                f" parameters are {len(self._kept)}. Resume with the model and the aggregation of the"
                " checkpoint."
            )
        self._kept.copy_(residuals)
        self._restored = True

    def overtaken(self) -> None:
        """Forget residuals of a checkpoint, since the others have gone on from later.

        Before it died this party has paid some of them, in rounds that the checkpoint knows nothing of.
        """
        if self._restored:
            self._kept.zero_()
            self._restored = False
