"""What comes of a federation: exported folders, their cards, and the matrix of adapters and parties."""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from certificates import authority, tls_of
from lightning.pytorch import Trainer
from party_threads import Connecting, ValidatedClassifier, fit_parties, in_threads, quiet_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language_models import WORDS, word_tokenizer
from tolerances import assert_says_the_same
from torch import Tensor
from torch.distributed import HashStore
from trainer_jobs import At
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from pellm_lightning import FederatedCLI, Membership, Parameters, SeparateJobs
from pellm_lightning.aggregation import Aggregation, ResidualMean, Stacking
from pellm_lightning.cli import evaluate
from pellm_lightning.cli.evaluate import BASE, matrix, named, standing_as
from pellm_lightning.cli.export import export
from pellm_lightning.cli.main import main
from pellm_lightning.cli.verify import verified
from pellm_lightning.comm import ElasticFederation
from pellm_lightning.comm.evidence.certificate import EvidenceError
from pellm_lightning.comm.topology import Topology
from pellm_lightning.tasks import CausalLM, SaveAdapter, TextDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:`loftq_config` specified",  # PEFT, about a default of its own that jsonargparse hands over
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # Lightning's use of it
)

IDS = torch.tensor([[3, 5, 7, 9, 11]])
CLASS = "pellm_lightning.tasks.CausalLM"


LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}


def lora(**changed: Any) -> LoraConfig:
    return LoraConfig(**LORA | changed)


