"""Parties of a simulation, and the same parties as threads with an engine each."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lora_module import Tuned
from party_threads import data, fit_parties, quiet_trainer, run_parties
from torch import Tensor, nn

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import Aggregation, lora_modules
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.simulation.settings import Simulation

Named = dict[str, Tensor]


class PartiesData(LightningDataModule):
    """Unequal data: party k has 8, 12, 16, 8, ... samples in batches of 4."""

    def party_dataloader(self, party: int) -> Any:
        return data(8 + party % 3 * 4, seed=party)


@dataclass
class Setting:
    """What a simulation and its reference have in common; ``steps`` None is one pass over a party's data."""

    simulation: Simulation
    rounds: int = 3
    steps: int | None = 3
    optimizer: str = "AdamW"
    arguments: dict[str, Any] = field(default_factory=dict)
    rule: Callable[[], Aggregation | None] = lambda: None

    def module(self) -> Tuned:
        return Tuned(0, optimizer=self.optimizer)


@dataclass
class Outcome:
    shared: Named
    reports: list[RoundReport]


def simulated(setting: Setting, workers: int = 1) -> list[Outcome]:
    """Return what each worker ends with."""

    def fit(worker: int, federated: Callable[..., Any]) -> Outcome:
        module = setting.module()
        schedule = {"every_n_epochs": 1} if setting.steps is None else {"every_n_steps": setting.steps}
        callback = federated(
            simulate=setting.simulation, aggregation=setting.rule(), **schedule, **setting.arguments
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(folder, [callback], max_epochs=setting.rounds)
            trainer.fit(module, PartiesData())
        return Outcome(shared_of(module, callback.aggregation), callback.rounds)

    return fit_parties(workers, fit)


def real(setting: Setting) -> Outcome:
    """Return what parties with a thread and an engine each end with; those that were not drawn weigh 0."""
    simulation = setting.simulation

    def party(federation: Federation) -> Outcome:
        module, rule = setting.module(), setting.rule()
        arguments = dict(setting.arguments)
        weighting, resets = arguments.pop("weighting", "samples"), arguments.pop("inner_optimizer_state", "")
        plan = Plan(rule, module.trained(), lora_modules(module))
        shared = {name: module.trained()[name] for name in plan.shared}
        aggregator = Aggregator(federation, shared, plan=plan, **arguments)
        aggregator.start()
        optimizer, batches = module.configure_optimizers(), endless(federation.party)
        steps = setting.steps or len(PartiesData().party_dataloader(federation.party))
        reports = []
        for number in range(setting.rounds):
            weight, loss = 0.0, None
            if federation.party in simulation.draw(number).training:
                frozen = plan.named(plan.rule.frozen_parts(number))
                weight, loss = train(module, optimizer, islice(batches, steps), frozen)
            report = aggregator.step(weight if weighting == "samples" else float(weight > 0), loss)
            reports.append(report)
            clear(optimizer, module, plan, report, all_of_it=resets == "reset")
        return Outcome(shared_of(module, rule), reports)

    return run_parties(simulation.num_parties, party)[0]


def endless(party: int) -> Iterator[Any]:
    return cycle(list(PartiesData().party_dataloader(party)))


def train(
    module: LightningModule, optimizer: torch.optim.Optimizer, batches: Iterator[Any], frozen: set[str]
) -> tuple[float, float]:
    """Train on batches, return their samples and mean loss."""
    samples, total = 0, 0.0
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        for name, parameter in module.named_parameters():
            if name in frozen:
                parameter.grad = None
        optimizer.step()
        samples, total = samples + len(x), total + float(loss.detach()) * len(x)
    return float(samples), total / samples


def clear(
    optimizer: torch.optim.Optimizer, module: Tuned, plan: Plan, report: RoundReport, *, all_of_it: bool
) -> None:
    """Clear the moments that a round has made meaningless."""
    if all_of_it:
        optimizer.state.clear()
    rebased = plan.named(plan.rule.basis_changed(report.active_parties))
    for name, parameter in module.trained().items():
        if name in rebased:
            optimizer.state.pop(parameter, None)


def shared_of(module: Tuned, rule: Aggregation | None) -> Named:
    """Copies of the parameters that federate under a rule."""
    plan = Plan(rule, module.trained(), lora_modules(module))
    return {name: module.trained()[name].detach().clone() for name in sorted(plan.shared)}


def furthest(first: Named, other: Named) -> float:
    """Return the largest difference of two numbers."""
    assert first.keys() == other.keys()
    return max(float((first[name] - other[name]).abs().max()) for name in first)
