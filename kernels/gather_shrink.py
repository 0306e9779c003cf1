"""X_s = x[order_s // choices] and S_s = X_s A_eᵀ: each choice's row, sorted by expert, and its low-rank part on the way.

x [T, K] (last dim contiguous), A [E, R, K] (any strides), order int64 [S] (token times choices, and the choice) -> X [S, K],
and S [S, W] in the factors' dtype, zeros from column R on (W: what grouped_mm takes).  In backward x is dout and A is Bᵀ.  Rows
behind the last end are not written.
Floor: one read of x and one write of X, which any layer's gather makes; 31 us at 4096 tokens, 8 choices, K 2048 in bf16 at
4.3 TB/s.
Eager form: lowrank/ops/experts_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _groups
from ._groups import tile_of
from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, pad_rank, planned, precision, run
from ._tile import cast, dot
from .combine_expand import check_routing

MAX_RANK = 64  # all of S's columns are one accumulator


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_k: int = 64
    num_warps: int = 4


def pick_config(rows: int, experts: int, block_r: int, kind: str) -> Config:
    """Pure; chosen so that nothing spills, no threshold has been measured yet."""
    wide = block_r > 32
    block_m = min(64 if kind == "same" else 32, _groups.block_m(rows, experts))
    return Config(block_m, (64 if wide else 128) if kind == "same" else 32 if wide else 64)


@triton.jit
def _gather_shrink_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    s_ptr,
    K,
    E,
    rank,
    width,
    choices,
    stride_xm,
    stride_ae,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, E_PADDED)
    expert = expert.to(tl.int64)
    offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    token = tl.load(order_ptr + offs_m, mask=mask_m, other=0) // choices
    offs_r = tl.arange(0, R_PADDED)
    acc = tl.zeros((BLOCK_M, R_PADDED), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + token[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], x, mask=mask)
        if a_ptr is not None:
            a = tl.load(
                a_ptr
                + expert * stride_ae
                + offs_r[:, None].to(tl.int64) * stride_ar
                + offs_k[None, :].to(tl.int64) * stride_ak,
                mask=(offs_r < rank)[:, None] & (offs_k < K)[None, :],
                other=0.0,
            )
            acc = dot(x, cast(a, DTYPE).T, acc, PRECISION)
    if a_ptr is not None:
        s = s_ptr + offs_m[:, None] * width + offs_r[None, :]
        tl.store(s, cast(acc, DTYPE), mask=mask_m[:, None] & (offs_r < width)[None, :])


@planned
def plan(
    x: Layout,
    A: Layout | None,
    order: Layout,
    ends: Layout,
    choices: int,
    thin: torch.dtype,
    width: int,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`gather_shrink`; None where there is no row."""
    (T, K), (E,), rows = x.shape, ends.shape, order.shape[0]
    rank = 0 if A is None else A.shape[1]
    if A is not None and A.shape != (E, rank, K):
        raise ValueError(f"gather_shrink: A {list(A.shape)} does not fit x [{T}, {K}] and {E} experts")
    check("gather_shrink", x, thin, [] if A is None else [A], [] if A is None else [rank])
    if rank > MAX_RANK or not rank <= width <= max(MAX_RANK, 16):
        raise ValueError(f"gather_shrink: expected a rank of at most {MAX_RANK}, got {rank} in {width} columns")
    check_routing("gather_shrink", rows, order, ends)
    if choices < 1 or rows != T * choices:
        raise ValueError(f"gather_shrink: expected order [{T} x {choices}], got {list(order.shape)}")
    if rows == 0 or K == 0:
        return None
    gpu, how = gpu or GPU.of(x.device), dot_kind(x.dtype, thin)
    padded = pad_rank(max(width, 1))
    c = config or pick_config(rows, E, padded, how)
    return Plan(
        _gather_shrink_kernel,
        (_groups.capacity(rows, E, c.block_m),),
        (
            x,
            A,
            order,
            ends,
            Layout.new((rows, K), x.dtype, x.device),
            None if A is None else Layout.new((rows, width), thin, x.device),
        ),
        (K, E, rank, width, choices, x.strides[0], *((0, 0, 0) if A is None else A.strides)),
        dict(
            BLOCK_M=c.block_m,
            BLOCK_K=c.block_k,
            R_PADDED=padded,
            E_PADDED=triton.next_power_of_2(E),
            DTYPE=DTYPES[thin],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
        ),
    )


def gather_shrink(
    x: torch.Tensor,
    A: torch.Tensor | None,
    order: torch.Tensor,
    ends: torch.Tensor,
    choices: int,
    thin: torch.dtype,
    width: int,
    full: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(X, S or None).  Rows of no expert are zeros unless ``full`` says that there are none.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        layout(x),
        None if A is None else layout(A),
        layout(order),
        layout(ends),
        choices,
        thin,
        width,
        torch.get_float32_matmul_precision(),
        config,
    )
    make = torch.empty if full else torch.zeros
    X = make((order.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    S = None if A is None else make((order.shape[0], width), dtype=thin, device=x.device)
    if p is not None:
        run(p, x, A, order, ends, X, S)
    return X, S
