"""What each process of a launch does for integrations/test_transformers.py: scenarios, one after the other.

What a scenario returns is saved as ``<scenario>-<rank>.pt``. Parties are processes: accelerate keeps its
state once for all threads.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pellm_lightning import FederatedAveraging, FederatedLoop, Federation
from pellm_lightning.aggregation import FrozenA
from pellm_lightning.integrations.transformers import STATE_FILE, FederatedCallback
from pellm_lightning.tensors.frozen_state import frozen_state

OUT, MODEL = Path(sys.argv[1]), sys.argv[2]
RANK = int(os.environ["RANK"])


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def adapted(seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def vector(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def arguments(folder: str, **settings: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(OUT / folder), **(defaults | settings))


def trainer_of(
    federated: FederatedCallback, args: Any, samples: int, model: Any, callbacks: Sequence[Any] = ()
) -> Any:
    """Make a Trainer that takes its samples in order."""
    from torch.utils.data import DataLoader
    from transformers import Trainer

    class InOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            loader = DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    party = federated.topology.party
    data, held_out = rows(party, samples), rows(90 + party, 4)
    trainer = InOrder(
        model, args, train_dataset=data, eval_dataset=held_out, callbacks=[*callbacks, federated]
    )
    return federated.attach(trainer)


def train(folder: str, federated: dict[str, Any], samples: int = 8, **settings: Any) -> Any:
    """Train a Trainer with rounds; return it and its callback."""
    callback = FederatedCallback(**federated)
    trainer = trainer_of(callback, arguments(folder, **settings), samples, adapted(RANK))
    with callback:
        trainer.train()
    return trainer, callback


def found(model: Any, rounds: Sequence[Any]) -> dict[str, Any]:
    told = [(report.round, report.weight, report.loss) for report in rounds]
    return {"vector": vector(model), "rounds": told}


# ---- each process is a party


def by_hand(samples: int, accumulate: int, **federated: Any) -> dict[str, Any]:
    """Train as the Trainer does, in a loop of our own."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    model = adapted(RANK).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loop = FederatedLoop(model, optimizer, record=False, **federated)
    loader = DataLoader(rows(RANK, samples), batch_size=2, collate_fn=default_data_collator)
    with loop:
        for _ in range(2):
            for index, batch in enumerate(loader):
                loss = model(**batch).loss
                of_step = min(accumulate, len(loader) - index // accumulate * accumulate)
                (loss / of_step).backward()  # an epoch's last step may have fewer batches
                if index % accumulate + 1 < of_step:
                    loop.count(2, loss)
                    continue
                optimizer.step()
                optimizer.zero_grad()
                loop.after_step(2, loss)
            loop.after_epoch()
    return found(model, loop.rounds)


def equal() -> list[Any]:
    results = []
    for federated, accumulate, fewest in (
        ({"every_n_steps": 3}, 1, 8),
        ({"every_n_epochs": 1}, 2, 10),
        ({"every_n_epochs": 1, "aggregation": FrozenA()}, 1, 8),
        ({"every_n_steps": 2, "weighting": "uniform", "inner_optimizer_state": "reset"}, 3, 8),
    ):
        federated["quorum"] = 1
        samples = fewest + 8 * RANK
        trainer, callback = train("equal", federated, samples, gradient_accumulation_steps=accumulate)
        results.append((found(trainer.model, callback.rounds), by_hand(samples, accumulate, **federated)))
    return results


def quantised() -> dict[str, Any]:
    """LoRA on a base of 4 bits: by the Trainer as its users load it, and by a Lightning fit of CausalLM."""
    every: dict[str, Any] = {"every_n_steps": 3, "quorum": 1}
    callback = FederatedCallback(**every)
    trainer = trainer_of(callback, arguments("nf4"), 8 + 4 * RANK, adapted_of_4_bits(RANK))
    trainer.train()
    module, federated = lightning_fit(8 + 4 * RANK, FederatedAveraging(**every))
    bases = [model.get_base_model() for model in (trainer.model, module.model)]
    return {
        "trainer": found(trainer.model, callback.rounds),
        "lightning": found(module.model, federated.rounds),
        "kinds": [type(base.model.layers[0].mlp.up_proj).__name__ for base in bases],
        "bases": [frozen_state(base) for base in bases],
    }


def adapted_of_4_bits(seed: int) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # The dtype of the file, as in CausalLM. By default transformers 4 rounds to float16 before it quantises.
    base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype="auto")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def lightning_fit(samples: int, federated: FederatedAveraging) -> Any:
    """Fit on the batches of ``trainer_of``, on 4 bits; return the module and its callback."""
    from lightning.pytorch import Trainer
    from peft import LoraConfig
    from torch.utils.data import DataLoader

    from pellm_lightning.tasks import CausalLM

    module = CausalLM(
        MODEL,
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
        quantization="nf4",
    )
    torch.manual_seed(RANK)  # what the adapter starts from, of which that of party 0 counts
    module.configure_model()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUT / "nf4-lightning",
        callbacks=[federated],
    )
    trainer.fit(module, DataLoader(rows(RANK, samples), batch_size=2))
    return module, federated


