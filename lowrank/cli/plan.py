"""``lowrank plan``: memory and FLOPs of fine-tuning a model, computed from its config alone (measure/estimate.py)."""

import argparse
import dataclasses
import json
import warnings

from .._screen import console
from ..measure.estimate import ASSUMPTIONS, CARDS, Estimate, Setting, estimate_all
from ..measure.models import BUILT_IN, load_config

SUMMARY = "memory, FLOPs and GPUs that each fine-tuning method needs for a model (computed, not measured)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    default = Setting()
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(BUILT_IN)}, a local path, or a hub id")
    parser.add_argument("--batch", type=int, default=default.batch, help="sequences per micro-batch (%(default)s)")
    parser.add_argument("--seq", type=int, default=default.seq, help="tokens per sequence (%(default)s)")
    parser.add_argument("--rank", type=int, default=default.rank, help="of the adapters (%(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default=default.dtype, help="of the base weights (%(default)s)")
    parser.add_argument("--adapter-dtype", choices=dtypes, default=default.adapter_dtype, help="(%(default)s)")
    parser.add_argument("--dropout", type=float, default=default.dropout, help="before the adapters (%(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="keep block inputs, recompute the rest")
    parser.add_argument(
        "--in-place", action="store_true", help="full fine-tuning keeps no fp32 masters of 16-bit weights"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default.device, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def main(args: argparse.Namespace) -> int:
    setting = Setting(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setting)})
    config = load_config(args.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' deprecations, once per adapted model
        estimates, not_done = estimate_all(config, setting)
    notes = _notes(setting, estimates[0].fused) + [f"{name} cannot be done: {why}" for name, why in not_done.items()]
    if args.json:
        rows = {e.method: {**dataclasses.asdict(e), "total": e.total, "gpus": e.gpus()} for e in estimates}
        setting = dataclasses.asdict(setting)
        report = {"model": args.model, "setting": setting, "methods": rows, "not_done": not_done, "notes": notes}
        print(json.dumps(report, indent=2))
    else:
        _print_table(args.model, setting, estimates, notes)
    return 0


def _notes(setting: Setting, fused: bool) -> list[str]:
    autocast = "" if setting.adapter_dtype == setting.dtype else f", layers under {setting.dtype} autocast"
    masters = setting.dtype != "float32" and not setting.in_place
    master = " and an fp32 copy of the weights (full)" if masters else ", no fp32 copy of the weights"
    attention = (
        "fused attention (no [T,T] kept)" if fused else "no fused attention or scan: what the model's own code keeps"
    )
    names = {**dataclasses.asdict(setting), "autocast": autocast, "master": master, "attention": attention}
    return [line.format(**names) for line in ASSUMPTIONS]


def _print_table(model: str, setting: Setting, estimates: list[Estimate], notes: list[str]) -> None:
    from rich import box
    from rich.table import Table

    screen = console()
    screen.print(
        f"{model}: {estimates[0].parameters:,} parameters in {setting.dtype}; {setting.batch} x {setting.seq} tokens, "
        f"rank {setting.rank}, dropout {setting.dropout:g}{', gradient checkpointing' * setting.gradient_checkpointing}"
    )
    unit, size = ("GiB", 2**30) if max(e.total for e in estimates) >= 2**30 else ("MiB", 2**20)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(f"in {unit}", no_wrap=True)
    heads = ("trained", "weights", "grads", "AdamW", "activ.", "total", "file", "GFLOP/token")
    for head in (*heads, *CARDS):
        table.add_column(head, justify="right", no_wrap=True)
    for e in estimates:
        memory = (e.weights, e.gradients, e.optimizer, e.activations, e.total, e.checkpoint)
        cells = [f"{value / size:,.2f}" for value in memory]
        cards = [str(count) for count in e.gpus().values()]
        table.add_row(e.method, _count(e.trainable), *cells, f"{e.flops_per_token / 1e9:.3g}", *cards)
    screen.print(table)
    for note in notes:
        screen.print(note)


def _count(n: int) -> str:
    """1.24 B, 11.3 M, 5.1 K parameters."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)
