"""Outer optimizers that torch has not, and optimizers as defaults of arguments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from typing_extensions import override

T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerConfig:
    """Makes optimizers of one class with given settings: a default argument that pickles and compares equal.

    jsonargparse reads a dataclass as a dict, and a dict with these two keys as the configuration of a class.
    So ``--print_config`` shows the optimizer and each of its settings, and a YAML file or the command line
    can change one of them, as with a lambda: test_a_default_optimizer_is_configured_setting_by_setting.

    Args:
        class_path: Import path of the class.
        init_args: Its arguments but for the parameters.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Make the optimizer of ``params``."""
        module, _, name = self.class_path.rpartition(".")
        optimizer: torch.optim.Optimizer = getattr(import_module(module), name)(params, **self.init_args)
        return optimizer


def without_parser(factory: T) -> T:
    """Return what jsonargparse has made of a class and settings as a plain partial of that class.

    Its own partial holds the parser and the command line with the Trainer, which cannot be pickled. Anything
    else is returned as it is.
    """
    if isinstance(factory, partial) and factory.func.__module__.partition(".")[0] == "jsonargparse":
        made = next((argument for argument in factory.args if isinstance(argument, type)), None)
        if made is not None:
            return partial(made, **factory.keywords)  # type: ignore[return-value]
    return factory


class Yogi(torch.optim.Optimizer):
    """Adam whose second moment moves by steps of bounded size: as an outer optimizer, FedYogi.

    Element by element, with the gradient g, ``m = 0`` and ``v = initial_accumulator_value`` at the start::

        m <- beta1 m + (1 - beta1) g
        v <- v - (1 - beta2) g^2 sign(v - g^2)
        x <- x - lr m / (sqrt(v) + eps)

    That is FedYogi of Reddi et al. 2021 (arXiv:2003.00295), algorithm 2, whose tau is ``eps`` and whose Delta
    is ``-g``: test_yogi_equals_its_formula. As there, and unlike torch's Adam, the moments are not freed of
    their start.

    Args:
        params: Parameters, floating-point and dense.
        lr: Step size, above 0.
        betas: Coefficients of the moments, in [0, 1).
        eps: Added to the root of the second moment, above 0: the smaller, the more adaptive.
        initial_accumulator_value: Second moment at the start, 0 or more. The paper asks for at least
            ``eps ** 2``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        initial_accumulator_value: float = 1e-6,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must both be in [0, 1).")
        if not initial_accumulator_value >= 0:
            raise ValueError(f"initial_accumulator_value={initial_accumulator_value} must be 0 or more.")
        settings = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, settings)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient; return what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.full_like(p, group["initial_accumulator_value"])
                m, v = state["exp_avg"], state["exp_avg_sq"]
                square = p.grad * p.grad
                m.lerp_(p.grad, 1 - beta1)
                v.addcmul_(square, (v - square).sign_(), value=beta2 - 1)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss
