"""Fine-tune a causal language model with LoRA by transformers' Trainer, as a PELLM job of FATE-LLM does."""

import argparse

from pellm_lightning.integrations.transformers import FederatedCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/examples/smollm2", help="hub id or folder of the base model")
    data = "runs/examples/data/instructions/party-{party}.jsonl"
    parser.add_argument("--data", default=data, help="JSON lines with instruction and response, by party")
    parser.add_argument("--epochs", type=int, default=1, help="local epochs, a round after each")
    parser.add_argument("--output", default="runs/examples/trainer", help="folder for logs and adapter")
    options = parser.parse_args()

    federated = FederatedCallback(every_n_epochs=1)  # before TrainingArguments: accelerate must not join all

    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    file = options.data.format(party=federated.topology.party)
    rows = load_dataset("json", data_files=file, split="train").map(
        lambda row: tokenizer(f"{row['instruction']}\n{row['response']}", truncation=True, max_length=192),
        remove_columns=["instruction", "response"],
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), lora),
        args=TrainingArguments(
            options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=2,
            learning_rate=5e-4,
            logging_steps=5,
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[federated],
    )
    federated.attach(trainer)
    with federated:
        trainer.train()
    trainer.save_model()  # the adapter, the same at every party


if __name__ == "__main__":
    main()
