"""How good each adapter is for each party: a row per adapter, a column per party's held-out data."""

import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from peft import (
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor

from pellm_lightning.cli.configured import Configured
from pellm_lightning.tasks.adapter import peft_model_in

log = logging.getLogger(__name__)

BASE = "base"
"""Row of the module as it is configured, before any training."""

Matrix: TypeAlias = dict[str, dict[str, list[float]]]
"""By metric, by adapter: the value on each party's data."""


def main(options: Namespace, rest: Sequence[str]) -> None:
    """Run ``pellm evaluate``."""
    names = options.names or [f"party {party}" for party in range(options.parties)]
    if len(names) != options.parties:
        raise ValueError(f"--names gives {len(names)} names for --parties {options.parties}.")
    adapters: dict[str, Path | None] = {} if options.no_base else {BASE: None}
    adapters |= named(options.adapters, options.parties)
    if not adapters:
        raise ValueError("There is nothing to evaluate: give --adapters, or leave --no-base out.")
    if options.out:  # what cannot be written is reported before hours of work
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    found = matrix(rest, adapters, names)
    for metric, rows in found.items():
        print(f"{metric}\n\n{table(rows, names)}")
    if options.out:
        options.out.write_text(json.dumps({"parties": names, "metrics": found}, indent=2), encoding="utf-8")


def named(words: Sequence[str], parties: int) -> dict[str, Path | None]:
    """Read NAME=FOLDER, where ``{party}`` in it stands for each party in turn.

    Raises:
        ValueError: If a word is none, two adapters would have one name, or a folder holds no adapter.
    """
    found: dict[str, Path | None] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapters {word} is no NAME=FOLDER, as clinic-a={word}.")
        for party in range(parties) if "{party}" in word else range(1):
            called = name.replace("{party}", str(party))
            if called in (BASE, *found):
                raise ValueError(
                    f"--adapters {word} calls a second row {called!r}. Give each adapter a name of its own,"
                    " with {party} in it if {party} is in the folder."
                )
            found[called] = Path(folder.replace("{party}", str(party)))
    for name, path in found.items():
        if path is not None and not (path / "adapter_config.json").exists():
            raise ValueError(
                f"--adapters {name}={path}: there is no adapter_config.json. Name a folder that PEFT's"
                " save_pretrained, SaveAdapter or `export` has written."
            )
    return found


def matrix(words: Sequence[str], adapters: Mapping[str, Path | None], parties: Sequence[str]) -> Matrix:
    """Evaluate each adapter on each party's data.

    Args:
        words: Arguments as of the command line's ``fit``.
        adapters: Folder of each adapter by name; None leaves the module as it is configured. The base model
            in a folder's ``base`` takes the place of the configuration's.
        parties: Names of the parties, in the order of their indices.

    Raises:
        ValueError: If the module cannot be evaluated, logs nothing or not the same for all parties, or an
            adapter does not fit it.
    """
    found: Matrix = {}
    configured = Configured(words)
    module = configured.module
    module.configure_model()
    tests = is_overridden("test_step", module, LightningModule)
    if not tests and not is_overridden("validation_step", module, LightningModule):
        raise ValueError(f"{type(module).__name__} has neither a test_step nor a validation_step.")
    wraps = any(path is not None for path in adapters.values())
    model = peft_model_in(module, "evaluate") if wraps else None
    prompts = None if model is None or not model.active_peft_config.is_prompt_learning else _Prompts(model)
    fresh = {} if model is None or prompts else _copy(get_peft_model_state_dict(model))
    bases = {name: path / "base" for name, path in adapters.items() if path and (path / "base").is_dir()}
    fresh_base = _copy(get_base_model_state_dict(model)) if model is not None and bases else {}
    every = [_data_of(words, party, len(parties)) for party in range(len(parties))]
    for name, path in adapters.items():
        if prompts is not None:
            prompts.put(path, name)
        elif model is not None:
            _put(model, fresh if path is None else load_peft_weights(str(path), device="cpu"), name)
        if model is not None and bases:
            kind: Any = type(model.get_base_model())
            base = kind.from_pretrained(bases[name]).state_dict() if name in bases else fresh_base
            set_base_model_state_dict(model, base)
        for index, party in enumerate(parties):
            with standing_as(index, len(parties)):
                run = configured.trainer.test if tests else configured.trainer.validate
                results = run(module, every[index], verbose=False)
            for metric, value in ((metric, value) for result in results for metric, value in result.items()):
                found.setdefault(metric, {}).setdefault(name, []).append(value)
            uneven = [metric for metric, rows in found.items() if len(rows.get(name, [])) != index + 1]
            if uneven:
                raise ValueError(
                    f"{uneven[0]} is not logged once on the data of each party: not so of {party}. Let"
                    f" {type(module).__name__} log the same metrics for all."
                )
            log.info("%s on %s: %s", name, party, ", ".join(f"{k} {v:.4g}" for k, v in results[0].items()))
    if not found:
        raise ValueError(
            f"{type(module).__name__} logs no metric when it is {'tested' if tests else 'validated'}."
        )
    return found


def _data_of(words: Sequence[str], party: int, num_parties: int) -> LightningDataModule:
    """Return a data module for one party only, since it keeps whose data it has read."""
    with standing_as(party, num_parties):
        return Configured(words).data


@contextmanager
def standing_as(party: int, num_parties: int) -> Iterator[None]:
    """Let this process be a party for whoever asks; there is no launcher and no other process."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update({"RANK": str(party), "WORLD_SIZE": str(num_parties)})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def table(rows: Mapping[str, Sequence[float]], parties: Sequence[str]) -> str:
    """Return a table in Markdown, with the mean over the parties in the last column."""
    lines = [["", *parties, "mean"], ["---"] + ["---:"] * (len(parties) + 1)]
    for name, values in rows.items():
        lines.append([name, *(f"{value:.4g}" for value in [*values, math.fsum(values) / len(values)])])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


class _Prompts:
    """Puts saved prompts on a model, as adapters of their own.

    A saved prompt is what an encoder gave (p-tuning, prefix tuning with projection) and not the encoder: put
    into a model that has one, it would be encoded once more.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.configured = model, model.active_adapter
        self.count = 0

    def put(self, path: Path | None, name: str) -> None:
        """Use the prompt in a folder, or the configured one."""
        adapter = self.configured
        if path is not None:
            adapter, self.count = f"evaluated_{self.count}", self.count + 1
            ours, theirs = self.model.peft_config[self.configured], PeftConfig.from_pretrained(str(path))
            if theirs.peft_type != ours.peft_type:
                raise ValueError(
                    f"The adapter {name} does not fit the configuration's: it is of {theirs.peft_type}, not"
                    f" of {ours.peft_type}. Evaluate adapters with the PEFT configuration of their training."
                )
            self.model.load_adapter(str(path), adapter_name=adapter, is_trainable=False)
        self.model.set_adapter(adapter)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def _put(model: PeftModel, weights: Mapping[str, Tensor], name: str) -> None:
    """Give a PEFT model other values of its adapter."""
    expected = get_peft_model_state_dict(model)
    unlike = sorted(
        key
        for key in expected.keys() | weights.keys()
        if key not in expected or key not in weights or expected[key].shape != weights[key].shape
    )
    if unlike:
        raise ValueError(
            f"The adapter {name} does not fit the configuration's: {unlike[0]!r} is missing or of another"
            f" shape ({len(unlike)} in all). Evaluate adapters with the PEFT configuration of their training."
        )
    set_peft_model_state_dict(model, dict(weights))
