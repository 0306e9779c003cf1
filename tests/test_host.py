"""What csrc/plan_cuda.cpp asks of the CUDA driver is what Triton's own launcher asks: function, grid, stream, every byte."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank import _native

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with the stand-in as libcuda.so.1, libcuda.so and libtorch_cuda.so."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has a libtorch_cuda.so of its own: -m gpu holds the same there")
    cc = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if cc is None or _native.why_not("cpu") is not None:
        pytest.skip("needs a C compiler and csrc/")
    folder, source = tmp_path_factory.mktemp("driver"), HERE / "libcuda.c"
    called = Path(triton.__file__).parent / "backends/nvidia/driver.c"
    names = set(re.findall(r"\b(cu[A-Z]\w+)\(", called.read_text()))
    stubs = "".join(f"STUB({name})" for name in sorted(names) if f"{name}(" not in source.read_text())
    for name in ("libcuda.so.1", "libtorch_cuda.so"):
        command = [cc, "-shared", "-fPIC", "-w", f"-DSTUBS={stubs}", f"-Wl,-soname,{name}", source, "-o", folder / name]
        subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


def test_as_triton_launches(driver):
    path = os.pathsep.join(map(str, (HERE.parent, HERE / "kernels", HERE, os.environ.get("PYTHONPATH", ""))))
    env = os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)}
    libraries = driver / "libcuda.so.1", driver / "libtorch_cuda.so"
    done = subprocess.run([sys.executable, HERE / "launches.py", *libraries], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *different, last = done.stdout.splitlines()
    assert not different, done.stdout
    compared, kernels = map(int, re.findall(r"\d+", last))
    assert compared > 50
    assert kernels == 20
