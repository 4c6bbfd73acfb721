"""A rule applied to the parameters at hand: which of them are pairs, what crosses, what rests."""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from pellm_lightning.aggregation.base import EVERYTHING, FACTORS, Aggregation, Capability, Part, Parts
from pellm_lightning.aggregation.lora import LoraModule, Pair, find_pairs
from pellm_lightning.aggregation.low_rank import LowRankMean
from pellm_lightning.aggregation.mean import Mean


class Plan:
    """Which parameters a rule treats how.

    Args:
        rule: The aggregation; None chooses ``LowRankMean()`` for LoRA and the mean for all else, modules that
            it cannot handle included.
        names: Names of the trainable parameters that may federate.
        modules: What the modules of the pairs say, by the pairs' names; a pair that is not among them has
            scaling 1.
        capabilities: What the rule may have of the parties. Sums, with a masked exchange: None then chooses
            ``LowRankMean(solver="power")``. Means, with differential privacy: None then chooses ``Mean()``,
            and so it does with sparse updates. Rounded values with other compressed exchanges.

    Raises:
        ValueError: If the rule finds no LoRA pair, or cannot handle one: it is named, with the reason.
    """

    def __init__(
        self,
        rule: Aggregation | None,
        names: Iterable[str],
        modules: Mapping[str, LoraModule] | None = None,
        *,
        capabilities: Capability = "parties",
    ) -> None:
        names = sorted(names)
        self.rule: Aggregation = _default(capabilities) if rule is None else rule
        _check_needs(self.rule, capabilities)
        self.modules = dict(modules or {})
        pairs = find_pairs(names)
        obstacles = {pair.name: self._unsupported_reason(pair) for pair in pairs}
        hard = {name: words for name, words in obstacles.items() if words}
        if hard and rule is not None:
            name, words = next(iter(hard.items()))
            raise ValueError(
                f"{self.rule!r} cannot aggregate the LoRA module {name!r} ({len(hard)} of {len(pairs)}"
                f" modules): {words}. Use Mean(), which averages its factors, or leave the module out of"
                " target_modules."
            )
        self.unmanaged = hard
        """Why the default rule averages the factors of a module one by one, by the name of its pair."""
        self.pairs = [pair for pair in pairs if pair.name not in hard]
        self._part = dict.fromkeys(names, Part.OTHER)
        for pair in self.pairs:
            self._part |= {pair.a: Part.A, pair.b: Part.B}
        if not self.pairs and not isinstance(rule, Mean | None):
            raise ValueError(
                f"{self.rule!r} found no LoRA pair (...lora_A.<adapter>.weight with its lora_B) among the"
                f" {len(names)} trainable parameters{f', such as {names[0]!r}' if names else ''}. Use Mean()"
                " for other adapters and for full fine-tuning, and check include and exclude."
            )

    @property
    def shared(self) -> set[str]:
        """Names that federate; the rest stays local."""
        return self.named(self.rule.shared)

    @cached_property
    def products(self) -> list[Pair]:
        """Pairs of which both factors federate and are a product, which can be combined and compared."""
        if not self.rule.shared >= FACTORS:
            return []
        return [pair for pair in self.pairs if self.module(pair).unsupported_reason is None]

    @cached_property
    def groups(self) -> list[tuple[Part, ...]]:
        """Parts that cross together; parts of different groups may cross without each other."""
        apart = any(self.rule.averaged(round, 2) != EVERYTHING for round in (0, 1))
        return [(Part.A,), (Part.B,), (Part.OTHER,)] if apart else [tuple(Part)]

    @property
    def written_bases(self) -> list[Tensor]:
        """The frozen weights that rounds write into, contiguous, in the order of the pairs."""
        bases = [self.module(pair).base for pair in self.pairs] if self.rule.writes_base else []
        return [base if base.is_contiguous() else base.T for base in bases if base is not None]

    def named(self, parts: Parts | tuple[Part, ...]) -> set[str]:
        """Return the names of the parameters that are such parts."""
        return {name for name, part in self._part.items() if part in parts}

    def module(self, pair: Pair) -> LoraModule:
        """Return what the module of a pair says."""
        return self.modules.get(pair.name, LoraModule())

    def _unsupported_reason(self, pair: Pair) -> str | None:
        module = self.module(pair)
        if not (math.isfinite(module.scaling) and module.scaling != 0):
            raise ValueError(
                f"The LoRA module {pair.name!r} has scaling {module.scaling:g}, with which its factors change"
                " nothing. Give it a lora_alpha above 0."
            )
        if self.rule.writes_base and module.base is None and module.base_obstacle is None:
            return "no frozen weight is known for it (pass lora={...: LoraModule(base=...)})"
        return self.rule.unsupported_reason(module)


def _default(capabilities: Capability) -> Aggregation:
    if capabilities in ("means", "sparse"):
        return Mean()
    return LowRankMean(solver="power" if capabilities == "sums" else "exact")


def _check_needs(rule: Aggregation, capabilities: Capability) -> None:
    if capabilities == "sums" and rule.requires == "parties":
        raise ValueError(
            f"{rule!r} needs what single parties have, and a masked exchange gives sums only. Use Mean(),"
            " FrozenA(), Alternating(), ShareA() or LowRankMean(solver='power'), or exchange.Plain()."
        )
    if capabilities == "means" and rule.requires != "means":
        raise ValueError(
            f"{rule!r} sums more than the parties' updates. With differential privacy, which adds no noise to"
            " the rest, and with SCAFFOLD, FedNova or FedDyn, which correct parameters one by one, use"
            " FrozenA() or Alternating(), which train one factor at a time, or Mean()."
        )
    if capabilities == "sparse" and rule.requires != "means":
        raise ValueError(
            f"{rule!r} needs the parties' whole factors in each round, and exchange.TopK(...) sends a"
            " small part of an update. Use Mean(), FrozenA(), Alternating() or ShareA(), or"
            " exchange.Quantized(...)."
        )
    if capabilities == "rounded" and rule.requires == "sums":
        raise ValueError(
            f"{rule!r} sums what must cross exactly, so a compressed exchange would save nothing of it. Use"
            " solver='exact', whose factors are compressed, or exchange.Plain()."
        )
    if (
        capabilities == "rounded"
        and rule.requires == "parties"
        and rule.basis_changed(2)
        and not rule.writes_base
    ):
        raise ValueError(
            f"{rule!r} gives the factors new coordinates in each round, so the result is far from what every"
            " party has, and a compressed exchange, which sends the difference, would round it coarsely. Use"
            " LowRankMean() with gauge='procrustes', HeterogeneousRank(method='zero_pad'), or"
            " exchange.Plain()."
        )