def seen() -> dict[str, Any]:
    """What a party is to accelerate, and what a training leaves."""
    trainer, _ = train("seen", {"every_n_epochs": 1})
    logged = [line for line in trainer.state.log_history if "federated/round" in line]
    return {
        "world": trainer.args.world_size,
        "folder": str(trainer.args.output_dir),
        "logged": [(line["federated/round"], line["step"]) for line in logged],
        "record": len((OUT / f"seen/party-{RANK}/rounds.jsonl").read_text().splitlines()),
        "again": error_of(trainer.train),
        "hooks": len(trainer.model._forward_hooks),
        "joined": Federation.from_env().num_parties,
    }


def resumed() -> dict[str, Any]:
    """A training that was stopped in the middle of a round goes on as if it had not been."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = train("whole", {"every_n_steps": 3}, **saving)
    shutil.copytree(OUT / f"whole/party-{RANK}/checkpoint-4", OUT / f"again/party-{RANK}/checkpoint-4")
    callback = FederatedCallback(every_n_steps=3)
    trainer = trainer_of(callback, arguments("again", **saving), 8, adapted(RANK))
    trainer.train(resume_from_checkpoint=True)
    return {"whole": vector(whole.model), "resumed": vector(trainer.model), "rounds": len(callback.rounds)}


def between() -> dict[str, Any]:
    """A checkpoint after an epoch's last step, and before its round."""
    saving = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3}
    every = {"every_n_epochs": 2}
    whole, uncut = train("uncut", every, **saving)
    shutil.copytree(OUT / f"uncut/party-{RANK}/checkpoint-8", OUT / f"cut/party-{RANK}/checkpoint-8")
    callback = FederatedCallback(**every)
    trainer = trainer_of(callback, arguments("cut", **saving), 8, adapted(RANK))
    trainer.train(resume_from_checkpoint=True)
    return {
        "whole": found(whole.model, uncut.rounds),
        "resumed": found(trainer.model, callback.rounds),
    }


def short() -> list[int]:
    """Epochs that are cut short count as epochs; return the steps at which rounds ran."""
    from transformers import TrainerCallback

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    callback = FederatedCallback(every_n_epochs=2)
    trainer = trainer_of(callback, arguments("short", num_train_epochs=4), 8, adapted(RANK), [Short()])
    trainer.train()
    return [line["step"] for line in trainer.state.log_history if "federated/round" in line]


def measured(losses: Sequence[float]) -> Any:
    """Return a callback that writes the loss of each evaluation."""
    from transformers import TrainerCallback

    class Measured(TrainerCallback):
        of_evaluations = iter(losses)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_loss"] = next(self.of_evaluations)

    return Measured()


def best() -> dict[str, Any]:
    """Party 1's own loss falls while party 0 trains, that of both does not; then party 1 trains on alone."""
    from transformers import EarlyStoppingCallback

    losses = [[3.0, 2.0, 9.0, 9.0], [1.0, 0.9, 0.8, 0.7, *[9.0] * 12]][RANK]
    callback = FederatedCallback(every_n_steps=1, quorum=1)
    args = arguments(
        "best",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="federated/loss",
        greater_is_better=False,
    )
    trainer = trainer_of(callback, args, 16, adapted(RANK), [EarlyStoppingCallback(2)] if RANK == 0 else [])
    trainer.callback_handler.callbacks.insert(0, measured(losses))
    trainer.train()
    saved = adapted()
    saved.load_adapter(str(OUT / f"best/party-{RANK}/checkpoint-2"), "default")
    return {
        "metric": trainer.state.best_metric,
        "step": trainer.state.global_step,
        "vector": vector(trainer.model),
        "saved": vector(saved),
    }


