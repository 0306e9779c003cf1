"""One read of dY for the backward's two products on its side: dS = scale (dY B) and dB = scale dYᵀ S.

dY [M, N], B [N, R] (any strides), S [M, R] -> dS [M, R] in the thin dtype, dB [N, R] in B's.
Programs form a grid of row chunks x column groups; each leaves fp32 partials of both products, summed in a fixed order.
Those partials grow with R while dY does not, so from some rank on two passes of one product each (shrink, outer) move fewer
bytes: ``one_pass_pays`` counts them.
Floor: one read of dY, M N itemsize bytes; 15.6 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/thin_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _reduce
from . import shrink as _shrink
from . import x_pass as _x_pass
from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, layouts, pad_rank, planned, precision, run
from ._tile import cast, dot

MAX_RANK_IN_ONE_PASS = 64


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_n: int = 128
    blocks: int = 4  # of columns per program: its accumulators of dB
    chunks: int = 1  # of rows
    num_warps: int = 8
    num_stages: int = 2


def pick_config(M: int, N: int, block_r: int, kind: str, arch: int, sms: int) -> Config:
    """Pure; ``kind``: _launch.dot_kind's.  Chosen so that nothing spills; no threshold has been measured yet."""
    block_m = 16 if M <= 16 else 32 if M <= 32 or kind != "same" else 64
    block_n = 128 if kind == "same" else 64
    # 8192 fp32 accumulators are 32 registers of each of 256 threads; a split operand needs registers too
    budget = {"same": 8192, "split": 2048, "fp32": 2048}[kind]
    blocks = max(1, min(budget // (block_n * block_r), triton.next_power_of_2(triton.cdiv(N, block_n))))
    groups = triton.cdiv(N, blocks * block_n)
    chunks = max(1, min(triton.cdiv(sms, groups), M // 128))
    # in 16 bits two stages take 168 KiB of shared memory at rank 16, and an unknown GPU may have 64; fp32 needs them
    return Config(block_m, block_n, blocks, chunks, num_stages=2 if arch in (80, 90, 100) or kind == "fp32" else 1)


def one_pass_pays(M: int, N: int, R: int, dtype: torch.dtype, thin_dtype: torch.dtype, c: Config) -> bool:
    """Whether writing and reading the partials moves fewer bytes than reading dY a second time.  Modelled, not measured."""
    if R > MAX_RANK_IN_ONE_PASS or (
        dtype is torch.float16 and thin_dtype is torch.float32
    ):  # three TF32 parts: it spills
        return False
    groups = triton.cdiv(N, c.blocks * c.block_n)
    partials = 4 * R * ((groups * M if groups > 1 else 0) + (c.chunks * N if c.chunks > 1 else 0))
    return 2 * partials <= M * N * dtype.itemsize


@triton.jit
def _dy_pass_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    scale_ptr,
    scale,
    R,
    M,
    N,
    ROWS,
    stride_dym,
    stride_bn,
    stride_br,
    stride_sm,
    stride_dsm,
    stride_dsg,
    stride_dbn,
    stride_dbc,
    PER_COLUMN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_n = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    scales = tl.zeros((BLOCK_R,), tl.float32) + tl.cast(scale, tl.float32)
    if PER_COLUMN:
        scales *= tl.load(scale_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    elif scale_ptr is not None:
        scales *= tl.load(scale_ptr).to(tl.float32)

    dbs = (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),) * BLOCKS
    first_m = tl.program_id(0).to(tl.int64) * ROWS
    for m in range(first_m, tl.minimum(first_m + ROWS, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_s = mask_m[:, None] & mask_r[None, :]
        s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask_s, other=0.0)
        ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        new = ()
        for block in tl.static_range(BLOCKS):
            offs_n = first_n + block * BLOCK_N + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            dy = tl.load(
                dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :],
                mask=mask_m[:, None] & mask_n[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            ds = dot(dy, cast(b, DTYPE), ds, PRECISION)
            new = new + (dot(dy.T, s, dbs[block], PRECISION),)
        dbs = new
        tl.store(
            ds_ptr + tl.program_id(1) * stride_dsg + offs_m[:, None] * stride_dsm + offs_r[None, :],
            cast(ds * scales[None, :], ds_ptr.dtype.element_ty),
            mask=mask_s,
        )
    for block in tl.static_range(BLOCKS):
        offs_n = first_n + block * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(
            db_ptr + tl.program_id(0).to(tl.int64) * stride_dbc + offs_n[:, None] * stride_dbn + offs_r[None, :],
            cast(dbs[block] * scales[None, :], db_ptr.dtype.element_ty),
            mask=(offs_n < N)[:, None] & mask_r[None, :],
        )


class OnePass(NamedTuple):
    """Both products of one adapter.  The partials' shapes are None where there is one of its kind, the result itself."""

    dS: tuple[int, int]
    launch: Plan
    ds: tuple[int, int, int] | None
    db: tuple[int, int, int] | None
    total_ds: Plan | None
    total_db: Plan | None


class TwoPasses(NamedTuple):
    dS: tuple[int, int]
    shrink: _shrink.Shrink | None
    outer: tuple[_x_pass.Batch, ...]


@planned
def plan(
    dY: Layout,
    Bs: tuple[Layout, ...],
    scale_tensors: tuple[Layout | None, ...],
    S: Layout | None,
    need_dB: tuple[bool, ...],
    need_dS: bool,
    dtype: torch.dtype,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> OnePass | TwoPasses:
    """Of :func:`dy_pass`."""
    (M, N), ranks = dY.shape, [B.shape[1] for B in Bs]
    check("dy_pass", dY, dtype, Bs if S is None else [*Bs, S], ranks)
    if any(B.shape[0] != N for B in Bs) or (any(need_dB) and (S is None or S.shape != (M, sum(ranks)))):
        raise ValueError(f"dy_pass: B {[list(B.shape) for B in Bs]} and S do not fit dY [{M}, {N}]")
    gpu = gpu or GPU.of(dY.device)
    dS = Layout.new((M, sum(ranks)), dtype, dY.device)
    dBs = [Layout.new(B.shape, B.dtype, B.device) if need else None for B, need in zip(Bs, need_dB, strict=True)]
    if need_dS and len(Bs) == 1 and need_dB[0]:
        c = config or pick_config(M, N, pad_rank(ranks[0]), dot_kind(dY.dtype, dtype), gpu.arch, gpu.sms)
        if config or one_pass_pays(M, N, ranks[0], dY.dtype, dtype, c):
            return _one_pass(dY, Bs[0], S, dS, dBs[0], scale_tensors[0], matmul, c, gpu)
    shrink = outer = None
    if need_dS:
        factors = tuple(B.mT for B in Bs)
        shrink = _shrink.plan(dY, factors, dtype, (-1,) * len(Bs), (), None, scale_tensors, dS, matmul, None, gpu)
    if any(need_dB):
        outer = _x_pass.plan_outer(dY, S.split(ranks), tuple(dBs), scale_tensors, matmul, None, gpu)
    return TwoPasses(dS.shape, shrink, outer or ())


def _one_pass(dY, B, S, dS, dB, scale_tensor, matmul, c, gpu) -> OnePass:
    (M, N), R = dY.shape, B.shape[1]
    rows = max(1, triton.cdiv(triton.cdiv(M, c.chunks), c.block_m)) * c.block_m
    chunks, groups = max(1, triton.cdiv(M, rows)), triton.cdiv(N, c.blocks * c.block_n)
    ds = None if groups == 1 else Layout.new((groups, M, R), torch.float32, dY.device)
    db = None if chunks == 1 else Layout.new((chunks, N, R), torch.float32, dY.device)
    launch = Plan(
        _dy_pass_kernel,
        (chunks, groups),
        (dY, B, S, ds or dS, db or dB, scale_tensor, float),
        (R, M, N, rows, dY.strides[0], *B.strides, S.strides[0], (ds or dS).strides[-2], M * R, R, N * R),
        dict(
            PER_COLUMN=scale_tensor is not None and len(scale_tensor.shape) == 1,
            BLOCKS=c.blocks,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_R=pad_rank(R),
            DTYPE=DTYPES[dS.dtype],
            PRECISION=precision(dot_kind(dY.dtype, dS.dtype), matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )
    return OnePass(
        dS.shape,
        launch,
        ds and ds.shape,
        db and db.shape,
        ds and _reduce.plan(groups, M * R, (dS,)),
        db and _reduce.plan(chunks, N * R, (dB,)),
    )


def dy_pass(
    dY: torch.Tensor,
    Bs: list[torch.Tensor],
    scales: list[float],
    scale_tensors: list[torch.Tensor | None],
    S: torch.Tensor | None,
    need_dB: list[bool],
    need_dS: bool,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(dS_j [M, R_j] in the thin ``dtype`` if needed, dB_j in B_j's dtype where needed).

    ``S`` [M, R_0 + R_1 + ...], last dim contiguous, may be None where no dB is needed.  ``config`` asks for the one-pass
    kernel.
    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        layout(dY),
        layouts(Bs),
        layouts(scale_tensors),
        layout(S),
        tuple(need_dB),
        need_dS,
        dtype,
        torch.get_float32_matmul_precision(),
        config,
    )
    dS = dY.new_empty(p.dS, dtype=dtype) if need_dS else None
    if type(p) is OnePass:
        return [dS], [_run_one_pass(p, dY, Bs[0], S, dS, scale_tensors[0], scales[0])]
    n, ranks = len(Bs), [B.shape[1] for B in Bs]
    dBs = [B.new_empty(B.shape) if need else None for B, need in zip(Bs, need_dB, strict=True)]
    if need_dS:
        _shrink.execute(p.shrink, dY, Bs, dS, (-1,) * n, (), None, scales, scale_tensors)
    if p.outer:
        _x_pass.execute(p.outer, dY, S.split(ranks, 1), None, dBs, None, (None,) * n, scales, scale_tensors)
    return list(dS.split(ranks, 1)) if need_dS else [None] * n, dBs


def _run_one_pass(p: OnePass, dY, B, S, dS, scale_tensor, scale) -> torch.Tensor:
    """dB; dS is filled."""
    dB = B.new_empty(B.shape)
    ds = dS if p.ds is None else dY.new_empty(p.ds, dtype=torch.float32)
    db = dB if p.db is None else dY.new_empty(p.db, dtype=torch.float32)
    run(p.launch, dY, B, S, ds, db, scale_tensor, scale)
    if p.ds is not None:
        run(p.total_ds, ds, (dS,))
    if p.db is not None:
        run(p.total_db, db, (dB,))
    return dB
