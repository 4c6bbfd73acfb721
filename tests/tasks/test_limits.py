import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from pellm_lightning.tasks import CausalLM, ClassificationDataModule, TextClassification, TextDataModule
from pellm_lightning.tasks.limits import num_positions

TINY: dict[str, Any] = {
    "vocab_size": 35,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_positions_are_counted_as_the_model_uses_them(llama: str) -> None:
    assert num_positions(BertModel(BertConfig(**TINY, max_position_embeddings=40))) == 40
    # Its positions begin at padding index + 1.
    roberta = RobertaModel(RobertaConfig(**TINY, max_position_embeddings=40, pad_token_id=1))
    assert num_positions(roberta) == 38
    roberta(torch.full((1, 38), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 39), 5))
    assert (
        num_positions(BloomForCausalLM(BloomConfig(vocab_size=35, hidden_size=16, n_layer=1, n_head=2)))
        is None
    )
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    assert num_positions(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompt)) == 64 - 5


def test_blocks_longer_than_the_positions_are_refused(
    tmp_path: Path, llama: str, quiet_trainer: dict[str, Any]
) -> None:
    (tmp_path / "a.txt").write_text("w1 " * 400)
    for block_size in (64, 65):
        data = TextDataModule(str(tmp_path / "a.txt"), llama, block_size=block_size, val_fraction=0.25)
        trainer = Trainer(**quiet_trainer, max_steps=1)
        if block_size == 64:
            trainer.fit(CausalLM(llama), data)
            continue
        for run in (trainer.fit, trainer.validate):
            with pytest.raises(
                ValueError, match=r"block_size=65 is too large.*positions for 64.*block_size to 64"
            ):
                run(CausalLM(llama), data)


def test_texts_longer_than_the_positions_are_refused(
    tmp_path: Path, bert: str, quiet_trainer: dict[str, Any]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + f"{'w1 ' * 70},a\nw2,b\n" * 2)
    data = ClassificationDataModule(str(tmp_path / "a.csv"), bert, labels=["a", "b"], max_length=80)
    with pytest.raises(
        ValueError, match=r"max_length=80 is too large: a sample has 70 tokens.*positions for 64"
    ):
        Trainer(**quiet_trainer, max_steps=1).fit(TextClassification(bert, 2), data)


def test_data_of_one_s_own_are_checked_by_the_batch(
    llama: str, bert: str, quiet_trainer: dict[str, Any]
) -> None:
    long = {"input_ids": torch.ones(65, dtype=torch.int64), "labels": torch.ones(65, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"texts of 65 tokens, and the model has positions for 64"):
        Trainer(**quiet_trainer, max_steps=1).fit(CausalLM(llama), *[DataLoader([long])] * 2)
    wrong = {"input_ids": torch.ones(4, dtype=torch.int64), "labels": torch.tensor(2)}
    with pytest.raises(ValueError, match=r"the label 2, and the model has num_labels=2"):
        Trainer(**quiet_trainer, max_steps=1).fit(TextClassification(bert, 2), *[DataLoader([wrong])] * 2)


def test_more_labels_than_the_model_has_are_refused(
    tmp_path: Path, bert: str, quiet_trainer: dict[str, Any]
) -> None:
    (tmp_path / "a.csv").write_text("text,label\nw1,a\nw2,b\nw3,c\n")
    data = ClassificationDataModule(str(tmp_path / "a.csv"), bert, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"have 3 labels .*num_labels=2\. Set --model\.num_labels 3"):
        Trainer(**quiet_trainer, max_steps=1).fit(TextClassification(bert, 2), data)


def test_a_prompt_that_cannot_be_continued_is_named(
    tmp_path: Path, llama: str, quiet_trainer: dict[str, Any]
) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": "w1 " * n}) + "\n" for n in (3, 61)))
    data = TextDataModule("x", llama, predict_files=str(tmp_path / "p.jsonl"))
    assert Trainer(**quiet_trainer).predict(
        CausalLM(llama, max_new_tokens=4), data
    )  # 61 + 3: the last is not read
    with pytest.raises(
        ValueError, match=r"p\.jsonl:2: a prompt of 61 tokens and max_new_tokens=5.*positions for 64"
    ):
        Trainer(**quiet_trainer).predict(CausalLM(llama, max_new_tokens=5), data)
