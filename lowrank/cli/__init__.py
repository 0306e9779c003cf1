"""``lowrank COMMAND``: each command is one module with SUMMARY, add_arguments(parser) and main(args) -> exit status."""

import argparse
import contextlib
import importlib
import os
import sys

from .._screen import Unbreakable
from .._version import __version__

COMMANDS = {
    "compare": "lowrank.cli.compare",
    "probe": "lowrank.cli.probe",
    "plan": "lowrank.cli.plan",
    "bench": "lowrank.cli.bench",
    "doctor": "lowrank.cli.doctor",
    "tools": "lowrank.cli.tools",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.  Returns 0, 2 after printing what was wrong with the input, 130 after Ctrl-C, or 1 where whoever
    read the output left before its end."""
    command = "lowrank"
    try:
        if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot spell → or ×
        args = _parse(argv)
        command = f"lowrank {args.command}"
        return importlib.import_module(COMMANDS[args.command]).main(args) or 0
    except KeyboardInterrupt as interrupt:
        _complain(command, f"interrupted{f': {interrupt}' if str(interrupt) else ''}")
        exec(
            ""
        )  # CPython kills itself by SIGINT at its end if the last string it ran, a dataclass say, was interrupted
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:  # what bad input raises; anything else is our bug
        _complain(command, f"error: {error}")
        return 2
    finally:
        _flush()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lowrank", description="When is a small adapter enough?  Measure it.")
    parser.add_argument("--version", action="version", version=f"lowrank-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        module.add_arguments(commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY))
    return parser.parse_args(argv)


def _complain(command: str, text: str) -> None:
    print(f"{command}: {' '.join(text.splitlines())}", file=Unbreakable(sys.stderr), flush=True)


def _flush() -> None:
    """Write what is buffered; where nobody reads it, leave nothing for Python to complain of at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
