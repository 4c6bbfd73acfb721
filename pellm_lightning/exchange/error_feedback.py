"""Error-feedback residuals of lossy exchanges (Karimireddy et al. 2019, arXiv:1901.09847)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ErrorFeedback:
    """Error-feedback residuals of one party: compression errors, which are added to the next values sent.

    They are in units of the sum, after multiplication by the party's share: an error of one round's sum is
    repaid to a later sum as it is, whatever share the party has then.

    Nothing changes before ``commit``: an attempt that is repeated starts from the same residuals.

    Args:
        vector: What is summed in each round, (D,) float32; its buckets are identified by their offset in it.
        enabled: Whether residuals are kept; they take 8 bytes for each number of the vector.

    Example:
        >>> feedback = ErrorFeedback(torch.zeros(3), enabled=True)
        >>> feedback.begin(round=0, participating=[True, True])
        >>> feedback.next_residual(0, 3).copy_(torch.tensor([0.1, -0.1, 0.0])).tolist()[2]
        0.0
        >>> feedback.commit()
        >>> feedback.residual(0, 3)[0].item() > 0
        True
    """

    def __init__(self, vector: Tensor, *, enabled: bool) -> None:
        size = len(vector)
        self._vector = vector
        self.enabled = enabled
        self.round = 0
        self.participating: list[bool] = []
        """Which members take part in the current attempt, in their order."""
        self.num_gathers = 0
        """Number of gathers in the current attempt."""
        self._residual = torch.zeros(size if enabled else 0)
        self._next = torch.zeros(size if enabled else 0)
        self._touched: list[slice] = []
        self._squared_error = self._squared_norm = 0.0
        self._restored = False
        self._buffers: dict[str, Tensor] = {}

    @property
    def error(self) -> float | None:
        """Relative compression error of the current attempt, by 2-norms; None if nothing was compressed."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm > 0 else None

    def begin(self, round: int, participating: Sequence[bool]) -> None:
        """Begin an attempt at a round; discard the previous attempt's residuals."""
        self.discard()
        self.round = round
        self.participating = list(participating)

    def discard(self) -> None:
        """Discard the residuals of a failed attempt."""
        self._touched, self.participating, self.num_gathers = [], [], 0
        self._squared_error = self._squared_norm = 0.0

    def commit(self) -> None:
        """Commit the attempt's residuals together with its round."""
        for place in self._touched:
            # A value that is not finite was excluded from the round, or made it non-finite for all; the next
            # round must not inherit it.
            if math.isfinite(float(self._next[place].sum())):
                self._residual[place].copy_(self._next[place])
        if self.participating:
            self._restored = False
        self._touched, self.participating = [], []

    def offset(self, bucket: Tensor) -> int | None:
        """Return a bucket's offset in the vector, None if it is not part of it."""
        if bucket.untyped_storage().data_ptr() != self._vector.untyped_storage().data_ptr():
            return None
        return int(bucket.storage_offset()) - int(self._vector.storage_offset())

    def residual(self, start: int, stop: int) -> Tensor | None:
        """Return the residuals of a range of the vector, None if disabled."""
        return self._residual[start:stop] if self.enabled else None

    def next_residual(self, start: int, stop: int) -> Tensor | None:
        """Return the buffer to write a range's new residuals into, None if disabled."""
        if not self.enabled:
            return None
        self._touched.append(slice(start, stop))
        return self._next[start:stop]

    def record_error(self, error: Tensor, values: Tensor) -> None:
        """Accumulate the squared norms of a compression error and of the values that were compressed."""
        self._squared_error += float(torch.dot(error, error))
        self._squared_norm += float(torch.dot(values, values))

    def buffer(self, name: str, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Return a named scratch buffer, reused between rounds: allocating costs more than filling it."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size]

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals, which belong to this party alone."""
        return {"residuals": self._residual.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of ``state_dict``.

        Raises:
            ValueError: If it belongs to a vector of another length.
        """
        residuals = state["residuals"]
        if not self.enabled or not len(residuals):
            return
        if residuals.shape != self._residual.shape:
            raise ValueError(
                f"The checkpoint's residuals of error feedback are {len(residuals)} numbers, but the"
                f" parameters are {len(self._residual)}. Resume with the model and the aggregation of the"
                " checkpoint."
            )
        self._residual.copy_(residuals)
        self._restored = True

    def discard_restored(self) -> None:
        """Discard a checkpoint's residuals when the other parties have committed later rounds.

        Part of them was repaid before the crash, in rounds that the checkpoint does not know.
        """
        if self._restored:
            self._residual.zero_()
            self._restored = False
