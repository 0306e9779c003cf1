"""``lowrank tools TOOL``: work on model files.  Each tool is a module like a command's (cli/__init__.py)."""

import argparse
import importlib

SUMMARY = "SVD factors of a checkpoint; deltas between two, and applying them in place; a GGUF file as a checkpoint"

TOOLS = {
    "factors": "lowrank.cli.factors",
    "delta": "lowrank.cli.delta",
    "apply": "lowrank.cli.apply",
    "gguf": "lowrank.cli.gguf",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, module_name in TOOLS.items():
        module = importlib.import_module(module_name)
        module.add_arguments(tools.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))


def main(args: argparse.Namespace) -> int:
    return importlib.import_module(TOOLS[args.tool]).main(args)
