"""``lowrank COMMAND``: each command is one module with SUMMARY, add_arguments(parser) and main(args) -> exit status."""

import argparse
import importlib
import sys

from ._version import __version__

COMMANDS = {
    "compare": "lowrank.compare",
    "plan": "lowrank.plan",
    "bench": "lowrank.bench",
    "doctor": "lowrank.doctor",
    "tools": "lowrank.tools",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.  Returns 0, or 2 after printing what was wrong with the input."""
    parser = argparse.ArgumentParser(prog="lowrank", description="When is a small adapter enough?  Measure it.")
    parser.add_argument("--version", action="version", version=f"lowrank-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        module.add_arguments(commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command]).main(args) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:  # what bad input raises; anything else is our bug
        print(f"lowrank {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
