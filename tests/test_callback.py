"""FederatedAveraging under real Trainers, parties as threads."""

from pathlib import Path
from typing import Any

import torch
from parties import Classifier, data, fit_parties, quiet_trainer


def test_parties_end_with_the_same_bits_however_uneven(tmp_path: Path) -> None:
    samples, epochs = (16, 8, 28), (2, 4, 1)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=3)], max_epochs=epochs[party])
        trainer.fit(module, data(samples[party], seed=party))
        return module.vector()

    first, *others = fit_parties(3, fit)
    assert all(torch.equal(first, other) for other in others)
