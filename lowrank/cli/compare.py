"""``lowrank compare``: full fine-tuning and low-rank adapters on one model, one text and the same seeds, measured."""

import argparse
import sys

from ..compare.settings import METHODS, Embedded, from_arguments

SUMMARY = "Train one model by several methods on your data and measure cost, result and forgetting."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="transformers model: a directory or hub id (default: a small one, pretrained here)"
    )
    parser.add_argument("--data", help="text file of the new domain (default: the standard library's source)")
    parser.add_argument("--general-data", help="text file of the old domain (default: pydoc's topics)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each method (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default: %(default)s)")
    parser.add_argument(
        "--alpha", default="32", help="LoRA is scaled by alpha / rank; r for alpha = rank (default: %(default)s)"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="16-bit weights that train have no fp32 masters: less memory, lost updates",
    )
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many seeds each method runs with (default: %(default)s)"
    )
    parser.add_argument("--out", default="lowrank-compare", help="directory of the reports (default: %(default)s)")


def main(args: argparse.Namespace, embedded: Embedded | None = None) -> int:
    """Check the options, run, write compare.md, compare.json and compare.png.  embedded: the built-in model's size."""
    settings = from_arguments(args, embedded or Embedded())

    from ..compare import report, run  # torch, transformers and peft: only once the options are known to be good

    finished = 0

    def save(comparison) -> None:
        nonlocal finished
        try:
            report.write(comparison, settings.out)
            finished += 1
        except OSError as error:  # a full disk may have room again when all is done
            print(f"lowrank compare: not written yet: {error}", file=sys.stderr)

    try:
        comparison = run.compare(settings, save)
    except KeyboardInterrupt:
        if finished:
            runs = f"{finished} run{'s' if finished > 1 else ''}"
            raise KeyboardInterrupt(f"{settings.out} holds what was finished, {runs}") from None
        raise
    try:
        report.write(comparison, settings.out)
    finally:  # what took so long is at least on the terminal
        report.show(comparison)
    return 0
