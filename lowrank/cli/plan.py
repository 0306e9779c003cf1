"""``lowrank plan``: memory and FLOPs of fine-tuning a model, computed from its config alone (measure/estimate.py)."""

import argparse
import dataclasses
import json
import warnings

from .._screen import console
from ..measure.estimate import (
    ASSUMPTIONS,
    CARDS,
    CHECKPOINTING,
    ROWS,
    TYPED,
    Estimate,
    Row,
    Setting,
    estimate_all,
    row_of,
)
from ..measure.models import BUILT_IN, load_config

SUMMARY = "memory, FLOPs and GPUs that each fine-tuning method needs for a model (computed, not measured)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    default = Setting()
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(BUILT_IN)}, a local path, or a hub id")
    parser.add_argument(
        "--methods",
        default=",".join(ROWS),
        metavar="NAMES",
        help=f"some of {','.join(TYPED)}; LoRA's take a rank, as in lora:64, and all of them {CHECKPOINTING} (a row with "
        "gradient checkpointing), as full and lora have by default",
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="sequences per micro-batch (%(default)s)")
    parser.add_argument("--seq", type=int, default=default.seq, help="tokens per sequence (%(default)s)")
    parser.add_argument("--rank", type=int, default=default.rank, help="of the adapters (%(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default=default.dtype, help="of the base weights (%(default)s)")
    parser.add_argument("--adapter-dtype", choices=dtypes, default=default.adapter_dtype, help="(%(default)s)")
    parser.add_argument("--dropout", type=float, default=default.dropout, help="before the adapters (%(default)s)")
    parser.add_argument(
        "--autocast", action="store_true", help="linear layers compute in --dtype, as with Trainer's bf16"
    )
    parser.add_argument("--in-place", action="store_true", help="16-bit weights that train have no fp32 masters")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default.device, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def main(args: argparse.Namespace) -> int:
    setting = Setting(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setting)})
    rows = _rows(args.methods)
    config = load_config(args.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' deprecations, once per adapted model
        estimates, not_done = estimate_all(config, rows, setting)
    notes = _notes(setting, rows, estimates[0].fused) + _not_done(not_done)
    if args.json:
        methods = {e.method: {**dataclasses.asdict(e), "total": e.total, "gpus": e.gpus()} for e in estimates}
        setting = dataclasses.asdict(setting)
        report = {"model": args.model, "setting": setting, "methods": methods, "not_done": not_done, "notes": notes}
        print(json.dumps(report, indent=2))
    else:
        _print_table(args.model, setting, estimates, notes)
    return 0


def _rows(text: str) -> list[Row]:
    """Of the names in an option, each once."""
    try:
        rows = {row.name: row for row in (row_of(name) for name in text.replace(" ", "").split(",") if name)}
    except ValueError as error:
        raise ValueError(f"--methods {text!r}: {error}") from error
    if not rows:
        raise ValueError(f"--methods {text!r}: no method")
    return list(rows.values())


def _notes(setting: Setting, rows: list[Row], fused: bool) -> list[str]:
    autocast = f", layers under {setting.dtype} autocast" if setting.autocast else ""
    if not setting.autocast and setting.adapter_dtype != setting.dtype:
        autocast = ", which PEFT copies their inputs to (not with --autocast, as transformers' Trainer runs them)"
    masters = setting.dtype != "float32" and not setting.in_place
    master = " and an fp32 copy of 16-bit weights that train" if masters else ", no fp32 copy of the weights"
    attention = (
        "fused attention (no [T,T] kept)" if fused else "no fused attention or scan: what the model's own code keeps"
    )
    names = {**dataclasses.asdict(setting), "autocast": autocast, "master": master, "attention": attention}
    notes = dict.fromkeys(row.method.note for row in rows if row.method.note)
    return [line.format(**names) for line in (*ASSUMPTIONS, *notes)]


def _not_done(why: dict[str, str]) -> list[str]:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in why.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} cannot be done: {reason}" for reason, names in by_reason.items()]


def _print_table(model: str, setting: Setting, estimates: list[Estimate], notes: list[str]) -> None:
    from rich import box
    from rich.table import Table

    screen = console()
    screen.print(
        f"{model}: {estimates[0].parameters:,} parameters in {setting.dtype}; {setting.batch} x {setting.seq} tokens, "
        f"rank {setting.rank}, dropout {setting.dropout:g}"
    )
    most = max(e.total for e in estimates)
    unit, size = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    digits = 1 if most >= 100 * size else 2
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(f"in {unit}")
    heads = ("trained", "weights", "grads", "AdamW", "activ.", "total", "file", "GFLOP/tok")
    for head in (*heads, *CARDS):
        table.add_column(head, justify="right", no_wrap=True)
    for e in estimates:
        cells = [
            f"{value / size:,.{digits}f}" for value in (e.weights, e.gradients, e.optimizer, e.activations, e.total)
        ]
        cells += [_count(e.checkpoint, 1024), f"{e.flops_per_token / 1e9:.3g}"]
        table.add_row(
            e.method.replace("+", " +"), _count(e.trainable), *cells, *(str(count) for count in e.gpus().values())
        )
    screen.print(table)
    for note in notes:
        screen.print(note)


def _count(n: int, thousand: int = 1000) -> str:
    """1.24B, 11.3M, 5.1K parameters; of bytes, with a thousand of 1024, as ls -h has them: 1.15G."""
    for power, letter in ((3, "B" if thousand == 1000 else "G"), (2, "M"), (1, "K")):
        if n >= thousand**power:
            return f"{n / thousand**power:.3g}{letter}"
    return str(n)
