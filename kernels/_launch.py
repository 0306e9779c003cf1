"""Host-side facts about a device, and what every launcher checks.  No kernels, no policy."""

import contextlib
import functools

import torch
import triton
import triton.language as tl

MAX_RANK = 512
WGMMA = (0, 90, 100)  # tensor cores that read shared memory (0: interpreter, AMD); elsewhere operands take registers
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """(arch as 80, 90, 100, ...; number of SMs).  (0, 4) where there is no NVIDIA GPU: interpreter, ROCm."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 4 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The tensor's device, for a launch."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def dot_kind(wide: torch.dtype, thin: torch.dtype) -> str:
    """What dots a thin product takes: "same" 16-bit dtype, "split" (fp32 over 16 bits), or "fp32"."""
    return "fp32" if wide is torch.float32 else "same" if wide is thin else "split"


def precision(kind: str) -> str:
    """tl.dot's input_precision for fp32 operands of a :func:`dot_kind`; 16-bit operands know only one."""
    if kind == "split" and not torch.version.hip:  # AMD multiplies fp32 exactly, and knows no tf32x3
        return "tf32x3"
    return "tf32" if kind == "fp32" and torch.get_float32_matmul_precision() != "highest" else "ieee"


def check(name: str, wide: torch.Tensor, thin: torch.dtype, factors: list[torch.Tensor], ranks: list[int]) -> None:
    """Raise ValueError on what the thin kernels do not take: dtypes, ranks, devices, a strided last dim of ``wide``."""
    for t in (wide, *factors):
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: expected fp16, bf16 or fp32, got {t.dtype}")
        if t.device != wide.device:
            raise ValueError(f"{name}: tensors on {wide.device} and {t.device}")
    if thin not in (wide.dtype, torch.float32):
        raise ValueError(f"{name}: thin products in {thin} over {wide.dtype}; expected {wide.dtype} or torch.float32")
    if wide.stride(-1) != 1 and wide.shape[-1] > 1:
        raise ValueError(f"{name}: the last dim must be contiguous, got strides {wide.stride()}")
    for rank in ranks:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{name}: rank {rank} is outside 1..{MAX_RANK}")


def as_bytes(keeps) -> tuple[torch.Tensor | None, ...]:
    """Keep bits as kernels read them: little-endian bytes of the int32 words."""
    return tuple(None if keep is None else keep.view(torch.uint8) for keep in keeps)


def pad_rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def batches(ranks: list[int], width: int) -> list[range]:
    """Consecutive adapters that one launch takes: together at most ``width`` padded columns, or a single adapter."""
    found, start = [], 0
    for j in range(1, len(ranks) + 1):
        if j == len(ranks) or (j + 1 - start) * pad_rank(max(ranks[start : j + 1])) > width:
            found.append(range(start, j))
            start = j
    return found
