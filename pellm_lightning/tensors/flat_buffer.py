"""Flat buffer: the layout of named parameters in one float32 vector.

The vector is processed in chunks that fit into a core's cache: for a large adapter the memory traffic of
packing takes as long as the network, so each pass over main memory counts.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pellm_lightning.tensors.sharding import is_sharded

# Scalars per chunk: float32 chunks of parameters, vectors and scratch fit together into a core's 1 or 2 MB.
_CHUNK = 1 << 16
# Scalars per bucket, the unit of communication: large enough to hide latency, small enough to overlap.
_BUCKET = 1 << 22


class Strided:
    """Adapter for a range of a non-contiguous parameter, which has no flat view and is copied.

    Args:
        parameter: The whole parameter.
        start: First scalar of the range, in the parameter's logical order.
        stop: The scalar after the last.
    """

    def __init__(self, parameter: Tensor, start: int, stop: int) -> None:
        self._parameter = parameter
        self._range = slice(start, stop)
        self._size = stop - start
        self.dtype = parameter.dtype

    def numel(self) -> int:
        """Return the number of scalars."""
        return self._size

    def flat(self) -> Tensor:
        """Return a flat copy of the range."""
        return self._parameter.reshape(-1)[self._range]

    def copy_(self, values: Tensor) -> None:
        """Write flat values into the range."""
        flat = self._parameter.reshape(-1)
        flat[self._range] = values
        self._parameter.copy_(flat.view(self._parameter.shape))


class Chunk:
    """Chunk of the vector: a range and the pieces of parameters in it, in order.

    Args:
        start: Index of the first scalar.
        pieces: Flat views of parameters, or ``Strided`` adapters.
        group: Index of the layout's group that the parameters belong to.
    """

    def __init__(self, start: int, pieces: list[Tensor | Strided], group: int = 0) -> None:
        self.start = start
        self.pieces = pieces
        self.group = group
        self._sizes = [piece.numel() for piece in pieces]
        self.size = sum(self._sizes)
        self.stop = start + self.size
        self.rounds = any(piece.dtype not in (torch.float32, torch.float64) for piece in pieces)
        """Whether writing rounds, since a parameter has less precision than float32."""

    def gather_(self, out: Tensor) -> Tensor:
        """Copy the parameters into ``out``, a float32 vector of the chunk's size."""
        return torch.cat(self._flat(), out=out)

    def subtracted_from(self, values: Tensor, out: Tensor) -> Tensor:
        """Return ``values`` minus the parameters, in ``out``; both float32 vectors of the chunk's size."""
        flat = self._flat()
        return torch.sub(values, flat[0] if len(flat) == 1 else torch.cat(flat, out=out), out=out)

    def split(self, values: Tensor) -> list[Tensor]:
        """Return the parts of a vector of the chunk's size that belong to the pieces."""
        return list(values.split(self._sizes))

    def scatter_(self, values: Tensor) -> None:
        """Write a float32 vector of the chunk's size into the parameters, in place, cast to their dtype."""
        for piece, part in zip(self.pieces, self.split(values), strict=True):
            piece.copy_(part)

    def as_written(self, values: Tensor, scratch: Tensor) -> Tensor:
        """Return the parameters' values after ``scatter_(values)``; a rounded copy is in ``scratch``."""
        if not self.rounds:
            return values
        parts = zip(self.pieces, values.split(self._sizes), scratch.split(self._sizes), strict=True)
        for piece, part, rounded in parts:
            rounded.copy_(part.to(piece.dtype))
        return scratch

    def _flat(self) -> list[Tensor]:
        return [piece if isinstance(piece, Tensor) else piece.flat() for piece in self.pieces]


