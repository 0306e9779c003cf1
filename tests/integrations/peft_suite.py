"""PEFT's own tests with the patch, and what does not pass without it: the same must pass, and the fused path be taken.

    python tests/integrations/peft_suite.py           the LoRA tests on models made on the spot: what `make test` runs
    python tests/integrations/peft_suite.py --more    also files some of whose tests need the hub, and fail alike without

The suite comes from PEFT's source distribution on the package index, in the version that is installed.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

# Models made on the spot; most other files need the hub.
FILES = tuple(f"tests/test_{name}.py" for name in ("custom_models", "mixed", "bdlora"))
MORE = tuple(
    f"tests/test_{name}.py" for name in ("initialization", "lora_variants", "tuners_utils", "lora_ga", "config")
)
OTHERS = ("adalora", "randlora", "vblora", "xlora", "unilora", "glora")  # -k matches parts of names
SELECT = "lora and not " + " and not ".join(OTHERS)
PLUGIN = """
import json, os
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    from lowrank.integrations.peft import patch
    patch()

def pytest_sessionfinish(session):
    import lowrank
    out = os.path.join(os.environ["LOWRANK_STATS"], f"{os.getpid()}.json")
    json.dump(lowrank.stats(), open(out, "w"))
"""


def fetch(folder: Path) -> Path:
    """Unpack PEFT's source distribution into ``folder``; raises RuntimeError where the index cannot be reached."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    done = subprocess.run([*command, "-d", str(folder), f"peft=={version('peft')}"], capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz"))
    if not archives:
        raise RuntimeError(f"could not download PEFT's source distribution: {done.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    suite = next(path for path in folder.iterdir() if path.is_dir() and path.name.startswith("peft-"))
    (suite / "tests" / "__init__.py").touch()  # the distribution leaves it out, and the tests import each other
    return suite


def run(suite: Path, tests: Iterable[str], patched: bool, workers: int, select: str) -> tuple[dict, dict]:
    """({test: passed | failed | skipped}, stats summed over the workers) of one run of files or single tests."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "lowrank_plugin.py").write_text(PLUGIN)
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "LOWRANK_STATS": folder,
            "PYTHONPATH": folder,
            "OMP_NUM_THREADS": "1",
        }
        # run from the suite's folder: the repository's root must not be importable
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-k", select]
        command += ["-n", str(workers), "--junitxml", f"{folder}/result.xml", "-c", "/dev/null", f"--rootdir={suite}"]
        command += ["-p", "lowrank_plugin"] if patched else []
        done = subprocess.run([*command, *tests], cwd=suite, env=env, capture_output=True, text=True)
        if not Path(folder, "result.xml").exists():
            raise RuntimeError(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        results = {}
        for case in ElementTree.parse(f"{folder}/result.xml").iter("testcase"):
            outcome = "passed"
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    outcome = "skipped" if child.tag == "skipped" else "failed"
            file, *cls = case.get("classname").removeprefix("tests.").split(".")
            results["::".join([f"tests/{file}.py", *cls, case.get("name")])] = outcome
        stats = {"fused": 0, "fallback": {}}
        for file in Path(folder).glob("*.json"):
            part = json.loads(file.read_text())
            stats["fused"] += part["fused"]
            for reason, n in part["fallback"].items():
                stats["fallback"][reason] = stats["fallback"].get(reason, 0) + n
    return results, stats


def compare(files: tuple[str, ...] = FILES, workers: int = 2, select: str = SELECT) -> tuple[dict, dict, dict]:
    """(results without the patch of what did not pass with it, results with it, stats with it)."""
    with tempfile.TemporaryDirectory() as folder:
        suite = fetch(Path(folder))
        patched, stats = run(suite, files, True, workers, select)
        lost = [test for test, outcome in patched.items() if outcome != "passed"]
        plain = run(suite, lost, False, workers, select)[0] if lost else {}
    return plain, patched, stats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    plain, patched, stats = compare(FILES + MORE if args.more else FILES, args.workers)
    for what, results in (("with the patch", patched), ("the others without", plain)):
        counts = {outcome: list(results.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
        print(f"{what}: {counts}")
    different = {name: outcome for name, outcome in patched.items() if outcome != plain.get(name, "passed")}
    for name, outcome in sorted(different.items()):
        print(f"  {name}: {plain.get(name)} -> {outcome}")
    print(json.dumps(stats, indent=1))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
