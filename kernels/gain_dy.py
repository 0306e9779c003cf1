"""gain ∘ dY over [M, N], with Σ_t dY ∘ v and Σ_t dY on the way: the backward of y = gain ∘ v + bias by columns.

dY, v [M, N] (last dim contiguous), gain fp32 [N] -> scaled [M, N] in dY's dtype, sums fp32 [N].  With a bias [N], which is
part of v, Σ_t dY ∘ (v - bias).  Sums over rows: one partial per block of rows, then _reduce.py; fixed order.
Floor: 3 M N itemsize bytes (read dY and v, write the product); 47 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/dora_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _reduce
from ._launch import DTYPES, Layout, Plan, layout, planned, run
from ._tile import cast


@dataclass(frozen=True)
class Config:
    block_m: int = 32
    block_n: int = 128
    num_warps: int = 4


def pick_config(M: int) -> Config:
    """Pure; no threshold has been measured yet."""
    return Config(16 if M <= 16 else 32)


@triton.jit
def _gain_dy_kernel(
    dy_ptr,
    v_ptr,
    bias_ptr,
    gain_ptr,
    out_ptr,
    dots_ptr,
    sums_ptr,
    M,
    N,
    stride_dym,
    stride_vm,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block_m = tl.program_id(0).to(tl.int64)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if dots_ptr is not None:
        v = tl.load(v_ptr + offs_m[:, None] * stride_vm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            v -= tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        tl.store(dots_ptr + block_m * N + offs_n, tl.sum(dy * v, 0), mask=mask_n)
    if sums_ptr is not None:
        tl.store(sums_ptr + block_m * N + offs_n, tl.sum(dy, 0), mask=mask_n)
    if out_ptr is not None:
        gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
        out = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :]
        tl.store(out, cast(dy * gain[None, :], out_ptr.dtype.element_ty), mask=mask)


class GainDY(NamedTuple):
    partials: tuple[int, int]  # [blocks of rows, N]
    launch: Plan
    total: Plan


@planned
def plan(
    dY: Layout,
    gain: Layout,
    v: Layout | None,
    need_scaled: bool,
    need_sum: bool,
    bias: Layout | None,
    config: Config | None = None,
) -> GainDY | None:
    """Of :func:`gain_dy`; None where dY is empty or nothing is asked for."""
    M, N = dY.shape
    for t in (dY, v):
        if t is not None and (t.dtype not in DTYPES or t.shape != (M, N) or (t.strides[1] != 1 and N > 1)):
            raise ValueError(
                f"gain_dy: expected [{M}, {N}] fp16, bf16 or fp32 with a contiguous last dim, got {t.dtype}"
                f" {list(t.shape)} {t.strides}"
            )
    if gain.shape != (N,) or gain.dtype is not torch.float32 or not gain.contiguous:
        raise ValueError(f"gain_dy: expected a contiguous fp32 gain [{N}], got {gain.dtype} {list(gain.shape)}")
    if bias is not None and (bias.shape != (N,) or not bias.contiguous):
        raise ValueError(f"gain_dy: expected a contiguous bias [{N}], got {list(bias.shape)} {bias.strides}")
    if not (M and N and (need_scaled or need_sum or v is not None)):
        return None
    c = config or pick_config(M)
    grid = triton.cdiv(M, c.block_m), triton.cdiv(N, c.block_n)
    scaled = Layout.new((M, N), dY.dtype, dY.device) if need_scaled else None
    partials = Layout.new((grid[0], N), torch.float32, dY.device)
    launch = Plan(
        _gain_dy_kernel,
        grid,
        (dY, v, bias, gain, scaled, partials if v is not None else None, partials if need_sum else None),
        (M, N, dY.strides[0], 0 if v is None else v.strides[0], N),
        dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps),
    )
    total = _reduce.plan(grid[0], N, (Layout.new((1, N), torch.float32, dY.device),))
    return GainDY(partials.shape, launch, total)


def gain_dy(
    dY: torch.Tensor,
    gain: torch.Tensor,
    v: torch.Tensor | None,
    need_scaled: bool,
    need_sum: bool,
    bias: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(gain ∘ dY if needed, Σ_t dY ∘ (v - bias) if v is given, Σ_t dY if needed).

    Raises: ValueError before anything is launched.
    """
    p = plan(layout(dY), layout(gain), layout(v), need_scaled, need_sum, layout(bias), config)
    scaled = dY.new_empty(dY.shape) if need_scaled else None
    wanted = v is not None, need_sum
    if p is None:
        return scaled, *(gain.new_zeros(dY.shape[1]) if w else None for w in wanted)
    partials = [gain.new_empty(p.partials) if w else None for w in wanted]
    run(p.launch, dY, v, bias, gain, scaled, *partials)
    totals = [gain.new_empty(dY.shape[1]) if w else None for w in wanted]
    for part, total in zip(partials, totals, strict=True):
        if total is not None:
            run(p.total, part, (total,))
    return scaled, *totals
