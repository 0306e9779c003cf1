"""Y = start + sum over j of scale_j drop_j(S_j B_jᵀ): the prefill that the big GEMM adds to in place.

S_j [M, R_j], B_j [N, R_j] (any strides) -> Y [M, N], rounded once.  scale_j: a float, times a 0-d tensor, or times a
tensor [R_j] (one scale per column of S); or, for a single S, mix @ scales with mix [M, E] and scales [E, R] (one scale per
row and column, never in memory; svf_scale.py).  start: nothing, a bias [N] or a matrix [M, N]; with a gain [N] (DoRA) it
is gain ∘ matrix + bias, and with a base [M, N] it is base + gain ∘ matrix, or base + gain ∘ (base − bias) without a matrix.
drop_j zeroes where a keep bit of int32 [M, ceil(N / 32)] is 0: with B = Aᵀ this is the backward's dX = mask ∘ (dS A).
Floor: the write of Y, M N itemsize bytes; 15.6 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/thin_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, layouts, pad_rank, planned, precision, run
from ._tile import cast, dot, unpack
from .svf_scale import check_mix, scale_tile

MAX_BLOCK_R = {"same": 64, "split": 32, "fp32": 16}  # larger ranks are summed block by block


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 2


def pick_config(M: int, N: int, block_r: int, kind: str) -> Config:
    """Pure; ``kind``: _launch.dot_kind's.  Chosen so that nothing spills; no threshold has been measured yet."""
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    block_n = 128 if kind == "same" or block_r <= 16 else 64
    return Config(block_m, block_n, 4 if block_m == 16 else 8)


