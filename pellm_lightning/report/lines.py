"""What a user reads while a fit runs: log lines, figures in Lightning's loggers and progress bar."""

import logging
from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.words import size
from pellm_lightning.tensors.adapters import adapter_parameters
from pellm_lightning.tensors.selection import plain_name, share_outside_adapter
from pellm_lightning.trainer.isolation import written_paths

log = logging.getLogger(__name__)


def show_log_lines() -> None:
    """Show the package's lines as Lightning shows its own, unless the application set up logging itself."""
    package = logging.getLogger("pellm_lightning")
    if not package.handlers and not logging.getLogger().handlers:
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


def announce(
    trainer: Trainer,
    module: LightningModule,
    topology: Topology,
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    exchange: Exchange,
    privacy: GaussianMechanism | None,
) -> None:
    """Say at the start what will leave this party: people ask whether it is the adapter only."""
    leaving = sum(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in module.parameters())
    log.info(
        "[party %s] federation of %d %s: %s of %s parameters leave a party (%.3g %%), %s per round",
        topology.name,
        topology.num_parties,
        "party" if topology.num_parties == 1 else "parties",
        f"{leaving:,}",
        f"{total:,}",
        100 * leaving / total,
        size(4 * leaving),
    )
    log.info("[party %s] these are %s", topology.name, _first(parameters))
    if plan.pairs:
        log.info("[party %s] %d LoRA modules, aggregated by %r", topology.name, len(plan.pairs), plan.rule)
    if exchange.is_secure:
        log.info("[party %s] the other parties see sums over all only: %r", topology.name, exchange)
    if exchange.supports in ("rounded", "sparse"):
        log.info("[party %s] they cross in fewer bytes than these: %r", topology.name, exchange)
    if privacy is not None:
        log.info("[party %s] updates are clipped and noisy: %r", topology.name, privacy)
    trainable = {plain_name(name) for name, p in module.named_parameters() if p.requires_grad}
    local = trainable - parameters.keys()
    if local:
        log.info("[party %s] %s of its own stay local: %s", topology.name, _counted(local), _first(local))
    outside = share_outside_adapter(parameters, adapter_parameters(module))
    if outside > 0.5 and total > leaving:
        log.warning(
            "[party %s] %.0f %% of what crosses each round is embeddings, heads, modules_to_save or other"
            " layers of the base, not adapter. If that is not intended, name them in `exclude` (they stay"
            " local) or freeze them.",
            topology.name,
            100 * outside,
        )
    if topology.party > 0:
        for path in written_paths(trainer):
            log.info("[party %s] writes to %s", topology.name, path.partition(":")[2])


def figures(done: RoundReport) -> dict[str, float]:
    """Return a round's figures as loggers get them."""
    known = {
        "round": done.round,
        "parties": len(done.parties),
        "active_parties": done.active_parties,
        "trained_parties": done.trained_parties,
        "weight": done.weight,
        "total_weight": done.total_weight,
        "seconds": done.seconds,
        "waited_seconds": done.waited_seconds,
        "stalled_seconds": done.stalled_seconds,
        "bytes_sent": done.bytes_sent,
        "update_norm": done.update_norm,
        "distance": done.distance,
        "loss": done.loss,
        "local_loss": done.local_loss,
        "outer_lr": done.outer_lr,
        "compression_error": done.compression_error,
    }
    if done.deviation is not None:
        known |= {"deviation": done.deviation.total, "worst_deviation": done.deviation.worst}
    if done.epsilon is not None and done.clipping_norm is not None:
        known |= {"epsilon": done.epsilon, "clipping_norm": done.clipping_norm}
    return {f"federated/{name}": float(value) for name, value in known.items() if value is not None}


def put_on_bar(module: LightningModule, done: RoundReport) -> None:
    """Show the round and the global loss on the progress bar; Lightning allows that in some hooks only."""
    shown = {"round": float(done.round)} | ({} if done.loss is None else {"global_loss": done.loss})
    module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)


def say_round(topology: Topology, done: RoundReport) -> None:
    """Log one line about a round."""
    log.info(
        "[party %s] round %d: %s%d of %d parties trained, loss %s, weight %g of %g, %s in %.2f s%s",
        topology.name,
        done.round,
        "moved nothing, " if done.trained_parties < done.quorum else "",
        done.trained_parties,
        topology.num_parties,
        "unknown" if done.loss is None else f"{done.loss:.4f}",
        done.weight,
        done.total_weight,
        size(done.bytes_sent),
        done.seconds,
        "" if done.deviation is None else f", deviation {done.deviation.total:.2g}",
    )


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand metrics to other callbacks and to the loggers; works in hooks where ``self.log`` is refused."""
    if not metrics:
        return
    trainer.callback_metrics.update(
        {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
    )
    # The step that Lightning itself gives to what is logged at this moment, so that a table's rows line up.
    step = max(trainer.global_step - 1, 0)
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)


def _counted(names: Collection[str]) -> str:
    return "1 trainable parameter" if len(names) == 1 else f"{len(names)} trainable parameters"


def _first(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
