"""Fragments of the parameters that take turns, so that each exchange is a K-th as large."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pellm_lightning.aggregation.base import Aggregation
from pellm_lightning.comm import Communicator
from pellm_lightning.engine.aggregator import Aggregator, RoundReport
from pellm_lightning.engine.auxiliary import AuxiliaryValues
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.engine.overlap import OverlappedAggregator


def fragments_of(names: Collection[str], fragments: int) -> list[list[str]]:
    """Deal the layers of a model to fragments in turn, as Streaming DiLoCo's strided pattern does.

    A layer is what has the same name up to the first number ("model.layers.7.mlp.up_proj" and
    "model.layers.7.norm"); without a number it is a module's own parameters, its adapter included.

    Args:
        names: Names of parameters.
        fragments: Number of fragments K.

    Raises:
        ValueError: If there are fewer layers than fragments.
    """
    layers: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        numbered = re.match(r".*?\.\d+(?=\.|$)", f".{name}")
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        layers.setdefault(numbered[0] if numbered else module or name, []).append(name)
    if len(layers) < fragments:
        raise ValueError(
            f"fragments={fragments} is more than the {len(layers)} layers of what federates"
            f" ({', '.join(layer.removeprefix('.') for layer in list(layers)[:3])}). Take fewer fragments."
        )
    dealt = list(layers.values())
    return [[name for layer in dealt[first::fragments] for name in layer] for first in range(fragments)]


def check_rule(rule: Aggregation) -> None:
    """Refuse a rule that lets factors rest by turns: fragments would be in different turns.

    Raises:
        ValueError: If it is one.
    """
    if rule.frozen_parts(0) != rule.frozen_parts(1):
        raise ValueError(
            f"{rule!r} trains other factors after each round, but fragments have their rounds at different"
            " times. Use another aggregation, or fragments=1."
        )


@dataclass(frozen=True)
class FragmentCursor:
    """What a party has done since the last round of each fragment, and whose turn it is."""

    samples: list[float]
    """Training samples since that of each, but for those since the last round of any."""
    steps: list[int]
    """Optimizer step at which each was last sent."""
    next: int = 0
    """The fragment whose turn it is."""

    @classmethod
    def from_step(cls, fragments: int, step: int) -> "FragmentCursor":
        """Return what is so before the first round."""
        return cls([0.0] * fragments, [step] * fragments)

    def behind(self, step: int) -> bool:
        """Tell whether the next fragment has been trained since it was sent."""
        return step > self.steps[self.next]

    def passed_on(self, samples: float, step: int) -> "FragmentCursor":
        """Return what is so after the next fragment was sent.

        Args:
            samples: Training samples since the last round of any fragment.
            step: The optimizer step at which it was sent.
        """
        since, steps = [before + samples for before in self.samples], list(self.steps)
        since[self.next], steps[self.next] = 0.0, step
        return FragmentCursor(since, steps, (self.next + 1) % len(steps))


class FragmentedAggregator:
    """One aggregator per fragment; each round is that of the next one.

    Args:
        federation: The joined parties of one launch.
        parameters: Named floating-point tensors on one device.
        fragments: Number of fragments K.
        make: Makes the aggregator of a fragment.
        **options: As of ``Aggregator``; neither ``privacy`` nor ``auxiliary``.

    Raises:
        ValueError: As ``Aggregator``; or if it cannot be done in fragments.
    """

    carried: Mapping[str, Tensor] = {}

    def __init__(
        self,
        federation: Communicator,
        parameters: Mapping[str, Tensor],
        fragments: int,
        make: Callable[..., Aggregator] = Aggregator,
        **options: Any,
    ) -> None:
        if federation.may_lose_parties:
            raise ValueError(
                "Separate jobs agree on one state of all parameters, so fragments need all parties in one"
                " launch. Set fragments=1."
            )
        if options.get("privacy") is not None or options.get("auxiliary") is not None:
            raise ValueError(
                "Differential privacy and drift corrections look at all parameters at once. Set fragments=1."
            )
        self.federation = federation
        self.names = fragments_of(parameters, fragments)
        self._parts: list[Aggregator] = []
        for number, names in enumerate(self.names):
            self._parts.append(make(federation, {name: parameters[name] for name in names}, **options))
            if not number:
                check_rule(self._parts[0]._plan.rule)
                options |= {"frozen": None}  # compared once
        self._turn = 0

    @property
    def round(self) -> int:
        """Index of the round that comes, over all fragments."""
        return self._turn

    @property
    def settings(self) -> Mapping[str, str | int | float | None]:
        """As of ``Aggregator``."""
        return self._parts[0].settings

    @property
    def run_id(self) -> str | None:
        """As of ``Aggregator``."""
        return self._parts[0].run_id

    @property
    def size_bytes(self) -> int:
        """Bytes of the vectors that the fragments exchange, all together."""
        return sum(part.size_bytes for part in self._parts)

    def party_spec(self) -> PartySpec:
        """As of ``Aggregator``, of all fragments together."""
        shown = [part.party_spec() for part in self._parts]
        schema = sorted(entry for of_part in shown for entry in of_part["schema"])
        lora = {name: pair for of_part in shown for name, pair in of_part["lora"].items()}
        return shown[0] | {"schema": schema, "lora": lora}

    def facts(self) -> dict[str, Any]:
        """As of ``Aggregator``."""
        return self._parts[0].facts()

    @property
    def failed(self) -> bool:
        """As of ``OverlappedAggregator``."""
        return self._overlapped.failed

    @property
    def completed(self) -> float:
        """As of ``OverlappedAggregator``."""
        return max(part.completed for part in self._parts if isinstance(part, OverlappedAggregator))

    def start(self) -> bool:
        """As of ``Aggregator``."""
        overwritten = [part.start() for part in self._parts]
        return any(overwritten)

    def step(
        self,
        weight: float,
        loss: float | None = None,
        contribution: AuxiliaryValues | None = None,
        *,
        steps_left: float = math.nan,
    ) -> RoundReport:
        """Run one round of the next fragment, as ``Aggregator`` does."""
        return self._told(self._next.step(weight, loss, contribution, steps_left=steps_left))

    def begin(self, weight: float, loss: float | None = None, *, steps_left: float = math.nan) -> None:
        """Begin a round of the next fragment, as ``OverlappedAggregator`` does."""
        self._overlapped.begin(weight, loss, steps_left=steps_left)

    def apply(self, *, last: bool = False) -> RoundReport:
        """Land the round under way, as ``OverlappedAggregator`` does."""
        return self._told(self._overlapped.apply(last=last))

    def drain(self) -> Iterator[RoundReport]:
        """As of ``Aggregator``."""
        drained = [part.drain() for part in self._parts]
        while (report := next(drained[self._turn % len(drained)], None)) is not None:
            yield self._told(report)

    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """As of ``Aggregator``."""
        return self._next.mean(values)

    def state_dict(self) -> dict[str, Any]:
        """As of ``Aggregator``."""
        return {"turn": self._turn, "fragments": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As of ``Aggregator``.

        Raises:
            ValueError: If the state is of other parameters, or of another number of fragments.
        """
        saved: Sequence[Mapping[str, Any]] = state.get("fragments", [state])
        if len(saved) != len(self._parts):
            raise ValueError(
                f"The checkpoint's federated state is of {len(saved)} fragments, these are"
                f" {len(self._parts)}. Resume with the fragments of the checkpoint."
            )
        for part, of_part in zip(self._parts, saved, strict=True):
            part.load_state_dict(of_part)
        self._turn = state["turn"]

    @property
    def _next(self) -> Aggregator:
        return self._parts[self._turn % len(self._parts)]

    @property
    def _overlapped(self) -> OverlappedAggregator:
        part = self._next
        if not isinstance(part, OverlappedAggregator):
            raise RuntimeError("These fragments are not exchanged in the background.")
        return part

    def _told(self, report: RoundReport) -> RoundReport:
        """Pass the turn on; tell the round's index over all fragments."""
        self._turn += 1
        return replace(report, round=self._turn - 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names as people count: layer 10 after layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
