"""What is trainable must stay what the parties agreed on at the start of a fit."""

from collections.abc import Sequence

from torch import nn

from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.tensors.selection import is_federated, plain_name

CURE = (
    "If a callback such as BaseFinetuning unfreezes layers during the fit, leave them unfrozen and in the"
    " optimizer from the start, in a parameter group whose lr is 0 until they are to train."
)
"""What to do about layers that are unfrozen later."""


class TrainableSet:
    """Finds parameters that become trainable in a fit, which no round would average.

    What is frozen in a fit is averaged on, and so stays equal at all parties.

    Args:
        module: As it is when the parties agree on what they share.
        include: As of ``parameters.select``.
        exclude: As of ``parameters.select``: what it matches may become trainable, and stays at home.
    """

    def __init__(self, module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include, self._exclude = include, exclude
        self._known = {id(p) for p in module.parameters() if p.requires_grad}
        self._frozen = list(self._others(module))
        self._group_sizes: list[int] | None = None
        self._in_optimizers: list[nn.Parameter] = []

    def check(self, local: LocalTraining, module: nn.Module, *, everything: bool) -> None:
        """Refuse a parameter that was frozen, or not there, and is now trained.

        Args:
            local: Its optimizers say what is trained.
            module: The module as it is now.
            everything: Whether to look for parameters that were not there, which takes longer.

        Raises:
            ValueError: If there is one.
        """
        if not everything and not self._may_train(local):
            return
        others = list(self._others(module)) if everything else self._frozen
        unfrozen = [(name, p) for name, p in others if p.requires_grad]
        if not unfrozen:
            return
        trained = {id(p) for o in local.optimizers for group in o.param_groups for p in group["params"]}
        names = [name for name, p in unfrozen if id(p) in trained]
        if names:
            raise ValueError(
                f"The parameter {names[0]!r} ({len(names)} in all) trains since epoch"
                f" {local.epoch}, step {local.step}, but was not trainable when the"
                " parties agreed on what they share: no round would average it, and it would differ at each"
                f" party. {CURE} Or let it stay at home by exclude=[{names[0]!r}]."
            )

    def _may_train(self, local: LocalTraining) -> bool:
        """Tell whether what was frozen may be trained now: it is in an optimizer, and requires a gradient.

        Of a frozen base's many parameters few or none are in an optimizer, so few are looked at each step.
        """
        groups = [group["params"] for optimizer in local.optimizers for group in optimizer.param_groups]
        sizes = [len(group) for group in groups]
        if sizes != self._group_sizes:
            known = {id(p) for group in groups for p in group}
            self._group_sizes = sizes
            self._in_optimizers = [p for _, p in self._frozen if id(p) in known]
        return any(p.requires_grad for p in self._in_optimizers)

    def _others(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return what would federate if it had been trainable at the start, by name."""
        named = ((plain_name(name), p) for name, p in module.named_parameters() if id(p) not in self._known)
        return [(name, p) for name, p in named if is_federated(name, self._include, self._exclude)]
