"""``lowrank doctor``: what this machine has, which backend every op takes and why, what is missing, known traps.

Plain text, made to be pasted into a bug report.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..measure.environment import BF16_UNITS, cpuinfo, device_name

SUMMARY = "versions, devices, the backend each op takes and why, and what is missing"

OPS = ("lora_linear", "lora_linears")
PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "peft", "bitsandbytes", "matplotlib")
OPTIONAL = {  # distribution: what it is for, how to get it
    "triton": ("the Triton kernels on NVIDIA GPUs", "pip install triton"),
    "peft": (
        "LoRA adapters, `lowrank compare`, `lowrank plan`",
        "pip install 'lowrank-kernels[peft]'",
    ),
    "bitsandbytes": ("4-bit base weights (QLoRA)", "pip install 'lowrank-kernels[qlora]'"),
    "matplotlib": ("the figures of `lowrank compare`", "pip install 'lowrank-kernels[compare]'"),
}
ENVIRONMENT = ("LOWRANK_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    for title, lines in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("environment", (f"{name}={os.environ.get(name, '(not set)')}" for name in ENVIRONMENT)),
        ("backends", _backends()),
        ("native libraries", _native_libraries()),
        ("vocabulary heads in bf16", _heads()),
        ("self-check, relative error against fp64", _self_check()),
        ("missing", _missing()),
        ("warnings", _traps()),
    ):
        print(title)
        print("\n".join(f"  {line}" for line in lines) or "  none")
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[str]:
    import torch

    from .._version import __version__

    yield f"{'lowrank-kernels':16}{__version__}"
    yield f"{'python':16}{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        build = f" (CUDA {torch.version.cuda or 'none'})" if name == "torch" else ""
        yield f"{name:16}{_version(name) or 'not installed'}{build}"


def _torch_devices() -> list:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _devices() -> Iterator[str]:
    import torch

    for device in _torch_devices():
        if device.type == "cpu":
            yield f"{device}: {device_name(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
        else:
            card = torch.cuda.get_device_properties(device)
            yield f"{device}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} GiB"


def _backends() -> Iterator[str]:
    import lowrank

    from ..ops._choice import backend

    for op in OPS:
        for device in _torch_devices() if hasattr(lowrank, op) else []:
            try:
                name, why = backend(device)
            except ValueError as error:
                name, why = "none", str(error)
            yield f"{op:14} {device!s:7} {name}: {why}"


def _native_libraries() -> Iterator[str]:
    from .. import _native

    for library in _native.LIBRARIES:
        reason = _native.why_not(library)
        yield f"{library:8}{'loaded' if reason is None else f'not there, PyTorch does its work: {reason}'}"


def _heads() -> Iterator[str]:
    import torch

    from ..ops import mixed

    for device in _torch_devices():
        try:
            reason = mixed.why_not(device, torch.bfloat16)
        except ValueError as error:
            reason = str(error)
        yield f"{device}: {'multiplied as they are' if reason is None else f'widened to fp32: {reason}'}"


def _self_check() -> Iterator[str]:
    import torch

    for device in _torch_devices():
        for dtype in (torch.float32, torch.bfloat16):
            limit = 4 * torch.finfo(dtype).eps  # rounding gives 2 eps in fp32, a third of one in bf16
            try:
                error = lora_linear_error(device, dtype)
            except Exception as failure:  # a diagnosis reports whatever happens
                yield f"lora_linear {device} {dtype}: failed: {type(failure).__name__}: {failure}"
            else:
                verdict = "ok" if error <= limit else "WRONG"  # a NaN is wrong too
                yield f"lora_linear {device} {dtype}: {error:.1e}, {verdict} (expected below {limit:.1e})"


def lora_linear_error(device, dtype) -> float:
    """The largest ||out - exact|| / ||exact|| over lora_linear's y, dx, dA and dB; exact is the formula in fp64."""
    import torch

    import lowrank

    generator = torch.Generator().manual_seed(0)
    M, K, N, r, scaling = 48, 64, 80, 8, 0.5
    shapes = ((M, K), (N, K), (r, K), (N, r), (M, N))
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    def run(function, tensors):
        x, weight, A, B, dy = tensors
        leaves = [t.requires_grad_() for t in (x, A, B)]
        y = function(x, weight, A, B, scaling)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact = run(lambda x, W, A, B, s: x @ W.mT + s * (x @ A.mT @ B.mT), [t.double() for t in inputs])
    out = run(lowrank.lora_linear, [t.clone() for t in inputs])
    errors = torch.stack([(o - e).norm() / e.norm() for o, e in zip(out, exact, strict=True)])
    return errors.max().item()


def _missing() -> Iterator[str]:
    for name, (purpose, command) in OPTIONAL.items():
        if _version(name) is None and (name != "triton" or platform.system() == "Linux"):
            yield f"{name}: {purpose}: {command}"


def _traps() -> Iterator[str]:
    """Situations that have cost somebody an afternoon, with the way out."""
    import torch

    spec = importlib.util.find_spec("kernels")
    if spec is not None and (spec.origin is None or _version("kernels") is None):  # None: a folder without __init__.py
        location = spec.origin or next(iter(spec.submodule_search_locations))
        yield f"`import kernels` finds {location}, not Hugging Face's package: start Python in another folder, or with -P"
    triton, numpy = _version("triton") or "", _version("numpy") or ""
    if _numbers(triton) == (3, 6) and _numbers(numpy) >= (2, 4):
        yield f"triton {triton}'s interpreter (TRITON_INTERPRET=1) fails with numpy {numpy}: pip install 'numpy<2.4'"
    flags = cpuinfo().get("flags") or cpuinfo().get("Features") or []
    if flags and not BF16_UNITS & set(flags):
        yield "this CPU has no bf16 instructions: bf16 is emulated on it and slower than fp32"
    if _has_nvidia_gpu() and torch.version.cuda is None:
        yield "there is an NVIDIA GPU, but this torch is a CPU build: pip install a CUDA build (https://pytorch.org)"
    elif _has_nvidia_gpu() and not torch.cuda.is_available():
        yield (
            f"there is an NVIDIA GPU, but torch (CUDA {torch.version.cuda}) cannot use it: "
            "look at nvidia-smi's driver version and CUDA_VISIBLE_DEVICES"
        )


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _numbers(version: str) -> tuple[int, ...]:
    """(major, minor) of "3.6.0"; () where there is none."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()
