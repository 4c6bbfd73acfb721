"""Checkpoints of compiled modules and of plain ones: only ``torch.compile``'s prefix in names differs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from party_threads import Classifier, data, fit_parties, quiet_trainer

from pellm_lightning import Parameters
from pellm_lightning.tensors.selection import load_compiled_, named_as_in

pytestmark = pytest.mark.compiled


def compiled(module: Classifier, parts: Sequence[str]) -> Classifier:
    for part in parts:
        setattr(module, part, torch.compile(getattr(module, part), backend="eager"))
    return module


@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize(
    ("first", "second"), [(["head"], []), ([], ["head"]), (["base"], ["head"]), (["base", "head"], [])]
)
def test_a_fit_resumes_whichever_parts_are_compiled(
    tmp_path: Path, first: Sequence[str], second: Sequence[str], save_frozen: bool
) -> None:
    """Two epochs, saved after the first: the second one goes on as if nothing had been renamed."""

    def fit(
        parts: Sequence[str], epochs: int, resumed: bool, party: int, federated: Any
    ) -> tuple[list[str], torch.Tensor]:
        module = compiled(Classifier(seed=party, optimizer="Adam"), parts)
        callback = federated(
            parameters=Parameters(save_frozen=save_frozen),
            outer_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9),
        )
        trainer = quiet_trainer(tmp_path, [callback], max_epochs=epochs)
        path = tmp_path / f"{party}.ckpt"
        trainer.fit(module, data(8, seed=party), ckpt_path=path if resumed else None)
        if epochs == 1:
            trainer.save_checkpoint(path)
            names = sorted(torch.load(path, weights_only=True)["state_dict"])
        else:
            names = []
        assert not module._load_state_dict_pre_hooks  # nothing of ours stays at the module
        return names, module.vector()

    (names, _), _ = fit_parties(2, partial(fit, first, 1, False))
    assert any("_orig_mod" in name for name in names) == any(save_frozen or part == "head" for part in first)
    (_, resumed), _ = fit_parties(2, partial(fit, second, 2, True))
    (_, straight), _ = fit_parties(2, partial(fit, [], 2, False))
    # A compiled layer may round otherwise, and Adam (lr 0.1) makes a step of 1e-6 of a gradient's last bit;
    # what is lost of the moments or the momentum would make 1e-2.
    assert (resumed - straight).abs().max() < 1e-4


def test_trainer_test_reads_a_compiled_checkpoint(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("norm", self.vector().norm())

    def fit(party: int, federated: Any) -> None:
        module = compiled(Tested(), ["head"])
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(module, data(8, seed=0))
        trainer.save_checkpoint(tmp_path / "0.ckpt")
        plain = Tested(seed=5)
        (found,) = trainer.test(plain, data(8, seed=0), ckpt_path=tmp_path / "0.ckpt", verbose=False)
        assert found["norm"] == pytest.approx(module.vector().norm().item())
        assert torch.equal(plain.vector(), module.vector())

    fit_parties(1, fit)


def test_names_that_differ_otherwise_stay() -> None:
    module = compiled(Classifier(), ["head"])
    found = named_as_in(module, {"head.weight": 1, "base._orig_mod.bias": 2, "other.weight": 3})
    assert found == {"head._orig_mod.weight": 1, "base.bias": 2, "other.weight": 3}


def test_two_names_for_one_parameter_are_left_to_the_loader() -> None:
    module = Classifier()
    state = {"head.weight": torch.zeros(3, 16), "head._orig_mod.weight": torch.ones(3, 16)}
    before = dict(state)
    load_compiled_(module, state, "")
    assert state == before


def test_a_submodule_in_a_larger_one_is_renamed_below_its_prefix() -> None:
    state = {"inner.head._orig_mod.weight": 1, "outer.head._orig_mod.weight": 2}
    load_compiled_(Classifier(), state, "inner.")  # type: ignore[arg-type]
    assert state == {"inner.head.weight": 1, "outer.head._orig_mod.weight": 2}