@triton.jit
def _expand_kernel(
    s_ptrs,
    b_ptrs,
    bias_ptr,
    start_ptr,
    y_ptr,
    keep_ptrs,
    scale_ptrs,
    mix_ptr,
    gain_ptr,
    base_ptr,
    scales,
    ranks,
    M,
    N,
    strides_sm,
    strides_bn,
    strides_br,
    stride_startm,
    stride_ym,
    E,
    stride_basem,
    PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.static_range(len(s_ptrs)):
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in range(0, R_PADDED, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < ranks[j]
            s = tl.load(
                s_ptrs[j] + offs_m[:, None] * strides_sm[j] + offs_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )
            if PER_COLUMN[j]:
                m = scale_tile(scale_ptrs[j], mix_ptr, offs_m, offs_r, mask_m, mask_r, ranks[j], E, BLOCK_M, BLOCK_R)
                s = cast(s.to(tl.float32) * m, s.dtype)
            b = tl.load(
                b_ptrs[j] + offs_n[:, None] * strides_bn[j] + offs_r[None, :].to(tl.int64) * strides_br[j],
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            acc = dot(s, cast(b, DTYPE).T, acc, PRECISION)
        scale = tl.cast(scales[j], tl.float32)
        if scale_ptrs[j] is not None and not PER_COLUMN[j]:
            scale *= tl.load(scale_ptrs[j]).to(tl.float32)
        acc *= scale
        if keep_ptrs[j] is not None:
            offs_b = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            row_bytes = 4 * tl.cdiv(N, 32)
            keep = tl.load(
                keep_ptrs[j].to(tl.pointer_type(tl.uint8)) + offs_m[:, None] * row_bytes + offs_b[None, :],
                mask=mask_m[:, None] & (offs_b < row_bytes)[None, :],
                other=0,
            )
            acc = tl.where(unpack(keep.to(tl.int32), BLOCK_M, BLOCK_N), acc, 0.0)
        y += acc
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if base_ptr is None:
            y += bias
    if start_ptr is not None:
        start = tl.load(start_ptr + offs_m[:, None] * stride_startm + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if gain_ptr is not None:
            start *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        y += start
    if base_ptr is not None:
        base = tl.load(base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if start_ptr is None:
            free = base
            if bias_ptr is not None:
                free -= bias
                if bias_ptr.dtype.element_ty == base_ptr.dtype.element_ty:  # as PyTorch rounds it
                    free = cast(free, base_ptr.dtype.element_ty).to(tl.float32)
            y += free * tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        y += base
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], cast(y, y_ptr.dtype.element_ty), mask=mask)


@planned
def plan(
    Y: Layout,
    S: tuple[Layout, ...],
    Bs: tuple[Layout, ...],
    scale_tensors: tuple[Layout | None, ...],
    start: Layout | None,
    keeps: tuple[Layout | None, ...],
    mix: Layout | None,
    gain: Layout | None,
    bias: Layout | None,
    base: Layout | None,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`expand_into`; None where Y is empty."""
    M, N = Y.shape
    for s, B in zip(S, Bs, strict=True):
        if s.shape[0] != M or B.shape != (N, s.shape[1]) or s.dtype is not S[0].dtype:
            raise ValueError(f"expand: {s.dtype} S {list(s.shape)} and B {list(B.shape)} do not fit Y [{M}, {N}]")
        check("expand", s, s.dtype, [B], [s.shape[1]])
    if start is not None and start.shape not in ((N,), (M, N)):
        raise ValueError(f"expand: expected start [{N}] or [{M}, {N}], got {list(start.shape)}")
    if base is not None and (base.shape != (M, N) or gain is None or (start is not None and bias is not None)):
        raise ValueError(
            f"expand: expected base [{M}, {N}] beside a gain and no bias on a start, got {list(base.shape)}"
        )
    check("expand", Y, S[0].dtype, [S[0], *(t for t in (start, base) if t is not None)], [])
    for name, t in (("start", start), ("base", base)):
        if t is not None and t.strides[-1] != 1 and N > 1:
            raise ValueError(f"expand: {name}'s last dim must be contiguous, got strides {t.strides}")
    under = base if start is None else start
    for name, t in (("gain", gain), ("bias", bias)):
        if t is not None and (under is None or len(under.shape) != 2 or t.shape != (N,) or t.strides[0] != 1):
            raise ValueError(f"expand: expected a contiguous {name} [{N}] beside a matrix to start from")
    if gain is not None and gain.dtype is not torch.float32:
        raise ValueError(f"expand: expected gain in fp32, got {gain.dtype}")
    if mix is not None:
        check_mix("expand", scale_tensors[0], mix, M, S[0].shape[1])
    if Y.numel == 0:
        return None
    gpu, how, ranks = gpu or GPU.of(Y.device), dot_kind(Y.dtype, S[0].dtype), tuple(s.shape[1] for s in S)
    block_r = min(MAX_BLOCK_R[how], max(pad_rank(rank) for rank in ranks))
    c = config or pick_config(M, N, block_r, how)
    matrix, bias = _apart(start, bias)
    return Plan(
        _expand_kernel,
        (triton.cdiv(M, c.block_m), triton.cdiv(N, c.block_n)),
        (S, Bs, bias, matrix, Y, keeps, scale_tensors, mix, gain, base, (float,) * len(S)),
        (
            ranks,
            M,
            N,
            tuple(s.strides[0] for s in S),
            tuple(B.strides[0] for B in Bs),
            tuple(B.strides[1] for B in Bs),
            0 if matrix is None else matrix.strides[0],
            Y.strides[0],
            0 if mix is None else mix.shape[1],
            0 if base is None else base.strides[0],
        ),
        dict(
            PER_COLUMN=tuple(t is not None and len(t.shape) >= 1 for t in scale_tensors),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=block_r,
            R_PADDED=triton.cdiv(max(ranks), block_r) * block_r,
            DTYPE=DTYPES[S[0].dtype],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )


def _apart(start, bias):
    """(matrix to start from, vector beside it) of start, which may be either."""
    if start is None or len(start.shape) == 2:
        return start, bias
    return None, start


@planned
def plan_new(
    S: Layout, Bs: tuple[Layout, ...], dtype: torch.dtype, *more, **options
) -> tuple[tuple[int, int], Plan | None]:
    """Of :func:`expand`, whose S is one matrix: Y's shape, and the plan.  ``more``, ``options``: as plan has them."""
    if S.shape[1] != sum(B.shape[1] for B in Bs):
        raise ValueError(f"expand: S {list(S.shape)} does not fit B {[list(B.shape) for B in Bs]}")
    Y = Layout.new((S.shape[0], Bs[0].shape[0]), dtype, S.device)
    return Y.shape, plan(Y, S.split([B.shape[1] for B in Bs]), Bs, *more, **options)


def expand(
    S: torch.Tensor,
    Bs: list[torch.Tensor],
    scales: list[float],
    scale_tensors: list[torch.Tensor | None],
    start: torch.Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
    mix: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y [M, N] in ``dtype``.  S [M, R_0 + R_1 + ...], last dim contiguous.  mix: fp32 [M, E], contiguous.  gain: fp32 [N],
    contiguous, beside a matrix as start; ``bias`` [N] then comes on top.  base: [M, N], beside a gain and either a matrix as
    start or a bias of its own.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    n = len(Bs)
    shape, p = plan_new(
        layout(S),
        layouts(Bs),
        dtype,
        layouts(scale_tensors),
        layout(start),
        (None,) * n,
        layout(mix),
        layout(gain),
        layout(bias),
        layout(base),
        torch.get_float32_matmul_precision(),
        config,
    )
    Y = S.new_empty(shape, dtype=dtype)
    parts = (S,) if n == 1 else S.split([B.shape[1] for B in Bs], 1)
    execute(p, Y, parts, Bs, scales, scale_tensors, start, (None,) * n, mix, gain, bias, base)
    return Y


def expand_into(
    Y: torch.Tensor,
    S: list[torch.Tensor],
    Bs: list[torch.Tensor],
    scales: list[float],
    scale_tensors: list[torch.Tensor | None],
    start: torch.Tensor | None,
    keeps: list[torch.Tensor | None] | None,
    config: Config | None = None,
) -> None:
    """Overwrite Y, with drop_j if ``keeps`` are given.  ``S``: one [M, R_j] per factor, last dim contiguous."""
    keeps = keeps or (None,) * len(S)
    p = plan(
        layout(Y),
        layouts(S),
        layouts(Bs),
        layouts(scale_tensors),
        layout(start),
        layouts(keeps),
        None,
        None,
        None,
        None,
        torch.get_float32_matmul_precision(),
        config,
    )
    execute(p, Y, S, Bs, scales, scale_tensors, start, keeps)


def execute(p: Plan | None, Y, S, Bs, scales, scale_tensors, start, keeps, mix=None, gain=None, bias=None, base=None):
    """Bs only with the strides of the plan: a pointer is what is read of each."""
    if p is not None:
        matrix, bias = _apart(start, bias)
        run(p, tuple(S), tuple(Bs), bias, matrix, Y, tuple(keeps), tuple(scale_tensors), mix, gain, base, tuple(scales))
