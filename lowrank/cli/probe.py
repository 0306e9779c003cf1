"""``lowrank probe``: is it behaviour or knowledge that your examples teach?  Forward passes only."""

import argparse
import json
import sys
from pathlib import Path

from ..compare.settings import LOSSES, Adapter, device_of, dtype_of, is_examples, readable
from ._malloc import keep_freed_memory

LEAST_CHECKED = 10  # examples: of every five, one is held out

SUMMARY = "How much of your examples does the model already give when shown a few: behaviour or knowledge? No training."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a directory, a hub id, or smollm2")
    add(
        "--data",
        help="examples (.jsonl of text, prompt and completion, or messages) or a text (default: generated sets alone)",
    )
    add("--test", help=".jsonl of questions on what --data teaches: says that recall is wanted")
    add("--recall", action="store_true", help="the model is to give back what the examples say")
    add(
        "--check",
        action="store_true",
        help="train a LoRA on four fifths of the examples and hold the forecast against it",
    )
    add("--loss", default="all", help="of messages: all, assistant, or last (default: %(default)s)")
    add("--examples", type=int, default=40, help="how many are asked (default: %(default)s)")
    add("--draws", type=int, default=3, help="contexts of each (default: %(default)s)")
    add(
        "--seq", "--max-length", type=int, default=256, dest="length", help="tokens of an example at most (%(default)s)"
    )
    add("--dtype", help="float32 or bfloat16 (default: bfloat16 where the device multiplies it in hardware)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of the contexts (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of the table")


def main(args: argparse.Namespace) -> int:
    for option, least in (("examples", 2), ("draws", 1), ("length", 8), ("seed", 0)):
        if getattr(args, option) < least:
            name = {"length": "seq"}.get(option, option)
            raise ValueError(f"--{name} {getattr(args, option)}: expected at least {least}")
    if args.loss not in LOSSES:
        raise ValueError(f"--loss {args.loss!r}: expected one of {', '.join(LOSSES)}")
    for option in ("data", "test"):
        if getattr(args, option):
            readable(f"--{option} {getattr(args, option)}", Path(getattr(args, option)))
    if (args.check or args.test or args.recall) and not args.data:
        raise ValueError("--check, --test and --recall are about your examples: expected --data FILE with them")
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    keep_freed_memory()
    result = probed(args, device, dtype)
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show(result)
    return 0


def probed(args: argparse.Namespace, device: str, dtype: str) -> dict:
    import random

    import torch

    from ..compare import probe
    from ..compare.checks import check_asked
    from ..compare.data import pretrained
    from ..compare.progress import stages
    from ..measure.environment import environment

    model, tokenizer, _ = pretrained(args.model, dtype)
    model.to(device)
    sets, left_out = {}, 0
    examples = []
    if args.data:
        examples, left_out = _examples(args, tokenizer)
        alone = probe.distinct(examples)
        if len(alone) < 2:
            raise ValueError(f"--data {args.data}: expected at least two different examples, got {len(alone)}")
        if args.check and len(alone) < LEAST_CHECKED:
            raise ValueError(f"--check: expected at least {LEAST_CHECKED} different examples, got {len(alone)}")
        sets["yours"] = random.Random(args.seed).sample(alone, min(args.examples, len(alone)))
    sets |= probe.calibrations(tokenizer, probe.positions(model), args.seed, args.examples)
    rows = [example.row for chosen in sets.values() for example in chosen]
    if not rows:
        raise ValueError(f"--model {args.model}: nothing can be asked of it, and there is no --data")
    check_asked(f"--model {args.model}: {type(model).__name__}", model, tokenizer, rows)
    with stages() as screen, screen.stage("examples in the context", len(sets)) as stage:
        done, why_not = probe.probe(
            model, tokenizer, sets, draws={"yours": args.draws}, seed=args.seed, tick=lambda name: stage.tick()
        )
    generated = {name: summary for name, summary in done.items() if name != "yours"}
    result = {
        "model": args.model,
        "data": args.data,
        "left_out": left_out,
        "dtype": dtype,
        "environment": environment(torch.device(device)),
        "sets": done,
        "not_done": why_not,
    }
    if "yours" in done:
        result["finding"] = probe.finding(done["yours"], generated, recall=args.recall or bool(args.test))
    if args.check and "yours" in done:
        trained = _checked(args, model, tokenizer, examples, device)
        result["trained"] = {
            "alone": trained.alone,
            "held_out": trained.held_out,
            "trained": trained.trained,
            "general": trained.general,
            "specific": trained.specific,
            "share": trained.share,
        }
        result["check"] = probe.held(done["yours"], trained)
    return result


