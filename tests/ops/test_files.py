"""An op's docstring names the files that it is made of, its tests and its benchmarks, and they are there."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lowrank

OPS = Path(lowrank.__file__).parent / "ops"
ROOT = Path(__file__).parents[2]
PUBLIC = {inspect.unwrap(f).__module__ for f in vars(lowrank.ops).values() if inspect.isfunction(f)}
MODULES = sorted(
    path for path in OPS.glob("[!_]*.py") if ".define(" in path.read_text() or f"lowrank.ops.{path.stem}" in PUBLIC
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_files_of_an_op_are_there(path):
    """As ``Files: kernels/x.py, ...; tests/test_x.py; bench x.``, beside the module or from the repository's root."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    files, bench = re.fullmatch(r".*\n\nFiles: ([^\n]*?)(?:; bench ([a-z_, ]+))?\.", docstring, re.DOTALL).groups()
    names = re.split("[,;] ", files)
    assert any(name.startswith("tests/") for name in names)
    for name in names:
        assert [*OPS.glob(name), *ROOT.glob(name)], name
    if bench:
        registry = (ROOT / "bench" / "registry.py").read_text()
        assert all(f'"{name}"' in registry for name in bench.split(", "))
