"""Every fine-tuning method of the installed PEFT on a tiny Llama: it federates and equals the mean."""

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
from parties import fit_parties, quiet_trainer
from peft import PeftConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from pellm_lightning import FederationError, Parameters
from pellm_lightning.aggregation import Mean, lora_modules
from pellm_lightning.aggregation.lora import find_pairs
from pellm_lightning.tensors.selection import plain_name, select

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # X-LoRA's base
    # What PEFT and transformers say about methods and versions, not about federating them.
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::huggingface_hub"),
]

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


def test_every_method_of_peft_is_listed() -> None:
    listed = {make.func for make in METHODS.values()}  # type: ignore[attr-defined]
    assert listed == set(PEFT_TYPE_TO_CONFIG_MAPPING.values())


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
    return DataLoader(ids, batch_size=SAMPLES[party])


def with_adapters(make: Make, path: Path) -> Make:
    """Give X-LoRA the two adapters it mixes."""
    if make().peft_type != "XLORA":
        return make
    for index in range(2):
        torch.manual_seed(index)
        adapter = get_peft_model(tiny_llama(), peft.LoraConfig(**LORA, init_lora_weights=False))
        adapter.save_pretrained(path / str(index))
    return partial(make, adapters={str(index): str(path / str(index)) for index in range(2)})


def frozen(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain_name(name): p.detach() for name, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_the_mean_and_leaves_the_base_alone(tmp_path: Path, name: str) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    make = with_adapters(METHODS[name], tmp_path)

    def fit(party: int, federated: Any) -> tuple[Tuned, dict[str, torch.Tensor]]:
        module = Tuned(make, party)
        still = frozen(module)
        still = {n: t.clone() for n, t in (still | dict(module.named_buffers())).items()}
        quiet_trainer(tmp_path, [federated(aggregation=Mean())], max_epochs=1).fit(module, sentences(party))
        return module, still

    results = fit_parties(2, fit)
    first, second = (module for module, _ in results)
    names = list(select(first))
    assert names == sorted(name for name, _ in first.trained())
    trained, other = dict(first.trained()), dict(second.trained())
    for name in names:
        assert torch.equal(trained[name], other[name]), name
        mean = (3 * first.local[name] + 1 * second.local[name]) / 4
        # A few float32 roundings of numbers that are below 4 for all these methods.
        torch.testing.assert_close(trained[name].double(), mean, rtol=3e-7, atol=1e-6, msg=name)
    assert any(not torch.equal(first.local[name], second.local[name]) for name in names), (
        "nothing was trained"
    )
    for module, still in results:
        now = frozen(module) | dict(module.named_buffers())
        assert all(torch.equal(value, now[name]) for name, value in still.items())


def test_only_lora_and_its_variants_have_pairs(tmp_path: Path) -> None:
    for name, make in METHODS.items():
        if name not in NOT_HERE:
            torch.manual_seed(0)
            model = get_peft_model(tiny_llama(), with_adapters(make, tmp_path)())
            pairs = {pair.name for pair in find_pairs(select(model))}
            if make.func is peft.LoraConfig:  # type: ignore[attr-defined]
                assert pairs == lora_modules(model).keys() != set(), name
            else:
                assert pairs == set(), name


class LoraFa(Tuned):
    """LoRA with a frozen A: a matter of the optimizer, which freezes it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_lorafa_optimizer(self.model, r=4, lora_alpha=8, lr=0.1)


@pytest.mark.parametrize("same_seed", [True, False])
def test_lora_fa_sends_b_only_and_wants_the_same_a(tmp_path: Path, same_seed: bool) -> None:
    def fit(party: int, federated: Any) -> LoraFa:
        module = LoraFa(METHODS["LoRA"], party)
        if same_seed:
            other = LoraFa(METHODS["LoRA"], 0)
            module.load_state_dict(other.state_dict())
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, sentences(party))
        return module

    first, second = fit_parties(2, fit, may_fail=True)
    if not same_seed:
        for error in (first, second):
            assert "The frozen base model of party 1 is not that of party 0" in str(error)
            assert "lora_A" in str(error)
        return
    assert all("lora_B" in name for name in select(first))
    for name, parameter in first.trained():
        mean = (3 * first.local[name] + second.local[name]) / 4
        torch.testing.assert_close(parameter.double(), mean, rtol=3e-7, atol=1e-6)
        assert torch.equal(parameter, dict(second.trained())[name])


def test_a_random_frozen_part_must_be_the_same_everywhere(tmp_path: Path) -> None:
    """A cartridge's first token is frozen at a random value: to average the rest would mix unlike things."""

    def fit(party: int, federated: Any) -> None:
        module = Tuned(of("CartridgeConfig", **PROMPT), party)
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, sentences(party))

    for error in fit_parties(2, fit, may_fail=True):
        assert isinstance(error, FederationError)
        assert "the first tensor that differs is 'model.prompt_encoder.default.frozen_embedding'" in str(
            error
        )


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "prefix tuning"])
def test_the_adapter_is_exported_by_peft(tmp_path: Path, name: str) -> None:
    """What every party saves with save_pretrained is the same adapter, and loads onto a fresh base."""

    def fit(party: int, federated: Any) -> Tuned:
        module = Tuned(METHODS[name], party)
        quiet_trainer(tmp_path, [federated(parameters=Parameters(save_frozen=False))], max_epochs=1).fit(
            module, sentences(party)
        )
        module.model.save_pretrained(tmp_path / f"adapter-{party}")
        return module

    first, _ = fit_parties(2, fit)
    ids = next(iter(sentences(0)))
    with torch.no_grad():
        expected = first.model.eval()(input_ids=ids).logits
        for party in range(2):
            loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / f"adapter-{party}").eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


class ChatGlm(nn.Module):
    """ChatGLM-6B as far as LoRA sees it: 28 layers whose attention has one query_key_value."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig(model_type="chatglm", tie_word_embeddings=False)
        hidden, inner, vocabulary = 4096, 16384, 130528
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(vocabulary, hidden)
        self.transformer.layers = nn.ModuleList()
        for _ in range(28):
            layer = nn.Module()
            layer.input_layernorm = nn.LayerNorm(hidden)
            layer.attention = nn.Module()
            layer.attention.query_key_value = nn.Linear(hidden, 3 * hidden)
            layer.attention.dense = nn.Linear(hidden, hidden)
            layer.post_attention_layernorm = nn.LayerNorm(hidden)
            layer.mlp = nn.Module()
            layer.mlp.dense_h_to_4h = nn.Linear(hidden, inner)
            layer.mlp.dense_4h_to_h = nn.Linear(inner, hidden)
            self.transformer.layers.append(layer)
        self.transformer.final_layernorm = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.word_embeddings.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_chatglm_6b_sends_the_adapter_only() -> None:
    """The numbers of FATE-LLM's tutorial: 3,670,016 parameters, 0.059 % of the model."""
    with torch.device("meta"):
        base = ChatGlm()
        assert sum(p.numel() for p in base.parameters()) == 6_173_286_400
        model = get_peft_model(base, peft.LoraConfig(r=8, target_modules=["query_key_value"]))
    chosen = select(model)
    # 28 layers of A, 8 x 4096, and B, 12288 x 8.
    assert sum(p.numel() for p in chosen.values()) == 28 * 8 * (4096 + 12288) == 3_670_016
    assert all("query_key_value.lora_" in name for name in chosen)
    share = 3_670_016 / sum(p.numel() for p in model.parameters())
    assert f"{share:.3%}" == "0.059%"
    assert f"{share:.6%}" == f"{3_670_016 / (6_173_286_400 + 3_670_016):.6%}"
