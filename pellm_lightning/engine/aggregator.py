"""Aggregator: one party's interface to the engine: start, step, drain; ``round.py`` runs the rounds."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.aggregation.base import Aggregation
from pellm_lightning.aggregation.lora import LoraModule
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Communicator, FederationError, Quorum
from pellm_lightning.engine import compatibility
from pellm_lightning.engine import outer_optimizer as outer
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.engine.background import BackgroundRounds, Staging
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.engine.context import OnNonfinite, Settings, capabilities, make_context
from pellm_lightning.engine.coordination import Coordinator, Purpose
from pellm_lightning.engine.evidence import EvidenceKeeper
from pellm_lightning.engine.global_state import GlobalState
from pellm_lightning.engine.metrics import MAX_WEIGHT
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.engine.round import LocalInput, RoundRunner
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.exchange.base import as_exchange
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.tensors.adapter_config import AdapterConfigs
from pellm_lightning.tensors.digest import bits_digest
from pellm_lightning.tensors.snapshot import SnapshotDir

log = logging.getLogger(__name__)


class Aggregator:
    """Aggregator of named tensors over a federation: averages them round by round, in place.

    The update of party i is exchanged as ``w_i / sum(w) * (anchor - x_i)`` in float32; the sum over the
    parties is the pseudo-gradient, and one step of the outer optimizer on the global vector (float32) gives
    what all parties write back. With ``SGD(lr=1)`` that is FedAvg, ``x = sum(w_i x_i) / sum(w)`` (McMahan et
    al. 2017, arXiv:1602.05629): test_weighted_mean_equals_float64. What no party moved keeps its bits.

    After a round the global vector has the same bits at all parties, whatever their processors and numbers of
    threads (test_all_hold_the_same_bits_after_each_round): sums come from one party each; what every party
    computes for itself consists of operations that IEEE 754 fixes to the bit (``portable``), or is compared,
    and where it differs the first party's is taken.

    Every party must own one, call ``start()``, then ``step()`` once a round; a party that has finished calls
    ``drain()`` so that the others can continue. A failed round leaves the parameters as they were.

    Between separate jobs a round is tried again without a party that was lost, and is committed by all or by
    none: each makes the result durable, then all agree that it stands, then it is written. A party that
    comes late, or back, loads the newest global state and counts 0 in that round.

    Args:
        federation: The joined parties.
        parameters: Named floating-point tensors on one device; the same names, shapes and dtypes at every
            party.
        aggregation: What is computed from the parties' parameters; None chooses ``LowRankMean()`` for LoRA
            pairs, which are recognised by PEFT's names, and the weighted mean for all else.
        lora: Scaling and base of the modules of the LoRA pairs, from ``lora_modules(model)``; scaling 1
            without.
        plan: The aggregation, applied to the parameters already, instead of ``aggregation`` and ``lora``.
        exchange: How values are summed over the parties; None is ``exchange.Plain()``.
        privacy: Differential privacy of each party's updates. Every weight must be 1 or 0 then; no training
            loss is exchanged.
        auxiliary: What a method that corrects drift sends besides the updates, for example
            ``drift.SCAFFOLD().auxiliary``.
        outer_optimizer: Makes the optimizer of the global vector, one flat float32 parameter of shape (D,).
            It must move each element by its own gradients.
        outer_scheduler: Makes a torch scheduler of that optimizer's learning rate, stepped once for each
            round in which a party counted; with fragments, once for each such round of a fragment.
        frozen: Named tensors that stay local but must be the same everywhere, from ``frozen_state(model)``;
            every value is compared, by digests that are made once; those of tensors in shards are given.
        adapters: PEFT configurations that must be the same everywhere, from ``adapter_configs(model)``.
        config: Settings that must be equal at all parties, by name; compared at the start.
        files: Paths this party writes to ("host:path"), which no other party may share.
        facts: What else the others may want to know of this party, in plain containers; not compared.
        overlap: Lets rounds run in the background, between ``begin`` and ``apply``, with copies of the
            parameters in CPU memory, or exchange a fragment of them at a time, each with an outer optimizer
            state of its own; None for neither.
        on_nonfinite: What to do when a party's parameters hold NaN or infinity, or its update is absurd, as
            ``aggregation.influence.absurd`` says, where the exchange shows norms: leave it out of the round
            and give it the result, or raise at every party.
        quorum: Parties that must have trained in a round for it to move the global parameters: more than half
            of all ("majority"), or a number. With fewer, all go back to the last result of a quorum; if the
            others are through, or it happens twice in a row, that is the end (``RoundReport.last``).
        max_share: Cap on a party's share of the weights, above 0 and at most 1: what exceeds it does not
            count. None for none.
        state_dir: Where a party of separate jobs keeps the global state through a restart; None keeps it in
            memory only.

    Raises:
        ValueError: If the parameters cannot be laid out as one float32 vector, the aggregation cannot handle
            them or the outer optimizer, the exchange hides what it needs, or they cannot overlap.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> federation, model = Federation(HashStore(), party=0, num_parties=1), torch.nn.Linear(2, 1)
        >>> aggregator = Aggregator(federation, dict(model.named_parameters()))
        >>> aggregator.start()
        True
        >>> aggregator.step(weight=8.0).active_parties
        1
        >>> federation.close()
    """

    def __init__(
        self,
        federation: Communicator,
        parameters: Mapping[str, Tensor],
        *,
        aggregation: Aggregation | None = None,
        lora: Mapping[str, LoraModule] | None = None,
        plan: Plan | None = None,
        exchange: Exchange | None = None,
        privacy: GaussianMechanism | None = None,
        auxiliary: AuxiliaryTerms | None = None,
        outer_optimizer: OptimizerFactory = outer.sgd_one,
        outer_scheduler: SchedulerFactory | None = None,
        frozen: Mapping[str, Tensor | str] | None = None,
        adapters: AdapterConfigs | None = None,
        config: Settings | None = None,
        files: Iterable[str] = (),
        facts: Mapping[str, Any] | None = None,
        overlap: Overlap | None = None,
        on_nonfinite: OnNonfinite = "exclude",
        quorum: Quorum = "majority",
        max_share: float | None = None,
        state_dir: str | Path | None = None,
    ) -> None:
        self.federation = federation
        exchange, overlap = as_exchange(exchange), overlap or Overlap()
        exchange.check(federation)
        if plan is None:
            allowed = capabilities(exchange, privacy, auxiliary)
            plan = Plan(aggregation, parameters, lora, capabilities=allowed)
        self._context = make_context(
            federation,
            plan,
            exchange,
            privacy=privacy,
            auxiliary=auxiliary,
            outer_optimizer=outer_optimizer,
            outer_scheduler=outer_scheduler,
            on_nonfinite=on_nonfinite,
            quorum=quorum,
            max_share=max_share,
            overlap=overlap,
            config=config or {},
        )
        staging = Staging(parameters) if overlap.in_background else None
        live = parameters if staging is None else staging.copies
        self._parameters = {name: live[name] for name in sorted(plan.shared)}
        self._global_state = GlobalState(self._context, self._parameters)
        snapshots = None if state_dir is None else SnapshotDir(state_dir, federation.name)
        self._coordinator = Coordinator(federation, exchange, snapshots)
        self._evidence = EvidenceKeeper(self._context, None if state_dir is None else Path(state_dir))
        self._rounds = RoundRunner(self._context, self._coordinator, self._global_state, self._evidence)
        self._background: BackgroundRounds | None = None
        if staging is not None:
            self._background = BackgroundRounds(self._rounds, self._global_state, staging, overlap.mix)
        self._frozen = frozen
        self._base: dict[str, str] | None = None
        self._adapters = adapters or {}
        self._files = list(files)
        self._facts = dict(facts or {})
        self._warned_of_metrics = False
        self._started = False

    @property
    def round(self) -> int:
        """Index of the next round."""
        return self._global_state.round

    @property
    def run_id(self) -> str | None:
        """Name of a run of separate jobs, the same at all and through restarts; None in one launch."""
        version = self._global_state.version
        return None if version is None else version.run_id or None

    @property
    def size_bytes(self) -> int:
        """Bytes of the global vector, of which a round exchanges one fragment."""
        return 4 * self._global_state.layout.size

    @property
    def settings(self) -> Settings:
        """What all parties have agreed on, by name."""
        return self._context.settings

    @property
    def global_vector(self) -> Tensor:
        """The global vector of shape (D,), float32: what every party's parameters hold after a round."""
        return self._global_state.vector

    @property
    def global_parameters(self) -> dict[str, Tensor]:
        """Views of the global vector by parameter, each of the parameter's shape, float32."""
        return self._global_state.layout.views(self.global_vector)

    @property
    def carried(self) -> dict[str, Tensor]:
        """Mean of the parties' auxiliary vectors by parameter, float32; empty without.

        These are views of the global state, zero before the first round.
        """
        carried = self._global_state.updates.carried
        return {} if carried is None else self._global_state.layout.views(carried)

    @property
    def evidence(self) -> str | None:
        """Certificates of all rounds up to now, signed by a quorum, as lines of JSON; None without keys.

        Only separate jobs leave any. ``pellm verify`` reads it next to an adapter. A round in the background
        is waited for.
        """
        if self._background is not None:
            self._background.settle()
        return self._evidence.text

    # ---- what a party calls

    def handshake(self) -> None:
        """Compare what all parties must share; ``start`` does that too.

        Raises:
            MismatchError: If parties differ.
        """
        self._coordinator.handshake(self.party_spec())

    @torch.no_grad()
    def start(self) -> bool:
        """Compare what all parties must share, then load the parameters of one of them.

        With a loaded state, every party keeps its own parameters instead and continues from there. Separate
        jobs that are running already give it the newest global state with the next round.

        Returns:
            Whether the parameters were overwritten.

        Raises:
            MismatchError: If parties differ; no parameter was touched.
        """
        self.federation.enter("starting")
        self.handshake()
        overwritten = self._join() if self.federation.may_lose_parties else self._begin()
        self._started = True
        self._global_state.release_loaded()
        if self._background is not None:
            self._background.start(overwritten=overwritten)
        return overwritten

    def step(
        self,
        weight: float,
        loss: float | None = None,
        contribution: AuxiliaryValues | None = None,
        *,
        steps_left: float = math.nan,
    ) -> RoundReport:
        """Run one round with all parties.

        Args:
            weight: How much this party counts, 0 to 2^53; 0 sends zeros, yet receives the result.
            loss: Mean training loss of this party since the last round, for the report.
            contribution: What this party gives besides its update, if a method asks for it.
            steps_left: Optimizer steps that this party still has to make, for the others' messages if the
                federation ends without them; NaN if unknown.

        Raises:
            ValueError: If the weight is out of range, or the contribution is not what the method asks for.
            MismatchError: If a party is in another round.
            PartyLostError: If a party is lost or too late, and the parties are of one launch.
            FederationError: If no party counts.
        """
        self._check_step(weight, contribution)
        local = LocalInput(weight, loss, contribution, steps_left)
        if self._background is not None:
            return self._background.step(local)
        report = self._rounds.run(Purpose.ROUND, local)
        if report is None:
            raise FederationError(f"Party {self.federation.name} came to a round, but none was run.")
        return report

    def begin(self, weight: float, loss: float | None = None, *, steps_left: float = math.nan) -> None:
        """Begin a round, as ``step``, with the parameters as they are now; it runs until ``apply``.

        Raises:
            RuntimeError: If the last one has not been applied yet, or there is no overlap.
        """
        self._check_step(weight, None)
        self.background.begin(LocalInput(weight, loss, steps_left=steps_left))

    def apply(self, *, last: bool = False) -> RoundReport:
        """Wait for the round in the background, and mix its result into the parameters.

        Args:
            last: Take the result as it is, so that all parties end with the same parameters.

        Raises:
            RuntimeError: If none is running, or there is no overlap.
            FederationError: As ``step``.
        """
        return self.background.apply(last=last)

    def drain(self) -> Iterator[RoundReport]:
        """Take part in the others' rounds with weight 0 until no party trains; yield each round's report.

        Call it when this party has made its last step, and exhaust it: all parties end with the same
        parameters.
        """
        self._check_started()
        if self._background is not None:
            yield from self._background.drain()
        else:
            while (report := self._rounds.run(Purpose.DONE, LocalInput())) is not None:
                yield report
        self._coordinator.finished(self._global_state.version)

    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the weighted mean over the parties of each named (value, weight), equal on all parties.

        A party that is elsewhere (in a round, or done) counts 0, and so does one that lacks a name. A value
        that is not finite is left out and its party named; the mean is NaN where no party has a finite one.
        """
        self._check_started()
        if self._background is not None:
            self._background.wait()  # parties meet for one thing at a time
        if values and self._context.privacy is not None and not self._warned_of_metrics:
            self._warned_of_metrics = True
            log.warning(
                "[party %s] Metrics are averaged as they are, and epsilon does not cover them. Log none of"
                " private data, or on data that may be seen.",
                self.federation.name,
            )
        return self._coordinator.mean(values, self.round, self._global_state.version)

    def party_spec(self) -> PartySpec:
        """Return what this party shows the others at the start: what must agree, in plain containers."""
        plan, state = self._context.plan, self._global_state
        vector = (state.loaded or {}).get("global")
        if self._frozen is not None and self._base is None:
            self._base = compatibility.base_digests(self._frozen)
        return {
            "protocol": compatibility.PROTOCOL,
            "schema": compatibility.schema(state.layout, plan),
            "lora": {
                pair.name: [module.rank(self._parameters[pair.a]), module.scaling, module.experts]
                for pair in plan.products
                for module in [plan.module(pair)]
            },
            "ranks_may_differ": plan.rule.ranks_may_differ,
            "config": self._context.settings,
            "adapters": self._adapters,
            "base": self._base,
            "round": self.round,
            "checksum": None if vector is None else bits_digest(vector),
            "files": self._files,
            "facts": self._facts,
            "identity": self._evidence.identity,
        }

    def facts(self) -> dict[str, Any]:
        """Return the ``facts`` of the parties that met last, by name; a peer may have sent anything."""
        specs = self.federation.party_specs()
        return {name: spec.get("facts") for name, spec in zip(self.federation.names, specs, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers; resuming from it is exact.

        It waits for a round in the background to end, and holds its result if that is not applied yet.
        """
        pending = None if self._background is None else self._background.state_dict()
        return self._global_state.state_dict() | {"pending": pending, "evidence": self.evidence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; call it before ``start()``.

        Raises:
            ValueError: If the state is of other parameters or fragments, or has a round in progress.
        """
        pending = state.get("pending")
        if pending is not None and self._background is None:
            raise ValueError(
                "The federated state was saved with a round in progress. Resume with the overlap with which"
                " it was saved."
            )
        self._global_state.load_state_dict(state)
        self._evidence.load(state.get("evidence"))
        if pending is not None and self._background is not None:
            self._background.load_state_dict(pending)

    # ---- small parts

    @property
    def background(self) -> BackgroundRounds:
        """Rounds in the background, as ``Overlap(delay_steps=...)`` asks for.

        Raises:
            RuntimeError: If there is no such overlap.
        """
        if self._background is None:
            raise RuntimeError(
                "Rounds here do not overlap with training. Give overlap=Overlap(delay_steps=1)."
            )
        return self._background

    def _begin(self) -> bool:
        """Take over the parameters of one party, if no state was loaded; return whether that is so."""
        state = self._global_state
        self._rounds.set_lora_specs()
        if state.loaded is None:
            state.begin(version=None)
            state.write_()
        state.share_memory()
        self.federation.enter("training")
        return state.loaded is None

    def _join(self) -> bool:
        """Take over the newest global state of the separate jobs; return whether it was another."""
        state = self._global_state
        before = state.version
        kept = self._coordinator.restored()
        if kept is not None and state.resume(kept):
            log.info(
                "[party %s] resumes an unfinished federation at round %d", self.federation.name, self.round
            )
        self._evidence.resume(state.statement)
        self._rounds.run(Purpose.JOIN, LocalInput())
        return state.version != before

    def _check_started(self) -> None:
        if not self._started:
            raise FederationError(
                f"Party {self.federation.name} comes to a round before the parties have agreed on what they"
                " share. Call start() first, at every party."
            )

    def _check_step(self, weight: float, contribution: AuxiliaryValues | None) -> None:
        self._check_started()
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(
                f"Party {self.federation.name} has weight={weight}; it must be 0 to {MAX_WEIGHT:g} (2^53), so"
                " that sums of weights are exact and finite."
            )
        if self._context.privacy is not None and weight not in (0.0, 1.0):
            raise ValueError(
                f"Party {self.federation.name} has weight={weight}, but with differential privacy all parties"
                " must count alike: a weight would be a factor of what one party can change. Use"
                " weighting='uniform', which is the weight 1."
            )
        auxiliary = self._context.auxiliary
        if auxiliary is not None and weight > 0:
            who = f"Party {self.federation.name} comes to round {self.round}"
            auxiliary.check_contribution(contribution, self._global_state.layout.shapes, who)
