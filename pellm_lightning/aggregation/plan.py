"""Aggregation plan: a rule applied to a model's parameters."""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from pellm_lightning.aggregation.base import EVERYTHING, FACTORS, Aggregation, Capability, Part, Parts
from pellm_lightning.aggregation.lora import LoraModule, Pair, find_pairs, unknown_module
from pellm_lightning.aggregation.low_rank import LowRankMean
from pellm_lightning.aggregation.mean import Mean
from pellm_lightning.aggregation.robust import NormBound, RobustRule, SenderNormBound


class Plan:
    """Aggregation plan: the role of each federated parameter under a rule.

    Args:
        rule: The aggregation rule; None chooses ``LowRankMean()`` for LoRA, and the mean for all else and for
            modules that it does not support.
        names: Names of the trainable parameters that may federate.
        modules: Facts of the LoRA modules, by the pairs' names; a pair without them has scaling 1, and is no
            product if it may be of several experts.
        capabilities: What the exchange and privacy allow: "sums" with secure aggregation (None then chooses
            ``LowRankMean(solver="power")``), "means" with differential privacy and "sparse" with top-k (None
            then chooses ``Mean()``), "rounded" with other compressed exchanges, "parties" without limits.

    Raises:
        ValueError: If the rule finds no LoRA pair, or does not support one.
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
        if capabilities == "sums" and isinstance(rule, NormBound) and not rule.mixing:
            self.rule = SenderNormBound(rule.factor)
        _check_requirement(self.rule, capabilities)
        self.modules = dict(modules or {})
        pairs = find_pairs(names)
        reasons = {pair.name: self._unsupported_reason(pair) for pair in pairs}
        unsupported = {name: reason for name, reason in reasons.items() if reason}
        if unsupported and rule is not None:
            name, reason = next(iter(unsupported.items()))
            raise ValueError(
                f"{self.rule!r} cannot aggregate the LoRA module {name!r} ({len(unsupported)} of"
                f" {len(pairs)} modules): {reason}. Use Mean(), which averages its factors, or exclude the"
                " module from target_modules."
            )
        self.unsupported = unsupported
        """Why the default rule averages a module's factors separately, by the name of its pair."""
        self.pairs = [pair for pair in pairs if pair.name not in unsupported]
        self._part = dict.fromkeys(names, Part.OTHER)
        for pair in self.pairs:
            self._part |= {pair.a: Part.A, pair.b: Part.B}
        if not self.pairs and not isinstance(rule, Mean | RobustRule | None):
            raise ValueError(
                f"{self.rule!r} found no LoRA pair (...lora_A.<adapter>.weight with its lora_B) among the"
                f" {len(names)} trainable parameters{f', such as {names[0]!r}' if names else ''}. Use Mean()"
                " for other adapters and for full fine-tuning, and check include and exclude."
            )

    @property
    def shared(self) -> set[str]:
        """Names of the federated parameters; the rest stays local."""
        return self.named(self.rule.shared)

    @cached_property
    def products(self) -> list[Pair]:
        """Pairs whose factors are both federated and form a product, or one for each of their experts."""
        if not self.rule.shared >= FACTORS:
            return []
        return [pair for pair in self.pairs if self.module(pair).unsupported_reason is None]

    @cached_property
    def groups(self) -> list[tuple[Part, ...]]:
        """Parts that are always sent together, as groups."""
        apart = any(self.rule.averaged(round, 2) != EVERYTHING for round in (0, 1))
        return [(Part.A,), (Part.B,), (Part.OTHER,)] if apart else [tuple(Part)]

    @property
    def written_bases(self) -> list[Tensor]:
        """The frozen weights that rounds change, contiguous, in the order of the pairs."""
        bases = [self.module(pair).base for pair in self.pairs] if self.rule.writes_base else []
        return [base if base.is_contiguous() else base.mT for base in bases if base is not None]

    def named(self, parts: Parts | tuple[Part, ...]) -> set[str]:
        """Return the names of the parameters with the given roles."""
        return {name for name, part in self._part.items() if part in parts}

    def module(self, pair: Pair) -> LoraModule:
        """Return the facts of a pair's module."""
        return self.modules.get(pair.name) or unknown_module(pair)

    def _unsupported_reason(self, pair: Pair) -> str | None:
        module = self.module(pair)
        if not (math.isfinite(module.scaling) and module.scaling != 0):
            raise ValueError(
                f"The LoRA module {pair.name!r} has scaling {module.scaling:g}, with which its factors have"
                " no effect. Give it a lora_alpha above 0."
            )
        if self.rule.writes_base and module.base is None and module.unwritable_base_reason is None:
            return "its frozen weight is unknown (pass lora={...: LoraModule(base=...)})"
        return self.rule.unsupported_reason(module)


def _default(capabilities: Capability) -> Aggregation:
    if capabilities in ("means", "sparse"):
        return Mean()
    return LowRankMean(solver="power" if capabilities == "sums" else "exact")


def _check_requirement(rule: Aggregation, capabilities: Capability) -> None:
    if isinstance(rule, RobustRule) and capabilities not in ("parties", "rounded"):
        why = {
            "sums": "and secure aggregation reveals sums only. Use NormBound(), with which each party bounds"
            " its own update",
            "means": "and differential privacy bounds and hides these already, while drift corrections send"
            " more than updates. Use Mean(), whose influence privacy's clipping bounds",
            "sparse": "and exchange.TopK(...) sends a small part of each, of which the rest looks like zero."
            " Use exchange.Quantized(...) or Cast(...)",
        }[capabilities]
        raise ValueError(f"{rule!r} compares the parties' single updates, {why}, or exchange.Plain().")
    if capabilities == "sums" and rule.requires == "parties":
        raise ValueError(
            f"{rule!r} needs single parties' factors, and secure aggregation reveals sums only. Use Mean(),"
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
            f"{rule!r} sums values that must be exact, so a compressed exchange would save nothing. Use"
            " solver='exact', whose factors are compressed, or exchange.Plain()."
        )
    gathers = rule.requires == "parties" and not rule.writes_base
    if capabilities == "rounded" and gathers and rule.basis_changed(2):
        raise ValueError(
            f"{rule!r} changes the basis of the factors in each round, so the result is far from the anchors,"
            " and a compressed exchange, which sends the difference, would round it coarsely. Use"
            " LowRankMean() with factorization='procrustes', HeterogeneousRank(method='zero_pad'), or"
            " exchange.Plain()."
        )
