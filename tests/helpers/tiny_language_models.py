"""Tiny models and a tokenizer of whole words, built here: no test reaches for a hub."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pellm_lightning.tasks import CausalLM, TextClassification

WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(30)), "user", "assistant", ":"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; "w3" has the index 5, <eos> 0, <unk> 1."""
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> dict[str, object]:
    """Arguments of a Trainer that writes nothing but what its callbacks write."""
    return {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@pytest.fixture(autouse=True, scope="session")
def one_model_at_a_time() -> Iterator[None]:
    """Parties are threads here; in transformers 4 loading a model changes torch.nn for all of them."""
    lock = threading.Lock()

    def locked(configure: Callable[[LightningModule], None]) -> Callable[[LightningModule], None]:
        def configures(self: LightningModule) -> None:
            with lock:
                configure(self)

        return configures

    with pytest.MonkeyPatch.context() as patch:
        for kind in (CausalLM, TextClassification):
            patch.setattr(kind, "configure_model", locked(kind.configure_model))
        yield


@pytest.fixture(autouse=True)
def loading_is_over() -> Iterator[None]:
    """Wait for the threads of `from_pretrained`: they end a moment after it returns, as a leak would not."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