def configured(folder: Path, texts: Path, llama: str, **trainer: Any) -> Path:
    """Write a configuration of the command line, and return its path."""
    peft = {"class_path": "peft.LoraConfig", "init_args": LORA}
    data = {
        "files": f"{texts}/train-{{party}}.txt",
        "test_files": f"{texts}/test-{{party}}.txt",
        "tokenizer": llama,
        "block_size": 8,
        "batch_size": 2,
    }
    written = {
        "seed_everything": False,
        "model": {"class_path": CLASS, "init_args": {"model": llama, "peft": peft}},
        "data": {"class_path": "pellm_lightning.tasks.TextDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "default_root_dir": str(folder / "run"), **trainer},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for party in range(2):
        for stage, lines in (("train", 12), ("test", 6)):
            words = [f"w{(7 * line + k + 3 * party) % 30}" for line in range(lines) for k in range(9)]
            (folder / f"{stage}-{party}.txt").write_text(" ".join(words))
    return folder


def data_of(texts: Path, llama: str, **options: Any) -> TextDataModule:
    return TextDataModule(
        files=f"{texts}/train-{{party}}.txt",
        test_files=f"{texts}/test-{{party}}.txt",
        tokenizer=llama,
        batch_size=2,
        block_size=8,
        **options,
    )


def logits(model: torch.nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


Model = tuple[Tensor, dict[str, Tensor]]
"""What a model says, and its parameters by name."""


def assert_loaded(model: torch.nn.Module, expected: Model) -> None:
    """The parameters are the same to the bit; so what the model says is the same but for rounding."""
    said, parameters = expected
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert [name for name, p in found.items() if not torch.equal(p, parameters[name])] == []
    assert_says_the_same(logits(model), said)


def fit_two(
    folder: Path, texts: Path, llama: str, peft_config: LoraConfig | None = None, **arguments: Any
) -> Model:
    """Leave a checkpoint of each party of a federation; return what their model says and consists of."""
    said: list[Tensor] = [torch.empty(0)] * 2
    trained: list[dict[str, Tensor]] = [{}, {}]

    def fit(party: int, federated: Any) -> None:
        # Fast enough that the mean of the products is another than the product of the means.
        module = CausalLM(
            llama, peft_config or lora(), optimizer=lambda params: torch.optim.Adam(params, lr=0.05)
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=4,
            callbacks=[federated(every_n_steps=2, **arguments), SaveAdapter("saved")],
            default_root_dir=folder / f"of-{party}",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data_of(texts, llama, party=party))
        trainer.save_checkpoint(folder / f"{party}.ckpt")
        said[party] = logits(module.model)
        trained[party] = {name: p.detach().clone() for name, p in module.model.named_parameters()}

    fit_parties(2, fit)
    assert [name for name in trained[0] if not torch.equal(trained[0][name], trained[1][name])] == []
    return said[1], trained[1]


@pytest.fixture(scope="module", params=[True, False], ids=["whole", "adapter only"])
def fitted(
    request: pytest.FixtureRequest, texts: Path, llama: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Model]:
    """A federation's folder, and its model."""
    folder = tmp_path_factory.mktemp("fit")
    return folder, fit_two(folder, texts, llama, parameters=Parameters(save_frozen=request.param))


def test_the_exported_adapter_says_what_the_model_said(
    fitted: tuple[Path, Model], llama: str, tmp_path: Path
) -> None:
    folder, trained = fitted
    export(folder / "1.ckpt", tmp_path / "out", module=CLASS)
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.allclose(logits(base), trained[0], atol=1e-3)  # or nothing was learned
    assert_loaded(PeftModel.from_pretrained(base, tmp_path / "out"), trained)


def test_the_merged_model_says_the_same_and_has_its_tokenizer(
    fitted: tuple[Path, Model], tmp_path: Path
) -> None:
    folder, (said, _) = fitted
    export(folder / "0.ckpt", tmp_path / "out", module=CLASS, merged=True)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), said, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w5").input_ids == [5, 7]
    assert "merged adapter" in (tmp_path / "out" / "README.md").read_text()


def mixture(family: str, folder: Path) -> str:
    """Save a model with experts, and its tokenizer."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 8}
    sizes |= {"num_experts_per_tok": 2, "max_position_embeddings": 64, "bos_token_id": None}
    kinds: dict[str, Any] = {
        "Mixtral": (MixtralConfig, MixtralForCausalLM),
        "GPT-OSS": (GptOssConfig, GptOssForCausalLM),
    }
    config, model = kinds[family]
    torch.manual_seed(0)
    made = model(config(**sizes, eos_token_id=0, pad_token_id=None))
    if not any(name.endswith("experts.gate_up_proj") for name, _ in made.named_parameters()):
        pytest.skip(f"this transformers keeps the experts of {family} as modules of their own")
    made.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rule", [None, ResidualMean()], ids=["default", "base"])
@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_experts_are_exported_and_merged(
    family: str, rule: Aggregation | None, texts: Path, tmp_path: Path
) -> None:
    model, out, merged = mixture(family, tmp_path / "model"), tmp_path / "out", tmp_path / "merged"
    experts = lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    trained = fit_two(tmp_path, texts, model, experts, aggregation=rule)
    assert sum("experts" in name and "lora_" in name for name in trained[1]) == 4
    export(tmp_path / "1.ckpt", out, module=CLASS)
    base = AutoModelForCausalLM.from_pretrained(out / "base" if rule else model)
    assert_loaded(PeftModel.from_pretrained(base, out), trained)
    export(tmp_path / "1.ckpt", merged, module=CLASS, merged=True)
    alone = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(logits(alone), trained[0], atol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.allclose(logits(original), trained[0], atol=1e-3)  # or nothing was learned


@pytest.mark.parametrize("rule", [ResidualMean(), Stacking()], ids=repr)
def test_a_rule_that_writes_into_the_base_is_exported_and_evaluated_with_it(
    rule: Aggregation, texts: Path, llama: str, tmp_path: Path
) -> None:
    # Without the frozen weights, but for those that the rule has changed.
    trained = fit_two(tmp_path, texts, llama, aggregation=rule, parameters=Parameters(save_frozen=False))
    said, _ = trained
    out, merged = tmp_path / "out", tmp_path / "merged"
    export(tmp_path / "1.ckpt", out, module=CLASS)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert_loaded(PeftModel.from_pretrained(base, out), trained)
    original = AutoModelForCausalLM.from_pretrained(llama)
    assert not torch.allclose(logits(PeftModel.from_pretrained(original, out)), said, atol=1e-3)
    assert f"load it onto the model in `base/`, and not onto `{llama}`" in (out / "README.md").read_text()
    export(tmp_path / "1.ckpt", merged, module=CLASS, merged=True)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), said, atol=1e-5)
    assert "base/" not in (merged / "README.md").read_text()
    # An adapter of the original base comes after it: each must be on its own.
    config = configured(tmp_path, texts, llama)
    plain = tmp_path / "plain"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out).save_pretrained(plain)
    losses = matrix([f"--config={config}"], {"written": out, "plain": plain, BASE: None}, ["0"])["test_loss"]
    written = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out)
    on_original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out)
    expected = [mean_loss(model, texts, llama, 0) for model in (written, on_original)]
    assert [losses["written"][0], losses["plain"][0]] == pytest.approx(expected, rel=1e-5)
    assert losses[BASE] == pytest.approx(
        [mean_loss(AutoModelForCausalLM.from_pretrained(llama), texts, llama, 0)], rel=1e-5
    )


@pytest.mark.parametrize("where", ["exported", "saved by SaveAdapter"])
def test_the_card_tells_the_federation(
    fitted: tuple[Path, Model], llama: str, tmp_path: Path, where: str
) -> None:
    folder, _ = fitted
    out = folder / "of-1" / "saved"
    if where == "exported":
        out = tmp_path / "an adapter"
        export(folder / "1.ckpt", out, module=CLASS)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "tags": ["federated-learning", "pellm-lightning", "lora"],
        "base_model": llama,
    }
    assert text.startswith(f"\n# {out.name}\n")
    for row in (
        "| rounds | `2` |",
        "| aggregation | `LowRankMean(solver='exact', steps=1, factorization='procrustes')` |",
        "| a round every | `2 optimizer steps` |",
        "| exchange | `Plain()` |",
        "| privacy | `none` |",
        # Four steps of two windows each.
        "| party | rounds | training samples |",
        "| `0` | 2 | 8 |",
        "| `1` | 2 | 8 |",
    ):
        assert row in text


def test_what_the_command_line_has_built_needs_no_more_words(
    texts: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(
        tmp_path,
        texts,
        llama,
        max_steps=2,
        default_root_dir=str(tmp_path / "run"),
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    monkeypatch.setattr(sys, "argv", ["pellm_lightning"])
    cli = FederatedCLI(args=["fit", f"--config={config}"], auto_configure_optimizers=False)
    trained = logits(cli.model.model), dict(cli.model.model.named_parameters())
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    for name, words in (("plain", []), ("configured", [f"--config={config}"])):
        out = tmp_path / name
        monkeypatch.setattr(
            sys, "argv", ["pellm_lightning", "export", str(checkpoint), f"--out={out}", *words]
        )
        main()
        base = AutoModelForCausalLM.from_pretrained(llama)
        assert_loaded(PeftModel.from_pretrained(base, out), trained)


def test_what_cannot_be_exported_is_refused(
    fitted: tuple[Path, Model],
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = fitted
    checkpoint, out = folder / "0.ckpt", tmp_path / "out"
    with pytest.raises(ValueError, match=r"There is no checkpoint .*none\.ckpt"):
        export(tmp_path / "none.ckpt", out)
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a Lightning checkpoint"):
        export(tmp_path / "text", out)
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"callbacks": {}}, tmp_path / "alone.ckpt")
    with pytest.raises(ValueError, match="is of no federated fit"):
        export(tmp_path / "alone.ckpt", out)
    with pytest.raises(ValueError, match="does not tell how to build its module"):
        export(checkpoint, out)
    with pytest.raises(ValueError, match=r"--module no\.such cannot be imported"):
        export(checkpoint, out, module="no.such")
    with pytest.raises(ValueError, match=r"pathlib\.Path is no LightningModule"):
        export(checkpoint, out, module="pathlib.Path")
    other = CausalLM(llama, lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="holds the unknown parameter"):
        export(checkpoint, out, module=other)
    more = CausalLM(llama, lora(target_modules=["q_proj", "v_proj", "k_proj"]))
    with pytest.raises(ValueError, match="lacks the parameter"):
        export(checkpoint, out, module=more)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    words = ["pellm_lightning", "export", str(checkpoint), f"--out={tmp_path}/full", f"--module={CLASS}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    error = " ".join(capsys.readouterr().err.split())
    assert "full is not empty. Name another folder, or add --overwrite" in error
    monkeypatch.setattr(sys, "argv", [*words, "--overwrite"])
    main()
    assert (tmp_path / "full" / "adapter_config.json").exists()


def test_a_checkpoint_that_tells_nothing_of_its_federation_is_exported(
    fitted: tuple[Path, Model], tmp_path: Path
) -> None:
    saved = torch.load(fitted[0] / "0.ckpt", weights_only=True)
    del saved["callbacks"][next(n for n in saved["callbacks"] if n.startswith("Federated"))]["summary"]
    torch.save(saved, tmp_path / "old.ckpt")
    export(tmp_path / "old.ckpt", tmp_path / "out", module=CLASS)
    assert "The checkpoint holds nothing about it" in (tmp_path / "out" / "README.md").read_text()


# ---- the matrix


def test_the_matrix_is_that_of_a_plain_loop(
    fitted: tuple[Path, Model],
    texts: Path,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = fitted[0] / "of-0" / "saved"
    config = configured(tmp_path, texts, llama)
    words = ["evaluate", f"--config={config}", "--parties=2", "--names", "east", "west"]
    words += ["--adapters", f"federated={adapter}", f"--out={tmp_path}/deep/matrix.json"]
    monkeypatch.setattr(sys, "argv", ["pellm_lightning", *words])
    monkeypatch.chdir(tmp_path)
    main()
    written = json.loads((tmp_path / "deep" / "matrix.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(llama)
    expected = {BASE: [mean_loss(base, texts, llama, party) for party in range(2)]}
    tuned = PeftModel.from_pretrained(base, adapter)
    expected["federated"] = [mean_loss(tuned, texts, llama, party) for party in range(2)]
    assert written["parties"] == ["east", "west"]
    losses, perplexities = written["metrics"]["test_loss"], written["metrics"]["test_perplexity"]
    for name, row in expected.items():
        assert losses[name] == pytest.approx(row, rel=1e-5)
        assert perplexities[name] == pytest.approx([math.exp(loss) for loss in row], rel=1e-5)
    shown = capsys.readouterr().out
    row = expected["federated"]
    cells = " | ".join(f"{value:.4g}" for value in [*row, sum(row) / 2])
    assert f"| federated | {cells} |" in shown
    assert "|  | east | west | mean |" in shown
    assert not list((tmp_path).glob("party-*"))  # nothing else is written

    smaller = tmp_path / "smaller"
    export(fitted[0] / "0.ckpt", smaller, module=CLASS)
    with pytest.raises(ValueError, match="adapter federated does not fit the configuration's: "):
        matrix([f"--config={config}", "--model.peft.r=4"], {"federated": smaller}, ["0"])


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        (
            [{"a": 1.0}, {"a": 2.0, "b": 3.0}],
            "b is not logged once on the data of each party: not so of west",
        ),
        (
            [{"a": 1.0, "b": 3.0}, {"a": 2.0}],
            "b is not logged once on the data of each party: not so of west",
        ),
        ([{}, {}], "logs no metric when it is validated"),
    ],
)
def test_metrics_that_are_not_every_party_s_are_refused(
    logged: list[dict[str, float]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a column would show another party's value."""
    results = iter(logged)

    class Fake:
        def __init__(self, words: Sequence[str]) -> None:
            self.module, self.data, self.trainer = ValidatedClassifier(), None, self

        def validate(self, *_: Any, **__: Any) -> list[dict[str, float]]:
            return [next(results)]

    monkeypatch.setattr(evaluate, "Configured", Fake)
    with pytest.raises(ValueError, match=words):
        matrix([], {BASE: None}, ["east", "west"])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    ],
)
def test_a_saved_prompt_is_evaluated_as_it_is(
    kind: str, arguments: dict[str, Any], texts: Path, llama: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, texts, llama)
    written = yaml.safe_load(config.read_text())
    arguments = arguments | {"task_type": "CAUSAL_LM"}
    written["model"]["init_args"]["peft"] = {"class_path": f"peft.{kind}", "init_args": arguments}
    config.write_text(yaml.safe_dump(written))
    base = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(base, getattr(peft, kind)(**arguments)).save_pretrained(tmp_path / "saved")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "saved")
    data = data_of(texts, llama, party=0)
    data.setup("test")
    tuned.eval()
    with torch.no_grad():  # one batch size, so that the mean over the batches is that over the tokens
        losses = [(tuned(**batch).loss.item(), len(batch["labels"])) for batch in data.test_dataloader()]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    found = matrix([f"--config={config}"], {"one": tmp_path / "saved", BASE: None}, ["0"])["test_loss"]
    assert found["one"] == pytest.approx([expected], rel=1e-5)
    assert found[BASE] != pytest.approx([expected], rel=1e-5)


