"""Where a figure was measured: the device, its capabilities, threads and versions, without which it is worth nothing."""

import contextlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from .._version import __version__

BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of /proc/cpuinfo


def environment(device: torch.device) -> dict[str, object]:
    """{"device", "threads", "python", "torch", "triton", "peft", "transformers", "cuda", "lowrank"}; what is not installed is
    left out."""
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version()}
    for name in ("torch", "triton", "peft", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts | {"torch": torch.__version__, "cuda": torch.version.cuda, "lowrank": __version__}


def device_name(device: torch.device) -> str:
    """A GPU's name; a CPU's, and the instruction set that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = " ".join(cpuinfo().get("model name", [platform.processor() or platform.machine()]))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def cpuinfo() -> dict[str, list[str]]:
    """Words by field of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.split() for key, _, value in fields}


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(BF16_UNITS & set(cpuinfo().get("flags", []) + cpuinfo().get("Features", [])))
