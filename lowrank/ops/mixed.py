"""fp32 products of 16-bit matrices, without a copy of them in fp32: cuBLAS's on a GPU, csrc/gemm_cpu.cpp's on a CPU.

A CPU does bf16, where it has AVX512-BF16 and csrc/ is built: PyTorch's own GEMMs there give bf16.  A number of the result is a
sum over k in one order, whatever the other rows, the threads and the strides are.  On every other CPU operands are widened.

Files: csrc/gemm_cpu.cpp; tests/ops/test_mixed.py.
"""

import functools

import torch
from torch import Tensor

from .. import _native
from ._choice import choice
from .thin_eager import add_product_

_lib = torch.library.Library("lowrank", "FRAGMENT")
# out fp32 [M,N] = a bf16 [M,K] @ b bf16 [K,N], added to what is there if asked for
_lib.define("mixed_mm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")
_lib.define("has_mixed_mm() -> bool")


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why matrices of that ``dtype`` are widened on ``device``, in a line; None where they are not.  No timing decides."""
    if takes(device, dtype):
        return None
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return f"no fp32 products of {dtype} on {device.type}"
    chosen = choice(device)
    if not chosen.native:
        return _native.why_not("cpu") or chosen.reason
    return "this CPU has no AVX512-BF16, or LOWRANK_ISA leaves it out"


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`mm` and :func:`add_product` multiply matrices of that ``dtype`` as they are."""
    if device.type == "cpu":
        return dtype is torch.bfloat16 and choice(device).native and _has_bf16()
    return device.type == "cuda" and dtype.itemsize == 2


@functools.cache
def _has_bf16() -> bool:
    return torch.ops.lowrank.has_mixed_mm()


def mm(a: Tensor, b: Tensor, acc_dtype: torch.dtype) -> Tensor:
    """a @ b in ``acc_dtype``, fp32 or fp64; either may be 16-bit."""
    if a.dtype is not b.dtype or not takes(a.device, a.dtype):
        return a.to(acc_dtype) @ b.to(acc_dtype)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=acc_dtype)
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=acc_dtype)
    torch.ops.lowrank.mixed_mm_(out, a, b, False)
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor, started: bool) -> None:
    """out = a @ b in fp32 or fp64, added to what is there if ``started``; rows of ``out`` are contiguous."""
    if a.dtype is b.dtype and takes(a.device, a.dtype):
        if a.device.type == "cuda":
            torch.addmm(out, a, b, beta=float(started), out_dtype=out.dtype, out=out)
        else:
            torch.ops.lowrank.mixed_mm_(out, a, b, started)
    elif started:
        add_product_(out, a.to(out.dtype), b.to(out.dtype))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