def _examples(args: argparse.Namespace, tokenizer):
    """(examples, how many were too long)."""
    from ..compare.data import PASSAGE, blocks
    from ..tasks import examples as reader

    path = Path(args.data)
    if not is_examples(path):
        return blocks(path, tokenizer, min(args.length, PASSAGE)), 0
    read = reader.read(path, tokenizer, args.length, args.loss)
    if args.test:
        reader.overlap(read.examples, reader.read_questions(Path(args.test), tokenizer, args.length))
    return read.examples, read.left_out


def _checked(args: argparse.Namespace, model, tokenizer, examples, device: str):
    """A LoRA of rank 8 on four fifths of the examples, at the middle of its rates: ten times each, at most 200 steps."""
    import torch

    from ..compare import probe, train
    from ..compare.data import Subject
    from ..compare.methods import METHODS
    from ..compare.progress import stages
    from ..compare.rates import grid
    from ..tasks.own import Parts, Text
    from ..tasks.score import token_losses

    groups: dict = {}
    for example in examples:  # equal prompts on one side
        groups.setdefault(example.prompt or example.row.ids, []).append(example)
    held = [example for group in list(groups.values())[4::5] for example in group]
    seen = [example for at, group in enumerate(groups.values()) if at % 5 != 4 for example in group]
    steps = max(20, min(200, 10 * len(seen) // 8))
    rows, unseen = [example.row for example in seen], [example.row for example in held]
    task = Text(Parts(args.data, "", seen, held, held), tokenizer.pad, args.seed, constant_rate=True)
    adapter = Adapter(8)
    rate = grid(METHODS["lora"], model.get_input_embeddings().embedding_dim, adapter, 1)[0]
    subject = Subject(args.model, model, tokenizer, None, 8, args.length, False)
    after = {}

    def mean(model, rows) -> float:
        return float(torch.cat(token_losses(model, rows, tokenizer.pad)).mean())

    def measured(run, trained_model) -> None:
        after["held"], after["seen"] = mean(trained_model, unseen), mean(trained_model, rows[: len(unseen)])

    before = mean(model, unseen)
    with stages() as screen, screen.stage(f"lora at {rate:g}", steps) as stage:
        run = train.train(
            subject,
            task,
            METHODS["lora"],
            rate,
            args.seed,
            train.Plan(steps, 8, 1),
            adapter=adapter,
            device=torch.device(device),
            measure=lambda model: {},
            tick=stage.tick,
            after=measured,
        )
    if run.diverged:
        raise ValueError(f"--check: training diverged at a rate of {rate:g}")
    return probe.Trained(before, after["held"], after["seen"])


def rows_of_table(result: dict) -> tuple[list[str], list[list[str]]]:
    conditions = list(next(iter(result["sets"].values()))["loss"]) if result["sets"] else []
    columns = ["nats per token", *(f"L_{condition}" for condition in conditions), "elicited", "specific", "share"]
    rows = []
    for name, summary in result["sets"].items():
        for label, part in ((_title(name), summary), ("  of which content", summary["content"])):
            if part is None:
                continue
            low, high = part["intervals"]["share"]
            cells = [f"{part['loss'].get(condition, float('nan')):.2f}" for condition in conditions]
            cells += [
                f"{part['elicited']:.2f}",
                f"{part['specific']:.2f}",
                f"{part['share']:.2f} [{low:.2f}, {high:.2f}]",
            ]
            rows.append([label, *cells])
    return columns, rows


def _title(name: str) -> str:
    from ..compare.probe import SETS

    return "yours" if name == "yours" else f"generated: {SETS[name]}"


def show(result: dict) -> None:
    from rich.table import Table

    from .._screen import console

    screen = console(folds=True)
    if result["sets"]:
        columns, rows = rows_of_table(result)
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        screen.print(table)
    for name, why in result["not_done"].items():
        screen.print(f"not done: {why}" if name in why else f"{name} not done: {why}", markup=False, highlight=False)
    if result["left_out"]:
        screen.print(f"{result['left_out']} examples are longer than --seq and were left out.", highlight=False)
    for key in ("finding", "check"):
        if key in result:
            screen.print(result[key], markup=False, highlight=False)
    sys.stdout.flush()
