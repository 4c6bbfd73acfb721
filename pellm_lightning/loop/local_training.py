"""LocalTraining: what the rounds know of, and ask from, the training loop of one process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues


class LocalTraining(ABC):
    """Interface to a training loop: Lightning's, transformers', or one of the user's own."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Optimizer steps made so far."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """Index of the present epoch."""

    @property
    @abstractmethod
    def planned_steps(self) -> float:
        """Optimizer steps after which training is over, if nothing stops it before; NaN if unknown."""

    @property
    @abstractmethod
    def optimizers(self) -> Sequence[Optimizer]:
        """The local optimizers."""

    @property
    def batch_copies(self) -> int:
        """Processes of the party that train on the same batch, as tensor-parallel ones do."""
        return 1

    @abstractmethod
    def stop(self) -> None:
        """Ask the loop to end after the present step."""

    @property
    @abstractmethod
    def should_stop(self) -> bool:
        """Whether the loop has been asked to end."""

    @abstractmethod
    def save(self, path: str, *, leads: bool) -> str:
        """Save what was trained; return how to continue from it, as a sentence. Called in all processes.

        Args:
            path: Where to.
            leads: Whether this process leads its party.
        """

    @abstractmethod
    def check_new_start(self, signature: str, round: int) -> None:
        """Refuse to begin anew in a federation in which this party has trained and saved before.

        Args:
            signature: What checkpoints of this party in this federation hold.
            round: Index of the federation's next round.
        """


class LocalCorrection(Protocol):
    """Interface to a correction of local steps, such as SCAFFOLD, which rounds begin and end."""

    @property
    def auxiliary(self) -> AuxiliaryTerms:
        """Auxiliary terms that it adds to rounds."""

    def begin(
        self, parameters: Mapping[str, nn.Parameter], mean: Mapping[str, Tensor], *, resumed: bool
    ) -> None:
        """Begin the rounds of a fit; see ``DriftCorrection.begin``."""

    def contribution(self) -> AuxiliaryValues:
        """Return this party's auxiliary values for the next round."""

    def end_round(self, mean: Mapping[str, Tensor], *, counted: bool) -> None:
        """Begin the next round, with the result of the last one in the parameters."""
