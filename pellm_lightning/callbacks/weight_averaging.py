"""Lightning's averages of weights over time, where they are averages of what all parties have in common.

Right after a round all parties have the same parameters. A ``WeightAveraging`` callback that is updated then,
and only then, averages global parameters: nothing more has to cross, and all parties have the same average.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.loop.schedule import Schedule
from pellm_lightning.trainer.isolation import callbacks_of

# Steps and epochs for which a callback is asked whether it would be updated then.
_ASKED = 1000

_WAY = (
    "Let it be updated when an epoch has ended, as EMAWeightAveraging(decay=0.9, update_every_n_steps=0,"
    " update_starting_at_epoch=0) is, with a round each epoch; or leave it out and let the outer optimizer"
    " average: SGD with lr=0.1 moves the global parameters by a tenth of the way to each round's mean."
)


def averaging_of(trainer: Trainer) -> WeightAveraging | None:
    """Return the Trainer's callback that averages weights over time, if it has one."""
    return next((c for c in callbacks_of(trainer) if isinstance(c, WeightAveraging)), None)


def check_averaging(
    trainer: Trainer, schedule: Schedule, *, mixes: bool, separate: bool, saves_frozen: bool
) -> None:
    """Refuse a callback that would average what the parties have not in common.

    Args:
        trainer: The Trainer.
        schedule: When a round is due.
        mixes: Whether the parties' parameters may differ after a round: with an overlap, or fragments.
        separate: Whether parties are separate jobs, which may come late and miss rounds.
        saves_frozen: Whether checkpoints hold frozen parameters.

    Raises:
        MisconfigurationException: If there is one.
    """
    for other in callbacks_of(trainer):
        if isinstance(other, StochasticWeightAveraging):
            raise MisconfigurationException(
                "StochasticWeightAveraging averages when an epoch begins, replaces the learning rate's"
                " schedule and adds an epoch, at each party by itself. WeightAveraging, which averages alike,"
                f" goes with rounds. {_way(WeightAveraging)}"
            )
    averaging = averaging_of(trainer)
    if averaging is None:
        return
    name = type(averaging).__name__
    if schedule.unit != "epochs":
        raise MisconfigurationException(
            f"{name} would average weights of single parties: only after a round all have the same, and"
            f" rounds here do not end with epochs. {_WAY}"
        )
    if any(averaging.should_update(step_idx=step) for step in range(_ASKED)):
        raise MisconfigurationException(
            f"{name} is updated after single steps, when the parties' weights differ: each would end with"
            f" another average. {_WAY}"
        )
    early = [e for e in range(_ASKED) if (e + 1) % schedule.n and averaging.should_update(epoch_idx=e)]
    if early:
        raise MisconfigurationException(
            f"{name} is updated after epoch {early[0]}, which has no round with every_n_epochs={schedule.n}:"
            f" the parties' weights differ then. {_WAY}"
        )
    reasons = {
        "an overlap or fragments leave the parties with unlike weights after a round": mixes,
        "separate jobs may come late or back, and miss rounds that others have averaged": separate,
        "its checkpoints hold the whole model, so save_frozen=False cannot be kept": not saves_frozen,
    }
    for reason, applies in reasons.items():
        if applies:
            raise MisconfigurationException(f"{name} does not go with this federation: {reason}. {_WAY}")


def check_coordinates(trainer: Trainer, plan: Plan) -> None:
    """Refuse to average factors over rounds that give them other coordinates each time.

    Raises:
        MisconfigurationException: If the rule does, or writes into frozen weights.
    """
    averaging = averaging_of(trainer)
    if averaging is None or not plan.products:
        return
    if plan.rule.outer == "mean" or plan.rule.writes_base:
        raise MisconfigurationException(
            f"{plan.rule!r} gives the LoRA factors other coordinates each round, so that"
            f" {type(averaging).__name__}'s mean of them over rounds has no meaning. Use aggregation=Mean()"
            " or LowRankMean(factorization='procrustes')."
        )


def agreed(trainer: Trainer) -> str | None:
    """Return what must be the same at all parties so that their averages are; None without any."""
    averaging = averaging_of(trainer)
    if averaging is None:
        return None
    updates = [epoch for epoch in range(_ASKED) if averaging.should_update(epoch_idx=epoch)]
    return (
        f"{type(averaging).__name__}: of 0, 1, 2, 3 it makes {_tried(averaging)}; {len(updates)} updates in"
        f" {_ASKED} epochs, the first in epoch {updates[0] if updates else None};"
        f" max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
    )


def begin_averaging(trainer: Trainer, module: LightningModule) -> None:
    """Let the averaged copy, which was made before the parties had met, be what all have in common now.

    It does so by the callback's public hook, as from a checkpoint in which nothing was averaged yet.
    """
    averaging = averaging_of(trainer)
    if averaging is None:
        return
    state = module.state_dict()
    averaging.on_load_checkpoint(
        trainer,
        module,
        {
            "state_dict": state,
            "current_model_state": state,
            "averaging_state": {"n_averaged": torch.tensor(0)},
        },
    )


def warn_of_missed(trainer: Trainer, rounds: int) -> None:
    """Warn a party that has ended before others that they have averaged further rounds."""
    averaging = averaging_of(trainer)
    if averaging is not None and rounds:
        rank_zero_warn(
            f"Other parties have made {rounds} more round(s) after this one had ended, which its"
            f" {type(averaging).__name__} has not averaged: its average is not theirs. Take the result of a"
            " party that trained to the end, or let all stop by the same federated metric."
        )


def _tried(averaging: WeightAveraging) -> float:
    """Return the average of 0, 1, 2, 3 as the callback makes it, so that two of them can be compared."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    averaged = AveragedModel(layer, **vars(averaging).get("_kwargs", {}))
    for value in range(4):
        nn.init.constant_(layer.weight, value)
        averaged.update_parameters(layer)
    (weight,) = averaged.module.parameters()
    return round(float(weight.detach()), 9)


def _way(kind: type[WeightAveraging]) -> str:
    return _WAY.replace("Let it be", f"Let {kind.__name__} be")
