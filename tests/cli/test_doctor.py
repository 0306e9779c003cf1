from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank import cli
from lowrank._version import __version__
from lowrank.cli import doctor


def section(output: str, title: str) -> list[str]:
    lines = output.split(title + "\n", 1)[1].splitlines()
    return [line.strip() for line in lines[: next((i for i, x in enumerate(lines) if x[:1] != " "), len(lines))]]


@pytest.fixture
def report(capsys):
    def run() -> str:
        assert cli.main(["doctor"]) == 0
        return capsys.readouterr().out

    return run


def test_report(report, environment):
    environment.delenv("LOWRANK_BACKEND", raising=False)
    output = report()
    versions = " ".join(section(output, "versions"))
    assert __version__ in versions
    assert torch.__version__.split("+")[0] in versions
    assert section(output, "devices")[0].startswith("cpu: ")
    cpu = [line for line in section(output, "backends") if " cpu " in line]
    assert [line.split()[0] for line in cpu] == list(doctor.OPS)
    assert all(" eager: " in line for line in cpu)
    checks = section(output, "self-check, relative error against fp64")
    assert len(checks) == 2 * (1 + torch.cuda.device_count())
    assert all(", ok " in line for line in checks)


def test_native_libraries(report, monkeypatch):
    from lowrank import _native

    reasons = {"cpu": None, "cuda": "this torch is not a CUDA build", "node": None}
    monkeypatch.setattr(_native, "why_not", reasons.get)
    assert section(report(), "native libraries") == [
        "cpu     loaded",
        "cuda    not there, PyTorch does its work: this torch is not a CUDA build",
        "node    loaded",
    ]


def test_how_heads_are_multiplied(report, monkeypatch):
    from lowrank.ops import mixed

    monkeypatch.setattr(mixed, "why_not", lambda device, dtype: None)
    assert "cpu: multiplied as they are" in section(report(), "vocabulary heads in bf16")
    monkeypatch.setattr(mixed, "why_not", lambda device, dtype: f"no {dtype} here")
    assert "cpu: widened to fp32: no torch.bfloat16 here" in section(report(), "vocabulary heads in bf16")


def test_a_backend_that_does_not_exist_is_reported_not_raised(report, environment):
    environment.setenv("LOWRANK_BACKEND", "abacus")
    output = report()
    assert "LOWRANK_BACKEND=abacus" in section(output, "environment")
    assert all(" none: " in line and "'abacus'" in line for line in section(output, "backends"))


def test_self_check_notices_a_wrong_result(report, monkeypatch):
    import lowrank

    right = lowrank.lora_linear
    monkeypatch.setattr(lowrank, "lora_linear", lambda x, W, A, B, s: right(x, W, A, B, 1.001 * s))
    assert "WRONG" in section(report(), "self-check, relative error against fp64")[0]
    monkeypatch.setattr(lowrank, "lora_linear", lambda x, W, A, B, s: right(x, W, A, B, float("nan") * x.new_ones(())))
    assert "nan, WRONG" in section(report(), "self-check, relative error against fp64")[0]
    monkeypatch.setattr(lowrank, "lora_linear", lambda *_: 1 / 0)
    assert "failed: ZeroDivisionError" in section(report(), "self-check, relative error against fp64")[0]


def test_missing_packages_come_with_their_install_line(report, monkeypatch):
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("peft", "bitsandbytes") else present(name))
    missing = section(report(), "missing")
    assert any(line.startswith("peft: ") and line.endswith("pip install 'lowrank-kernels[peft]'") for line in missing)
    assert any(line.startswith("bitsandbytes: ") and line.endswith("[qlora]'") for line in missing)


@pytest.fixture
def sound_machine(monkeypatch):
    """A machine without any trap; each test adds one."""
    machine = SimpleNamespace(
        versions={"triton": "3.9.0", "numpy": "2.4.6"}, cpu={"flags": ["avx512_bf16"]}, gpu=False, kernels=None
    )
    monkeypatch.setattr(doctor, "_version", lambda name: machine.versions.get(name))
    monkeypatch.setattr(doctor, "cpuinfo", lambda: machine.cpu)
    monkeypatch.setattr(doctor, "_has_nvidia_gpu", lambda: machine.gpu)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: machine.kernels)
    return machine


def test_no_warnings_on_a_sound_machine(sound_machine):
    assert list(doctor._traps()) == []
    sound_machine.versions["kernels"] = "0.17"
    sound_machine.kernels = SimpleNamespace(origin="/site-packages/kernels/__init__.py")
    assert list(doctor._traps()) == []


def test_warns_of_a_folder_named_kernels(sound_machine):
    sound_machine.versions["kernels"] = "0.17"
    sound_machine.kernels = SimpleNamespace(origin=None, submodule_search_locations=["/repo/kernels"])
    [warning] = doctor._traps()
    assert "finds /repo/kernels, not Hugging Face's" in warning


def test_warns_of_triton_3_6_with_numpy_2_4(sound_machine):
    sound_machine.versions["triton"] = "3.6.0"
    [warning] = doctor._traps()
    assert "numpy<2.4" in warning
    sound_machine.versions["numpy"] = "2.2.6"
    assert list(doctor._traps()) == []


def test_warns_of_a_cpu_without_bf16(sound_machine):
    sound_machine.cpu = {"flags": ["avx2"]}
    [warning] = doctor._traps()
    assert "no bf16 instructions" in warning


@pytest.mark.parametrize(("cuda", "expected"), [(None, "CPU build"), ("13.0", "cannot use it")])
def test_warns_of_a_gpu_that_torch_does_not_see(sound_machine, monkeypatch, cuda, expected):
    sound_machine.gpu = True
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [warning] = doctor._traps()
    assert expected in warning


def test_cpuinfo_reads_this_machine():
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo")
    assert "flags" in doctor.cpuinfo() or "Features" in doctor.cpuinfo()
