"""What a user reads while a fit runs: log lines, and metrics in Lightning's loggers and progress bar."""

import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.aggregation.robust import RobustRule
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.report.formatting import count, parties, size
from pellm_lightning.report.record import Start
from pellm_lightning.tensors.adapters import adapter_parameters
from pellm_lightning.tensors.selection import plain_name, share_outside_adapter

log = logging.getLogger(__name__)

_NOT_LOGGED = {"quorum", "last"}
# From this share of the weights on, a party decides nearly alone.
_DOMINATES = 0.9
_MAX_SHARES = 8


class _Stderr:
    """Stream to what stderr is now: a live view replaces it, to keep lines above itself."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def show_log_lines() -> None:
    """Show the package's lines as Lightning shows its own, unless the application set up logging itself."""
    package = logging.getLogger("pellm_lightning")
    if not package.handlers and not logging.getLogger().handlers:
        package.addHandler(logging.StreamHandler(_Stderr()))
        package.setLevel(logging.INFO)


def keep_above_live_view() -> None:
    """Let Lightning's lines pass through stderr as it is now: a line below a live view would tear it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
                handler.setStream(_Stderr())


def log_start(
    start: Start,
    module: nn.Module,
    plan: Plan,
    parameters: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: GaussianMechanism | None,
    written: Mapping[str, Sequence[str]],
) -> None:
    """Log which parameters will leave a party, since users want to know whether it is the adapter only.

    Args:
        start: Of the fit.
        module: The module to train.
        plan: The aggregation applied to the parameters.
        parameters: Those that take part in the rounds.
        exchange: How they are sent.
        privacy: The mechanism that makes them private.
        written: Where parties write, as "host:path", by name.
    """
    trainable = {plain_name(name) for name, p in module.named_parameters() if p.requires_grad}
    local = trainable - parameters.keys()
    lines = [
        f"federation of {count(len(start.parties), 'party')}: {start.leaving:,} of {start.parameters:,}"
        f" parameters leave a party ({100 * start.leaving / start.parameters:.3g} %),"
        f" {size(4 * start.leaving)} per round",
        f"these are {_first(parameters)}",
    ]
    if plan.pairs:
        experts = sum(plan.module(pair).experts for pair in plan.pairs)
        of_experts = f" ({experts} products, one of each expert)" if experts > len(plan.pairs) else ""
        lines.append(f"{len(plan.pairs)} LoRA modules{of_experts}, aggregated by {plan.rule!r}")
    elif isinstance(plan.rule, RobustRule):
        lines.append(f"they are aggregated by {plan.rule!r}")
    if exchange.is_secure:
        lines.append(f"the other parties see sums over all only: {exchange!r}")
    if exchange.supports in ("rounded", "sparse"):
        lines.append(f"they are compressed: {exchange!r}")
    if privacy is not None:
        lines.append(f"updates are clipped and noisy: {privacy!r}")
    if local:
        lines.append(f"{count(len(local), 'trainable parameter')} of its own stay local: {_first(local)}")
    if len(start.parties) > 1:
        lines += _where_written(written)
    for line in lines:
        log.info("[party %s] %s", start.name, line)
    outside = share_outside_adapter(parameters, adapter_parameters(module))
    if outside > 0.5 and start.parameters > start.leaving:
        log.warning(
            "[party %s] %.0f %% of what crosses each round is embeddings, heads, modules_to_save or other"
            " layers of the base, not adapter. If that is not intended, name them in `exclude` (they stay"
            " local) or freeze them.",
            start.name,
            100 * outside,
        )


def log_round(topology: Topology, report: RoundReport) -> None:
    """Log one line about a round."""
    log.info(
        "[party %s] round %d: %s%d of %d parties trained, loss %s, weight %g of %g%s, %s in %.2f s%s",
        topology.name,
        report.round,
        "moved nothing, " if report.trained_parties < report.quorum else "",
        report.trained_parties,
        topology.num_parties,
        "unknown" if report.loss is None else f"{report.loss:.4f}",
        report.weight,
        report.total_weight,
        _shares_of(report),
        size(report.bytes_sent),
        report.seconds,
        "" if report.deviation is None else f", deviation {report.deviation.total:.2g}",
    )


def log_shares(topology: Topology, shares: Mapping[str, float]) -> None:
    """Log each party's share of the weights as expected before the first round, unless all are equal."""
    if len({*shares.values()}) < 2:
        return
    largest = sorted(shares.items(), key=lambda share: -share[1])
    named = ", ".join(f"party {name} {_percent(share)}" for name, share in largest[:_MAX_SHARES])
    more = f" and {len(largest) - _MAX_SHARES} smaller" if len(largest) > _MAX_SHARES else ""
    log.info("[party %s] shares of the weights, as expected: %s%s", topology.name, named, more)
    name, share = largest[0]
    if share > _DOMINATES:
        log.warning("[party %s] Party %s will have %s", topology.name, name, _dominates(share))


