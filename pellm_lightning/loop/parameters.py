"""Selection of the parameters that federate, and what becomes of the frozen ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pellm_lightning.aggregation import lora_modules
from pellm_lightning.tensors.frozen_state import quantization_state
from pellm_lightning.tensors.selection import select
from pellm_lightning.tensors.sharding import storage_key


@dataclass(frozen=True)
class Parameters:
    """Selection of the federated parameters among the trainable ones, and checks of the frozen ones.

    Example:
        The LoRA factors federate, the classifier's head stays with its party.

        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(parameters=Parameters(exclude=["*classifier*"]))

    Args:
        include: Glob patterns over names of trainable parameters; only what matches one federates. Default:
            all.
        exclude: Glob patterns over names of trainable parameters that stay local.
        check_frozen: Compare every value of the frozen weights, of the adapters' buffers and of the
            quantisation state over the parties before training, by digests computed once per fit.
        save_frozen: Whether checkpoints hold the frozen parameters too. Without them a checkpoint is as small
            as the adapter, and is resumed on, or loaded onto, a freshly built base.
        experimental: Allow parties in shards by FSDP1 or DeepSpeed, which have not been run in a federation
            on accelerators yet, or with an older torch than was tried; see the page on sharded parties.

    Raises:
        ValueError: If a list of patterns is none.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    check_frozen: bool = True
    save_frozen: bool = True
    experimental: bool = False

    def __post_init__(self) -> None:
        _check_patterns("include", self.include)
        _check_patterns("exclude", self.exclude)

    def select(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the module's parameters that federate, by name, sorted.

        Raises:
            ValueError: If there are none, or a pattern matches nothing.
        """
        return select(module, self.include, self.exclude)

    def unsaved(self, module: nn.Module, *, writes_base: bool) -> set[str]:
        """Return the names of frozen parameters, and of their quantisation state, that checkpoints leave out.

        Args:
            module: The module.
            writes_base: Whether rounds write into the frozen weights below LoRA factors: these are saved.
        """
        if self.save_frozen:
            return set()
        bases = [lora.base for lora in lora_modules(module).values()] if writes_base else []
        written = {storage_key(base) for base in bases if base is not None}
        parameters = module.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in parameters if not p.requires_grad and storage_key(p) not in written}
        return frozen | quantization_state(module)


def _check_patterns(name: str, value: object) -> None:
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(pattern, str) for pattern in value)
    ):
        raise ValueError(
            f"{name}={value!r} must be a list of glob patterns, for example {name}=['*lora_A*']."
        )