class Layout:
    """Layout of parameters in the flat vector: by groups, in each sorted by name.

    Args:
        parameters: Named floating-point tensors, on one device. They are read and written in place.
        groups: Names of each group, which can be sent without the others; no chunk or bucket spans two. By
            default all are one group.

    Raises:
        ValueError: If there are none, one is not real floating point, one is sharded, or devices differ.

    Example:
        >>> parameters = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
        >>> layout = Layout(parameters)
        >>> vector = layout.pack_(layout.new_vector())
        >>> vector
        tensor([1., 2., 3.])
        >>> layout.view(vector, "b").shape
        torch.Size([1, 1])
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[Collection[str]] | None = None
    ) -> None:
        groups = [list(parameters)] if groups is None else groups
        self._group_of = {name: index for index, group in enumerate(groups) for name in sorted(group)}
        self._parameters = {name: parameters[name] for name in self._group_of}
        _check(self._parameters)
        self.names = list(self._parameters)
        self._shapes = {name: list(p.shape) for name, p in self._parameters.items()}
        self._sizes = [p.numel() for p in self._parameters.values()]
        self._starts = dict(zip(self.names, accumulate(self._sizes, initial=0), strict=False))
        self.size = sum(self._sizes)
        self.device = next(iter(self._parameters.values())).device
        self._lay_out()

    @property
    def dtypes(self) -> list[str]:
        """Dtype of each parameter, such as ``"float32"``, in the vector's order."""
        return [str(p.dtype).removeprefix("torch.") for p in self._parameters.values()]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each parameter by name, in the vector's order."""
        return dict(self._shapes)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """Return a parameter's part of ``vector``, as a view in the parameter's shape."""
        start = self._starts[name]
        shape = self._shapes[name]
        return vector[start : start + math.prod(shape)].view(shape)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return all parameters' parts of ``vector``, by name, as views."""
        parts = vector.split(self._sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def new_vector(self) -> Tensor:
        """Return a new float32 vector for all parameters, on their device, of shape (D,)."""
        return torch.zeros(self.size, dtype=torch.float32, device=self.device)

    def new_scratch(self) -> Tensor:
        """Return a float32 vector as long as the longest chunk."""
        return torch.empty(
            max(chunk.size for chunk in self.chunks()), dtype=torch.float32, device=self.device
        )

    def ranges(self, vector: Tensor) -> list[Tensor]:
        """Return ``vector`` of shape (D,) as views of a bucket's size, whatever lies in them."""
        return list(vector.split(_BUCKET))

    def chunks(self) -> list[Chunk]:
        """Return the chunks of the vector, rebuilt if a parameter's storage was reallocated."""
        if [p.data_ptr() for p in self._parameters.values()] != self._pointers:
            self._check_shapes()
            self._lay_out()
        return self._chunks

    def buckets(self) -> list[list[Chunk]]:
        """Return the chunks grouped into buckets, the units of communication."""
        self.chunks()
        return self._buckets

    def pack_(self, vector: Tensor) -> Tensor:
        """Copy all parameters into ``vector`` of shape (D,)."""
        for chunk in self.chunks():
            chunk.gather_(vector[chunk.start : chunk.stop])
        return vector

    def unpack_(self, vector: Tensor) -> None:
        """Write ``vector`` of shape (D,) into all parameters, in place."""
        for chunk in self.chunks():
            chunk.scatter_(vector[chunk.start : chunk.stop])

    def first_nonfinite(self) -> str | None:
        """Return the name of the first parameter with NaN or infinity, None if there is none."""
        return next((name for name, p in self._parameters.items() if not is_finite(p)), None)

    def _check_shapes(self) -> None:
        for name, parameter in self._parameters.items():
            if list(parameter.shape) != self._shapes[name]:
                raise ValueError(
                    f"Parameter {name!r} has changed its shape from {self._shapes[name]} to"
                    f" {list(parameter.shape)}. Federated parameters must keep their shape in a fit."
                )

    def _lay_out(self) -> None:
        """Split the vector into chunks, by sizes only, so that they are equal at every party."""
        self._pointers = [p.data_ptr() for p in self._parameters.values()]
        self._chunks: list[Chunk] = []
        pieces: list[Tensor | Strided] = []
        start = filled = group = 0

        def close() -> None:
            nonlocal pieces, start, filled
            if filled:
                self._chunks.append(Chunk(start, pieces, group))
                pieces, start, filled = [], start + filled, 0

        for name, parameter in self._parameters.items():
            size, taken = parameter.numel(), 0
            if 2 * size > _CHUNK or self._group_of[name] != group:
                close()  # chunks of a single piece need no gathering
            group = self._group_of[name]
            while taken < size:
                stop = min(size, taken + _CHUNK - filled)
                pieces.append(_piece(parameter.detach(), taken, stop))
                filled += stop - taken
                taken = stop
                if filled == _CHUNK:
                    close()
        close()
        self._buckets = _group(self._chunks)


def is_finite(x: Tensor) -> bool:
    """Return whether all values are finite, by their sum, which needs no mask of them."""
    # A finite sum implies finite values; an infinite one may be an overflow.
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def are_finite(tensors: list[Tensor]) -> bool:
    """Return whether all values of tensors on one device are finite, by their norms."""
    if not tensors or bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()):
        return True
    return all(map(is_finite, tensors))  # squares of finite values may overflow


def sum_of_squares(chunk: Tensor) -> float:
    """Return the sum of squares of a chunk, summed in float32; not finite if a value is not."""
    squares = float(torch.dot(chunk, chunk))
    # Squares of large finite values overflow float32; those of infinite ones float64 also.
    return squares if math.isfinite(squares) else float(chunk.double().square().sum())


def norm_of(sums: Sequence[float]) -> float:
    """Return the 2-norm of a vector by its chunks' sums of squares; NaN if a value is not finite."""
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.nan


def _piece(parameter: Tensor, start: int, stop: int) -> Tensor | Strided:
    return parameter.view(-1)[start:stop] if parameter.is_contiguous() else Strided(parameter, start, stop)


def _group(chunks: list[Chunk]) -> list[list[Chunk]]:
    buckets: list[list[Chunk]] = []
    for chunk in chunks:
        first = buckets[-1][0] if buckets else None
        if first is None or chunk.group != first.group or chunk.stop - first.start > _BUCKET:
            buckets.append([])
        buckets[-1].append(chunk)
    return buckets


def _check(parameters: Mapping[str, Tensor]) -> None:
    if sum(p.numel() for p in parameters.values()) == 0:
        raise ValueError("There is no parameter to federate. Pass at least one floating-point tensor.")
    devices = {p.device for p in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"The federated parameters are on several devices ({', '.join(sorted(map(str, devices)))}); a"
            " party's parameters must be on one. Load the model without a device map that spreads it."
        )
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise ValueError(
                f"Parameter {name!r} is a DTensor, sharded over the party's processes, and an aggregator"
                " takes whole tensors. Federate by FederatedAveraging, which gathers them."
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"Parameter {name!r} has dtype {parameter.dtype}; only real floating point can be averaged."
            )
