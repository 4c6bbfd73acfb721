"""LightningModule of a causal language model, fine-tuned fully or by a PEFT adapter."""

from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, PreTrainedModel

from pellm_lightning.engine.optim import without_parser
from pellm_lightning.loop.arguments import at_least, one_of
from pellm_lightning.tasks.adapter import config_of, make_plain_, with_adapter
from pellm_lightning.tasks.limits import check_length, check_positions, check_prompts, data_of, num_positions
from pellm_lightning.tasks.optimizing import ADAMW, optimize_trainable
from pellm_lightning.tasks.pretrained import Dtype, Pretrained, device_of
from pellm_lightning.tasks.quantization import Quantization
from pellm_lightning.tasks.samples import IGNORED, Sample
from pellm_lightning.tasks.text import TextDataModule


class Perplexity(MeanMetric):
    """Perplexity metric, exp of the token-weighted mean loss; call ``update(loss, num_tokens)``."""

    def compute(self) -> Tensor:
        """Return the perplexity since the last reset, a scalar."""
        return super().compute().exp()


class CausalLM(LightningModule):
    """LightningModule that fine-tunes a causal language model.

    Logs ``train_loss`` at each step; ``val_loss``, ``val_perplexity``, ``test_loss`` and ``test_perplexity``
    over the epoch, weighted by unmasked tokens. Prediction continues each prompt and returns the new text.

    The model is loaded by ``configure_model``, which a Trainer or ``load_from_checkpoint`` calls, not by the
    constructor.

    Args:
        model: Hub id, local folder or GGUF file.
        peft: Configuration of a new PEFT adapter, for example ``class_path: peft.LoraConfig``. None trains
            every parameter, unless ``adapter`` is given.
        adapter: Folder of a saved adapter to evaluate or continue training, with its own configuration.
        optimizer: Optimizer of the trainable parameters.
        scheduler: Learning rate scheduler, stepped at each local step (``ReduceLROnPlateau`` each epoch, on
            ``val_loss``).
        dtype: Dtype of the loaded parameters; ``auto`` keeps that of the file. The Trainer's ``precision``
            also applies.
        max_new_tokens: Length of a predicted continuation, in tokens.
        mean_over: Whether the training loss is the mean over the batch's unmasked tokens, or over its records
            (of each one's mean over tokens), as record-level differential privacy needs it.
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
        >>> module = CausalLM("HuggingFaceTB/SmolLM2-135M", peft=LoraConfig(r=8))
    """

    model: PreTrainedModel | PeftModel
    num_positions: int | None = None

    def __init__(
        self,
        model: str,
        peft: PeftConfig | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable = ADAMW,
        scheduler: LRSchedulerCallable | None = None,
        dtype: Dtype = "auto",
        max_new_tokens: int = 32,
        mean_over: Literal["tokens", "records"] = "tokens",
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__()
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
        self.model_name, self.peft, self.adapter = model, config_of(peft), adapter
        self.optimizer, self.scheduler = without_parser(optimizer), without_parser(scheduler)
        at_least(1, max_new_tokens=max_new_tokens)
        self.max_new_tokens = max_new_tokens
        one_of("mean_over", mean_over, ("tokens", "records"))
        self.mean_over = mean_over
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    def configure_model(self) -> None:
        """Load the base model and add the adapter, once."""
        if not hasattr(self, "model"):
            base = self.pretrained.model(AutoModelForCausalLM, device_of(self))
            self.model = with_adapter(
                base, self.peft, self.adapter, TaskType.CAUSAL_LM, self.pretrained.revision
            )
        self.num_positions = num_positions(self.model)
        check_positions(self.model, self.model_name, self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the trainable parameters, and the scheduler."""
        return optimize_trainable(self, self.optimizer, self.scheduler)

    def forward(self, batch: Sample) -> Any:
        """Run the model on ``input_ids``, ``attention_mask`` and, for a loss, ``labels``: (B, T) int64.

        Raises:
            ValueError: If T exceeds the model's positions.
        """
        check_length(batch["input_ids"].shape[1], self.num_positions)
        return self.model(**batch)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's unmasked tokens, or over its records."""
        if self.mean_over == "tokens":
            loss: Tensor = self(batch).loss
        else:
            logits, labels = self(batch).logits[:, :-1].float(), batch["labels"][:, 1:]
            losses = cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
            loss = (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the metric, which cannot be updated in a fit after ``trainer.validate``."""
        self.val_perplexity.reset()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Add the batch to the epoch's loss and perplexity."""
        self._evaluate("val", batch, self.val_perplexity)

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Add the batch to the epoch's loss and perplexity."""
        self._evaluate("test", batch, self.test_perplexity)

    def _evaluate(self, stage: str, batch: Sample, perplexity: Perplexity) -> None:
        loss = self(batch).loss
        num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token is never predicted
        perplexity.update(loss, num_tokens)
        self.log(f"{stage}_loss", loss, batch_size=num_tokens, sync_dist=True)
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True)

    def on_predict_start(self) -> None:
        """Load the tokenizer, which only prediction needs, and validate the lengths of prompts."""
        self.tokenizer = self.pretrained.tokenizer()
        data = data_of(self)
        if isinstance(data, TextDataModule):
            check_prompts(data.predict_places, data.predict_samples, self.max_new_tokens, self.num_positions)

    def predict_step(self, batch: Sample, batch_idx: int) -> list[str]:
        """Continue each prompt greedily and return the new text."""
        generate: Any = self.model.generate
        tokens = generate(
            **batch,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        prompt_length = batch["input_ids"].shape[1]
        return self.tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)

    def save_adapter(self, folder: str) -> None:
        """Save the adapter for ``PeftModel.from_pretrained``; without one, the whole model."""
        self.model.save_pretrained(folder)
