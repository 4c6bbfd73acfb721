"""Ready-made LightningModules and data modules: causal language models, text classification, with PEFT."""

from pellm_lightning.tasks.adapter import SaveAdapter
from pellm_lightning.tasks.causal_lm import CausalLM
from pellm_lightning.tasks.classification import TextClassification
from pellm_lightning.tasks.labelled import ClassificationDataModule
from pellm_lightning.tasks.predictions import SavePredictions
from pellm_lightning.tasks.text import TextDataModule

__all__ = [
    "CausalLM",
    "ClassificationDataModule",
    "SaveAdapter",
    "SavePredictions",
    "TextClassification",
    "TextDataModule",
]
