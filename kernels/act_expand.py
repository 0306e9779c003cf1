"""h = act(G + scale S_s B_eᵀ + bias_e): the adapter of an expert's first product is added inside its activation.

G [S, N] sorted by expert (gate over up, beside it, or no gate), S [S, R], B [E, N, R] (any strides), bias [E, N] -> h [S, N / 2
or N] in G's dtype, rounded once; G stays what it is.  Rows behind the last end are not written.
Floor: one read of G and one write of h, which the activation makes anyway; 35 us at 32768 x 1536 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/experts_eager.py and activations.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _groups
from ._act import act
from ._groups import tile_of
from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, pad_rank, planned, precision, run
from ._tile import cast, dot

NAMES = ("silu", "gelu", "gelu_tanh", "relu2", "clamped")
MAX_BLOCK_R = {"same": 64, "split": 32, "fp32": 16}  # larger ranks are summed block by block


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_i: int = 64
    num_warps: int = 4


def pick_config(rows: int, experts: int, block_r: int, kind: str) -> Config:
    """Pure; chosen so that nothing spills, no threshold has been measured yet."""
    block_m = _groups.block_m(rows, experts)
    return Config(block_m, 64 if kind == "same" or block_r <= 16 else 32, 8 if block_m == 64 else 4)


@triton.jit
def thin_tile(
    s_ptr, b_ptr, bias_ptr, scale, expert, offs_m, cols, mask_m, mask_i, N, rank, stride_sm, stride_be, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, R_PADDED: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_I]: scale S B_eᵀ + bias_e at these columns."""
    y = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    if s_ptr is not None:
        for r in range(0, R_PADDED, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            s = tl.load(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
            )
            b = tl.load(
                b_ptr + expert * stride_be + cols[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
                mask=mask_i[:, None] & mask_r[None, :],
                other=0.0,
            )
            y = dot(s, cast(b, DTYPE).T, y, PRECISION)
        y *= tl.cast(scale, tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + cols, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _act_expand_kernel(
    g_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    ends_ptr,
    h_ptr,
    scale,
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
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PADDED: tl.constexpr,
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
        cols += apart
        up = tl.load(g_ptr + offs_m[:, None] * stride_gm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        up += thin_tile(
            s_ptr, b_ptr, bias_ptr, scale, expert, offs_m, cols, mask_m, mask_i, N, rank, stride_sm, stride_be, stride_bn,
            stride_br, BLOCK_M, BLOCK_I, BLOCK_R, R_PADDED, DTYPE, PRECISION,
        )  # fmt: skip
    h = act(gate, up, alpha, limit, NAME, GATED)
    tl.store(h_ptr + offs_m[:, None] * width + offs_i[None, :], cast(h, h_ptr.dtype.element_ty), mask=mask)


@planned
def plan(
    G: Layout,
    S: Layout | None,
    B: Layout | None,
    bias: Layout | None,
    ends: Layout,
    name: str,
    gated: bool,
    interleaved: bool,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`act_expand`; None where G is empty."""
    check_act("act_expand", G, S, B, bias, ends, name, gated)
    (rows, N), (E,) = G.shape, ends.shape
    if G.numel == 0:
        return None
    thin = G.dtype if S is None else S.dtype
    gpu, how, rank = gpu or GPU.of(G.device), dot_kind(G.dtype, thin), 0 if S is None else S.shape[1]
    block_r = min(MAX_BLOCK_R[how], pad_rank(max(rank, 1)))
    c, width = config or pick_config(rows, E, block_r, how), N // 2 if gated else N
    h = Layout.new((rows, width), G.dtype, G.device)
    return Plan(
        _act_expand_kernel,
        (_groups.capacity(rows, E, c.block_m), triton.cdiv(width, c.block_i)),
        (G, S, B, bias, ends, h, float, float, float),
        (N, width, E, rank, *columns(width, interleaved), *strides(G, S, B)),
        dict(
            NAME=name,
            GATED=gated,
            BLOCK_M=c.block_m,
            BLOCK_I=c.block_i,
            BLOCK_R=block_r,
            R_PADDED=triton.cdiv(max(rank, 1), block_r) * block_r,
            E_PADDED=triton.next_power_of_2(E),
            DTYPE=DTYPES[thin],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
        ),
    )


def columns(width: int, interleaved: bool) -> tuple[int, int]:
    """(from one gate to the next, from a gate to its up)."""
    return (2, 1) if interleaved else (1, width)


def strides(G: Layout, S: Layout | None, B: Layout | None) -> tuple[int, ...]:
    return (G.strides[0], 0 if S is None else S.strides[0], *((0, 0, 0) if B is None else B.strides))


def check_act(kernel: str, G: Layout, S, B, bias, ends: Layout, name: str, gated: bool) -> None:
    """Raise ValueError on what does not fit G [S, N]."""
    (rows, N), (E,) = G.shape, ends.shape
    if name not in NAMES or (name == "clamped" and not gated) or (gated and N % 2):
        raise ValueError(
            f"{kernel}: expected one of {', '.join(NAMES)} of an even number of columns, got {name!r} of {N}"
        )
    if S is not None and (S.shape[0] != rows or B is None or B.shape != (E, N, S.shape[1])):
        raise ValueError(f"{kernel}: S {list(S.shape)} and B do not fit G [{rows}, {N}] of {E} experts")
    thin = G.dtype if S is None else S.dtype
    check(kernel, G, thin, [t for t in (S, B) if t is not None], [] if S is None else [S.shape[1]])
    if S is not None and S.strides[1] != 1 and S.shape[1] > 1:
        raise ValueError(f"{kernel}: the last dim of S must be contiguous, got strides {S.strides}")
    if ends.dtype is not torch.int32 or not ends.contiguous:
        raise ValueError(f"{kernel}: expected contiguous int32 ends [E], got {ends.dtype}")
    if bias is not None and (bias.shape != (E, N) or not bias.contiguous):
        raise ValueError(f"{kernel}: expected a contiguous bias [{E}, {N}], got {list(bias.shape)}")


def act_expand(
    G: torch.Tensor,
    S: torch.Tensor | None,
    B: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
    act,
    full: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """h.  act: an Activation of lowrank/ops/activations.py.  Rows of no expert are zeros unless ``full`` says there are none.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        *(None if t is None else layout(t) for t in (G, S, B, bias, ends)),
        act.name,
        act.gated,
        act.interleaved,
        torch.get_float32_matmul_precision(),
        config,
    )
    shape = (G.shape[0], act.width(G.shape[1]))
    h = G.new_empty(shape) if full else G.new_zeros(shape)
    if p is not None:
        run(p, G, S, B, bias, ends, h, scale, act.alpha, act.limit)
    return h
