"""The same figures in the loggers of others: TensorBoard and CSV are tested where rounds are; here MLflow."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger
from party_threads import ValidatedClassifier, data, fit_parties, quiet_trainer

from pellm_lightning import FederatedAveraging

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::DeprecationWarning:mlflow")


def test_mlflow_gets_each_round(tmp_path: Path) -> None:
    callbacks: list[FederatedAveraging] = []
    loggers: list[MLFlowLogger] = []

    def fit(party: int, federated: Any) -> None:
        callbacks.append(federated(every_n_steps=2))
        loggers.append(MLFlowLogger("federated", tracking_uri=f"file:{tmp_path}/mlruns"))
        trainer = quiet_trainer(tmp_path, callbacks, max_steps=6, logger=loggers[0])
        trainer.fit(ValidatedClassifier(), data(16, seed=0), data(8, seed=9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it asks for a database by default
        patch.setenv("MLFLOW_TRACKING_URI", "")  # which it changes; so it is put back
        fit_parties(1, fit)
        check(*callbacks, *loggers)


def check(callback: FederatedAveraging, logger: MLFlowLogger) -> None:
    client, run = logger.experiment, logger.run_id

    def logged(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(run, f"federated/{name}")]

    assert len(callback.rounds) == 3
    # A round comes after its last step, whose index is one less than their number.
    assert logged("loss") == [(2 * done.round + 1, pytest.approx(done.loss)) for done in callback.rounds]
    assert logged("update_norm") == [
        (2 * done.round + 1, pytest.approx(done.update_norm)) for done in callback.rounds
    ]
    assert [step for step, _ in logged("val_loss")] == [3]  # four batches an epoch
    assert client.get_run(run).info.status == "FINISHED"