def stopped() -> dict[str, Any]:
    """An epoch's evaluation stops training with steps left since the last round; then the best is loaded."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    ended = {}

    class Ended(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            ended["vector"] = vector(model)  # at last before the best model is loaded

    callback = FederatedCallback(every_n_steps=5)
    args = arguments(
        "stopped",
        num_train_epochs=9,
        eval_strategy="epoch",
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="federated/loss",
        greater_is_better=False,
    )
    trainer = trainer_of(callback, args, 8, adapted(RANK), [EarlyStoppingCallback(2), Ended()])
    trainer.callback_handler.callbacks.insert(0, measured([1.0, 2.0, 3.0]))
    trainer.train()
    return {"ended": ended["vector"], "rounds": len(callback.rounds), "best": vector(trainer.model)}


def lost() -> list[str]:
    """A checkpoint without the federated state is refused, or with that of another run, at all parties."""
    folder = OUT / f"again/party-{RANK}"
    (folder / f"checkpoint-8/{STATE_FILE}").unlink()
    of_another = json.loads((folder / "checkpoint-4/trainer_state.json").read_text())
    of_another["log_history"].append({"loss": 1.0, "step": 4})
    (folder / "checkpoint-4/trainer_state.json").write_text(json.dumps(of_another))
    errors = []
    for checkpoint in (folder / "checkpoint-8", OUT / f"whole/party-{RANK}/checkpoint-4"):
        callback = FederatedCallback(every_n_steps=3)
        trainer = trainer_of(callback, arguments("again", num_train_epochs=3), 8, adapted(RANK))
        errors.append(
            error_of(lambda trainer=trainer, at=checkpoint: trainer.train(resume_from_checkpoint=at))
        )
    return errors


def trl() -> list[Any]:
    """SFTTrainer on TRL's formats: language modelling, prompt and completion, conversations."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    formats: list[Callable[[str, str], dict[str, Any]]] = [
        lambda a, b: {"text": f"{a} {b}"},
        lambda a, b: {"prompt": a, "completion": f" {b}"},
        lambda a, b: {
            "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}],
        },
    ]
    pairs = [(f"w{(7 * i + RANK) % 30} w{i % 30}", f"w{(i + RANK) % 30}") for i in range(8)]
    results = []
    for row in formats:
        federated = FederatedCallback(every_n_steps=2)
        config = SFTConfig(
            output_dir=str(OUT / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            max_length=16,
        )
        trainer = SFTTrainer(
            model=MODEL,
            args=config,
            train_dataset=Dataset.from_list([row(a, b) for a, b in pairs]),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            callbacks=[federated],
        )
        trainer.train()
        results.append(found(trainer.model, federated.rounds))
    return results


def broken() -> str:
    """An error of one party is told to the other."""
    from transformers import TrainerCallback

    class Broken(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if RANK == 1 and state.global_step == 2:
                raise ArithmeticError("no more data")

    callback = FederatedCallback(every_n_steps=4)
    trainer = trainer_of(callback, arguments("broken"), 8, adapted(RANK), [Broken()])

    def act() -> None:
        with callback:
            trainer.train()

    return error_of(act)


# ---- others


def several() -> dict[str, Any]:
    """Two processes are a party, which accelerate trains by DDP."""
    federated = FederatedCallback(num_parties=2, every_n_steps=2)
    args = arguments("several", num_train_epochs=1, logging_steps=1)
    trainer = trainer_of(federated, args, 12, adapted())
    trainer.train()
    # What the Trainer has computed by itself.
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return found(trainer.model, federated.rounds) | {
        "losses": [sum(losses[:2]) / 2, losses[2]],
        "world": args.world_size,
        "party": federated.topology.party,
    }


def late() -> dict[str, Any]:
    """The callback comes after TrainingArguments have made one world of all."""
    world = arguments("late").world_size
    return {"error": error_of(FederatedCallback), "world": world}


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    for scenario in sys.argv[3:]:
        torch.save(globals()[scenario](), OUT / f"{scenario}-{RANK}.pt")
