"""The command ``new``: a folder with a script, a configuration and small data, which run as they are."""

import csv
import io
import json
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

Case: TypeAlias = Literal["script", "text", "classification"]
Parties: TypeAlias = Literal["one-launch", "separate-jobs"]

_TEMPLATES = ("README.md", "run.yaml", "train.py")
_SUBJECTS = (("heart", "lung", "kidney", "liver"), ("knee", "hip", "shoulder", "ankle"))
"""What the records of each party are about."""
_FINDINGS = {"well": ("looks normal", "works without pain"), "ill": ("is swollen", "hurts at night")}


def new(folder: Path, case: Case = "text", parties: Parties = "one-launch") -> None:
    """Write a script, a configuration, a README and small data for two parties; they run as they are.

    Args:
        folder: Folder to write into; nothing in it is overwritten.
        case: What is trained: a module of a script of your own, a language model on texts, or a classifier.
        parties: How the parties start: all by one torchrun, or each as a job of its own, which may fail and
            rejoin, and may run on a host of its own.
    """
    files = {name: _rendered(name, case=case, parties=parties) for name in _TEMPLATES}
    files |= {f"data/party-{party}.{_suffix(case)}": _data(case, party) for party in range(len(_SUBJECTS))}
    there = [name for name in (*files, "model") if (folder / name).exists()]
    if there:
        raise ValueError(
            f"{folder} has {', '.join(there)} already, and nothing is overwritten. Name another folder."
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    _write_model(folder / "model")
    print(f"wrote {folder}: {', '.join(_TEMPLATES)}, data/ and model/. Read {folder / 'README.md'} next.")


def _rendered(name: str, **case: str) -> str:
    environment = Environment(
        loader=PackageLoader("pellm_lightning.cli"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(f"{name}.jinja").render(case)


def _suffix(case: Case) -> str:
    return "csv" if case == "classification" else "jsonl"


def _data(case: Case, party: int) -> str:
    """Return the content of a party's file: rows with a label, or instructions with their responses.

    The parties have 96 and 64 of them, so that they weigh differently.
    """
    reports = [
        (f"The {side} {subject} of patient {patient} {finding}.", label)
        for label, findings in _FINDINGS.items()
        for subject, side, finding, patient in product(
            _SUBJECTS[party], ("left", "right"), findings, range(1, 4 - party)
        )
    ]
    if case == "classification":
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("text", "label"), *reports])
        return table.getvalue()
    records = [{"instruction": f"Is this well? {text}", "response": label} for text, label in reports]
    return "".join(json.dumps(record) + "\n" for record in records)


def _write_model(folder: Path) -> None:
    """Write a language model of 19,000 random weights that reads bytes: it trains in seconds, and offline.

    Without transformers and torch, whose imports take longer than all else here.
    """
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    width, inner, layer = 32, 64, "layers.0"
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (len(vocabulary), width), "norm": (width,)}
    shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj": (width, inner)}
    shapes |= {f"{layer}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    generator = np.random.default_rng(0)
    weights = {
        f"model.{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else generator.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    for name, content in (("config", config), ("tokenizer_config", special)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
