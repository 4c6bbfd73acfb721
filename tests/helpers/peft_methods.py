"""Every fine-tuning method of the installed PEFT on a tiny Llama."""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from packaging.version import Version
from peft import PeftConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

QV = {"target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM}
PROMPT = {"num_virtual_tokens": 3, "task_type": TaskType.CAUSAL_LM}
LORA = {**QV, "r": 4}

Make = Callable[[], PeftConfig]


def of(name: str, **arguments: Any) -> Make | None:
    """Return what makes the configuration, None if the installed PEFT is too old for it."""
    kind = getattr(peft, name, None)
    return None if kind is None else partial(kind, **arguments)


LISTED = {
    "LoRA": of("LoraConfig", **LORA),
    "LoRA, all linear layers": of("LoraConfig", **LORA | {"target_modules": "all-linear"}),
    "LoRA with biases": of("LoraConfig", **LORA, bias="lora_only"),
    "LoRA with lora_bias": of("LoraConfig", **LORA, lora_bias=True),
    "LoRA with modules_to_save": of("LoraConfig", **LORA, modules_to_save=["lm_head"]),
    "LoRA with trainable tokens": of("LoraConfig", **LORA, trainable_token_indices={"embed_tokens": [2, 5]}),
    "LoRA on parameters": of(
        "LoraConfig", r=4, target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM"
    ),
    "rsLoRA": of("LoraConfig", **LORA, use_rslora=True),
    "DoRA": of("LoraConfig", **LORA, use_dora=True),
    "PiSSA": of("LoraConfig", **LORA, init_lora_weights="pissa"),
    "OLoRA": of("LoraConfig", **LORA, init_lora_weights="olora"),
    "aLoRA": of("LoraConfig", **LORA, alora_invocation_tokens=[2]),
    "AdaLoRA": of("AdaLoraConfig", **QV, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
    "LoHa": of("LoHaConfig", **QV, r=4),
    "LoKr": of("LoKrConfig", **QV, r=4),
    "IA3": of("IA3Config", **QV, feedforward_modules=[]),
    "OFT": of("OFTConfig", **QV, oft_block_size=4),
    "BOFT": of("BOFTConfig", **QV, boft_block_size=4),
    "HRA": of("HRAConfig", **QV, r=4),
    "VeRA": of("VeraConfig", **QV, r=4),
    "PVeRA": of("PveraConfig", **QV, r=4),
    "VBLoRA": of("VBLoRAConfig", **QV, r=2, num_vectors=8, vector_length=8),
    "FourierFT": of("FourierFTConfig", **QV, n_frequency=20),
    "WaveFT": of("WaveFTConfig", **QV, n_frequency=20),
    "RandLoRA": of("RandLoraConfig", **QV, r=4),
    "C3A": of("C3AConfig", **QV, block_size=8),
    "SHiRA": of("ShiraConfig", **QV, r=2, random_seed=7),
    "MiSS": of("MissConfig", **QV, r=4),
    "MiSS, bat": of("MissConfig", **QV, r=4, init_weights="bat"),
    "RoAd": of("RoadConfig", **QV, group_size=8),
    "LN tuning": of("LNTuningConfig", task_type="CAUSAL_LM"),
    "OSF": of("OSFConfig", **QV),
    "DeLoRA": of("DeloraConfig", **QV, r=4),
    "DEFT": of("DeftConfig", **QV),
    "BEFT": of("BeftConfig", **QV),
    "FRoD": of("FrodConfig", **QV),
    "GLoRA": of("GloraConfig", **QV),
    "GraLoRA": of("GraloraConfig", **QV, r=4),
    "HiRA": of("HiraConfig", **QV, r=4),
    "Lily": of("LilyConfig", **QV),
    "PEANuT": of("PeanutConfig", **QV),
    "PSOFT": of("PsoftConfig", **QV, r=4),
    "Supertuning": of("SupertuningConfig", **QV),
    "TinyLoRA": of("TinyLoraConfig", **QV),
    "Uni-LoRA": of("UniLoraConfig", **QV),
    "AdaMSS": of("AdamssConfig", **QV, r=4, num_subspaces=2),
    "Poly": of("PolyConfig", **QV, r=2, n_tasks=2, n_skills=2),
    "trainable tokens": of("TrainableTokensConfig", token_indices=[2, 5, 7], target_modules=["embed_tokens"]),
    "prompt tuning": of("PromptTuningConfig", **PROMPT),
    "multitask prompt tuning": of("MultitaskPromptTuningConfig", **PROMPT, num_tasks=2),
    "prefix tuning": of("PrefixTuningConfig", **PROMPT),
    "prefix tuning with projection": of(
        "PrefixTuningConfig", **PROMPT, prefix_projection=True, encoder_hidden_size=8
    ),
    "p-tuning": of("PromptEncoderConfig", **PROMPT, encoder_hidden_size=8),
    "CPT": of("CPTConfig", task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1],
              cpt_tokens_type_mask=[1, 2, 4]),
    "cartridge": of("CartridgeConfig", **PROMPT, num_frozen_tokens=0),
    "adaption prompt": of("AdaptionPromptConfig", adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "shadow": of("ShadowConfig", task_type="CAUSAL_LM", r=4),
    "X-LoRA": of("XLoraConfig", task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1),
}  # fmt: skip
METHODS: dict[str, Make] = {name: make for name, make in LISTED.items() if make is not None}

NOT_HERE: dict[str, str] = {}
"""Methods that cannot be built or trained here, and why."""
if not find_spec("sklearn"):
    NOT_HERE["AdaMSS"] = "AdaMSS clusters with scikit-learn, which is not installed"
if "generator" not in str(torch.randn_like.__doc__):
    NOT_HERE["PVeRA"] = "PVeRA draws from a generator of its own, which this torch cannot do"
if Version(peft.__version__) < Version("0.21"):
    NOT_HERE["X-LoRA"] = "X-LoRA of this PEFT unfreezes the adapters that it mixes when it first computes"


@pytest.fixture(autouse=True)
def no_compiler_chosen() -> Iterator[None]:
    """BOFT sets CC and CXX for a CUDA extension that it then cannot build."""
    before = dict(os.environ)
    yield
    for name in ("CC", "CXX"):
        if name not in before:
            os.environ.pop(name, None)


building = threading.Lock()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


class Tuned(LightningModule):
    """A PEFT model on the same base at every party; the adapter is initialised differently."""

    def __init__(self, make: Make, party: int) -> None:
        super().__init__()
        with building:  # PEFT draws from the global generator, and parties are threads
            base = tiny_llama()
            torch.manual_seed(100 + party)
            self.model = get_peft_model(base, make())
        config = self.model.active_peft_config
        self.kind = type(config)
        self.local: dict[str, torch.Tensor] = {}

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        also = {}
        if issubclass(self.kind, peft.PolyConfig | peft.MultitaskPromptTuningConfig):
            also["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
        if issubclass(self.kind, peft.CPTConfig):
            also["input_type_mask"] = torch.full_like(ids, 4)  # all tokens are labels
        return self.model(input_ids=ids, labels=ids, **also).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.local = {name: p.detach().double() for name, p in self.trained()}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


SAMPLES = (3, 1)


def sentences(party: int) -> DataLoader:
    generator = torch.Generator().manual_seed(party)
    ids = torch.randint(3, 32, (SAMPLES[party], 6), generator=generator)
    ids[:, 1] = 2  # what invokes an activated LoRA
    return DataLoader(ids, batch_size=SAMPLES[party], generator=torch.Generator())


def with_adapters(make: Make, path: Path) -> Make:
    """Give X-LoRA the two adapters it mixes."""
    if make().peft_type != "XLORA":
        return make
    for index in range(2):
        torch.manual_seed(index)
        adapter = get_peft_model(tiny_llama(), peft.LoraConfig(**LORA, init_lora_weights=False))
        adapter.save_pretrained(path / str(index))
    return partial(make, adapters={str(index): str(path / str(index)) for index in range(2)})
