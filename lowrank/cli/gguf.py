"""``lowrank tools gguf``: a GGUF file as a transformers checkpoint, which trains, saves and loads like any other."""

import argparse
import sys

from .._screen import console

SUMMARY = "convert a causal language model's GGUF file to a transformers checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file in one piece")
    parser.add_argument("folder", metavar="DIR", help="of the checkpoint; not there yet, or empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the weights; float32 keeps every bit of F16, F32 and of dequantised blocks (%(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    import torch

    from ..gguf import convert

    converted = convert(args.file, args.folder, getattr(torch, args.dtype))
    if converted.left_out:
        print(
            f"left out: {', '.join(converted.left_out)}; transformers reads no scaled rotary embedding from GGUF: "
            "set rope_parameters in config.json as the original model's",
            file=sys.stderr,
        )
    size = f"{converted.parameters:,} parameters in {args.dtype}"
    console().print(f"{args.folder}: {converted.architecture}, {size}", soft_wrap=True, markup=False)
    return 0
