"""The backward of act_expand.py and of what stands before and behind it, in one pass.

    dh_s = w_s (H_s + scale2 D_s A_e)        H = dout W2 by row, D = dout B2: what the second product's adapter adds
    h    = act(G + scale S B_eᵀ + bias_e)    made again
    dG   = act'(...) dh,   dots_s = <H_s, h_s>: the routing weights' gradient, but for the adapter's part

H [S, I], G [S, N], S [S, R], B [E, N, R], D [S, R2], A [E, R2, I] (factors in any strides), w [S] by place in the choices'
order -> dG [S, N], h [S, I] (for the second factors' gradients), dots fp32 [S]: one partial per block of columns, then
torch's sum.
Floor: reads of H and G, writes of dG and h: 3 S N itemsize bytes; 70 us at 32768 x 1536 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/experts_layer.py's backward and activations.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _groups
from ._act import act as activate
from ._act import act_backward as _act_backward
from ._groups import tile_of
from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, pad_rank, planned, precision, run
from ._tile import cast, dot
from .act_expand import check_act, columns, strides, thin_tile
from .combine_expand import check_routing

MAX_BLOCK_R = {"same": 64, "split": 32, "fp32": 16}  # larger ranks are summed block by block


@dataclass(frozen=True)
class Config:
    block_m: int = 32
    block_i: int = 64
    num_warps: int = 4


def pick_config(rows: int, experts: int, block_r: int, kind: str) -> Config:
    """Pure; chosen so that nothing spills, no threshold has been measured yet."""
    block_m = min(16 if kind == "split" and block_r > 16 else 32, _groups.block_m(rows, experts))
    return Config(block_m, 64 if kind == "same" or (kind == "split" and block_r <= 16) else 32)


@triton.jit
def _act_backward_kernel(
    h0_ptr,
    g_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    d_ptr,
    a_ptr,
    w_ptr,
    order_ptr,
    ends_ptr,
    dg_ptr,
    h_ptr,
    dots_ptr,
    scale,
    scale2,
    alpha,
    limit,
    N,
    width,
    E,
    rank,
    step,
    apart,
    stride_gm,
    stride_sm,
    stride_be,
    stride_bn,
    stride_br,
    rank2,
    stride_hm,
    stride_dm,
    stride_ae,
    stride_ar,
    stride_ai,
    rows,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PADDED: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    R2_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = tile_of(ends_ptr, tl.program_id(0), E, BLOCK_M, E_PADDED)
    expert = expert.to(tl.int64)
    offs_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_m, mask_i = offs_m < end, offs_i < width
    mask = mask_m[:, None] & mask_i[None, :]

    cols = offs_i * step
    gate = tl.load(g_ptr + offs_m[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    gate += thin_tile(
        s_ptr, b_ptr, bias_ptr, scale, expert, offs_m, cols, mask_m, mask_i, N, rank, stride_sm, stride_be, stride_bn,
        stride_br, BLOCK_M, BLOCK_I, BLOCK_R, R_PADDED, DTYPE, PRECISION,
    )  # fmt: skip
    up = gate
    if GATED:
        up_cols = cols + apart
        up = tl.load(g_ptr + offs_m[:, None] * stride_gm + up_cols[None, :], mask=mask, other=0.0).to(tl.float32)
        up += thin_tile(
            s_ptr, b_ptr, bias_ptr, scale, expert, offs_m, up_cols, mask_m, mask_i, N, rank, stride_sm, stride_be, stride_bn,
            stride_br, BLOCK_M, BLOCK_I, BLOCK_R, R_PADDED, DTYPE, PRECISION,
        )  # fmt: skip
    h = activate(gate, up, alpha, limit, NAME, GATED)
    dh = tl.load(h0_ptr + offs_m[:, None] * stride_hm + offs_i[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(
        dots_ptr + tl.program_id(1).to(tl.int64) * rows + offs_m, tl.sum(tl.where(mask, dh * h, 0.0), 1), mask=mask_m
    )
    if d_ptr is not None:
        acc = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for r in range(0, R2_PADDED, BLOCK_R2):
            offs_r = r + tl.arange(0, BLOCK_R2)
            mask_r = offs_r < rank2
            d = tl.load(
                d_ptr + offs_m[:, None] * stride_dm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
            )
            a = tl.load(
                a_ptr + expert * stride_ae + offs_r[:, None].to(tl.int64) * stride_ar + offs_i[None, :] * stride_ai,
                mask=mask_r[:, None] & mask_i[None, :],
                other=0.0,
            )
            acc = dot(d, cast(a, DTYPE), acc, PRECISION)
        dh += acc * tl.cast(scale2, tl.float32)
    place = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    dh *= tl.load(w_ptr + place, mask=mask_m, other=0.0).to(tl.float32)[:, None]
    dgate, dup = _act_backward(gate, up, dh, alpha, limit, NAME, GATED)
    dg = dg_ptr + offs_m[:, None] * N + cols[None, :]
    tl.store(dg, cast(dgate, dg_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(dg + apart, cast(dup, dg_ptr.dtype.element_ty), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + offs_m[:, None] * width + offs_i[None, :], cast(h, h_ptr.dtype.element_ty), mask=mask)


class ActBackward(NamedTuple):
    blocks: int  # of columns: the partials of dots
    launch: Plan


@planned
def plan(
    H: Layout,
    G: Layout,
    S: Layout | None,
    B: Layout | None,
    bias: Layout | None,
    D: Layout | None,
    A: Layout | None,
    w: Layout,
    order: Layout,
    ends: Layout,
    name: str,
    gated: bool,
    interleaved: bool,
    need_h: bool,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> ActBackward | None:
    """Of :func:`act_backward`; None where G is empty."""
    check_act("act_backward", G, S, B, bias, ends, name, gated)
    (rows, N), (E,) = G.shape, ends.shape
    width = N // 2 if gated else N
    if H.shape != (rows, width) or H.dtype is not G.dtype or (H.strides[1] != 1 and width > 1):
        raise ValueError(f"act_backward: expected H [{rows}, {width}] in {G.dtype}, got {H.dtype} {list(H.shape)}")
    thin = G.dtype if S is None and D is None else (D if S is None else S).dtype
    if D is not None and (D.shape[0] != rows or D.dtype is not thin or A is None or A.shape != (E, D.shape[1], width)):
        raise ValueError(f"act_backward: D {list(D.shape)} and A do not fit H [{rows}, {width}] of {E} experts")
    check("act_backward", H, thin, [t for t in (D, A) if t is not None], [] if D is None else [D.shape[1]])
    check_routing("act_backward", rows, order, ends)
    if w.shape != (rows,) or not w.contiguous:
        raise ValueError(f"act_backward: expected contiguous weights [{rows}], got {list(w.shape)}")
    if G.numel == 0:
        return None
    gpu, how = gpu or GPU.of(G.device), dot_kind(G.dtype, thin)
    rank, rank2 = (0 if t is None else t.shape[1] for t in (S, D))
    block_r, block_r2 = (min(MAX_BLOCK_R[how], pad_rank(max(r, 1))) for r in (rank, rank2))
    c = config or pick_config(rows, E, max(block_r, block_r2), how)
    blocks = triton.cdiv(width, c.block_i)
    new = G.device
    launch = Plan(
        _act_backward_kernel,
        (_groups.capacity(rows, E, c.block_m), blocks),
        (
            H,
            G,
            S,
            B,
            bias,
            D,
            A,
            w,
            order,
            ends,
            Layout.new((rows, N), G.dtype, new),
            Layout.new((rows, width), G.dtype, new) if need_h else None,
            Layout.new((blocks, rows), torch.float32, new),
            float,
            float,
            float,
            float,
        ),
        (
            N,
            width,
            E,
            rank,
            *columns(width, interleaved),
            *strides(G, S, B),
            rank2,
            H.strides[0],
            0 if D is None else D.strides[0],
            *((0, 0, 0) if A is None else A.strides),
            rows,
        ),
        dict(
            NAME=name,
            GATED=gated,
            BLOCK_M=c.block_m,
            BLOCK_I=c.block_i,
            BLOCK_R=block_r,
            R_PADDED=triton.cdiv(max(rank, 1), block_r) * block_r,
            BLOCK_R2=block_r2,
            R2_PADDED=triton.cdiv(max(rank2, 1), block_r2) * block_r2,
            E_PADDED=triton.next_power_of_2(E),
            DTYPE=DTYPES[thin],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
        ),
    )
    return ActBackward(blocks, launch)


def act_backward(
    H: torch.Tensor,
    G: torch.Tensor,
    S: torch.Tensor | None,
    B: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    D: torch.Tensor | None,
    A: torch.Tensor | None,
    scale2: float,
    w: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    act,
    full: bool,
    need_h: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dG, h or None, dots).  act: an Activation of lowrank/ops/activations.py.  Rows of no expert are zeros unless ``full``
    says that there are none.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        *(None if t is None else layout(t) for t in (H, G, S, B, bias, D, A, w, order, ends)),
        act.name,
        act.gated,
        act.interleaved,
        need_h,
        torch.get_float32_matmul_precision(),
        config,
    )
    make = torch.empty if full else torch.zeros
    dG = make(G.shape, dtype=G.dtype, device=G.device)
    h = make(H.shape, dtype=G.dtype, device=G.device) if need_h else None
    if p is None:
        return dG, h, G.new_zeros(G.shape[0], dtype=torch.float32)
    dots = make((p.blocks, G.shape[0]), dtype=torch.float32, device=G.device)
    run(p.launch, H, G, S, B, bias, D, A, w, order, ends, dG, h, dots, scale, scale2, act.alpha, act.limit)
    return dG, h, dots.sum(0)
