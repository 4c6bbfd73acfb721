"""The global state of a federation as one party holds it, and the way between it and its parameters."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.aggregation.heterogeneous_rank import PaddedFactors
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Collectives, MismatchError, Version
from pellm_lightning.engine import state_transfer
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.lora_step import LoraAggregator
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory
from pellm_lightning.engine.updates import UpdateReducer
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy.processor import DPProcessor
from pellm_lightning.tensors.flat_buffer import Layout

log = logging.getLogger(__name__)


class GlobalState:
    """What one party holds of what all share: the round, the global vector, the outer optimizer, the budget.

    Args:
        federation: The joined parties.
        plan: The aggregation, applied to the parameters.
        parameters: This party's shared parameters, by name.
        exchange: How values are summed over the parties.
        private: Differential privacy; None without.
        auxiliary: What crosses beside the updates; None if nothing does.
        optimizer: Makes the outer optimizer of the global vector.
        scheduler: Makes the schedule of its learning rate; None leaves it as it is.
        measures: Whether rounds measure the deviation of the LoRA products.
    """

    def __init__(
        self,
        federation: Collectives,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        *,
        exchange: Exchange,
        private: DPProcessor | None,
        auxiliary: AuxiliaryTerms | None,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        measures: bool,
    ) -> None:
        self.round = 0
        """The round that comes."""
        self.version: Version | None = None
        """Which of the states of this round it is, between separate jobs; None before the first."""
        self.short_rounds = 0
        """Rounds in a row, up to now, in which fewer than a quorum trained."""
        self.stale = False
        """Whether the parameters are still to be written."""
        self.distance = math.nan
        """2-norm of the parameters minus the result, in the last round."""
        self.loaded: Mapping[str, Any] | None = None
        """The state that this party goes on from; None if it begins."""
        self.products: LoraAggregator | None = None
        """The LoRA pairs; None without any, and before the parties have met."""
        self._federation = federation
        self._plan = plan
        self._parameters = parameters
        self._exchange = exchange
        self._private = private
        self._auxiliary = auxiliary
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._measures = measures
        self._padded: PaddedFactors | None = None
        self._before = torch.empty(0)
        self._warned = False
        self._lay_out(parameters)

    # ---- the parameters

    def read_(self) -> None:
        """Let what the rounds look at be the parameters as they are now."""
        if self._padded is not None:
            self._padded.read_()

    def write_(self) -> None:
        """Write the global vector into the parameters."""
        self.updates.write_()
        self.put_back_()
        self.stale = False

    def put_back_(self) -> None:
        """Write what a round has changed of what it looks at into the parameters."""
        if self._padded is not None:
            self._padded.write_()

    def take_over(self) -> None:
        """Let the global vector be that of one party: party 0, but of factors a party of the largest rank."""
        vector = self.updates.global_
        if self._padded is None or self.products is None:
            self._federation.broadcast_(vector)
            return
        sources = dict.fromkeys(self._parameters, 0)
        for pair in self._plan.products:
            sources[pair.a] = sources[pair.b] = self.products.source(pair)
        for name, source in sources.items():
            if source != self._federation.party:
                self.layout.view(vector, name).zero_()
        self._federation.all_reduce_(vector)  # each value comes from one party alone

    # ---- before the first round

    def know_products(self, told: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None) -> None:
        """Learn what the parties' LoRA pairs are, now that they have met; lay out those of unlike ranks.

        Args:
            told: Rank and scaling of each pair at each of the parties that meet, by the pair's name.
            reference: Those of the global factors, if the federation is under way; else None.

        Raises:
            MismatchError: If a pair of this party is of a higher rank than the global factors.
        """
        if self.products is not None:
            self.products.told = told
            return
        self.products = LoraAggregator(
            self._plan, self._parameters, self._federation, told, self._measures, reference
        )
        if self._plan.rule.ranks_may_differ:
            larger = self.products.larger()
            if larger is not None:
                raise MismatchError(
                    f"The rank of {larger!r} at party {self._federation.name} is above that of the"
                    " global factors, which was settled when the federation began. Give it a lower rank, or"
                    " begin anew."
                )
            self._pad(self.products)

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Build what has the size of the global vector."""
        groups = [self._plan.named(parts) & tensors.keys() for parts in self._plan.groups]
        self.layout = Layout(tensors, groups)
        self.updates = UpdateReducer(
            self.layout,
            self._plan,
            self._make_optimizer,
            self._federation,
            exact=self._exchange.exact,
            private=self._private,
            auxiliary=self._auxiliary,
            scheduler=self._make_scheduler,
        )
        self.error_feedback = self._exchange.new_error_feedback(self.updates.pseudo_gradient)

    def _pad(self, products: LoraAggregator) -> None:
        """Lay out factors of the largest rank of the parties, and go on from a loaded state."""
        pairs = self._plan.products
        self._padded = PaddedFactors(
            self._parameters, {pair: (products.rank(pair), products.ratio(pair)) for pair in pairs}
        )
        self._padded.read_()
        self._lay_out(self._padded.tensors)
        if self.loaded is not None:
            self._restore(self.loaded)

    # ---- the state

    def state(self) -> dict[str, Any]:
        """Return the state as it lies in memory, to be looked at before anything goes on."""
        updates, version = self.updates, self.version
        return {
            "round": self.round,
            "version": None if version is None else list(version),
            "short_rounds": self.short_rounds,
            "shapes": updates.layout.shapes,
            "lora": self.products.reference if self.products else None,
            "global": updates.global_,
            "outer_class": type(updates.optimizer).__name__,
            "outer_optimizer": updates.optimizer.state_dict(),
            "outer_scheduler": updates.schedule.state,
            "privacy": None if self._private is None else self._private.state_dict(),
            "carried": updates.carried,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers, with what this party alone owes."""
        kept = {"error_feedback": None if self.error_feedback is None else self.error_feedback.state_dict()}
        return _copied(self.state()) | kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it is of other parameters or settings.
        """
        self.round, self.short_rounds = state["round"], state["short_rounds"]
        self.version = Version(*state["version"]) if state.get("version") else None
        self.loaded = state
        if not self._plan.rule.ranks_may_differ:  # else the shapes depend on the other parties' ranks
            self._restore(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Let the global state be another one; the parameters are written when it is settled."""
        if self.error_feedback is not None:
            self.error_feedback.discard_restored()
        if self.products is None:
            self.load_state_dict(state)
        else:
            self.round, self.short_rounds = state["round"], state["short_rounds"]
            self.version = Version(*state["version"])
            self._restore(state)
        self.stale, self.distance = True, math.nan

    def agree(self) -> None:
        """Make sure that the outer optimizer's step has the same bits at all parties that meet.

        ``portable.step_`` sees to that for what consists of sums, products, quotients and square roots. An
        optimizer may do more, take powers or draw numbers, and a party may have another version of torch.
        """
        size_bytes = 4 * self.layout.size
        differed = state_transfer.agree(self._federation, self.state, self._correct, size_bytes)
        if differed and not self._warned:
            self._warned = True
            log.warning(
                "[party %s] Round %d: the outer optimizer %s gave other bits at party %s than at party %s,"
                " whose state all go on with. That is right, but the whole state crosses each time. Install"
                " the same version of torch at all parties, and use an optimizer that draws no random"
                " numbers.",
                self._federation.name,
                self.round,
                type(self.updates.optimizer).__name__,
                self._federation.called(differed),
                self._federation.called([0]),
            )

    def _correct(self, state: Mapping[str, Any]) -> None:
        """Take over another party's result of the same round."""
        self._restore(state)
        self.stale = True

    @contextmanager
    def reversible(self) -> Iterator[None]:
        """Undo what is done to the state if it fails; the parameters are no part of it."""
        if self._before.numel() != self.layout.size:
            self._before = torch.empty_like(self.updates.global_)
        before = _copied(self.state(), self._before)
        version, stale, loaded, distance = self.version, self.stale, self.loaded, self.distance
        try:
            yield
        except BaseException:
            self.round, self.short_rounds = before["round"], before["short_rounds"]
            self.version, self.stale, self.loaded, self.distance = version, stale, loaded, distance
            if self.layout.shapes == before["shapes"]:
                self._restore(before)
            raise

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; round and version are the caller's.

        Raises:
            ValueError: If it is of other parameters or settings; it may come from a peer.
        """
        updates = self.updates
        _check_shapes(state["shapes"], updates.layout.shapes)
        _check_settings(state, updates, self._private)
        updates.schedule.restore(state.get("outer_scheduler"), state["outer_optimizer"])
        if self._private is not None:
            self._private.load_state_dict(state["privacy"])
        if updates.carried is not None:
            updates.carried.copy_(state["carried"])
        updates.global_.copy_(state["global"])
        # A copy, since the optimizer goes on in the very tensors that it is given.
        updates.optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))
        if self.error_feedback is not None and state.get("error_feedback") is not None:
            self.error_feedback.load_state_dict(state["error_feedback"])


def _copied(state: Mapping[str, Any], into: Tensor | None = None) -> dict[str, Any]:
    """Return a state that stays what it is while training goes on.

    Args:
        state: What ``GlobalState.state`` returned.
        into: Memory for the global vector, (D,) float32; None for new memory.
    """
    carried = state["carried"]
    return {
        **state,
        "global": state["global"].clone() if into is None else into.copy_(state["global"]),
        "carried": None if carried is None else carried.clone(),
        "outer_optimizer": copy.deepcopy(state["outer_optimizer"]),
    }


def _check_shapes(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if list(saved.items()) == list(ours.items()):
        return
    differ = sorted(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
    first = (
        f"the first that differs is {differ[0]!r}"
        if differ
        else "their order differs, as with another aggregation"
    )
    raise ValueError(
        f"The checkpoint's federated state is of {len(saved)} parameters, this module trains"
        f" {len(ours)}; {first}. Resume with the model, PEFT configuration, aggregation, include and"
        " exclude patterns of the checkpoint."
    )


def _check_settings(state: Mapping[str, Any], updates: UpdateReducer, private: DPProcessor | None) -> None:
    name = type(updates.optimizer).__name__
    if state.get("outer_class", name) != name:
        raise ValueError(
            f"The saved federated state is of the outer optimizer {state['outer_class']:.100}, this party"
            f" has {name}. Resume with the outer_optimizer of the checkpoint."
        )
    spent = state.get("privacy")
    if (spent is None) != (private is None):
        how = "with differential privacy, and is to go on without it, which would end its guarantee"
        if spent is None:
            how = "without differential privacy, and is to go on with it"
        raise ValueError(
            f"The federated state was saved {how}. Resume with the privacy of the checkpoint, or begin"
            " anew from its weights."
        )
    carried = state.get("carried")
    if getattr(carried, "shape", None) != getattr(updates.carried, "shape", None):
        raise ValueError(
            f"The federated state was saved {'without' if carried is None else 'with another'} vector beside"
            " the global parameters than"
            f" {updates.auxiliary.method if updates.auxiliary else 'plain averaging'} keeps. Resume with the drift"
            " correction of the checkpoint, or begin anew from its weights."
        )
