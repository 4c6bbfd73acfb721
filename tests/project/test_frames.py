"""How many frames of the package lie between Lightning's hook and the collective of a round."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from package_imports import PACKAGE
from party_threads import Classifier, data, fit_parties, quiet_trainer

from pellm_lightning.comm.torchrun.gloo import GlooGroup

HOOK = "on_train_batch_end"


def frames_since_hook() -> list[str]:
    """Return the functions of the package on the stack, from the hook on; empty outside of it."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(str(PACKAGE)):
            found.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    names = [name.partition(".")[2] for name in found]
    return found[names.index(HOOK) :: -1] if HOOK in names else []


class Measured:
    """Stands before a ProcessGroupGloo and keeps the stack of each collective that a hook has led to."""

    def __init__(self, group: Any, stacks: list[list[str]]) -> None:
        self._group, self._stacks = group, stacks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if stack := frames_since_hook():
                self._stacks.append(stack)
            return getattr(self._group, name)(*arguments)

        return call


def test_a_round_is_ten_frames_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []
    build = GlooGroup.__init__

    def build_measured(self: GlooGroup, *arguments: Any) -> None:
        build(self, *arguments)
        self._group = Measured(self._group, stacks)

    monkeypatch.setattr(GlooGroup, "__init__", build_measured)

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=2)])
        trainer.fit(Classifier(seed=party), data(8, seed=party))

    fit_parties(2, fit)
    # Two parties, two epochs of a round each: headers are gathered, then updates are summed.
    assert len(stacks) == 2 * 2 * 2
    assert {stack[-1] for stack in stacks} == {"gloo.all_gather", "gloo.all_reduce"}
    assert {stack[0] for stack in stacks} == {f"federated_averaging.{HOOK}"}
    for stack in stacks:
        assert len(stack) <= 10, " > ".join(stack)
    assert max(map(len, stacks)) == 10, "docs/architecture.md names the number"
