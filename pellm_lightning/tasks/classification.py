"""LightningModule of text classification: an encoder with a new head, trained fully or by a PEFT adapter."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pellm_lightning.engine.optim import without_parser
from pellm_lightning.tasks.adapter import config_of, make_plain_, with_adapter
from pellm_lightning.tasks.limits import check_label_indices, check_length, check_positions, num_positions
from pellm_lightning.tasks.optimizing import ADAMW, optimize_trainable
from pellm_lightning.tasks.pretrained import Dtype, Pretrained, device_of
from pellm_lightning.tasks.quantization import Quantization
from pellm_lightning.tasks.samples import Sample


class TextClassification(LightningModule):
    """LightningModule that fine-tunes an encoder, or another model with a classification head.

    Logs ``train_loss`` at each step; ``val_loss``, ``val_accuracy`` and ``val_f1`` (macro average) over the
    epoch, and the same for ``test``. Prediction returns the index of each text's label.

    The model is loaded by ``configure_model``, which a Trainer or ``load_from_checkpoint`` calls, not by the
    constructor.

    Args:
        model: Hub id, local folder or GGUF file.
        num_labels: Number of labels, equal at every party.
        peft: Configuration of a new PEFT adapter; the head trains with it. None trains every parameter,
            unless ``adapter`` is given.
        adapter: Folder of a saved adapter to evaluate or continue training, with its own configuration.
        optimizer: Optimizer of the trainable parameters.
        scheduler: Learning rate scheduler, stepped at each local step (``ReduceLROnPlateau`` each epoch, on
            ``val_loss``).
        dtype: Dtype of the loaded parameters; ``auto`` keeps that of the file. The Trainer's ``precision``
            also applies.
        quantization: Quantises the base model while it is loaded, for an adapter on it (QLoRA): ``nf4`` or
            ``fp4`` (4 bits, double quantisation), ``int8``, or the settings of a
            ``transformers.BitsAndBytesConfig``. Needs bitsandbytes.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, or another of transformers; None
            chooses.
        trust_remote_code: Whether to run Python code that comes with the model.
        revision: Branch, tag or commit of the model and its tokenizer on the hub.

    Example:
        >>> from peft import LoraConfig
        >>> module = TextClassification("google-bert/bert-base-uncased", num_labels=2, peft=LoraConfig(r=8))
    """

    model: PreTrainedModel | PeftModel
    num_positions: int | None = None

    def __init__(
        self,
        model: str,
        num_labels: int,
        peft: PeftConfig | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable = ADAMW,
        scheduler: LRSchedulerCallable | None = None,
        dtype: Dtype = "auto",
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels={num_labels} must be at least 2.")
        self.pretrained = Pretrained(
            model,
            dtype,
            quantization,
            gradient_checkpointing,
            attn_implementation,
            trust_remote_code,
            revision,
        )
        self.save_hyperparameters(logger=False)
        make_plain_(self.hparams)
        self.model_name, self.num_labels = model, num_labels
        self.peft, self.adapter = config_of(peft), adapter
        self.optimizer, self.scheduler = without_parser(optimizer), without_parser(scheduler)
        self.val_scores, self.test_scores = _scores("val", num_labels), _scores("test", num_labels)

    def configure_model(self) -> None:
        """Load the base model with a head and add the adapter, once."""
        if not hasattr(self, "model"):
            self.model = with_adapter(
                self._base(), self.peft, self.adapter, TaskType.SEQ_CLS, self.pretrained.revision
            )
        self.num_positions = num_positions(self.model)
        check_positions(self.model, self.model_name, self)

    def _base(self) -> PreTrainedModel:
        # Seed the new head: PEFT freezes a copy of it, which must be equal at all parties.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.pretrained.model(
                AutoModelForSequenceClassification, device_of(self), num_labels=self.num_labels
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the trainable parameters, and the scheduler."""
        return optimize_trainable(self, self.optimizer, self.scheduler)

    def forward(self, batch: Sample) -> Any:
        """Run the model on ``input_ids`` and ``attention_mask``, (B, T), and for a loss ``labels``, (B,).

        Raises:
            ValueError: If T exceeds the model's positions, or a label is not below num_labels.
        """
        if "labels" in batch:
            check_label_indices(batch["labels"], self.num_labels)
        check_length(batch["input_ids"].shape[1], self.num_positions)
        return self.model(**batch)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss: Tensor = self(batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, which cannot be updated in a fit after ``trainer.validate``."""
        self.val_scores.reset()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Add the batch to the epoch's loss and scores."""
        self._evaluate("val", batch, self.val_scores)

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Add the batch to the epoch's loss and scores."""
        self._evaluate("test", batch, self.test_scores)

    def _evaluate(self, stage: str, batch: Sample, scores: MetricCollection) -> None:
        output = self(batch)
        scores.update(output.logits, batch["labels"])
        self.log(f"{stage}_loss", output.loss, batch_size=len(batch["labels"]), sync_dist=True)
        self.log_dict(scores, prog_bar=True)

    def predict_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Return the label's index for each text, (B,) int64."""
        logits: Tensor = self(batch).logits
        return logits.argmax(dim=-1)


def _scores(stage: str, num_labels: int) -> MetricCollection:
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_labels, average="micro"),
            "f1": MulticlassF1Score(num_labels, average="macro"),
        },
        prefix=f"{stage}_",
    )
