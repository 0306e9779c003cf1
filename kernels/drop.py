"""out = t where its keep bit is 1, else 0; or added to what ``out`` holds.

t [M, K] (last dim contiguous), keep int32 [M, ceil(K / 32)] of shrink.py's masks -> [M, K] in t's dtype.
Floor: 2 M K itemsize bytes (3 when adding) + M K / 8; 32 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/dora_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, Layout, Plan, layout, planned, run
from ._tile import cast, unpack


@dataclass(frozen=True)
class Config:
    block_m: int = 16
    block_k: int = 256
    num_warps: int = 4


@triton.jit
def _drop_kernel(
    t_ptr,
    keep_ptr,
    out_ptr,
    M,
    K,
    stride_tm,
    stride_om,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_b = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    mask_m, row_bytes = offs_m < M, 4 * tl.cdiv(K, 32)
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    keep = tl.load(
        keep_ptr.to(tl.pointer_type(tl.uint8)) + offs_m[:, None] * row_bytes + offs_b[None, :],
        mask=mask_m[:, None] & (offs_b < row_bytes)[None, :],
        other=0,
    )
    t = tl.load(t_ptr + offs_m[:, None] * stride_tm + offs_k[None, :], mask=mask, other=0.0)
    t = tl.where(unpack(keep.to(tl.int32), BLOCK_M, BLOCK_K), t, 0.0).to(t.dtype)
    out = out_ptr + offs_m[:, None] * stride_om + offs_k[None, :]
    if ADD:
        t = cast(t.to(tl.float32) + tl.load(out, mask=mask, other=0.0).to(tl.float32), t.dtype)
    tl.store(out, t, mask=mask)


@planned
def plan(t: Layout, keep: Layout, out: Layout | None, config: Config | None = None) -> Plan | None:
    """Of :func:`drop`; None where t is empty."""
    M, K = t.shape
    for operand in (t, out or t):
        if operand.dtype not in DTYPES or operand.dtype is not t.dtype or (operand.strides[1] != 1 and K > 1):
            raise ValueError(
                f"drop: expected fp16, bf16 or fp32, last dim contiguous, got {operand.dtype} {operand.strides}"
            )
    if keep.shape != (M, triton.cdiv(K, 32)) or keep.dtype is not torch.int32 or not keep.contiguous:
        raise ValueError(
            f"drop: expected contiguous int32 keep bits [{M}, {triton.cdiv(K, 32)}], got {list(keep.shape)}"
        )
    if out is not None and out.shape != (M, K):
        raise ValueError(f"drop: expected out [{M}, {K}], got {list(out.shape)}")
    if not t.numel:
        return None
    c, to = config or Config(), out or Layout.new((M, K), t.dtype, t.device)
    return Plan(
        _drop_kernel,
        (triton.cdiv(M, c.block_m), triton.cdiv(K, c.block_k)),
        (t, keep, to),
        (M, K, t.strides[0], to.strides[0]),
        dict(ADD=out is not None, BLOCK_M=c.block_m, BLOCK_K=c.block_k, num_warps=c.num_warps),
    )


def drop(
    t: torch.Tensor, keep: torch.Tensor, out: torch.Tensor | None = None, config: Config | None = None
) -> torch.Tensor:
    """t where kept; into a new tensor, or added to ``out``.

    Raises: ValueError before anything is launched.
    """
    p = plan(layout(t), layout(keep), layout(out), config)
    out = t.new_empty(t.shape) if out is None else out
    if p is not None:
        run(p, t, keep, out)
    return out