def warn_of_share(topology: Topology, names: Sequence[str], report: RoundReport) -> bool:
    """Warn if one of several parties has nearly all of the weights of a round; return whether it has."""
    if report.active_parties < 2 or not report.weights:
        return False
    weight, party = max(zip(report.weights, report.parties, strict=True))
    share = weight / report.total_weight
    if share <= _DOMINATES:
        return False
    message = "[party %s] Round %d: party %s has %s"
    log.warning(message, topology.name, report.round, names[party], _dominates(share))
    return True


def round_metrics(report: RoundReport) -> dict[str, float]:
    """Return the numbers of a round as loggers get them."""
    known: dict[str, object] = {**vars(report), "parties": len(report.parties)}
    if report.deviation is not None:
        known |= {"deviation": report.deviation.total, "worst_deviation": report.deviation.worst}
    return {
        f"federated/{name}": float(value)
        for name, value in known.items()
        if isinstance(value, int | float) and name not in _NOT_LOGGED
    }


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Pass metrics to other callbacks and to the loggers; works in hooks where ``self.log`` is refused."""
    if not metrics:
        return
    trainer.callback_metrics.update(
        {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
    )
    # The step that Lightning itself gives to what is logged at this moment, so that a table's rows line up.
    step = max(trainer.global_step - 1, 0)
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)


def show_on_bar(module: LightningModule, report: RoundReport) -> None:
    """Show the round and the global loss on the progress bar; Lightning allows that in some hooks only."""
    shown = {"round": float(report.round)} | ({} if report.loss is None else {"global_loss": report.loss})
    module.log_dict(shown, prog_bar=True, logger=False, batch_size=1)


def _where_written(written: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each party that writes; one for all whose paths differ by ``party-<k>`` only."""
    paths = {party: ", ".join(path.partition(":")[2] for path in named) for party, named in written.items()}
    alike: dict[str, list[str]] = {}
    for party, path in paths.items():
        alike.setdefault(re.sub(r"\bparty-\d+\b", "party-<k>", path), []).append(party)
    return [
        f"{parties(named)} write to {path}"
        if len(named) > 1
        else f"party {named[0]} writes to {paths[named[0]]}"
        for path, named in alike.items()
        if path
    ]


def _first(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _shares_of(report: RoundReport) -> str:
    """Return the parties' shares of a round's weights, where they differ and are few enough for a line."""
    if not report.total_weight or len({*report.weights}) < 2 or len(report.weights) > _MAX_SHARES:
        return ""
    return f" (shares {', '.join(_percent(weight / report.total_weight) for weight in report.weights)})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _dominates(share: float) -> str:
    return (
        f"{_percent(share)} of the weights, so its data decide nearly alone. If that is not intended, cap it"
        " by weighting=Weighting(max_share=0.5), or use weighting='uniform'."
    )
