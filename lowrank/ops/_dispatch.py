"""Whether a call runs in kernels or in csrc/.  Visible chains of conditions; ``lowrank doctor`` prints what they begin with.

Each ``*_impl`` maps the answer to two modules of the same functions: its kernels' and its ``*_eager``.
"""

import os

import torch
from torch import Tensor

from .. import _native, _stats
from ._choice import backend, choice

# What :func:`outlasts_host` reckons with.  Modelled from data sheets and from launches counted without a device, not measured.
HOST_US = 45.0  # of one pass of a layer through the kernels: PyTorch's module call, the guard, two planned launches and a GEMM
GEMM_PER_US = 6e8  # floating-point operations, in 16 bits, of a GPU of 2022
BYTES_PER_US = 2.5e6
MAX_RANK = 512  # of kernels/_launch.py, which imports triton


def in_kernels(activations: list[Tensor], rank: int, thin_dtype: torch.dtype, sizes: tuple | None = None) -> bool:
    """Whether thin products of ``activations`` with factors of at most ``rank`` directions run in kernels.

    What the kernels cannot do is PyTorch's, counted in ``stats()`` and refused by ``strict()``.  ``sizes``:
    :func:`prefers_eager`'s arguments, of a call that may be too small for them.
    """
    device = activations[0].device
    if backend(device)[0] == "eager":
        return False
    reason = _unsupported(activations, rank, thin_dtype)
    if reason is not None:
        _stats.op_fell_back(reason)
        return False
    return sizes is None or choice(device).forced or not prefers_eager(*sizes)


def in_csrc(t: Tensor, op: str) -> bool:
    """Whether ``op`` of csrc/ takes t.  Numbers of 64 bits are PyTorch's, and so is all under LOWRANK_BACKEND=eager; what else
    csrc/ does not take is counted in ``stats()`` and refused by ``strict()``.
    """
    if t.element_size() == 8 or os.environ.get("LOWRANK_BACKEND") == "eager":
        return False
    device = t.device.type
    if device in _native.LIBRARIES and _native.available(device):
        return True
    _stats.op_fell_back(f"{op}: {_native.why_not(device) if device in _native.LIBRARIES else f'on {device}'}")
    return False


def outlasts_host(rows: int, K: int, N: int, itemsize: int) -> bool:
    """Whether a GPU works longer on one pass of a layer, x [rows, K] to [rows, N], than the host needs for its kernels.

    A pure function of sizes.  What is not worth it is left to PyTorch's GEMMs, which read x and dY once more and which one call
    of csrc/node.cpp launches: where a GPU waits for its host, that is what counts.
    """
    gemm = 2 * rows * K * N / GEMM_PER_US * (itemsize / 2)
    return gemm + 2 * rows * (K + N) * itemsize / BYTES_PER_US >= HOST_US


def prefers_eager(rows, K, N, dtype, factors, thin_dtype, has_dropout) -> bool:
    """Whether a call is too small for kernels of ours.  Masks and casts would cost PyTorch launches of their own."""
    if has_dropout or thin_dtype is not dtype or any(t.dtype is not dtype for t in factors):
        return False
    return not outlasts_host(rows, K, N, dtype.itemsize)


def _unsupported(activations: list[Tensor], rank: int, thin_dtype: torch.dtype) -> str | None:
    for t in activations:
        if t.dtype is torch.float64:
            return "float64: the kernels take fp16, bf16 and fp32"
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return "the last dim of an activation is not contiguous"
        if thin_dtype not in (t.dtype, torch.float32):
            return f"a base output of {t.dtype} beside adapters in {thin_dtype}"
    if thin_dtype is torch.float64:
        return "float64: the kernels take fp16, bf16 and fp32"
    if rank > MAX_RANK:
        return f"a rank above {MAX_RANK}"
    return None
