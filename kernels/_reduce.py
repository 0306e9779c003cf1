"""out_j = sum over p of partials[p]: the second half of every split sum.  Fixed order, no atomics: the same bits every time.

partials fp32 [P, L], whose L columns are the elements of the outputs, one output after another.
Floor: 4 P L bytes read, mostly out of the L2 that the first half has just filled.
"""

import torch
import triton
import triton.language as tl

from ._launch import Layout, Plan, planned
from ._tile import cast

BLOCK = 1024


@triton.jit
def _reduce_kernel(partials_ptr, out_ptrs, rows, columns, strides, P, stride_p, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.cast(0, tl.int64)
    for j in tl.static_range(len(out_ptrs)):
        size = tl.cast(rows[j], tl.int64) * columns[j]
        if tl.program_id(1) == j:
            mask = offs < size
            acc = tl.zeros((BLOCK,), tl.float32)
            for p in range(P):
                acc += tl.load(partials_ptr + p * stride_p + first + offs, mask=mask, other=0.0)
            out = out_ptrs[j] + offs // columns[j] * strides[j] + offs % columns[j]
            tl.store(out, cast(acc, out_ptrs[j].dtype.element_ty), mask=mask)
        first += size


@planned
def plan(P: int, stride: int, outs: tuple[Layout, ...]) -> Plan:
    """Of filling the matrices ``outs`` (last dim contiguous), in order, from the columns of fp32 partials [P, L]."""
    partials = Layout((P, stride), (stride, 1), torch.float32, outs[0].device)
    return Plan(
        _reduce_kernel,
        (triton.cdiv(max(out.numel for out in outs), BLOCK), len(outs)),
        (partials, outs),
        tuple(zip(*((*out.shape, out.strides[0]) for out in outs), strict=True)) + (P, stride),
        dict(BLOCK=BLOCK),
    )