def mean_loss(model: torch.nn.Module, texts: Path, llama: str, party: int) -> float:
    """The mean loss over all tokens of a party's held-out windows that have one before them."""
    data = data_of(texts, llama, party=party)
    data.setup("test")
    total, count = 0.0, 0
    model.eval()
    for batch in data.test_dataloader():
        with torch.no_grad():
            said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = torch.nn.functional.cross_entropy(
            said[:, :-1].double().mT, batch["labels"][:, 1:], ignore_index=-100, reduction="sum"
        )
        total, count = total + losses.item(), count + int((batch["labels"][:, 1:] != -100).sum())
    return total / count


def test_names_may_stand_for_each_party(tmp_path: Path) -> None:
    for name in ("all", "alone-0", "alone-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    words = [f"all={tmp_path}/all", f"{{party}} alone={tmp_path}/alone-{{party}}"]
    assert named(words, 2) == {
        "all": tmp_path / "all",
        "0 alone": tmp_path / "alone-0",
        "1 alone": tmp_path / "alone-1",
    }
    with pytest.raises(ValueError, match="--adapters federated is no NAME=FOLDER"):
        named(["federated"], 2)
    for words in ([f"alone={tmp_path}/alone-{{party}}"], [f"base={tmp_path}/all"]):
        with pytest.raises(ValueError, match=r"a second row '(alone|base)'\. Give each"):
            named(words, 2)
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json"):
        named([f"x={tmp_path}"], 2)


def test_standing_as_a_party_leaves_the_environment_as_it_was() -> None:
    import os

    before = dict(os.environ)
    with standing_as(1, 3):
        assert os.environ["RANK"] == "1"
        assert Topology.from_env() == Topology(party=1, num_parties=3)
    assert dict(os.environ) == before


# ---- signed evidence


def test_what_separate_jobs_have_signed_lies_with_the_adapter(
    texts: Path, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From three jobs over TLS to exported adapters: of the end, and of the middle of a round."""
    roster, store, failed = ["a", "b", "c"], HashStore(), list[BaseException]()

    def job(name: str) -> None:
        tls, state_dir = tls_of(name), str(tmp_path / name)
        membership = Membership(wait_s=60)
        federated = Connecting(
            lambda: ElasticFederation(lambda: store, name, roster, membership=membership, tls=tls),
            jobs=SeparateJobs("tcp://127.0.0.1:1", name, roster, tls=tls, state_dir=state_dir),
            every_n_steps=2,
        )
        callbacks: list[Any] = [federated, SaveAdapter("saved-{party}")]
        if name == "a":
            callbacks.append(At(5, lambda: trainer.save_checkpoint(tmp_path / "middle.ckpt")))
        trainer = quiet_trainer(tmp_path / f"of-{name}", callbacks, max_steps=6)
        module = CausalLM(
            llama,
            lora(modules_to_save=["lm_head"]),
            optimizer=lambda params: torch.optim.Adam(params, lr=0.05),
        )
        try:
            trainer.fit(module, data_of(texts, llama, party=roster.index(name) % 2))
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        except BaseException as error:
            failed.append(error)

    in_threads([partial(job, name) for name in roster])
    assert not failed, failed
    trust, saved = ["--trust", str(authority() / "ca.pem")], tmp_path / "of-b" / "saved-1"
    assert main(["verify", str(saved), *trust]) == 0
    assert "tensors are the result of round 2, bit for bit" in capsys.readouterr().out
    assert "`evidence.jsonl` has signed certificates of its 3 rounds" in (saved / "README.md").read_text()
    for checkpoint in ("c", "middle"):
        module = CausalLM(llama, lora(modules_to_save=["lm_head"]))
        export(tmp_path / f"{checkpoint}.ckpt", tmp_path / checkpoint / "adapter", module=module)
    exported = tmp_path / "c" / "adapter"
    assert main(["verify", str(exported), *trust]) == 0
    assert {path.name for path in exported.iterdir()} >= {"evidence.jsonl", "README.md"}
    with pytest.raises(EvidenceError, match="the adapter is not the result of round 1"):
        verified(tmp_path / "middle" / "adapter")
    module = CausalLM(llama, lora(modules_to_save=["lm_head"]))
    export(tmp_path / "c.ckpt", tmp_path / "merged", module=module, merged=True)
    assert not (tmp_path / "merged" / "evidence.jsonl").exists()
