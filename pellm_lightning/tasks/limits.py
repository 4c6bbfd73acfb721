"""Limits of a model, its positions and labels, validated against the data."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from pellm_lightning.tasks.columns import shown
from pellm_lightning.tasks.samples import IGNORED, Sample, Samples


def num_positions(model: nn.Module) -> int | None:
    """Return the number of a model's positions for a text's tokens; None if unlimited.

    Virtual tokens of prompt methods take positions from the text.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    bound = getattr(config, "max_position_embeddings", None)
    if not isinstance(bound, int) or bound < 1:
        return None
    for name, part in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        is_table = name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
        if is_table and part.padding_idx is not None:
            bound = min(bound, part.num_embeddings - part.padding_idx - 1)
    configs = getattr(model, "peft_config", {})
    virtual = [getattr(c, "num_virtual_tokens", None) or 0 for c in configs.values()] if configs else []
    return bound - max(virtual, default=0)


def check_positions(model: nn.Module, name: str, module: LightningModule) -> None:
    """Validate that the longest sample fits into the model's positions.

    Data modules of one's own are left to `check_length`, since nothing says how long their samples are.

    Args:
        model: The model, with its adapter.
        name: What it was loaded by.
        module: Leads to the data module; without a Trainer there is none.

    Raises:
        ValueError: Names both values.
    """
    limit, data = num_positions(model), data_of(module)
    argument = next((name for name in ("block_size", "max_length") if hasattr(data, name)), None)
    if limit is None or argument is None:
        return
    sources = (getattr(data, f"{stage}_samples", ()) for stage in ("train", "val", "test"))
    longest = max((samples.longest for samples in sources if isinstance(samples, Samples)), default=0)
    if longest > limit:
        raise ValueError(
            f"{argument}={getattr(data, argument)} is too large: a sample has {longest} tokens, and"
            f" model={name!r} has positions for {limit}. Set --data.{argument} to {limit} or less, or take a"
            " model with more positions."
        )


def check_length(length: int, limit: int | None) -> None:
    """Validate that a batch fits into the model's positions.

    Raises:
        ValueError: Names both values.
    """
    if limit is not None and length > limit:
        raise ValueError(
            f"A batch has texts of {length} tokens, and the model has positions for {limit}. Let the data"
            f" module cut texts at {limit} tokens, or take a model with more positions."
        )


def data_of(module: LightningModule) -> LightningDataModule | None:
    """Return the Trainer's data module, None if there is none."""
    try:
        trainer: Any = module.trainer
    except RuntimeError:  # not attached to a Trainer
        return None
    return getattr(trainer, "datamodule", None)


def check_labels(labels: Sequence[str], module: LightningModule | None) -> None:
    """Validate that the number of labels does not exceed the model's.

    Raises:
        ValueError: Names both numbers.
    """
    num_labels = getattr(module, "num_labels", None)
    if isinstance(num_labels, int) and len(labels) > num_labels:
        raise ValueError(
            f"The data have {len(labels)} labels ({shown(list(labels))}),"
            f" the model num_labels={num_labels}. Set --model.num_labels {len(labels)} at every party, or"
            " take the rows of other labels out."
        )


def check_label_indices(labels: Tensor, num_labels: int) -> None:
    """Validate label indices; -100 is ignored by the loss.

    Looking at labels on an accelerator would wait for it at each step, so only those on a CPU are checked.

    Raises:
        ValueError: Names the index and ``num_labels``.
    """
    if labels.device.type != "cpu" or labels.dtype != torch.int64:
        return
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= num_labels)]
    if len(wrong):
        raise ValueError(
            f"A batch holds the label {int(wrong[0])}, and the model has num_labels={num_labels}, which are 0"
            f" to {num_labels - 1}. Set num_labels to the number of labels, at every party, or number them"
            " from 0."
        )


def check_prompts(
    places: Sequence[str], samples: Sequence[Sample], max_new_tokens: int, limit: int | None
) -> None:
    """Validate that prompts can be continued within the model's positions.

    Args:
        places: File and line of each prompt.
        samples: The prompts.
        max_new_tokens: Length of a continuation.
        limit: The model's positions.

    Raises:
        ValueError: Names file and line of the first.
    """
    for where, sample in zip(places, samples, strict=True):
        length = len(sample["input_ids"])
        # The last new token is read by nobody.
        if limit is not None and length + max_new_tokens - 1 > limit:
            raise ValueError(
                f"{where}: a prompt of {length} tokens and max_new_tokens={max_new_tokens} are too long: the"
                f" model has positions for {limit}. Shorten the prompt, or lower --model.max_new_tokens."
            )
