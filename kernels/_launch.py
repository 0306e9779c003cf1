"""Launches, decided apart from being run: a :class:`Plan` is everything about one that is not a tensor or a float.

A launcher reads as decide, allocate, run.  Its ``plan`` is pure and cached: from :func:`layout` of each tensor to Plans, with
every check on the way.  What finds a plan again is thereby proof that sizes, strides, dtypes, devices and alignment are what
was checked.  No kernels here, no policy.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import _host
from .._host import flat

MAX_RANK = 512
WGMMA = (0, 90, 100)  # tensor cores that read shared memory (0: interpreter, AMD); elsewhere operands take registers
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# A new batch length is a few new plans, which all layers of one size share.
planned = functools.lru_cache(4096)

_runtime = triton.knobs.runtime


class GPU(NamedTuple):
    """What a plan depends on of a device."""

    arch: int  # 80, 90, 100, ...; 0 where there is no NVIDIA GPU: interpreter, ROCm
    sms: int
    hip: bool = False

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> "GPU":
        hip = torch.version.hip is not None
        if device.type != "cuda":
            return cls(0, 4, hip)
        major, minor = torch.cuda.get_device_capability(device)
        return cls(
            0 if hip else 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count, hip
        )


class Layout(NamedTuple):
    """What a launch depends on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # of elements
    dtype: torch.dtype
    device: torch.device
    aligned: bool = True  # to 16 bytes, as all that is newly allocated

    @classmethod
    def new(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Layout":
        """Of torch.empty's."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        return cls(tuple(shape), tuple(reversed(strides)), dtype, device)

    @property
    def mT(self) -> "Layout":
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return self.numel == 0
            step *= size
        return True

    def split(self, sizes) -> "tuple[Layout, ...]":
        """Of t.split(sizes, 1), t [M, sum(sizes)]."""
        parts, start = [], 0
        for size in sizes:
            aligned = self.aligned and start * self.strides[1] * self.dtype.itemsize % 16 == 0
            parts.append(self._replace(shape=(self.shape[0], size), aligned=aligned))
            start += size
        return tuple(parts)


_layout = functools.partial(tuple.__new__, Layout)


def layout(t: torch.Tensor | None) -> Layout | None:
    return None if t is None else _layout((t.shape, t.stride(), t.dtype, t.device, not t.data_ptr() & 15))


def layouts(tensors) -> tuple[Layout | None, ...]:
    return tuple(map(layout, tensors))


@dataclass(eq=False)
class Plan:
    """One launch.  A kernel's parameters are, in this order: pointers, floats, integers, constants.

    ``arguments``: per pointer its tensor's Layout, or None; ``float`` per float; or a tuple of these.  A call brings as
    many.
    """

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    integers: tuple  # or tuples of integers
    constants: dict[str, Any]  # by name: constexpr parameters, and num_warps, num_stages

    def __post_init__(self):
        self.launch = self.kernel[self.grid]
        tensors = [leaf for leaf in flat(self.arguments) if leaf is not float]
        self.tensors, self.floats = len(tensors), flat(self.arguments).count(float)
        self.device = tensors[0].device
        self.several = self.device.type == "cuda" and torch.cuda.device_count() > 1  # another may be the current one
        self.compiled = None  # what Triton's launch returns; from the second on, _host.register's handle stands for it
        self.handle = 0


def run(plan: Plan, *arguments) -> None:
    """Launch on the current stream; ``arguments``: as plan.arguments has them."""
    if plan.several and torch.cuda.current_device() != plan.device.index:
        with torch.cuda.device(plan.device):
            run(plan, *arguments)
    elif plan.handle and not _hooked():
        leaves = flat(arguments)
        _host.launch(plan.handle, leaves[: plan.tensors], leaves[plan.tensors :])
    else:
        compiled = plan.launch(*arguments, *plan.integers, **plan.constants)
        if compiled is not plan.compiled:
            plan.compiled, plan.handle = compiled, _host.register(plan, compiled)


def _hooked() -> bool:
    """Whether something, like a profiler, is to be called around each of Triton's launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def dot_kind(wide_dtype: torch.dtype, thin_dtype: torch.dtype) -> str:
    """What dots a thin product takes: "same" 16-bit dtype, "split" (fp32 over 16 bits), or "fp32"."""
    return "fp32" if wide_dtype is torch.float32 else "same" if wide_dtype is thin_dtype else "split"


def precision(kind: str, matmul: str, gpu: GPU) -> str:
    """tl.dot's input_precision for fp32 operands of a :func:`dot_kind`; 16-bit operands know only one.

    ``matmul``: torch.get_float32_matmul_precision().
    """
    if kind == "split" and not gpu.hip:  # AMD multiplies fp32 exactly, and knows no tf32x3
        return "tf32x3"
    return "tf32" if kind == "fp32" and matmul != "highest" else "ieee"


def check(name: str, wide: Layout, thin_dtype: torch.dtype, factors, ranks) -> None:
    """Raise ValueError on what the thin kernels do not take: dtypes, ranks, devices, a strided last dim of ``wide``."""
    for t in (wide, *factors):
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: expected fp16, bf16 or fp32, got {t.dtype}")
        if t.device != wide.device:
            raise ValueError(f"{name}: tensors on {wide.device} and {t.device}")
    if thin_dtype not in (wide.dtype, torch.float32):
        raise ValueError(
            f"{name}: thin products in {thin_dtype} over {wide.dtype}; expected {wide.dtype} or torch.float32"
        )
    if wide.strides[-1] != 1 and wide.shape[-1] > 1:
        raise ValueError(f"{name}: the last dim must be contiguous, got strides {wide.strides}")
    for rank in ranks:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{name}: rank {rank} is outside 1..{MAX_RANK}")


def pad_rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def batches(ranks, width: int) -> list[slice]:
    """Consecutive adapters that one launch takes: together at most ``width`` padded columns, or a single adapter."""
    slices, start = [], 0
    for j in range(1, len(ranks) + 1):
        if j == len(ranks) or (j + 1 - start) * pad_rank(max(ranks[start : j + 1])) > width:
            slices.append(slice(start, j))
            start = j
    return slices
