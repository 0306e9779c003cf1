"""LoRA fine-tuning with transformers' Trainer and PEFT, on lowrank: the one line is the callback.

python examples/finetune_with_trainer.py --model DIRECTORY_OR_HUB_ID --data FILE.txt --out adapter
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lowrank
from lowrank.integrations.transformers import PatchCallback


def blocks(tokenizer, text: str, length: int) -> list[dict]:
    """The text's tokens in consecutive blocks of ``length``, each its own label."""
    ids = tokenizer(text)["input_ids"]
    cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": block, "labels": block} for block in cut]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))

    arguments = TrainingArguments(
        args.out / "trainer",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-4,
        report_to=[],
    )
    data = blocks(tokenizer, args.data.read_text(), args.length)
    with lowrank.strict():  # a layer that cannot run on lowrank stops the run instead of slowing it down
        Trainer(model, arguments, train_dataset=data, callbacks=[PatchCallback()]).train()
    print(lowrank.stats(model))
    lowrank.save_adapter(model, args.out)


if __name__ == "__main__":
    main()
