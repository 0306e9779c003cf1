"""The wheel holds lowrank and nothing else, and every file of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    out = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--null", "-T", "-", "-cf", copy / "s.tar"], cwd=ROOT, input=files, check=True)
    subprocess.run(["tar", "-xf", "s.tar"], cwd=copy, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_is_called_lowrank_kernels(wheel):
    assert wheel.name.startswith("lowrank_kernels-")


def test_top_level_is_exactly_lowrank(wheel):
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lowrank"}


def test_holds_every_module(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "lowrank", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {name for name in tracked.stdout.splitlines() if name.endswith(".py")}
    modules = {"lowrank/" + name if name.startswith("kernels/") else name for name in modules}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith(".py")} == modules
