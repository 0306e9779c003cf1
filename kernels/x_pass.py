"""One read of x for the backward's two products on its side: dA_j = dS_jᵀ drop_j(x) and dX = sum over j of drop_j(dS_j A_j).

x [M, K], dS_j [M, R_j], A_j [R_j, K] (any strides), keeps int32 [M, ceil(K / 32)] -> dA_j, dX [M, K].
A program keeps dA's columns in registers and walks down a chunk of rows; chunks leave fp32 partials, summed in a fixed order.
``plan_outer`` plans the first product alone: with x = dY and dS = S it is the backward's dB, scaled.
Floor: one read of x and one write of dX, 2 M K itemsize bytes; 31.2 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/thin_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _reduce
from . import expand as _expand
from ._launch import (
    DTYPES,
    GPU,
    WGMMA,
    Layout,
    Plan,
    batches,
    check,
    dot_kind,
    layout,
    layouts,
    pad_rank,
    planned,
    precision,
    run,
)
from ._tile import cast, dot, unpack

# Padded columns of dS one program takes, for dA alone and for both products.  Beyond the latter they are two launches: what
# the fused one saves is a launch and a second read of dS and the bits, not of x or dX.
WIDTH = {"same": 128, "split": 64, "fp32": 32}
FUSED_WIDTH = {"same": 128, "split": 32, "fp32": 16}


def fits(columns: int, kind: str, arch: int) -> bool:
    """Whether one launch takes both products of this many padded columns of dS."""
    return columns <= (FUSED_WIDTH[kind] if arch in WGMMA else 16)


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_k: int = 128
    chunks: int = 1  # of rows; each leaves one partial sum
    num_warps: int = 8
    num_stages: int = 2


def pick_config(M: int, K: int, columns: int, kind: str, arch: int, sms: int) -> Config:
    """Pure.  ``columns``: padded columns of dS per program; ``kind``: _launch.dot_kind's.

    Chosen so that nothing spills and every SM has loads in flight; no threshold has been measured yet.
    """
    block_m = 16 if M <= 16 and arch in WGMMA else 32 if M <= 32 or kind != "same" else 64
    block_k = 128 if kind == "same" and columns <= 64 and arch in WGMMA else 64
    # two programs per SM, but no chunk under 256 rows, where partials would outweigh x for large ranks
    chunks = max(1, min(triton.cdiv(2 * sms, triton.cdiv(K, block_k)), M // 256))
    return Config(block_m, block_k, chunks, 8 if block_m == 64 or kind != "same" else 4)


@triton.jit
def _x_pass_kernel(
    x_ptr,
    ds_ptrs,
    a_ptrs,
    keep_ptrs,
    da_ptrs,
    dx_ptr,
    scale_ptrs,
    scales,
    ranks,
    M,
    K,
    ROWS,
    stride_xm,
    strides_dsm,
    strides_ar,
    strides_ak,
    strides_dar,
    strides_dak,
    stride_dac,
    stride_dxm,
    MASKS: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_b = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    mask_k = offs_k < K
    row_bytes = 4 * tl.cdiv(K, 32)

    factors, accs = (), ()
    for j in tl.static_range(len(ds_ptrs)):
        accs = accs + (tl.zeros((BLOCK_K, BLOCK_R), tl.float32),)
        if dx_ptr is not None:
            a = tl.load(
                a_ptrs[j] + offs_r[:, None].to(tl.int64) * strides_ar[j] + offs_k[None, :] * strides_ak[j],
                mask=(offs_r < ranks[j])[:, None] & mask_k[None, :],
                other=0.0,
            )
            factors = factors + (cast(a, DTYPE),)

    first_m = tl.program_id(0).to(tl.int64) * ROWS
    for m in range(first_m, tl.minimum(first_m + ROWS, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
        dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        new = ()
        for j in tl.static_range(len(ds_ptrs)):
            ds = tl.load(
                ds_ptrs[j] + offs_m[:, None] * strides_dsm[j] + offs_r[None, :],
                mask=mask_m[:, None] & (offs_r < ranks[j])[None, :],
                other=0.0,
            )
            dropped = x
            if MASKS[j] >= 0:
                bits = tl.load(
                    keep_ptrs[j].to(tl.pointer_type(tl.uint8)) + offs_m[:, None] * row_bytes + offs_b[None, :],
                    mask=mask_m[:, None] & (offs_b < row_bytes)[None, :],
                    other=0,
                )
                keep = unpack(bits.to(tl.int32), BLOCK_M, BLOCK_K)
                dropped = tl.where(keep, x, 0.0).to(x.dtype)
            acc = accs[j]
            if da_ptrs[j] is not None:
                acc = dot(dropped.T, ds, acc, PRECISION)
            new = new + (acc,)
            if dx_ptr is not None:
                part = dot(ds, factors[j], tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
                if MASKS[j] >= 0:
                    part = tl.where(keep, part, 0.0)
                dx += part
        accs = new
        if dx_ptr is not None:
            dx_ptrs = dx_ptr + offs_m[:, None] * stride_dxm + offs_k[None, :]
            tl.store(dx_ptrs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)

    for j in tl.static_range(len(ds_ptrs)):
        if da_ptrs[j] is not None:
            acc, mask_r = accs[j] * tl.cast(scales[j], tl.float32), offs_r < ranks[j]
            if PER_COLUMN[j]:
                acc *= tl.load(scale_ptrs[j] + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
            elif scale_ptrs[j] is not None:
                acc *= tl.load(scale_ptrs[j]).to(tl.float32)
            da = da_ptrs[j] + tl.program_id(0).to(tl.int64) * stride_dac
            da += offs_k[:, None] * strides_dak[j] + offs_r[None, :].to(tl.int64) * strides_dar[j]
            tl.store(da, cast(acc, da_ptrs[j].dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


class Batch(NamedTuple):
    """One launch: some of the adapters."""

    adapters: slice
    launch: Plan
    partials: tuple[int, int] | None  # fp32 [chunks, elements of the outputs], which ``total`` sums
    sizes: tuple[int, ...]  # of each output that is wanted
    total: Plan | None


class XPass(NamedTuple):
    expand: Plan | None  # dX, where it is not the batches'
    batches: tuple[Batch, ...]


@planned
def plan(
    x: Layout | None,
    dS: tuple[Layout, ...],
    As: tuple[Layout, ...],
    need_dA: tuple[bool, ...],
    dX: Layout | None,
    masks: tuple[int, ...],
    keeps: tuple[Layout, ...],
    add: bool,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> XPass:
    """Of :func:`x_pass`."""
    wide = dX if x is None else x
    _check("x_pass", wide, dS, As, dX, masks, keeps)
    gpu, n, ranks = gpu or GPU.of(wide.device), len(As), [A.shape[0] for A in As]
    how, of = dot_kind(wide.dtype, dS[0].dtype), tuple(keeps[m] if m >= 0 else None for m in masks)
    fused = any(need_dA) and fits(n * pad_rank(max(ranks)), how, gpu.arch)
    expand = None
    if dX is not None and (add or not fused):
        Bs, start = tuple(A.mT for A in As), dX if add else None
        expand = _expand.plan(dX, dS, Bs, (None,) * n, start, of, None, None, None, None, matmul, None, gpu)
        dX = None
    dAs = tuple(Layout.new(A.shape, A.dtype, A.device) if need else None for A, need in zip(As, need_dA, strict=True))
    return XPass(expand, _batches(x, dS, As, dAs, dX, masks, of, (None,) * n, how, matmul, config, gpu))


@planned
def plan_outer(
    x: Layout,
    S: tuple[Layout, ...],
    outs: tuple[Layout | None, ...],
    scale_tensors: tuple[Layout | None, ...],
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> tuple[Batch, ...]:
    """Of outs[j] [K, R_j] (contiguous) = scale_j xᵀ S_j, where it is not None: :func:`execute`, without As, dX and keeps."""
    masks, of = (-1,) * len(S), (None,) * len(S)
    _check("outer", x, S, (), None, masks, ())
    how, gpu, transposed = dot_kind(x.dtype, S[0].dtype), gpu or GPU.of(x.device), tuple(out and out.mT for out in outs)
    return _batches(x, S, None, transposed, None, masks, of, scale_tensors, how, matmul, config, gpu)


def _check(name, x, dS, As, dX, masks, keeps):
    check(name, x, dS[0].dtype, [*dS, *As, *([] if dX is None else [dX])], [d.shape[1] for d in dS])
    for d in dS:
        if d.shape[0] != x.shape[0] or d.dtype is not dS[0].dtype or (d.strides[-1] != 1 and d.shape[1] > 1):
            raise ValueError(
                f"{name}: {d.dtype} [M, R] {list(d.shape)} with strides {d.strides} does not fit x {list(x.shape)}"
            )
    if any(A.shape != (d.shape[1], x.shape[1]) for d, A in zip(dS, As, strict=False)):
        raise ValueError(f"{name}: expected factors [R, {x.shape[1]}], got {[list(A.shape) for A in As]}")
    if dX is not None and (dX.shape != x.shape or dX.strides[-1] != 1):
        raise ValueError(
            f"{name}: expected dX {list(x.shape)} with a contiguous last dim, got {list(dX.shape)} {dX.strides}"
        )
    words = (x.shape[0], triton.cdiv(x.shape[1], 32))
    if max(masks) >= len(keeps) or any(keep.shape != words for keep in keeps):
        raise ValueError(f"{name}: masks {list(masks)} do not fit {len(keeps)} keep tensors {list(words)}")


def _batches(x, dS, As, outs, dX, masks, keeps, scale_tensors, how, *more) -> tuple[Batch, ...]:
    """``outs``: [R_j, K] of any strides."""
    return tuple(
        _batch(adapters, x, dS, As, outs, dX, masks, keeps, scale_tensors, how, *more)
        for adapters in batches([d.shape[1] for d in dS], WIDTH[how])
        if any(out is not None for out in outs[adapters])
    )


def _batch(adapters, x, dS, As, outs, dX, masks, keeps, scale_tensors, how, matmul, config, gpu) -> Batch:
    dS, outs, masks, keeps, scale_tensors = (t[adapters] for t in (dS, outs, masks, keeps, scale_tensors))
    As = None if As is None else As[adapters]
    (M, K), n, ranks = x.shape, len(dS), tuple(d.shape[1] for d in dS)
    block_r = min(WIDTH[how], pad_rank(max(ranks)))
    c = config or pick_config(M, K, n * block_r, how, gpu.arch, gpu.sms)
    rows = max(1, triton.cdiv(triton.cdiv(M, c.chunks), c.block_m)) * c.block_m
    chunks = max(1, triton.cdiv(M, rows))
    wanted = [out for out in outs if out is not None]
    sizes = tuple(out.numel for out in wanted)
    targets, partials, total, between = outs, None, None, 0
    if chunks > 1:
        between = sum(sizes)
        partials = Layout.new((chunks, between), torch.float32, x.device)
        parts = iter(partials.split(sizes))
        targets = tuple(None if out is None else next(parts) for out in outs)
        # a factor's gradient is contiguous, in one order of its dims or the other
        total = _reduce.plan(chunks, between, tuple(out if out.strides[-1] == 1 else out.mT for out in wanted))
    launch = Plan(
        _x_pass_kernel,
        (chunks, triton.cdiv(K, c.block_k), triton.cdiv(max(ranks), block_r)),
        (x, dS, None if dX is None else As, keeps, targets, dX, scale_tensors, (float,) * n),
        (
            ranks,
            M,
            K,
            rows,
            x.strides[0],
            tuple(d.strides[0] for d in dS),
            (0,) * n if As is None else tuple(A.strides[0] for A in As),
            (0,) * n if As is None else tuple(A.strides[1] for A in As),
            tuple(0 if out is None else out.strides[0] for out in outs),
            tuple(0 if out is None else out.strides[1] for out in outs),
            between,
            0 if dX is None else dX.strides[0],
        ),
        dict(
            MASKS=masks,
            PER_COLUMN=tuple(t is not None and len(t.shape) == 1 for t in scale_tensors),
            BLOCK_M=c.block_m,
            BLOCK_K=c.block_k,
            BLOCK_R=block_r,
            DTYPE=DTYPES[dS[0].dtype],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )
    return Batch(adapters, launch, partials and partials.shape, sizes, total)


def x_pass(
    x: torch.Tensor | None,
    dS: list[torch.Tensor],
    As: list[torch.Tensor],
    need_dA: list[bool],
    dX: torch.Tensor | None,
    masks: list[int],
    keeps: list[torch.Tensor],
    config: Config | None = None,
    add: bool = False,
) -> list[torch.Tensor | None]:
    """dA_j in A_j's dtype where needed; ``dX`` [M, K], if given, is overwritten, or added to and rounded once.  x may be None
    where no dA is needed.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    n = len(As)
    if dX is None and not any(need_dA):
        return [None] * n
    p = plan(
        layout(x),
        layouts(dS),
        layouts(As),
        tuple(need_dA),
        layout(dX),
        tuple(masks),
        layouts(keeps),
        add,
        torch.get_float32_matmul_precision(),
        config,
    )
    of, ones, none = tuple([keeps[m] if m >= 0 else None for m in masks]), (1.0,) * n, (None,) * n
    if p.expand is not None:
        _expand.execute(p.expand, dX, dS, As, ones, none, dX if add else None, of)
        dX = None
    dAs = [
        torch.empty_like(A, memory_format=torch.contiguous_format) if need else None
        for A, need in zip(As, need_dA, strict=True)
    ]
    execute(p.batches, x, dS, As, dAs, dX, of, ones, none)
    return dAs


def execute(batches, x, dS, As, outs, dX, keeps, scales, scale_tensors) -> None:
    """``outs`` only with the strides of the plan: a pointer is what is written to."""
    dS, outs, scales, scale_tensors = tuple(dS), tuple(outs), tuple(scales), tuple(scale_tensors)
    for adapters, launch, shape, sizes, total in batches:
        factors, targets = None if dX is None else tuple(As[adapters]), outs[adapters]
        if total is not None:
            partials = x.new_empty(shape, dtype=torch.float32)
            wanted = tuple([out for out in targets if out is not None])
            if len(targets) == 1:
                targets = (partials,)
            else:
                parts = iter(partials.split(sizes, 1))
                targets = tuple([None if out is None else next(parts) for out in targets])
        run(launch, x, dS[adapters], factors, keeps[adapters], targets, dX, scale_tensors[adapters], scales[adapters])
        if total is not None:
            run(total, partials, wanted)
