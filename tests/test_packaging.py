"""The wheel holds lowrank and nothing else, and every file of it; csrc/ is built for it without a warning."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    copy = tmp_path_factory.mktemp("source")
    subprocess.run(
        ["tar", "--null", "-T", "-", "-cf", copy / "s.tar"], cwd=ROOT, input="\0".join(files()).encode(), check=True
    )
    subprocess.run(["tar", "-xf", "s.tar"], cwd=copy, check=True)
    return copy


@pytest.fixture(scope="module")
def wheel(setup, source, tmp_path_factory):
    """Where csrc/ can be built, by a compiler to which a warning is an error."""
    native = dict(LOWRANK_REQUIRE_NATIVE="1", CXX=f"{setup.compiler()} -Werror") if setup.why_not("cpu") is None else {}
    return build(source, tmp_path_factory.mktemp("wheel"), **native)


def files(*folders: str) -> list[str]:
    """What git has, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()]


def build(source, out, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True, env=os.environ | environment)
    return next(out.glob("*.whl"))


def test_is_called_lowrank_kernels(wheel):
    assert wheel.name.startswith("lowrank_kernels-")


def test_top_level_is_exactly_lowrank(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lowrank"}


def test_holds_every_module(wheel):
    modules = {name for name in files("lowrank", "kernels") if name.endswith(".py")}
    modules = {"lowrank/" + name if name.startswith("kernels/") else name for name in modules}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith(".py")} == modules


def test_says_that_its_annotations_are_meant_for_type_checkers(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "lowrank/py.typed" in archive.namelist()


def test_its_native_library_loads(setup, wheel, tmp_path):
    """With any Python from 3.10 on: it holds no Python symbols."""
    if setup.why_not("cpu") is not None:
        pytest.skip(setup.why_not("cpu"))
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    libraries = sorted(library.name.split("-")[0] for library in tmp_path.glob("lowrank/*.so"))
    assert libraries == ["_C_cpu.so", "_C_node"]
    code = "import lowrank; from lowrank import _native; print(lowrank.__file__, _native.why_not('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "lowrank" / "__init__.py"), "None"]


def test_instruction_sets_leak_no_function(setup, source, wheel):
    """Of an object compiled for AVX-512 the linker may take nothing that another object also has."""
    if setup.why_not("cpu") is not None or shutil.which("nm") is None:
        pytest.skip(setup.why_not("cpu") or "needs nm")
    for rows in setup.CSRC.glob("*_rows.cpp"):
        for isa in setup.ISAS:
            path = next(source.glob(f"build/temp*/**/{rows.stem}_{isa}.o"))
            command = ["nm", "--defined-only", "-g", path]
            symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert symbols
            assert all(isa in line for line in symbols.splitlines()), symbols


def test_without_a_compiler_it_is_pure_python(source, tmp_path):
    wheel = build(source, tmp_path, PATH="", CXX="", LOWRANK_REQUIRE_NATIVE="")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
