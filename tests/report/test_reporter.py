"""What a user sees: log lines, the progress bar, the loggers."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from party_threads import Classifier, Rounds, data, fit_parties, quiet_trainer
from torch import nn

from pellm_lightning.report.logs import _where_written, show_log_lines


def lines_of(caplog: pytest.LogCaptureFixture, party: int, level: int = logging.INFO) -> list[str]:
    texts = [r.getMessage() for r in caplog.records if r.name.startswith("pellm") and r.levelno == level]
    return [text for text in texts if text.startswith(f"[party {party}]")]


def test_every_party_says_at_the_start_what_leaves_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    def fit(party: int, federated: Any) -> None:
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(Classifier(seed=party), data(8, seed=party))

    fit_parties(2, fit)
    for party in range(2):
        first, names, *rounds = lines_of(caplog, party)
        # head 16 x 3 + 3 of base 8 x 16 + 16 more; 4 bytes each.
        assert first == (
            f"[party {party}] federation of 2 parties: 51 of 195 parameters leave a party (26.2 %), 204 B"
            " per round"
        )
        assert names == f"[party {party}] these are head.bias, head.weight"
        assert len(rounds) == 1
        assert rounds[0].startswith(f"[party {party}] round 0: 2 of 2 parties trained, loss ")
        assert ", weight 8 of 16, " in rounds[0]


def test_one_party_is_not_called_parties(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    def fit(party: int, federated: Any) -> None:
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(Classifier(), data(4, seed=0))

    fit_parties(1, fit)
    assert lines_of(caplog, 0)[0].startswith("[party 0] federation of 1 party: ")


class Heads(Classifier):
    """Most of what trains is a copied head, which is no adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modules_to_save = nn.Linear(16, width)
        nn.init.zeros_(self.modules_to_save.weight)
        nn.init.zeros_(self.modules_to_save.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.modules_to_save(torch.tanh(self.base(x)))[:, :3]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize(("width", "warned"), [(9, True), (3, False)])
def test_heads_that_dwarf_the_adapter_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, width: int, warned: bool
) -> None:
    def fit(party: int, federated: Any) -> None:
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(Heads(width), data(4, seed=0))

    fit_parties(1, fit)
    # 9 x 17 = 153 scalars of 204 are 75 %; 3 x 17 of 102 are the half, which is not most.
    (line,) = lines_of(caplog, 0, logging.WARNING) or ["nothing"]
    assert ("75 % of what crosses each round" in line) == warned
    assert ("name them in `exclude` (they stay local) or freeze them" in line) == warned


def test_where_parties_write_is_told_together() -> None:
    folders = {"0": ["h:/run"], "1": ["h:/run/party-1/a", "h:/run/party-1/b"], "2": ["i:/run/party-2/a"]}
    assert _where_written(folders | {"3": ["i:/run/party-3/a"], "4": []}) == [
        "party 0 writes to /run",
        "party 1 writes to /run/party-1/a, /run/party-1/b",
        "parties 2 and 3 write to /run/party-<k>/a",
    ]


def test_more_than_three_names_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")

    class Many(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.base.requires_grad_(True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(party: int, federated: Any) -> None:
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(Many(), data(4, seed=0))

    fit_parties(1, fit)
    assert "(100 %)" in lines_of(caplog, 0)[0]
    assert lines_of(caplog, 0)[1].endswith("base.bias, base.weight, head.bias and 1 more")


def test_the_bar_shows_round_and_global_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pellm_lightning")
    loggers = [Rounds(), Rounds()]

    class Bar(TQDMProgressBar):
        shown: dict[str, Any] = {}  # noqa: RUF012

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            type(self).shown = dict(self.get_metrics(trainer, module))
            super().on_train_epoch_end(trainer, module)

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(
            tmp_path,
            [federated()] + ([Bar(refresh_rate=0)] if party == 0 else []),
            enable_progress_bar=party == 0,
            logger=loggers[party],
            max_epochs=3,
        )
        trainer.fit(Classifier(seed=party), data(8, seed=party))

    fit_parties(2, fit)
    assert float(Bar.shown["round"]) == 2
    assert float(Bar.shown["global_loss"]) == pytest.approx(loggers[0].rounds[2]["loss"], rel=1e-3)
    # Where a bar shows the rounds no line repeats them; the other party's lines do.
    assert len(lines_of(caplog, 0)) == 2
    assert len(lines_of(caplog, 1)) == 2 + 3


def test_all_figures_reach_the_loggers_and_the_callbacks(tmp_path: Path) -> None:
    figures = {
        "round", "active_parties", "trained_parties", "weight", "total_weight", "seconds", "waited_seconds",
        "stalled_seconds",
        "bytes_sent", "update_norm", "distance", "loss", "outer_lr",
    }  # fmt: skip
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> set[str]:
        csv = CSVLogger(tmp_path / f"own-{party}", name="run", version="a")
        trainer = quiet_trainer(tmp_path, [federated()], logger=[loggers[party], csv], log_every_n_steps=1)
        trainer.fit(Classifier(seed=party), data(8, seed=party))
        return set(trainer.callback_metrics)

    for names in fit_parties(2, fit):
        assert {f"federated/{figure}" for figure in figures} <= names
    for logger in loggers:
        assert [done["epoch"] for done in logger.rounds] == [0, 1]
        assert figures <= logger.rounds[0].keys()
    for path in (tmp_path / "own-0/run/a", tmp_path / "own-1/party-1/run/a"):
        header, *rows = (path / "metrics.csv").read_text().splitlines()
        columns = header.split(",")
        rounds = [row.split(",") for row in rows if row.split(",")[columns.index("federated/round")]]
        # Two steps an epoch; the row of a round is that of the step it followed, as Lightning counts them.
        assert [row[columns.index("step")] for row in rounds] == ["1", "3"]
        assert [float(row[columns.index("federated/round")]) for row in rounds] == [0, 1]


def test_distance_and_norm_are_those_of_the_parties(tmp_path: Path) -> None:
    """By hand: |x_i - anchor| and |x_i - mean|."""
    loggers = [Rounds(), Rounds()]

    class Recording(Classifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.local = self.vector().double()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Recording(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=loggers[party])
        trainer.fit(module, data(4 + 8 * party, seed=party))
        return module.local

    locals_ = fit_parties(2, fit)
    anchor = Classifier(seed=0).vector().double()
    mean = (4 * locals_[0] + 12 * locals_[1]) / 16
    for local, logger in zip(locals_, loggers, strict=True):
        assert logger.rounds[0]["update_norm"] == pytest.approx(float((local - anchor).norm()), rel=1e-5)
        assert logger.rounds[0]["distance"] == pytest.approx(float((local - mean).norm()), rel=1e-5)


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    root, package = logging.getLogger(), logging.getLogger("pellm_lightning")
    before = root.handlers[:], package.handlers[:], package.level
    root.handlers, package.handlers = [], []
    yield root, package
    root.handlers, package.handlers = before[:2]
    package.setLevel(before[2])


def test_lines_are_shown_unless_the_application_logs_itself(
    loggers: tuple[logging.Logger, logging.Logger],
) -> None:
    root, package = loggers
    package.setLevel(logging.NOTSET)
    root.handlers = [logging.NullHandler()]
    show_log_lines()
    assert package.handlers == []
    root.handlers = []
    show_log_lines()
    show_log_lines()
    assert len(package.handlers) == 1
    assert package.level == logging.INFO
