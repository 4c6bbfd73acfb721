"""Every example runs as its README says: on the data of make_data.py, with small models of random weights."""

import difflib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = ["classification.yaml", "ddp_parties.yaml", "instructions.yaml"]
