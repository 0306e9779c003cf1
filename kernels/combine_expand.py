"""U[order_s] = w_s (Z_s + scale S_s B_eᵀ + bias_e): experts' rows with their adapters, weighted, back in the choices' order.

Z [S, N] sorted by expert, S [S, R] and B [E, N, R] (any strides), bias [E, N], order int64 [S] (where each row goes), w [S] by
that place -> U [S, N], rounded once; the sum over a token's choices is torch's.  Backward of the gather is the same with
S = dS, B = Aᵀ and no w.  Rows behind the last end are not written.
Floor: one read of Z and one write of U, 2 S N itemsize bytes, which a frozen layer's weighting and sorting back take twice;
62 us at 32768 x 2048 in bf16 at 4.3 TB/s.
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

MAX_BLOCK_R = {"same": 64, "split": 32, "fp32": 16}  # larger ranks are summed block by block


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_n: int = 128
    num_warps: int = 4


def pick_config(rows: int, experts: int, rank: int, kind: str) -> Config:
    """Pure; chosen so that nothing spills, no threshold has been measured yet."""
    block_m = min(32 if kind == "fp32" and rank > 16 else 64, _groups.block_m(rows, experts))
    return Config(block_m, 128 if kind == "same" or rank <= 16 else 64, 8 if block_m == 64 else 4)


@triton.jit
def _combine_expand_kernel(
    z_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    w_ptr,
    order_ptr,
    ends_ptr,
    u_ptr,
    scale,
    N,
    E,
    rank,
    stride_zm,
    stride_sm,
    stride_be,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, E_PADDED)
    expert = expert.to(tl.int64)
    offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < end, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if s_ptr is not None:
        for r in range(0, R_PADDED, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            s = tl.load(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
            )
            b = tl.load(
                b_ptr + expert * stride_be + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            y = dot(s, cast(b, DTYPE).T, y, PRECISION)
        y *= tl.cast(scale, tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y += tl.load(z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    place = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    if w_ptr is not None:
        y *= tl.load(w_ptr + place, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    tl.store(u_ptr + place[:, None] * N + offs_n[None, :], cast(y, u_ptr.dtype.element_ty), mask=mask)


@planned
def plan(
    Z: Layout,
    S: Layout | None,
    B: Layout | None,
    bias: Layout | None,
    w: Layout | None,
    order: Layout,
    ends: Layout,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`combine_expand`; None where Z is empty."""
    (rows, N), (E,) = Z.shape, ends.shape
    thin = Z.dtype if S is None else S.dtype
    if S is not None and (S.shape[0] != rows or B is None or B.shape != (E, N, S.shape[1])):
        raise ValueError(f"combine_expand: S {list(S.shape)} and B do not fit Z [{rows}, {N}] of {E} experts")
    check("combine_expand", Z, thin, [t for t in (S, B) if t is not None], [] if S is None else [S.shape[1]])
    check_routing("combine_expand", rows, order, ends)
    if bias is not None and (bias.shape != (E, N) or not bias.contiguous):
        raise ValueError(f"combine_expand: expected a contiguous bias [{E}, {N}], got {list(bias.shape)}")
    if w is not None and (w.shape != (rows,) or not w.contiguous):
        raise ValueError(f"combine_expand: expected contiguous weights [{rows}], got {list(w.shape)}")
    if S is not None and S.strides[1] != 1 and S.shape[1] > 1:
        raise ValueError(f"combine_expand: the last dim of S must be contiguous, got strides {S.strides}")
    if Z.numel == 0:
        return None
    gpu, how = gpu or GPU.of(Z.device), dot_kind(Z.dtype, thin)
    rank = 0 if S is None else S.shape[1]
    block_r = min(MAX_BLOCK_R[how], pad_rank(max(rank, 1)))
    c = config or pick_config(rows, E, rank, how)
    return Plan(
        _combine_expand_kernel,
        (_groups.capacity(rows, E, c.block_m), triton.cdiv(N, c.block_n)),
        (Z, S, B, bias, w, order, ends, Layout.new((rows, N), Z.dtype, Z.device), float),
        (N, E, rank, Z.strides[0], 0 if S is None else S.strides[0], *((0, 0, 0) if B is None else B.strides)),
        dict(
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=block_r,
            R_PADDED=triton.cdiv(max(rank, 1), block_r) * block_r,
            E_PADDED=triton.next_power_of_2(E),
            DTYPE=DTYPES[thin],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
        ),
    )


def check_routing(name: str, rows: int, order: Layout, ends: Layout) -> None:
    if order.shape != (rows,) or order.dtype is not torch.int64 or not order.contiguous:
        raise ValueError(f"{name}: expected a contiguous int64 order [{rows}], got {order.dtype} {list(order.shape)}")
    if len(ends.shape) != 1 or ends.dtype is not torch.int32 or not ends.contiguous:
        raise ValueError(f"{name}: expected contiguous int32 ends [E], got {ends.dtype} {list(ends.shape)}")


def combine_expand(
    Z: torch.Tensor,
    S: torch.Tensor | None,
    B: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    w: torch.Tensor | None,
    order: torch.Tensor,
    ends: torch.Tensor,
    full: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """U [S, N] in Z's dtype; rows of no expert are zeros unless ``full`` says that there are none.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        *(None if t is None else layout(t) for t in (Z, S, B, bias, w, order, ends)),
        torch.get_float32_matmul_precision(),
        config,
    )
    U = torch.empty_like(Z, memory_format=torch.contiguous_format) if full else Z.new_zeros(Z.shape)
    if p is not None:
        run(p, Z, S, B, bias, w, order, ends, U, scale)
    return U
