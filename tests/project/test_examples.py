"""Every example runs as documented: on the data of make_data.py, with small models of random weights."""

import csv
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documented_examples
import pytest
import torch
import yaml
from documented_examples import documented, run
from fork_server import python
from paths import EXAMPLES, SCRIPTS
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pellm_lightning import Overlap
from pellm_lightning.cli.main import main
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.exchange import Quantized
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.tasks.partition import dirichlet

home = documented_examples.home
CONFIGS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
OVERLAYS = sorted(path.stem for path in EXAMPLES.glob("aggregation/*.yaml"))


RULES = {
    "alternating": "Alternating",
    "frozen_a": "FrozenA",
    "heterogeneous_rank": "HeterogeneousRank",
    "low_rank": "LowRankMean",
    "residual": "ResidualMean",
    "share_a": "ShareA",
    "stacking": "Stacking",
}
"""The rule of each overlay."""


def torchrun(folder: Path, num_processes: int, *command: str) -> None:
    run(folder, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", *command)


def fit(folder: Path, num_processes: int, config: str, *overrides: str) -> None:
    torchrun(
        folder, num_processes, "-m", "pellm_lightning", "fit", "--config", str(EXAMPLES / config), *overrides
    )


def adapter(
    folder: Path, base: Path, auto_class: Any = AutoModelForCausalLM, **options: Any
) -> dict[str, Tensor]:
    """Load an adapter as PEFT does, and return what was trained."""
    model = PeftModel.from_pretrained(
        auto_class.from_pretrained(base, **options), str(folder), is_trainable=True
    )
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert any(p.any() for name, p in trained.items() if "lora_B" in name), "B is zero before training"
    return trained


def metrics(folder: Path, name: str) -> list[float]:
    """Return a column of the metrics.csv of the last run below ``folder``, without the gaps."""
    path = sorted((folder / "lightning_logs").glob("version_*/metrics.csv"))[-1]
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_same(first: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_parses(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["pellm_lightning", "fit", "--config", str(EXAMPLES / config), "--print_config"]
    )
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    assert "pellm_lightning.tasks." in capsys.readouterr().out


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_parses(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config", str(EXAMPLES / "classification.yaml")]
    words += ["--config", str(EXAMPLES / f"aggregation/{name}.yaml")]
    monkeypatch.setattr(sys, "argv", ["pellm_lightning", "fit", *words, "--print_config"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["federated"]["aggregation"]["class_path"] == f"pellm_lightning.aggregation.{RULES[name]}"
    assert printed["model"]["class_path"] == "pellm_lightning.tasks.TextClassification"


def test_parties_as_separate_jobs_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, module, name, *words = shlex.split(documented("jobs/separate_jobs.yaml"))
    assert (program, module, name) == ("python", "-m", "pellm_lightning")
    words = [word.replace("examples/", f"{EXAMPLES}/") for word in words]
    monkeypatch.setattr(sys, "argv", [name, *words, "--print_config"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["federated"]
    jobs = SeparateJobs.from_config(printed["jobs"])
    assert jobs is not None
    assert (jobs.name, list(jobs.roster), jobs.membership.wait_s) == ("a", ["a", "b", "c"], 600)


@pytest.fixture
def laid_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], dict[str, Any]]:
    """Return what the federation's settings are with an overlay, by the command that the README gives."""

    def settings(overlay: str) -> dict[str, Any]:
        _, _, _, _, _, *words = shlex.split(documented(overlay))
        words = [word.replace("examples/", f"{EXAMPLES}/", 1) for word in words]
        monkeypatch.setattr(sys, "argv", ["pellm_lightning", *words, "--print_config"])
        with pytest.raises(SystemExit) as exited:
            main()
        assert exited.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["federated"]

    return settings


def test_party_level_privacy_is_laid_over_masked_sums(laid_over: Callable[[str], Any]) -> None:
    printed = laid_over("privacy/party_level.yaml")
    assert printed["exchange"]["class_path"].endswith("SecureAggregation")
    GaussianMechanism(**printed["privacy"]["init_args"])
    assert printed["weighting"] == "uniform"


def test_compression_is_laid_over_a_configuration(laid_over: Callable[[str], Any]) -> None:
    printed = laid_over("compression/quantized.yaml")["exchange"]
    assert printed["class_path"].endswith("Quantized")
    assert Quantized(**printed["init_args"]).error_feedback


def test_a_robust_rule_and_a_cap_are_laid_over_a_configuration(laid_over: Callable[[str], Any]) -> None:
    printed = laid_over("robust/norm_bound.yaml")
    assert printed["aggregation"]["class_path"] == "pellm_lightning.aggregation.NormBound"
    assert printed["weighting"] == {"by": "samples", "max_share": 0.4}


def test_overlap_is_laid_over_a_configuration(laid_over: Callable[[str], Any]) -> None:
    printed = laid_over("overlap/overlap.yaml")
    assert Overlap(**printed["overlap"]) == Overlap(5, 0.5)


def test_every_example_is_listed_with_its_command() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")):
        assert f"({path.name})" in readme
    overlays = [
        "jobs/separate_jobs.yaml",
        "compression/quantized.yaml",
        "overlap/overlap.yaml",
        "privacy/masked.yaml",
        "privacy/party_level.yaml",
        "robust/norm_bound.yaml",
        *(f"aggregation/{name}.yaml" for name in OVERLAYS),
    ]
    for config in (*CONFIGS, *overlays):
        assert f"#   {documented(config)}\n" in (EXAMPLES / config).read_text()


@pytest.mark.torchrun
def test_plain_script(home: Path) -> None:
    text = "runs/examples/data/texts/party-0.txt"
    run(home, str(EXAMPLES / "finetune.py"), "--text", text, "--steps=5", "--output=runs/plain")
    adapter(home / "runs/plain/lightning_logs/version_0/adapter", home / "runs/examples/smollm2")
    assert len(metrics(home / "runs/plain", "train_loss")) == 1


@pytest.mark.torchrun
def test_federated_script(home: Path) -> None:
    texts = "runs/examples/data/texts/party-{party}.txt"
    torchrun(
        home, 2, str(EXAMPLES / "finetune_federated.py"), "--text", texts, "--steps=12", "--output=runs/two"
    )
    parties = [home / "runs/two", home / "runs/two/party-1"]
    base = home / "runs/examples/smollm2"
    assert_same(*(adapter(party / "lightning_logs/version_0/adapter", base) for party in parties))
    for party in parties:
        # Ten steps of two samples at each of two parties, then the two steps that are left.
        assert metrics(party, "federated/total_weight") == [40, 8]
    assert metrics(parties[0], "train_loss") != metrics(parties[1], "train_loss"), "each reads its own text"


@pytest.mark.torchrun
def test_federated_transformers_script(home: Path) -> None:
    torchrun(home, 2, str(EXAMPLES / "trainer_federated.py"), "--output=runs/trainer")
    parties = [home / f"runs/trainer/party-{party}" for party in range(2)]
    assert_same(*(adapter(party, home / "runs/examples/smollm2") for party in parties))
    for party in parties:
        events = [json.loads(line)["event"] for line in (party / "rounds.jsonl").read_text().splitlines()]
        assert events == ["start", "round", "end"]


def head_and_factors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "lightning_logs/version_0/adapter/adapter_model.safetensors")


@pytest.mark.torchrun
@pytest.mark.parametrize("seed", [None, "3"])
def test_a_classifier_script_needs_no_seed(home: Path, seed: str | None) -> None:
    """Each party draws another head; all train the first one's, of which PEFT keeps an unused copy."""
    model = home / f"runs/encoder-{seed}"
    shutil.copytree(home / "runs/examples/minilm", model)
    PreTrainedTokenizerFast.from_pretrained(model, pad_token="<eos>").save_pretrained(model)
    script = [f"classifier-{seed}.py", "--epochs=2", f"--model={model}", f"--output=runs/classifier-{seed}"]
    text = (EXAMPLES / "classifier_federated.py").read_text()
    if seed is not None:
        text = text.replace("def main() -> None:\n", f"def main() -> None:\n    torch.manual_seed({seed})\n")
    (home / script[0]).write_text(text)
    torchrun(home, 2, *script)
    parties = [home / f"runs/classifier-{seed}", home / f"runs/classifier-{seed}/party-1"]
    trained = [head_and_factors(party) for party in parties]
    assert any("classifier" in name for name in trained[0])
    assert_same(*trained)
    losses = [metrics(party, "train_loss") for party in parties]
    assert losses[0] != losses[1], "each reads its own rows"
    with (home / "runs/examples/data/eras-train.csv").open(newline="") as file:
        rows = sum(1 for _ in csv.DictReader(file))
    for party in parties:
        assert metrics(party, "federated/total_weight") == [rows, rows]
        assert metrics(party, "federated/active_parties") == [2, 2]


@pytest.mark.torchrun
def test_classification(home: Path) -> None:
    fit(
        home,
        3,
        "classification.yaml",
        "--trainer.max_epochs=2",
        "--trainer.callbacks+=pellm_lightning.tasks.SaveAdapter",
        "--trainer.callbacks.dirpath=own-{party}",
    )
    parties = [home / f"runs/examples/classification/party-{party}" for party in range(3)]
    base = home / "runs/examples/minilm"
    options = {"auto_class": AutoModelForSequenceClassification, "num_labels": 3}
    adapters = [adapter(folder / f"own-{party}", base, **options) for party, folder in enumerate(parties)]
    assert_same(*adapters, adapter(parties[0] / "adapter", base, **options))
    with (home / "runs/examples/data/eras-train.csv").open() as file:
        eras = [row["era"] for row in csv.DictReader(file)]
    sizes = [len(part) for part in dirichlet(eras, 3, alpha=0.3, seed=1)]
    for party, size in zip(parties, sizes, strict=True):
        # A tenth of a party's rows is held out; every epoch goes through the rest.
        assert metrics(party, "federated/weight") == [size - round(size / 10)] * 2
        assert metrics(party, "federated/val_accuracy") == metrics(parties[0], "federated/val_accuracy")


EVERY_TWO_STEPS = ("--federated.every_n_steps=2", "--trainer.val_check_interval=2")


@pytest.fixture(scope="module")
def instructed(home: Path) -> Path:
    """Where six steps of instructions.yaml have written."""
    fit(home, 2, "instructions.yaml", *EVERY_TWO_STEPS, "--trainer.max_steps=6")
    return home / "runs/examples/instructions"


@pytest.mark.torchrun
def test_instructions(home: Path, instructed: Path) -> None:
    adapter(instructed / "party-0/adapter", home / "runs/examples/smollm2")
    losses = [metrics(instructed / f"party-{party}", "federated/val_loss") for party in range(2)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    kept = [torch.load(instructed / f"checkpoints/party-{party}/best.ckpt") for party in range(2)]
    assert kept[0]["global_step"] == 2 * (1 + losses[0].index(min(losses[0])))
    assert_same(*(checkpoint["state_dict"] for checkpoint in kept))
    assert all("lora_" in name for name in kept[0]["state_dict"]), "frozen parameters are not saved"


@pytest.mark.torchrun
def test_instructions_go_on_later(home: Path, instructed: Path) -> None:
    fit(home, 2, "instructions.yaml", *EVERY_TWO_STEPS, "--trainer.max_steps=8", "--ckpt_path=last")
    for party in range(2):
        # Rounds 0 to 2 were run before.
        assert metrics(instructed / f"party-{party}", "federated/round") == [3]


@pytest.fixture(scope="module")
def quantised(home: Path) -> Path:
    """Where six steps of qlora.yaml have written, the last two after a resume."""
    for steps, *resume in ((4,), (6, "--ckpt_path=last")):
        fit(home, 2, "qlora.yaml", *EVERY_TWO_STEPS, f"--trainer.max_steps={steps}", *resume)
    return home / "runs/examples/qlora"


@pytest.mark.torchrun
@pytest.mark.timeout(240)
def test_parties_train_and_resume_on_a_quantised_base(home: Path, quantised: Path) -> None:
    trained = adapter(quantised / "party-0/adapter", home / "runs/examples/smollm2")
    for party in range(2):
        assert metrics(quantised / f"party-{party}", "federated/round") == [2]
        saved = torch.load(quantised / f"checkpoints/party-{party}/last.ckpt")["state_dict"]
        assert {name.removeprefix("model.") for name in saved} == trained.keys()
        assert all(torch.equal(value, trained[name.removeprefix("model.")]) for name, value in saved.items())


@pytest.mark.torchrun
@pytest.mark.timeout(240)
def test_what_was_trained_on_a_quantised_base_is_used(home: Path, quantised: Path) -> None:
    checkpoint = str(quantised / "checkpoints/party-1/last.ckpt")
    for name, *merged in (("exported",), ("merged", "--merged")):
        out = str(quantised / name)
        run(home, "-m", "pellm_lightning", "export", checkpoint, "--out", out, *merged)
    base = home / "runs/examples/smollm2"
    assert_same(adapter(quantised / "exported", base), adapter(quantised / "party-0/adapter", base))
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        merged, plain = (
            AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (quantised / "merged", base)
        )
    assert 0 < (merged - plain).norm() < 0.5 * plain.norm()  # it was quantised, and trained for six steps
    adapters = [f"trained={quantised / 'exported'}"]
    words = ["--config", str(EXAMPLES / "qlora.yaml"), "--parties", "2", "--adapters", *adapters]
    words += [
        "--data.test_files",
        "runs/examples/data/texts/party-{party}.txt",
        "--trainer.limit_test_batches=4",
    ]
    run(home, "-m", "pellm_lightning", "evaluate", *words, "--out", str(quantised / "matrix.json"))
    found = json.loads((quantised / "matrix.json").read_text())["metrics"]["test_loss"]
    for after, before in zip(found["trained"], found["base"], strict=True):
        assert after != before
        assert after == pytest.approx(before, rel=0.05)


@pytest.mark.torchrun
def test_parties_of_two_processes(home: Path) -> None:
    fit(home, 4, "ddp_parties.yaml", *EVERY_TWO_STEPS, "--trainer.max_steps=4")
    parties = [home / f"runs/examples/ddp_parties/party-{party}" for party in range(2)]
    base = home / "runs/examples/smollm2"
    assert_same(*(adapter(folder / f"adapter-{party}", base) for party, folder in enumerate(parties)))
    for party in parties:
        # Two steps of two samples at each of two processes; the federation has two such parties.
        assert metrics(party, "federated/weight") == [8, 8]
        assert metrics(party, "federated/total_weight") == [16, 16]
        assert len(metrics(party, "federated/val_loss")) == 2


@pytest.fixture(scope="module")
def overlaid(home: Path) -> Path:
    """Where a few steps under each overlay have written; that of unlike ranks by its documented command."""
    names = [name for name in OVERLAYS if name != "heterogeneous_rank"]
    script = SCRIPTS / "overlays.py"
    torchrun(home, 2, str(script), str(EXAMPLES), *names)
    program, *options, shell = shlex.split(documented("aggregation/heterogeneous_rank.yaml"))
    assert program == "torchrun"
    root = "runs/overlays/heterogeneous_rank"
    shell = shell.replace("python ", f"{python()} ", 1).replace("examples/", f"{EXAMPLES}/")
    shell += f" --trainer.default_root_dir={root} --trainer.logger.init_args.save_dir={root}"
    shell += " --trainer.max_epochs=2 --trainer.limit_train_batches=2 --trainer.limit_val_batches=1"
    run(home, "-m", "torch.distributed.run", *options, shell)
    return home / "runs/overlays"


LABELS: dict[str, Any] = {"auto_class": AutoModelForSequenceClassification, "num_labels": 3}


@pytest.mark.torchrun
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [name for name in OVERLAYS if name not in ("share_a", "heterogeneous_rank")])
def test_an_overlay_changes_what_becomes_of_the_factors(home: Path, overlaid: Path, name: str) -> None:
    parties = [overlaid / name / f"party-{party}" for party in range(2)]
    deviations = [metrics(party, "federated/deviation") for party in parties]
    assert deviations[0] == deviations[1]
    assert len(deviations[0]) == (2 if name == "stacking" else 4)
    # Exact up to the rounding of float32, or the best that rank 8 can do.
    assert max(deviations[0]) < (1e-4 if name != "low_rank" else 1)
    base = home / "runs/examples/minilm"
    if name in ("residual", "stacking"):
        before, written = (
            load_file(folder / "model.safetensors") for folder in (base, parties[0] / "adapter/base")
        )
        changed = [key for key, value in before.items() if not torch.equal(written[f"bert.{key}"], value)]
        # Of two layers each.
        assert [sum(f"{part}.weight" in key for key in changed) for part in ("query", "value")] == [2, 2]
        assert len(changed) == 4
    else:
        assert not (parties[0] / "adapter/base").exists()
    if name == "stacking":  # the last round has merged all that was learned
        factors = load_file(parties[0] / "adapter/adapter_model.safetensors")
        assert not any(factor.any() for key, factor in factors.items() if "lora_B" in key)
    else:
        adapter(parties[0] / "adapter", base, **LABELS)


@pytest.mark.torchrun
@pytest.mark.timeout(240)
def test_masked_sums_make_the_same_adapter(home: Path) -> None:
    program, *launch = shlex.split(documented("privacy/masked.yaml"))
    assert program == "torchrun"
    words = [word.replace("examples/", f"{EXAMPLES}/", 1) for word in launch]
    header = (EXAMPLES / "privacy/masked.yaml").read_text()
    make_keys = next(line for line in header.splitlines() if " keys new --directory" in line)
    run(home, *shlex.split(make_keys.removeprefix("#   python ")))
    few = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    adapters = {}
    for name in ("masked", "plain"):
        root = f"runs/{name}"
        where = [f"--trainer.default_root_dir={root}", f"--trainer.logger.init_args.save_dir={root}"]
        more: list[str] = []
        if name == "plain":  # with the rule that a masked exchange has by default
            at = words.index(f"{EXAMPLES}/privacy/masked.yaml")
            del words[at - 1 : at + 1]
            more = ["--federated.aggregation=LowRankMean", "--federated.aggregation.solver=power"]
        run(home, "-m", "torch.distributed.run", *words, *few, *where, *more)
        parties = [home / root / f"party-{party}" for party in range(3)]
        adapters[name] = adapter(parties[0] / "adapter", home / "runs/examples/minilm", **LABELS)
        for seen in ("federated/val_loss", "federated/total_weight"):
            assert metrics(parties[1], seen) == metrics(parties[0], seen)
    for name, values in adapters["plain"].items():
        # 48 to 96 samples count: 3 / (2 * 48) * 2^-24 = 2e-9 a round, and roundings of float32.
        torch.testing.assert_close(adapters["masked"][name], values, rtol=0, atol=1e-6)


@pytest.mark.torchrun
@pytest.mark.timeout(240)
def test_share_a_leaves_each_party_a_model_of_its_own(home: Path, overlaid: Path) -> None:
    folders = [overlaid / f"share_a/party-{party}/adapter-{party}" for party in range(2)]
    first, second = [adapter(folder, home / "runs/examples/minilm", **LABELS) for folder in folders]
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if "lora_A" in name}


@pytest.mark.torchrun
@pytest.mark.timeout(240)
def test_each_party_has_the_rank_that_its_command_names(home: Path, overlaid: Path) -> None:
    folders = [overlaid / f"heterogeneous_rank/party-{party}/adapter-{party}" for party in range(3)]
    adapters = [adapter(folder, home / "runs/examples/minilm", **LABELS) for folder in folders]
    ranks = [{p.shape[0] for name, p in own.items() if "lora_A" in name} for own in adapters]
    assert ranks == [{4}, {8}, {16}]
    heads = [{name: p for name, p in own.items() if "lora_" not in name} for own in adapters]
    assert heads[0]
    assert_same(*heads)


@pytest.mark.torchrun
@pytest.mark.timeout(240)
# Lightning calls jsonargparse in a way that has gone out of use.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")  # PEFT's own default
@pytest.mark.parametrize(
    ("name", "adapter_folder"), [("residual", "party-0/adapter"), ("share_a", "party-1/adapter-1")]
)
def test_the_header_of_an_overlay_tells_how_to_test_its_result(
    home: Path,
    overlaid: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    adapter_folder: str,
) -> None:
    header, _, _ = (EXAMPLES / f"aggregation/{name}.yaml").read_text().partition("\n\n")
    _, _, command = header.replace("\\\n#", "").partition("#   python -m pellm_lightning ")
    words = shlex.split(command)
    assert words[-1] == f"runs/examples/classification/{adapter_folder}"
    words = [word.replace("runs/examples/classification", str(overlaid / name)) for word in words]
    words = [word.replace("examples/classification", str(EXAMPLES / "classification")) for word in words]
    monkeypatch.chdir(home)
    quiet = ["--trainer.limit_test_batches=2", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--seed_everything=false"]
    monkeypatch.setattr(sys, "argv", ["pellm_lightning", *words, *quiet])
    main()
    assert "test_accuracy" in capsys.readouterr().out
