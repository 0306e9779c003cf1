"""The tests of what is about to be timed.  Red, or not finished in time: no speed is shown.

    python bench/gate.py --seconds 150 --out gate.json NAME...

The JSON holds each file's outcome and a hash of the sources it holds for; bench/run.py --gate gate.json takes it instead of
running the tests again, as long as the sources are the same.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def red(tests: tuple[str, ...], seconds: float = 600.0) -> set[str]:
    """Those of the files ``tests`` that pytest does not find green; tests marked gpu run where there is a GPU.

    Every one of them if pytest does not come to an end.  What failed is printed.
    """
    if not tests:
        return set()
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") and len(tests) > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *parallel, *tests]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"gate: not finished after {seconds:.0f} s")
        return set(tests)
    if done.returncode == 0:
        return set()
    print(*(done.stdout + done.stderr).splitlines()[-15:], sep="\n")
    lines = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    named = {(ROOT / line.split("::")[0]).resolve() for line in lines}  # pytest names files from its root
    failed_tests = {test for test in tests if (ROOT / test).resolve() in named}
    return failed_tests if done.returncode == 1 and len(failed_tests) == len(named) > 0 else set(tests)


def sources() -> str:
    """A hash of everything that the tests and benchmarks run."""
    digest = hashlib.sha256()
    for folder in ("kernels", "lowrank", "tests/kernels", "tests/ops", "tests/integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def recorded(path: Path, tests: tuple[str, ...]) -> bool:
    """Whether ``path`` says that ``tests`` were green for the sources as they are."""
    record = json.loads(path.read_text()) if path.exists() else {"sources": "", "green": []}
    return record["sources"] == sources() and set(tests) <= set(record["green"])


def main() -> int:
    from registry import REGISTRY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REGISTRY)}; all")
    parser.add_argument("--tests", nargs="*", help="these instead of the benchmarks' own")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if unknown := set(args.names) - set(REGISTRY):
        parser.error(f"no benchmark named {', '.join(unknown)}: {', '.join(REGISTRY)}")
    tests = tuple(dict.fromkeys(t for name in args.names or REGISTRY for t in REGISTRY[name].tests))
    tests = tests if args.tests is None else tuple(args.tests)
    failed = red(tests, args.seconds)
    green = [test for test in tests if test not in failed]
    print(f"gate: {len(green)} of {len(tests)} test files green{', RED: ' * bool(failed)}{' '.join(sorted(failed))}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"green": green, "red": sorted(failed), "sources": sources()}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
