"""What happens where csrc/ cannot be built, and what nvcc makes of it; test_packaging.py builds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank import _native, _stats
from lowrank.ops._dispatch import in_csrc

ROOT = Path(__file__).parent.parent


def build(folder, **environment):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, list(folder.glob("lib/lowrank/*.so"))


def test_the_library_is_built_where_it_can_be(setup):
    """Not: that it would build.  Every other test of csrc/ skips without it."""
    if setup.why_not("cpu") is not None:
        pytest.skip(setup.why_not("cpu"))
    assert _native.why_not("cpu") is None


def test_a_failing_compiler_is_told_and_survived(setup, tmp_path):
    if setup.why_not("cpu") is not None:
        pytest.skip(setup.why_not("cpu"))
    code, output, libraries = build(tmp_path, CXX="false", LOWRANK_REQUIRE_NATIVE="")
    assert code == 0
    assert "_C_cpu.so was not built" in output
    assert libraries == []
    assert build(tmp_path, CXX="false", LOWRANK_REQUIRE_NATIVE="1")[0] != 0


def test_reasons_to_leave_a_library_out(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    monkeypatch.setattr(setup, "ninja", lambda: "ninja")
    monkeypatch.setattr(setup, "compiler", lambda: "g++")
    monkeypatch.setattr(setup, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(setup, "torch_version", lambda of="__version__": None)
    monkeypatch.delenv("LOWRANK_BUILD_CUDA", raising=False)
    assert setup.why_not("cpu") is None
    assert setup.why_not("cuda") == "needs a CUDA build of torch"
    assert setup.why_not("node") is None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(setup.sysconfig, "get_path", lambda name: "/nowhere")
        assert "Python's headers" in setup.why_not("node")
    monkeypatch.setenv("LOWRANK_BUILD_CUDA", "1")
    assert setup.why_not("cuda") is None
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    assert setup.why_not("cuda") == "needs nvcc"
    monkeypatch.setattr(setup, "compiler", lambda: None)
    assert setup.why_not("cpu") == "needs a C++ compiler"
    monkeypatch.setattr(setup, "ninja", lambda: None)
    assert "needs ninja" in setup.why_not("cpu")
    monkeypatch.setattr(setup, "torch_folder", lambda: None)
    assert "install lowrank again" in setup.why_not("cpu")


def test_torch_is_found_without_being_imported(setup, monkeypatch, tmp_path):
    """As pip's isolated builds must: by the folder of this Python's packages."""
    here = setup.torch_folder()
    assert here.samefile(Path(torch.__file__).parent)
    assert setup.torch_version() == torch.__version__
    assert setup.torch_version("cuda") == torch.version.cuda
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert setup.torch_folder().samefile(here)
    (tmp_path / "version.py").write_text("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    monkeypatch.setattr(setup, "torch_folder", lambda: tmp_path)
    assert (setup.torch_version(), setup.torch_version("cuda")) == ("2.14.1+cu130", "13.0")


@pytest.fixture
def reason(monkeypatch, tmp_path):
    """Why libraries in an empty folder cannot be used."""
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return _native.why_not.__wrapped__


def test_a_library_that_is_not_there_or_does_not_load(reason, tmp_path, monkeypatch):
    assert "lowrank/_C_cpu.so was not built" in reason("cpu")
    (tmp_path / "_C_cuda.so").write_text("not a library")
    assert reason("cuda").startswith("lowrank/_C_cuda.so does not load: ")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason("cuda") == "this torch is not a CUDA build"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            '{"url": "file:///src/low%20rank", "dir_info": {}}',
            "pip install -v --force-reinstall --no-deps '/src/low rank' ",
        ),
        ('{"url": "file:///src", "dir_info": {"editable": true}}', "python setup.py build_ext --inplace "),
        (None, "python setup.py build_ext --inplace "),
    ],
)
def test_a_library_that_was_not_built_names_the_command_that_builds_it(reason, monkeypatch, origin, command):
    import importlib.metadata
    import types

    distribution = types.SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    assert command in reason("cpu")


KERNELS = {
    "adamw": 18,  # dtypes of parameter and gradient, stochastic or not, masked or not
    "analysis": 10,  # three of each dtype; overlap
    "delta": 12,  # 16 or 32 bits; size, encode, apply, map, fingerprint; check, mark
    "rank_update": 14,  # dtypes, aligned or not, with or without report; and the map of changes
}
ARCHS = ("80", "90a", "100a")


def test_every_kernel_is_counted(setup):
    assert set(KERNELS) == set(setup.STEMS)


@pytest.mark.slow
@pytest.mark.parametrize("stem", KERNELS)
def test_cuda_kernels_compile_without_spills(setup, tmp_path, stem):
    if setup.nvcc() is None:
        pytest.skip("needs nvcc")
    includes, _ = setup.torch_flags()
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [setup.nvcc(), *setup.NVCCFLAGS.split(), setup.STABLE_ABI, *archs, "-Xptxas=-v", *includes.split()]
    command += ["-c", ROOT / "csrc" / f"{stem}.cu", "-o", tmp_path / f"{stem}.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", done.stderr)
    assert {arch for _, arch in kernels} == {f"sm_{arch}" for arch in ARCHS}
    assert len(kernels) == KERNELS[stem] * len(ARCHS), [name for name, _ in kernels]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0")] * len(kernels), done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    # two blocks of 256 threads on a multiprocessor, but for the report's
    assert sum(n > 128 for n in registers) <= (6 * len(ARCHS) if stem == "rank_update" else 0)


def test_what_csrc_takes_is_asked_in_one_place(monkeypatch):
    """64-bit numbers and LOWRANK_BACKEND=eager are no fallbacks; a missing library and another device are."""
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    monkeypatch.setattr(_native, "why_not", lambda library: "not built" if library == "cpu" else None)
    _stats.reset()
    single, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    with lowrank.strict():
        assert not in_csrc(double, "an op")
        with pytest.raises(lowrank.FallbackError, match="an op: not built"):
            in_csrc(single, "an op")
        with pytest.raises(lowrank.FallbackError, match="an op: on meta"):
            in_csrc(single.to("meta"), "an op")
        monkeypatch.setenv("LOWRANK_BACKEND", "eager")
        assert not in_csrc(single, "an op")
        monkeypatch.delenv("LOWRANK_BACKEND")
        monkeypatch.setattr(_native, "why_not", lambda library: None)
        assert in_csrc(single, "an op")
    monkeypatch.setattr(_native, "why_not", lambda library: "not built")
    before = lowrank.stats()["fallback"].get("an op: not built", 0)
    with pytest.warns(UserWarning, match="an op: not built"):
        assert not in_csrc(single, "an op")
    assert lowrank.stats()["fallback"]["an op: not built"] == before + 1
