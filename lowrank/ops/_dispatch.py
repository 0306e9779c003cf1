"""Which backend an op takes.  One visible chain of conditions; ``lowrank doctor`` prints its answer and its reason."""

from types import ModuleType

import torch

from .. import _stats
from . import eager
from ._choice import backend, choice

# What :func:`outlasts_host` reckons with.  Modelled from data sheets and from launches counted without a device, not measured.
HOST_US = 45.0  # of one pass of a layer through the kernels: PyTorch's module call, the guard, two planned launches and a GEMM
GEMM_PER_US = 6e8  # floating-point operations, in 16 bits, of a GPU of 2022
BYTES_PER_US = 2.5e6
MAX_RANK = 512  # of kernels/_launch.py, which imports triton


def thin_products(x, weights, others, As, Bs, thin_dtype, has_dropout) -> ModuleType:
    """ops/eager.py or kernels/thin.py for one call.  ``others``: base outputs [..., N] or gradients [M, N], or None.

    What the kernels cannot do is done by eager, counted in ``stats()`` and refused by ``strict()``.
    """
    first = next(t for t in (x, *others, *As) if t is not None)
    if backend(first.device)[0] == "eager" or not As:
        return eager
    wide = [t for t in (x, *others) if t is not None]
    widths = [t.shape[-1] if weight is None else weight.shape[0] for t, weight in zip(others, weights, strict=True)]
    rows = wide[0].numel() // max(wide[0].shape[-1], 1)
    if rows == 0 or 0 in widths:
        return eager
    reason = _unsupported(wide, As, thin_dtype)
    if reason is not None:
        _stats.op_fell_back(reason)
        return eager
    if not choice(first.device).forced and prefers_eager(
        rows, As[0].shape[1], sum(widths), wide[0].dtype, (*As, *Bs), thin_dtype, has_dropout
    ):
        return eager
    from ..kernels import thin

    return thin


def svf_products(x, other, A, B, thin_dtype):
    """The thin products of one SVF call: kernels/svf.py, or Eager or Wide (beyond MAX_RANK) of ops/svf_impl.py.

    ``other``: a base output, or the saved x of a backward, or None.
    """
    from .svf_impl import Eager, Wide

    if backend(x.device)[0] == "eager" or x.shape[0] == 0:
        return Eager
    wide = [t for t in (x, other) if t is not None]
    reason = _unsupported(wide, [A[:MAX_RANK]], thin_dtype)
    if reason is not None:
        _stats.op_fell_back(reason)
        return Eager
    if not choice(x.device).forced and prefers_eager(
        x.shape[0], A.shape[1], B.shape[0], x.dtype, (A, B), thin_dtype, False
    ):
        return Eager
    if A.shape[0] > MAX_RANK:
        return Wide
    from ..kernels import svf

    return svf


def dora_products(wide, A, thin_dtype):
    """The passes of one DoRA call over ``wide`` (x, dY or the weight): kernels/dora.py, or Eager of ops/dora_impl.py."""
    from .dora_impl import Eager

    if backend(wide.device)[0] == "eager" or wide.numel() == 0:
        return Eager
    reason = _unsupported([wide], [A], thin_dtype)
    if reason is not None:
        _stats.op_fell_back(reason)
        return Eager
    from ..kernels import dora

    return dora


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


def _unsupported(wide, As, thin_dtype) -> str | None:
    for t in wide:
        if t.dtype is torch.float64:
            return "float64: the kernels take fp16, bf16 and fp32"
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return "the last dim of an activation is not contiguous"
        if thin_dtype not in (t.dtype, torch.float32):
            return f"a base output of {t.dtype} beside adapters in {thin_dtype}"
    if thin_dtype is torch.float64:
        return "float64: the kernels take fp16, bf16 and fp32"
    if max(A.shape[0] for A in As) > MAX_RANK:
        return f"a rank above {MAX_RANK}"
    return None
