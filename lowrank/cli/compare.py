"""``lowrank compare``: full fine-tuning and low-rank adapters on one model and the same data and seeds, measured."""

import argparse
import sys

from ..compare.settings import METHODS, RANKED, RUNS, TASKS, Embedded, from_arguments
from ._malloc import keep_freed_memory

SUMMARY = "Teach one model by several methods: what each learns, costs and forgets, measured."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is taught").add_argument
    add("--model", help="a directory, a hub id, or smollm2 (default: a small model, pretrained here)")
    add("--task", help=f"all, or some of {','.join(TASKS)} (default: all, or what --data can be asked for)")
    add("--data", help="a text, or examples: .jsonl of text, prompt and completion, or messages (default: generated)")
    add("--test", help=".jsonl of questions on what --data teaches, that are never trained on")
    add("--valid", help="what a valid answer is: json, a regular expression, or module:function")
    add("--loss", help="of messages: all (default), assistant, or last")
    add("--general-data", help="text that shall not be forgotten (default: pydoc's topics)")
    add = parser.add_argument_group("how").add_argument
    add(
        "--methods",
        action="append",
        metavar="[TASK=]NAMES",
        help=f"all, or some of {','.join(METHODS)}; {', '.join(RANKED)} take a rank, as in lora:64; for one task alone "
        "after its name; repeatable",
    )
    add("--rank", type=int, default=8, help="rank of the adapters (default: %(default)s)")
    add("--alpha", default="32", help="LoRA is scaled by alpha / rank; r for alpha = rank (default: %(default)s)")
    add("--target-modules", help="names of the layers that lora and peft-lora adapt (default: all linear ones)")
    add(
        "--rates",
        action="append",
        metavar="METHOD=RATES",
        help="learning rates of a method, instead of three around a default; repeatable",
    )
    add("--replay", type=float, default=0.0, help="share of every batch that is general text (default: %(default)s)")
    add(
        "--in-place",
        action="store_true",
        help="16-bit weights that train have no fp32 masters: less memory, lost updates",
    )
    add("--dtype", help="float32 or bfloat16 (default: bfloat16 where the device multiplies it in hardware)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    add("--seeds", type=int, default=1, help="how many the picked rate runs with (default: %(default)s)")
    add = parser.add_argument_group("how much").add_argument
    add("--minutes", type=float, help="time two steps of each method first, and choose what fits")
    add(
        "--steps",
        type=int,
        help="of every run (default: text 200, knowledge 120, format 40; of the embedded model 100, 300, 100)",
    )
    add("--seq", "--max-length", type=int, dest="length", help="tokens of a sequence at most (default: 256)")
    add("--batch", type=int, help="sequences a step (default: 8)")
    add("--eval-sequences", type=int, default=64, help="held-out ones that are evaluated (default: %(default)s)")
    add(
        "--people",
        type=int,
        default=10,
        help="invented, three facts each, of the generated knowledge (default: %(default)s)",
    )
    add("--pairs", type=int, default=60, help="answers that the generated format is trained on (default: %(default)s)")
    add = parser.add_argument_group("results").add_argument
    add("--out", default="lowrank-compare", help="directory of the reports (default: %(default)s)")
    add("--resume", action="store_true", help="go on where an earlier run with the same --out ended")
    add("--save", action="store_true", help="keep the picked runs' adapters or weights under --out")


def main(args: argparse.Namespace, embedded: Embedded | None = None) -> int:
    """Check the options, run, write compare.md, compare.json and compare.png.  embedded: the built-in model's size."""
    settings = from_arguments(args, embedded or Embedded())
    keep_freed_memory()

    from ..compare import report, run  # torch, transformers and peft: only once the options are known to be good

    finished = 0

    def save(comparison) -> None:
        nonlocal finished
        finished += 1
        try:
            report.write(comparison, settings.out)
        except OSError as error:  # a full disk may have room again when all is done
            print(f"lowrank compare: not written yet: {error}", file=sys.stderr)

    try:
        comparison = run.compare(settings, save)
    except KeyboardInterrupt:
        if any((settings.out / RUNS).glob("*-*-*.json")):
            done = f", {finished} method{'s' if finished > 1 else ''}" if finished else ""
            raise KeyboardInterrupt(
                f"{settings.out} holds what was finished{done}; --resume goes on from there"
            ) from None
        raise
    try:
        report.write(comparison, settings.out)
    finally:  # what took so long is at least on the terminal
        report.show(comparison)
    return 0
