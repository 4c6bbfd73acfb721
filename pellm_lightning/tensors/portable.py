"""Arithmetic that gives the same bits on every processor, for what each party computes for itself.

IEEE 754 says to the bit what a sum, a difference, a product and a quotient of two numbers are. Torch does
more at once where a processor can: ``a + alpha * b`` is rounded once where there is a fused multiply-add and
twice where there is none, and its square roots come from a library that has other last bits on other
processors. So an optimizer's step differs in the last bit between institutions. Here all of that is put
together from operations of one rounding each.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

# Settings by which torch's optimizers choose kernels that do a whole step at once.
_KERNELS = ("foreach", "fused")


def step_(optimizer: torch.optim.Optimizer, piece: int = 1 << 16) -> None:
    """Step an optimizer by operations of one rounding each.

    The same state and gradients then give the same bits whatever the processor, the number of threads and the
    device, for every optimizer that is made of sums, products, quotients, square roots and comparisons, as
    those of torch are. What else it calls (exponentials, powers, random numbers) stays what it is.

    Args:
        optimizer: The optimizer.
        piece: Numbers worked on at a time: intermediate results take no more memory, and stay in the cache.
    """
    for group in optimizer.param_groups:
        group.update({key: False for key in _KERNELS if key in group})
    with _OneRoundingEach(piece):
        optimizer.step()


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a checksum of the tensors' bits, order included: 32 bits, against differences by accident."""
    sum_ = 0
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sum_ = zlib.crc32(data.numpy().data, sum_)
    return sum_


class _OneRoundingEach(TorchFunctionMode):
    """Takes torch's functions apart that round in another way than IEEE 754 says of their parts.

    Args:
        piece: Numbers worked on at a time.
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
        apart = _APART.get(name.strip("_"))
        if apart is None or not args or not _is_floating(args[0]):
            return func(*args, **kwargs)
        words = {key: value for key, value in kwargs.items() if key != "out"}
        out = args[0] if _is_in_place(name) else kwargs.get("out")
        result = _in_pieces(apart, args, words, out, self._piece)
        return func(*args, **kwargs) if result is None else result


def _in_pieces(
    apart: Callable[..., Tensor | None], args: Sequence[Any], words: Mapping[str, Any], out: Any, piece: int
) -> Tensor | None:
    """Return what a function makes of tensors of one shape, piece by piece; None if it is left as it is."""
    x = args[0]
    tensors = [value for value in (*args, *words.values(), out) if isinstance(value, Tensor) and value.ndim]
    if x.numel() <= piece or any(of.shape != x.shape or not of.is_contiguous() for of in tensors):
        result = apart(*args, **words)
        return result if result is None or out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(x)
    for start in range(0, x.numel(), piece):
        at = slice(start, start + piece)
        part = apart(*(_part(value, at) for value in args), **{k: _part(v, at) for k, v in words.items()})
        if part is None:
            return None
        out.view(-1)[at].copy_(part)
    return cast(Tensor, out)


def _part(value: Any, at: slice) -> Any:
    return value.view(-1)[at] if isinstance(value, Tensor) and value.ndim else value


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_in_place(name: str) -> bool:
    """Tell ``add_`` and ``__iadd__`` from ``add`` and ``__add__``."""
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


# ---- the parts; None leaves a function as it is


def _add(x: Tensor, other: Any, *, alpha: Any = 1) -> Tensor | None:
    return None if alpha == 1 else x + other * alpha


def _subtract(x: Tensor, other: Any, *, alpha: Any = 1) -> Tensor | None:
    return None if alpha == 1 else x - other * alpha


def _lerp(x: Tensor, end: Tensor, weight: Any) -> Tensor:
    near = x + (end - x) * weight
    far = end - (end - x) * (1 - weight)  # exact at the end, as torch's is
    if isinstance(weight, Tensor):
        return torch.where(weight.abs() < 0.5, near, far)
    chosen: Tensor = near if abs(weight) < 0.5 else far
    return chosen


def _addcmul(x: Tensor, one: Tensor, other: Tensor, *, value: Any = 1) -> Tensor:
    return x + one.mul(value).mul(other)


def _addcdiv(x: Tensor, one: Tensor, other: Tensor, *, value: Any = 1) -> Tensor:
    return x + one.mul(value).div(other)


def _divide(x: Tensor, other: Any, *, rounding_mode: str | None = None) -> Tensor | None:
    if isinstance(other, Tensor) and not (other.ndim == 0 and other.device != x.device):
        return None
    # Of a number a GPU takes the reciprocal first, which is a rounding more.
    divisor = torch.as_tensor(other, dtype=x.dtype).to(x.device)
    return torch.div(x, divisor, rounding_mode=rounding_mode)


def _sqrt(x: Tensor) -> Tensor:
    # The square root of float32 is never so near to the middle of two numbers that an error in the last bits
    # of float64 could turn the rounding: with 24 bits it keeps 2^-50 away, relatively.
    return x.double().sqrt().to(x.dtype)


def _rsqrt(x: Tensor) -> Tensor:
    return 1 / _sqrt(x)


def _power(x: Tensor, exponent: Any) -> Tensor | None:
    if isinstance(exponent, Tensor):
        return None
    known: dict[Any, Callable[[Tensor], Tensor]] = {0.5: _sqrt, -0.5: _rsqrt, 2: torch.square}
    return known[exponent](x) if exponent in known else None


_APART: dict[str, Callable[..., Tensor | None]] = {
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
