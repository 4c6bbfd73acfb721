"""Portable arithmetic: optimizer steps with the same bits on every processor.

IEEE 754 defines sums, differences, products and quotients of two numbers to the bit. Torch fuses operations
where a processor can: ``a + alpha * b`` is rounded once with a fused multiply-add and twice without, and its
square roots differ in the last bit between processors. So an optimizer's step, which each party computes
redundantly, differs in the last bit between institutions. Here it is composed of correctly rounded
operations.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pellm_lightning.tensors.digest import bits_digest

# Settings of torch's optimizers that select fused kernels.
_KERNELS = ("foreach", "fused")


def step_(optimizer: torch.optim.Optimizer, piece: int = 1 << 16) -> None:
    """Step an optimizer by correctly rounded operations.

    The same state and gradients then give the same bits on any processor, device and number of threads, for
    every optimizer made of sums, products, quotients, square roots and comparisons, such as torch's. Other
    functions (exponentials, powers, random numbers) are not changed.

    Args:
        optimizer: The optimizer.
        piece: Numbers processed at a time, which limits the memory of intermediate results.
    """
    for group in optimizer.param_groups:
        group.update({key: False for key in _KERNELS if key in group})
    with _CorrectRounding(piece):
        optimizer.step()


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of 63 bits of the tensors' bits, in order, to detect accidental differences."""
    sum_ = 0
    for tensor in tensors:
        hashed = hashlib.sha256(f"{sum_} {bits_digest(tensor)}".encode()).digest()
        sum_ = int.from_bytes(hashed[:8], "big") >> 1
    return sum_


class _CorrectRounding(TorchFunctionMode):
    """Torch function mode that decomposes fused functions into correctly rounded ones.

    Args:
        piece: Numbers processed at a time.
    """

    def __init__(self, piece: int = 1 << 16) -> None:
        super().__init__()
        self._piece = piece

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        decompose = _DECOMPOSITIONS.get(name.strip("_"))
        if decompose is None or not args or not _is_floating(args[0]):
            return func(*args, **kwargs)
        settings = {key: value for key, value in kwargs.items() if key != "out"}
        out = args[0] if _is_in_place(name) else kwargs.get("out")
        result = _in_pieces(decompose, args, settings, out, self._piece)
        return func(*args, **kwargs) if result is None else result


def _in_pieces(
    decompose: Callable[..., Tensor | None],
    args: Sequence[Any],
    settings: Mapping[str, Any],
    out: Any,
    piece: int,
) -> Tensor | None:
    """Apply a decomposition piece by piece to tensors of one shape; None if not decomposed."""
    x = args[0]
    tensors = [
        value for value in (*args, *settings.values(), out) if isinstance(value, Tensor) and value.ndim
    ]
    if x.numel() <= piece or any(of.shape != x.shape or not of.is_contiguous() for of in tensors):
        result = decompose(*args, **settings)
        return result if result is None or out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(x)
    for start in range(0, x.numel(), piece):
        at = slice(start, start + piece)
        part = decompose(
            *(_part(value, at) for value in args),
            **{k: _part(v, at) for k, v in settings.items()},
        )
        if part is None:
            return None
        out.view(-1)[at].copy_(part)
    return cast(Tensor, out)


def _part(value: Any, at: slice) -> Any:
    return value.view(-1)[at] if isinstance(value, Tensor) and value.ndim else value


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_in_place(name: str) -> bool:
    """Return whether a function is in-place, such as ``add_`` and ``__iadd__``."""
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


# ---- decompositions; None keeps a function as it is


def _add(x: Tensor, other: Any, *, alpha: Any = 1) -> Tensor | None:
    return None if alpha == 1 else x + other * alpha


def _subtract(x: Tensor, other: Any, *, alpha: Any = 1) -> Tensor | None:
    return None if alpha == 1 else x - other * alpha


def _lerp(x: Tensor, end: Tensor, weight: Any) -> Tensor:
    near = x + (end - x) * weight
    far = end - (end - x) * (1 - weight)  # exact at the end, like torch's
    if isinstance(weight, Tensor):
        return torch.where(weight.abs() < 0.5, near, far)
    result: Tensor = near if abs(weight) < 0.5 else far
    return result


def _addcmul(x: Tensor, one: Tensor, other: Tensor, *, value: Any = 1) -> Tensor:
    return x + one.mul(value).mul(other)


def _addcdiv(x: Tensor, one: Tensor, other: Tensor, *, value: Any = 1) -> Tensor:
    return x + one.mul(value).div(other)


def _divide(x: Tensor, other: Any, *, rounding_mode: str | None = None) -> Tensor | None:
    if isinstance(other, Tensor) and not (other.ndim == 0 and other.device != x.device):
        return None
    # A GPU multiplies by the reciprocal of a number, which is an additional rounding.
    divisor = torch.as_tensor(other, dtype=x.dtype).to(x.device)
    return torch.div(x, divisor, rounding_mode=rounding_mode)


def _sqrt(x: Tensor) -> Tensor:
    # A float32 square root is never within 2^-50, relatively, of the midpoint of two numbers, so errors in
    # the last bits of float64 cannot change the rounding.
    return x.double().sqrt().to(x.dtype)


def _rsqrt(x: Tensor) -> Tensor:
    return 1 / _sqrt(x)


def _power(x: Tensor, exponent: Any) -> Tensor | None:
    if isinstance(exponent, Tensor):
        return None
    known: dict[Any, Callable[[Tensor], Tensor]] = {0.5: _sqrt, -0.5: _rsqrt, 2: torch.square}
    return known[exponent](x) if exponent in known else None


_DECOMPOSITIONS: dict[str, Callable[..., Tensor | None]] = {
    "add": _add,
    "sub": _subtract,
    "subtract": _subtract,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "div": _divide,
    "divide": _divide,
    "true_divide": _divide,
    "truediv": _divide,
    "itruediv": _divide,
    "idiv": _divide,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "pow": _power,
    "ipow": _power,
}
