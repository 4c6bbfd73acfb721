"""How many frames of the package lie between Lightning's hook and the collective of a round."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from package_imports import PACKAGE
from party_threads import Classifier, data, fit_parties, quiet_trainer

from pellm_lightning.comm.torchrun.gloo import GlooGroup
from pellm_lightning.comm.torchrun.shared_memory import SharedMemoryLane

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


def measured(call: Callable[..., Any], stacks: list[list[str]]) -> Callable[..., Any]:
    """Return a method that keeps the stack of each call that a hook has led to."""

    def kept(*arguments: Any) -> Any:
        if stack := frames_since_hook():
            stacks.append(stack)
        return call(*arguments)

    return kept


class Measured:
    """Stands before a ProcessGroupGloo and keeps the stack of each collective that a hook has led to."""

    def __init__(self, group: Any, stacks: list[list[str]]) -> None:
        self._group, self._stacks = group, stacks

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return measured(getattr(self._group, name), self._stacks)


def test_a_round_is_ten_frames_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lane: str) -> None:
    stacks: list[list[str]] = []
    build = GlooGroup.__init__

    def build_measured(self: GlooGroup, *arguments: Any) -> None:
        build(self, *arguments)
        self._group = Measured(self._group, stacks)

    monkeypatch.setattr(GlooGroup, "__init__", build_measured)
    for name in ("all_gather_bytes", "all_reduce", "barrier"):
        method = getattr(SharedMemoryLane, name)
        monkeypatch.setattr(SharedMemoryLane, name, measured(method, stacks))

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=2)])
        trainer.fit(Classifier(seed=party), data(8, seed=party))

    fit_parties(2, fit)
    # Two parties, two epochs of a round each: headers are gathered, then updates are summed.
    assert len(stacks) == 2 * 2 * 2
    last = {"gloo.all_gather_bytes", "gloo.all_reduce"}
    if lane == "shared memory":  # where the stack is taken before the method that is the collective itself
        last = {"federation._all_gather_bytes", "federation.barrier"}
    assert {stack[-1] for stack in stacks} == last
    assert {stack[0] for stack in stacks} == {f"federated_averaging.{HOOK}"}
    depth = 10 if lane == "gloo" else 9
    for stack in stacks:
        assert len(stack) <= depth, " > ".join(stack)
    assert max(map(len, stacks)) == depth, "docs/architecture.md names the number"
