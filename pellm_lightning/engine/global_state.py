"""GlobalState: counters, global vector, outer optimizers and privacy budget, as one party holds them."""

import copy
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.aggregation.heterogeneous_rank import PaddedFactors
from pellm_lightning.comm import MismatchError, Version
from pellm_lightning.comm.evidence.certificate import RoundStatement
from pellm_lightning.engine import state_transfer
from pellm_lightning.engine.compatibility import check_shapes
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.counters import Counters
from pellm_lightning.engine.fragments import fragments_of
from pellm_lightning.engine.lora_step import LoraAggregator
from pellm_lightning.engine.updates import UpdateReducer
from pellm_lightning.tensors import snapshot
from pellm_lightning.tensors.flat_buffer import Layout

log = logging.getLogger(__name__)

# What is the same at all parties, in the order of ``GlobalState.state``.
_SHARED = ("round", "version", "short_rounds", "shapes", "lora", "global", "fragments", "privacy",
           "statement")  # fmt: skip


class GlobalState:
    """State of the federation at one party: counters, global vector, outer optimizers, privacy budget.

    The global vector is one; a fragment is a range of it, with an ``UpdateReducer`` of its own.

    Args:
        context: What the aggregator works with.
        parameters: This party's shared parameters, by name.
    """

    def __init__(self, context: EngineContext, parameters: Mapping[str, Tensor]) -> None:
        self.lora: LoraAggregator | None = None
        """The LoRA pairs; None without any, and before the parties have met."""
        self.last_written: frozenset[int] = frozenset()
        """Fragments whose parameters the last round has written."""
        self._context = context
        self._parameters = parameters
        self._counters = Counters((0,) * context.fragments)
        self._padded: PaddedFactors | None = None
        self._backup = torch.empty(0)
        self._undo: _Undo | None = None
        self._warned = False
        self._lay_out(parameters)

    # ---- counters

    @property
    def round(self) -> int:
        """Index of the next round."""
        return self._counters.round

    @property
    def version(self) -> Version | None:
        """Which of the states of this round it is, between separate jobs; None before the first."""
        return self._counters.version

    @property
    def digest(self) -> str:
        """Digest of the state of this version, as the parties have voted for it; "" before."""
        return self._counters.digest

    @digest.setter
    def digest(self, digest: str) -> None:
        self._counters = replace(self._counters, digest=digest)

    @property
    def distance(self) -> float:
        """2-norm of the parameters minus the result, in the last round; NaN before."""
        return self._counters.distance

    @property
    def loaded(self) -> Mapping[str, Any] | None:
        """The state that this party has resumed from; None if it begins."""
        return self._counters.loaded

    @property
    def statement(self) -> RoundStatement | None:
        """What was stated of the last round, where parties leave evidence; None before the first."""
        return self._counters.statement

    @property
    def fragment(self) -> int:
        """Index of the fragment that the next round exchanges."""
        return self.round % len(self.fragments)

    @property
    def short_rounds(self) -> int:
        """Rounds of this fragment in a row, up to now, in which fewer than a quorum trained."""
        return self._counters.short_rounds[self.fragment]

    @property
    def updates(self) -> UpdateReducer:
        """The reducer of the fragment that the next round exchanges."""
        return self.fragments[self.fragment]

    @property
    def vector(self) -> Tensor:
        """The global vector, (D,) float32."""
        return self._vector if len(self.fragments) > 1 else self.updates.global_

    def share_memory(self) -> None:
        """Let rounds work in memory that the parties share, if they can; every party must call it."""
        if len(self.fragments) == 1:  # else the vector would lie in pieces
            self.updates.share_memory()
            self._vector = self.updates.global_

    def begin(self, version: Version | None) -> None:
        """Take the parameters of one party for the global ones; the first version is made of them."""
        self._back_up()
        self._broadcast_vector()
        everything = frozenset(range(len(self.fragments)))
        self._counters = replace(self._counters, version=version, unwritten=everything)

    def end_round(
        self, version: Version | None, distance: float, *, short_rounds: int, written: bool
    ) -> None:
        """Advance to the next round.

        Args:
            version: Of the state after this round.
            distance: 2-norm of the parameters minus the result.
            short_rounds: Rounds of this fragment in a row in which fewer than a quorum trained.
            written: Whether the parameters hold the result already.
        """
        before, fragment = self._counters, self.fragment
        short = [*before.short_rounds]
        short[fragment] = short_rounds
        self.last_written = frozenset({fragment})
        self._counters = replace(
            before,
            round=before.round + 1,
            version=version,
            short_rounds=tuple(short),
            distance=distance,
            unwritten=before.unwritten if written else before.unwritten | {fragment},
        )

    def note_statement(self, statement: RoundStatement | None) -> None:
        """Take note of what is stated of the round that has just ended."""
        self._counters = replace(self._counters, statement=statement)

    # ---- the parameters

    def read_(self) -> None:
        """Copy the present factors into the padded ones, if there are any."""
        if self._padded is not None:
            self._padded.read_(self.updates.layout.names)

    def write_(self, fragments: Iterable[int] | None = None) -> None:
        """Write the global vector into the parameters.

        Args:
            fragments: Which to write; None for those that are still to be written.
        """
        written = self._counters.unwritten if fragments is None else frozenset(fragments)
        for index in sorted(written):
            self.fragments[index].write_()
            self.write_padded_(self.fragments[index])
        if written:
            self.last_written = written
        self._counters = replace(self._counters, unwritten=self._counters.unwritten - written)

    def write_padded_(self, updates: UpdateReducer) -> None:
        """Copy padded factors of a fragment back into the parameters, if there are any."""
        if self._padded is not None:
            self._padded.write_(updates.layout.names)

    def _broadcast_vector(self) -> None:
        """Take over the vector of one party: party 0, but of factors a party of the largest rank."""
        federation = self._context.federation
        if self._padded is None or self.lora is None:
            federation.broadcast_(self.vector)
            return
        sources = dict.fromkeys(self._parameters, 0)
        for pair in self._context.plan.products:
            sources[pair.a] = sources[pair.b] = self.lora.source(pair)
        for name, source in sources.items():
            if source != federation.party:
                self.layout.view(self.vector, name).zero_()
        federation.all_reduce_(self.vector)  # each value comes from one party alone

    # ---- the layout

    def set_lora_specs(self, specs: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None) -> None:
        """Take note of the parties' LoRA pairs, when they have met; pad those of unlike ranks.

        Args:
            specs: Rank, scaling and number of experts of each pair at each of the parties that meet, by name.
            reference: Those of the global factors, if the federation is running; else None.

        Raises:
            MismatchError: If a pair of this party is of a higher rank than the global factors.
        """
        if self.lora is not None:
            self.lora.specs = specs
            return
        self.lora = LoraAggregator(self._context, self._parameters, specs, reference)
        if not self._context.plan.rule.ranks_may_differ:
            return
        larger = self.lora.larger()
        if larger is not None:
            raise MismatchError(
                f"The rank of {larger!r} at party {self._context.federation.name} is above that of the global"
                " factors, which was settled when the federation began. Give it a lower rank, or begin anew."
            )
        self._pad(self.lora)

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate all that has the size of the global vector."""
        plan = self._context.plan
        parts = [plan.named(parts) for parts in plan.groups]
        fragments = [set(names) for names in fragments_of(tensors, self._context.fragments)]
        self.layout = Layout(tensors, [names & part for names in fragments for part in parts])
        self._vector = self.layout.new_vector()
        layouts = [self.layout]
        if len(fragments) > 1:
            layouts = [
                Layout({name: tensors[name] for name in names}, [names & part for part in parts])
                for names in fragments
            ]
        starts = accumulate((layout.size for layout in layouts), initial=0)
        self.fragments: list[UpdateReducer] = [
            UpdateReducer(self._context, layout, self._vector[start:stop])
            for layout, (start, stop) in zip(layouts, pairwise(starts), strict=True)
        ]

    def _pad(self, lora: LoraAggregator) -> None:
        """Lay out factors of the largest rank of the parties, and load the state that was kept for them."""
        pairs = self._context.plan.products
        self._padded = PaddedFactors(
            self._parameters,
            {pair: (lora.rank(pair), lora.ratio(pair), lora.experts(pair)) for pair in pairs},
        )
        self._padded.read_(self._parameters)
        self.fragments, self._vector = [], torch.empty(0)  # so that both vectors are not held at once
        self._lay_out(self._padded.tensors)
        if self.loaded is not None:
            self._restore(self.loaded)
            self.release_loaded()

    # ---- the state

    def state(self) -> dict[str, Any]:
        """Return the state as it lies in memory; to be read before anything changes it."""
        counters, privacy = self._counters, self._context.privacy
        loaded = counters.loaded if self.lora is None else None
        if loaded is not None and self._context.plan.rule.ranks_may_differ and self._context.plan.products:
            return {key: loaded[key] for key in _SHARED}  # it is restored once the parties have met
        reference = loaded.get("lora") if loaded is not None else None
        return {
            "round": counters.round,
            "version": None if counters.version is None else list(counters.version),
            "short_rounds": list(counters.short_rounds),
            "shapes": self.layout.shapes,
            "lora": self.lora.reference if self.lora else reference,
            "global": self.vector,
            "fragments": [updates.state() for updates in self.fragments],
            "privacy": None if privacy is None else privacy.state_dict(),
            "statement": None if counters.statement is None else counters.statement.text,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers, with what is this party's own."""
        feedback = [updates.error_feedback for updates in self.fragments]
        return _copied(self.state()) | {
            "error_feedback": [None if part is None else part.state_dict() for part in feedback],
            "last_written": sorted(self.last_written),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, from which ``start`` continues.

        Raises:
            ValueError: If it is of other parameters or settings.
        """
        self._load_counters(state)
        self._counters = replace(self._counters, loaded=state)
        self.last_written = frozenset(state.get("last_written", ()))
        if not self._context.plan.rule.ranks_may_differ:  # else the shapes depend on the other parties' ranks
            self._restore(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Copy the newer state of a peer, or of a snapshot; ``write_`` writes the parameters."""
        for updates in self.fragments:
            if updates.error_feedback is not None:
                updates.error_feedback.discard_restored()
        if self.lora is None:
            self.load_state_dict(state)
        else:
            self._load_counters(state)
            self._restore(state)
        everything = frozenset(range(len(self.fragments)))
        self._counters = replace(self._counters, unwritten=everything, distance=math.nan)
        if not self._context.plan.rule.ranks_may_differ:
            self.release_loaded()

    def release_loaded(self) -> None:
        """Drop the tensors of the state that was loaded, which are copied by now."""
        if self.loaded is not None:
            self._counters = replace(self._counters, loaded={"lora": self.loaded.get("lora")})

    @property
    def free_memory(self) -> Tensor | None:
        """Memory of the vector's size that no one needs between rounds; None if it lies in pieces."""
        in_pieces = len(self.fragments) > 1 or self._context.plan.rule.ranks_may_differ
        return None if in_pieces else self.updates.pseudo_gradient

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Load a state that was kept on disk, if it is newer than this one; return whether it is."""
        if self.version is not None and Version(*state["version"]) <= self.version:
            return False
        self.load_state(state)
        return True

    def _load_counters(self, state: Mapping[str, Any]) -> None:
        statement = state.get("statement")
        if len(state["short_rounds"]) != len(self.fragments):
            raise ValueError(
                f"The saved federated state is of {len(state['short_rounds'])} fragments, these are"
                f" {len(self.fragments)}. Resume with the fragments of the checkpoint."
            )
        self._counters = replace(
            self._counters,
            round=state["round"],
            version=Version(*state["version"]) if state.get("version") else None,
            short_rounds=tuple(state["short_rounds"]),
            digest=snapshot.digest({key: state[key] for key in _SHARED}) if state.get("version") else "",
            statement=RoundStatement.from_json(json.loads(statement)) if statement else None,
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Load all but the counters.

        Raises:
            ValueError: If it is of other parameters or settings; it may come from a peer.
        """
        check_shapes(state["shapes"], self.layout.shapes)
        self._back_up()
        self._restore_privacy(state)
        vectors = torch.split(state["global"], [updates.layout.size for updates in self.fragments])
        for updates, of_fragment, vector in zip(self.fragments, state["fragments"], vectors, strict=True):
            updates.restore(of_fragment, vector)
        own = state.get("error_feedback", [None] * len(self.fragments))
        for updates, residuals in zip(self.fragments, own, strict=True):
            if updates.error_feedback is not None and residuals is not None:
                updates.error_feedback.load_state_dict(residuals)

    def _restore_privacy(self, state: Mapping[str, Any]) -> None:
        spent, privacy = state.get("privacy"), self._context.privacy
        if (spent is None) != (privacy is None):
            how = "with differential privacy, and is to continue without it, which would end its guarantee"
            if spent is None:
                how = "without differential privacy, and is to continue with it"
            raise ValueError(
                f"The federated state was saved {how}. Resume with the privacy of the checkpoint, or begin"
                " anew from its weights."
            )
        if privacy is not None:
            privacy.load_state_dict(state["privacy"])

    # ---- attempts

    @contextmanager
    def reversible(self) -> Iterator[None]:
        """Undo what is done to the state if it fails; the parameters are no part of it.

        Plain averaging needs no copy of the vector: its step can be undone, and before the first version the
        vector is what the parameters are. Else it is copied, and so it is before another state is loaded.
        """
        counters, state = self._counters, self.state()
        before = {**state, "fragments": copy.deepcopy(state["fragments"])}
        can_be_undone = self._context.is_plain_averaging and not self._context.plan.products
        is_new = counters.version is None and counters.loaded is None
        self._undo = _Undo(is_packed=can_be_undone and is_new)
        for updates in self.fragments:
            updates.forget_previous()
        if not can_be_undone:  # rules for LoRA write into the vector
            self._back_up()
        try:
            yield
        except BaseException:
            self._counters = counters
            if self.layout.shapes == before["shapes"]:
                self._undo_vector_(self._undo)
                self._undo = None
                self._restore({**before, "global": self.vector})
            raise
        finally:
            self._undo = None
            if can_be_undone:
                self._backup = torch.empty(0)

    def _back_up(self) -> None:
        """Copy the vector before it is overwritten, once, where that may have to be undone."""
        if self._undo is None or self._undo.is_packed or self._undo.has_copy:
            return
        if self._backup.numel() != self.layout.size:
            self._backup = torch.empty_like(self.vector)
        self._backup.copy_(self.vector)
        self._undo.has_copy = True

    def _undo_vector_(self, undo: "_Undo") -> None:
        """Make the vector what it was when an attempt began."""
        if undo.has_copy:
            self.vector.copy_(self._backup)
        elif undo.is_packed:
            self.layout.pack_(self.vector)
        else:
            self.updates.undo_()

    def discard_residuals(self) -> None:
        """Discard what lossy compression has removed in an attempt that failed."""
        for updates in self.fragments:
            if updates.error_feedback is not None:
                updates.error_feedback.discard()

    def commit_residuals(self) -> None:
        """Keep what lossy compression has removed, since the round stands."""
        for updates in self.fragments:
            if updates.error_feedback is not None:
                updates.error_feedback.commit()

    def agree(self) -> None:
        """Make sure that the outer optimizer's step has the same bits at all parties that meet.

        ``portable.step_`` sees to that for what consists of sums, products, quotients and square roots. An
        optimizer may do more, take powers or draw numbers, and a party may have another version of torch.
        """
        federation, updates = self._context.federation, self.updates
        differed = state_transfer.agree(
            federation, self._of_round, self._correct, 4 * updates.layout.size, updates.pseudo_gradient
        )
        if differed and not self._warned:
            self._warned = True
            log.warning(
                "[party %s] Round %d: the outer optimizer %s gave other bits at party %s than at party %s,"
                " whose state all continue with. That is right, but the whole state is sent each time."
                " Install the same version of torch at all parties, and use an optimizer that draws no random"
                " numbers.",
                federation.name,
                self.round,
                type(updates.optimizer).__name__,
                federation.called(differed),
                federation.called([0]),
            )

    def _of_round(self) -> dict[str, Any]:
        """Return what a round changes."""
        privacy = self._context.privacy
        return {
            "round": self.round,
            "global": self.updates.global_,
            "fragment": self.updates.state(),
            "privacy": None if privacy is None else privacy.state_dict(),
        }

    def _correct(self, state: Mapping[str, Any]) -> None:
        """Load another party's result of the same round."""
        self._restore_privacy(state)
        self.updates.restore(state["fragment"], state["global"])
        self._counters = replace(self._counters, unwritten=self._counters.unwritten | {self.fragment})


@dataclass
class _Undo:
    """How the vector is made again what it was when an attempt began.

    Args:
        is_packed: It is what the parameters are.
        has_copy: There is a copy of it; else a step of SGD(lr=1) is undone.
    """

    is_packed: bool
    has_copy: bool = False


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that stays what it is while training continues."""
    return {**state, "global": state["global"].clone(), "fragments": copy.deepcopy(state["fragments"])}
