"""Merge an adapter into its base model, and prove that the result is the same model."""

import gc
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from pellm_lightning.tasks.quantization import dequantized, is_quantized

log = logging.getLogger(__name__)

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
    torch.int8: 1e-1,
}
"""By how much of its size an output may differ, by the coarsest dtype of the parameters.

A merged weight is rounded once more than W and B A by themselves, at 2^-24 of its size in float32, 2^-11 in
float16, 2^-8 in bfloat16. Some dozens of layers make ten to thirty times as much of that. A lost or doubled
update of an output layer is of the size of the output itself. Weights in int8 have inputs in int8, rounded at
2^-8 of the largest of a token.
"""

_WITHOUT = "Export it without --merged: the adapter is loaded onto its base by PeftModel.from_pretrained."
_LENGTH, _RANDOM = 32, 4


def refuse_prompt_learning(hparams: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse what a checkpoint shows to have nothing to merge, before its module is built.

    Raises:
        ValueError: If it is of a method of prompts.
    """
    if any(".prompt_encoder." in f".{name}" for name in names):
        peft = hparams.get("peft")
        kind = peft.get("peft_type") if isinstance(peft, Mapping) else getattr(peft, "peft_type", None)
        raise ValueError(_no_weights(str(getattr(kind, "value", kind) or "a method of prompts")))


def refuse_unmergeable(model: PeftModel) -> None:
    """Refuse a model of which PEFT can make no merged one.

    Raises:
        ValueError: If the method has nothing to merge, or the base is no model of transformers.
    """
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    tuner: Any = model.base_model
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        raise ValueError(_no_weights(kind))
    layers = [part for part in tuner.modules() if isinstance(part, BaseTunerLayer)]
    if any(type(layer).merge is BaseTunerLayer.merge for layer in layers):
        raise ValueError(f"PEFT has no way to merge adapters of {kind} into weights. {_WITHOUT}")
    base: Any = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"The base model is a {type(base).__name__}, and no model of transformers, which --merged writes."
            f" {_WITHOUT}"
        )


def _no_weights(kind: str) -> str:
    return f"{kind} adds no weights that could be merged into those of the base model. {_WITHOUT}"


def probe(model: PeftModel) -> list[dict[str, Tensor]]:
    """Return inputs on which to compare: one sequence each, (1, T), since not every model can pad.

    They hold tokens of the whole vocabulary, its first rows (special tokens), its last (new ones), and all
    whose rows an adapter trains by their indices.

    Raises:
        ValueError: If the model reads no tokens.
    """
    base: Any = model.get_base_model()
    rows = getattr(base.get_input_embeddings(), "weight", None)
    if getattr(base, "main_input_name", "input_ids") != "input_ids" or rows is None:
        raise ValueError(
            f"A {type(base).__name__} reads no tokens, so no input is known on which its merged model could"
            f" be compared with the adapter. {_WITHOUT}"
        )
    count, config = len(rows), base.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _LENGTH
    length = max(1, min(_LENGTH, int(longest) - 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(count, (_RANDOM * length,), generator=generator).tolist()
    rare = [*range(min(length, count)), *range(max(count - length, 0), count), *_trained_tokens(model, count)]
    sequences = [seq[start : start + length] for seq in (ids, rare) for start in range(0, len(seq), length)]
    device = next(model.parameters()).device
    inputs = [{"input_ids": torch.tensor([sequence], device=device)} for sequence in sequences]
    if getattr(base.config, "is_encoder_decoder", False):
        inputs = [given | {"decoder_input_ids": given["input_ids"]} for given in inputs]
    return inputs


def _trained_tokens(model: PeftModel, count: int) -> list[int]:
    found: set[int] = set()
    for config in model.peft_config.values():
        for indices in (
            getattr(config, "trainable_token_indices", None),
            getattr(config, "token_indices", None),
        ):
            lists = indices.values() if isinstance(indices, Mapping) else [indices or []]
            found |= {index for each in lists for index in each if 0 <= index < count}
    return sorted(found)


@torch.no_grad()
def outputs(model: Any, inputs: Sequence[Mapping[str, Tensor]], *, adapter: bool = True) -> list[Tensor]:
    """Return what a model says to each input: all its outputs in floating point, as one vector on the CPU."""
    was_training = [part for part in model.modules() if part.training]
    model.eval()  # no dropout
    said = []
    try:
        with nullcontext() if adapter else model.disable_adapter():
            for given in inputs:
                output = model(**given)
                parts = [output[key] for key in output if isinstance(output[key], Tensor)]
                said.append(
                    torch.cat([part.double().flatten().cpu() for part in parts if part.is_floating_point()])
                )
    finally:
        for part in was_training:
            part.training = True
    return said


def dequantized_as_trained(model: PeftModel, inputs: Sequence[Mapping[str, Tensor]]) -> PeftModel:
    """Return a model with its base dequantised, on which an adapter is merged without rounding to a few bits.

    Args:
        model: The model, which is used up if its base is quantised.
        inputs: Of `probe`.

    Raises:
        ValueError: If the base cannot be dequantised, or says something else then.
    """
    if not is_quantized(model.get_base_model()):
        return model
    dtype = coarsest(model)
    trained, without = outputs(model, inputs), outputs(model, inputs, adapter=False)
    try:
        model = dequantized(model)
    except ValueError as error:
        raise ValueError(f"{error} {_WITHOUT}") from error
    dtype = max(dtype, coarsest(model), key=TOLERANCE.__getitem__)
    doubt = compare(outputs(model, inputs), trained, without, dtype)
    if doubt:
        log.warning(doubt)
    return model


def merge_(model: PeftModel) -> PreTrainedModel:
    """Merge the active adapters into the base model, in place, and return that.

    Weights that several layers share and not all of them adapt alike (an output layer tied to the
    embedding) are untied, so that each layer keeps its own; if they come out equal, they stay tied.

    Raises:
        ValueError: If PEFT cannot.
    """
    base: Any = model.get_base_model()
    config = base.config
    tied = [
        each for each in (config, config.get_text_config()) if getattr(each, "tie_word_embeddings", False)
    ]
    _untie_adapted_(base)
    if tied and _separate(base):
        for each in tied:
            each.tie_word_embeddings = False
    tuner: Any = model.base_model
    try:
        with warnings.catch_warnings():
            # It says that they are untied now, which we have seen to.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")
            merged: PreTrainedModel = tuner.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"PEFT cannot merge this adapter: {error} {_WITHOUT}") from error
    if tied and _separate(merged) and _equal_embeddings(merged):
        for each in tied:
            each.tie_word_embeddings = True
        merged.tie_weights()
    return merged


def _untie_adapted_(base: nn.Module) -> None:
    """Give adapted layers a weight of their own where another layer has the same."""
    owners: dict[int, list[nn.Module]] = {}
    for part in base.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(part)
    adapted = {
        id(part.get_base_layer())
        for part in base.modules()
        if isinstance(part, BaseTunerLayer) and hasattr(part, "base_layer")
    }
    for layers in owners.values():
        if len(layers) > 1 and any(id(layer) in adapted for layer in layers):
            for layer in layers[1:]:
                weight: Any = layer.weight
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _embeddings(base: Any) -> tuple[Any, Any]:
    """Return the weights of input and output, below whatever wraps their layers."""
    found = []
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        while hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
            layer = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
        found.append(getattr(layer, "weight", None))
    return found[0], found[1]


def _separate(base: Any) -> bool:
    first, second = _embeddings(base)
    return first is not None and second is not None and first.data_ptr() != second.data_ptr()


def _equal_embeddings(base: Any) -> bool:
    first, second = _embeddings(base)
    return first.shape == second.shape and torch.equal(first, second)


def coarsest(model: nn.Module) -> torch.dtype:
    """Return the dtype of the parameters that rounds most."""
    # 4-bit weights are packed into integers, and computed with in another dtype.
    packed = getattr(getattr(model, "config", None), "quantization_config", None)
    computed = getattr(packed, "bnb_4bit_compute_dtype", torch.float64)
    kinds = ({p.dtype for p in model.parameters()} | {computed}) & TOLERANCE.keys()
    return max(kinds, key=lambda dtype: TOLERANCE[dtype], default=torch.bfloat16)


def reload(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Load what was written, once nothing holds the model that wrote it: a large one fits only once."""
    gc.collect()
    loaded: PreTrainedModel = kind.from_pretrained(folder, dtype="auto")
    return loaded


def compare(
    written: Sequence[Tensor], expected: Sequence[Tensor], base: Sequence[Tensor], dtype: torch.dtype
) -> str | None:
    """Compare a merged model with the adapter model.

    Args:
        written: What the merged model, reloaded, said to each input.
        expected: What the model with its adapter said.
        base: What the base model said without it.
        dtype: In which they computed.

    Returns:
        A warning where the dtype is so coarse that rounding hides what the adapter has changed, else None.

    Raises:
        ValueError: If they are not the same model.
    """
    worst, lost = 0.0, False
    for ours, theirs, without in zip(written, expected, base, strict=True):
        if ours.shape != theirs.shape or not ours.isfinite().all() or not theirs.isfinite().all():
            raise ValueError(
                f"The merged model gives {len(ours)} numbers where the adapter model gives {len(theirs)}, or"
                f" some that are not finite. Nothing was written. {_WITHOUT}"
            )
        size = max(theirs.norm().item(), torch.finfo(torch.float32).tiny)
        off, effect = (ours - theirs).norm().item() / size, 1.0
        if without.shape == theirs.shape:
            effect = (without - theirs).norm().item() / size
        worst = max(worst, off)
        lost |= off > 0.5 * effect and off > TOLERANCE[dtype] / 10
    if worst > TOLERANCE[dtype] or (lost and dtype in (torch.float32, torch.float64)):
        raise ValueError(
            f"The merged model says something else than the adapter model: its output is off by {worst:.2g}"
            f" of its size, where rounding in {dtype} explains {TOLERANCE[dtype]:.0e}. Nothing was written."
            f" {_WITHOUT}"
        )
    if lost:
        return (
            f"In {dtype} rounding moves the merged model's output by {worst:.2g} of its size, half of what"
            " the adapter has changed or more. Merge into the base in float32, or use the adapter as it is."
        )
    return None
