"""S_j = scale_j drop_j(x) A_jᵀ for every adapter j of one x, and one keep bit per element of each dropout mask.

x [M, K], A_j [R_j, K] (any strides) -> S [M, R_0 + R_1 + ...] in the thin dtype, keeps int32 [M, ceil(K / 32)].
drop_j() zeroes and does not scale; scale_j is a float, times a 0-d tensor or one scale per column.  With x = dY and A = Bᵀ
this is the backward's dS.  fp32 accumulation, one rounding.  x is read once for all adapters whose padded ranks sum
to at most WIDTH; the masks are drawn while the next block of x is on its way, or read where they are given.  Few rows: K is
split over programs, fp32 partials, summed in a fixed order.
Floor: M K itemsize bytes (+ M K / 8 per mask); 15.6 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/thin_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..ops.dropout import are_drawn
from . import _reduce
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
from ._tile import cast, dot, draw, unpack, words

WIDTH = 128  # padded columns of S one program accumulates


@dataclass(frozen=True)
class Config:
    block_m: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def pick_config(M: int, K: int, columns: int, masks: int, kind: str, arch: int, sms: int) -> Config:
    """Pure.  ``columns``: padded columns of S per program; ``kind``: _launch.dot_kind's.

    Chosen so that nothing spills and every SM has loads in flight; no threshold has been measured yet.
    """
    block_m = 16 if M <= 16 else 32 if M <= 32 or kind == "fp32" else 64
    if kind == "same":
        # beside a mask, operands in registers (before and after Hopper) leave room for half as many columns
        block_k = 128 if columns <= 64 and (arch in WGMMA or not masks) else 64
    else:
        block_k = 64 if columns <= 32 else 32
    programs = triton.cdiv(M, block_m)
    # split K until every SM has two programs, each with at least four blocks of columns
    split_k = max(1, min(2 * sms // programs, triton.cdiv(K, 4 * block_k), 32))
    many = columns > 64 or masks > 1 or (kind != "same" and (columns > 32 or (masks and block_m == 32)))
    return Config(block_m, block_k, split_k, 8 if many and (block_m * block_k >= 1024 or not masks) else 4)


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptrs,
    out_ptr,
    keep_ptrs,
    seeds_ptr,
    scale_ptrs,
    scales,
    ranks,
    thresholds,
    M,
    K,
    K_SPLIT,
    stride_xm,
    strides_ar,
    strides_ak,
    stride_om,
    stride_os,
    MASKS: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_r = tl.program_id(0) % R_BLOCKS  # programs that share x run side by side
    offs_m = (tl.program_id(0) // R_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // 32)
    mask_m = offs_m < M
    row_words = tl.cdiv(K, 32)
    first_k = tl.program_id(1) * K_SPLIT

    accs = (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),) * len(a_ptrs)
    for k in range(first_k, min(first_k + K_SPLIT, K), BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + (k + offs_k)[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        new = ()
        for j in tl.static_range(len(a_ptrs)):
            if MASKS[j] < 0:
                dropped = x
            elif (j == 0 or MASKS[j] != MASKS[j - 1]) and seeds_ptr is None:
                offs_b = k // 8 + tl.arange(0, BLOCK_K // 8)
                bits = tl.load(
                    keep_ptrs[j].to(tl.pointer_type(tl.uint8)) + offs_m[:, None] * (4 * row_words) + offs_b[None, :],
                    mask=mask_m[:, None] & (offs_b < 4 * row_words)[None, :],
                    other=0,
                )
                dropped = tl.where(unpack(bits.to(tl.int32), BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
            elif j == 0 or MASKS[j] != MASKS[j - 1]:
                base = offs_m.to(tl.uint64) * (8 * row_words) * 0x9E3779B97F4A7C15
                base += tl.load(seeds_ptr + MASKS[j]).to(tl.uint64)
                bits = draw(base, thresholds[j], k, BLOCK_M, BLOCK_K)
                dropped = tl.where(unpack(bits, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
                if pid_r == 0:
                    columns = k // 32 + offs_w
                    tl.store(
                        keep_ptrs[j] + offs_m[:, None] * row_words + columns[None, :],
                        words(bits, BLOCK_M, BLOCK_K),
                        mask=mask_m[:, None] & (columns < row_words)[None, :],
                    )
            a = tl.load(
                a_ptrs[j]
                + offs_r[:, None].to(tl.int64) * strides_ar[j]
                + (k + offs_k)[None, :].to(tl.int64) * strides_ak[j],
                mask=(offs_r < ranks[j])[:, None] & mask_k[None, :],
                other=0.0,
            )
            new = new + (dot(dropped, cast(a, DTYPE).T, accs[j], PRECISION),)
        accs = new

    column = 0
    for j in tl.static_range(len(a_ptrs)):
        acc, mask_r = accs[j] * tl.cast(scales[j], tl.float32), offs_r < ranks[j]
        if PER_COLUMN[j]:
            acc *= tl.load(scale_ptrs[j] + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        elif scale_ptrs[j] is not None:
            acc *= tl.load(scale_ptrs[j]).to(tl.float32)
        tl.store(
            out_ptr + tl.program_id(1) * stride_os + offs_m[:, None] * stride_om + (column + offs_r)[None, :],
            cast(acc, out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_r[None, :],
        )
        column += ranks[j]


class Batch(NamedTuple):
    """One launch: some of the adapters, and their columns of S."""

    adapters: slice
    columns: slice
    launch: Plan
    partials: tuple[int, int, int] | None  # fp32, over splits of K, which ``total`` sums
    total: Plan | None


class Shrink(NamedTuple):
    S: tuple[int, int]
    words: tuple[int, int]  # of each mask's keep bits
    batches: tuple[Batch, ...]


@planned
def plan(
    x: Layout,
    As: tuple[Layout, ...],
    dtype: torch.dtype,
    masks: tuple[int, ...],
    thresholds: tuple[int, ...],
    seeds: Layout | None,
    scale_tensors: tuple[Layout | None, ...],
    out: Layout | None,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Shrink:
    """Of :func:`shrink`; ``out``: None where it is allocated."""
    drawn = are_drawn(seeds)
    (M, K), ranks = x.shape, [A.shape[0] for A in As]
    check("shrink", x, dtype, As, ranks)
    if any(A.shape != (rank, K) for A, rank in zip(As, ranks, strict=True)):
        raise ValueError(f"shrink: expected factors [r, {K}], got {[list(A.shape) for A in As]}")
    if len(masks) != len(As) or max(masks, default=-1) >= len(thresholds) or (thresholds and seeds is None):
        raise ValueError(
            f"shrink: masks {list(masks)} do not fit {len(As)} factors, {len(thresholds)} thresholds and their seeds"
        )
    gpu, how, width = gpu or GPU.of(x.device), dot_kind(x.dtype, dtype), WIDTH
    if len(thresholds) > 1:  # each mask takes registers
        width = {"same": WIDTH if gpu.arch in WGMMA else 64, "split": 64, "fp32": 32}[how]
    words = M, triton.cdiv(K, 32)
    if drawn and (seeds.shape != (len(thresholds), *words) or not seeds.contiguous):
        raise ValueError(f"shrink: expected contiguous keep bits {[len(thresholds), *words]}, got {list(seeds.shape)}")
    keep = Layout.new(words, torch.int32, x.device)._replace(aligned=not drawn)
    S = out or Layout.new((M, sum(ranks)), dtype, x.device)
    parts, launches, column = S.split(ranks), [], 0
    for adapters in batches(ranks, width) if M else ():
        rs, ms, n = ranks[adapters], masks[adapters], len(ranks[adapters])
        S_batch = parts[adapters.start]._replace(shape=(M, sum(rs)))
        block_r = min(WIDTH, pad_rank(max(rs)))
        c = config or pick_config(M, K, n * block_r, len({m for m in ms if m >= 0}), how, gpu.arch, gpu.sms)
        k_split = triton.cdiv(triton.cdiv(K, c.split_k), c.block_k) * c.block_k
        splits, r_blocks = triton.cdiv(K, k_split), triton.cdiv(max(rs), block_r)
        to = S_batch if splits == 1 else Layout.new((splits, *S_batch.shape), torch.float32, x.device)
        launch = Plan(
            _shrink_kernel,
            (triton.cdiv(M, c.block_m) * r_blocks, splits),
            (
                x,
                As[adapters],
                to,
                tuple(keep if m >= 0 else None for m in ms),
                None if drawn else seeds,
                scale_tensors[adapters],
                (float,) * n,
            ),
            (
                tuple(rs),
                tuple(_in_upper_half(thresholds[m]) if m >= 0 else 0 for m in ms),
                M,
                K,
                k_split,
                x.strides[0],
                tuple(A.strides[0] for A in As[adapters]),
                tuple(A.strides[1] for A in As[adapters]),
                to.strides[-2],
                S_batch.numel,
            ),
            dict(
                MASKS=ms,
                PER_COLUMN=tuple(t is not None and len(t.shape) == 1 for t in scale_tensors[adapters]),
                BLOCK_M=c.block_m,
                BLOCK_K=c.block_k,
                BLOCK_R=block_r,
                R_BLOCKS=r_blocks,
                DTYPE=DTYPES[dtype],
                PRECISION=precision(how, matmul, gpu),
                num_warps=c.num_warps,
                num_stages=c.num_stages,
            ),
        )
        columns = slice(column, column + sum(rs))
        if splits == 1:
            launches.append(Batch(adapters, columns, launch, None, None))
        else:
            launches.append(Batch(adapters, columns, launch, to.shape, _reduce.plan(splits, S_batch.numel, (S_batch,))))
        column += sum(rs)
    return Shrink((M, sum(ranks)), words, tuple(launches))


def shrink(
    x: torch.Tensor,
    As: list[torch.Tensor],
    dtype: torch.dtype,
    masks: list[int],
    thresholds: list[int],
    seeds: torch.Tensor | None,
    scales: list[float] | None = None,
    scale_tensors: list[torch.Tensor | None] | None = None,
    config: Config | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(S, keeps).  masks[j]: the index of adapter j's mask in ``thresholds`` (of 65536, below which an element is dropped)
    and ``seeds`` (int64), or -1.  ``seeds`` may be the keep bits, int32 [n, M, ceil(K / 32)]: they are read, and none are
    returned.  ``out``: S, where it exists already.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    n = len(As)
    scale_tensors = scale_tensors or (None,) * n
    p = plan(
        layout(x),
        layouts(As),
        dtype,
        tuple(masks),
        tuple(thresholds),
        layout(seeds),
        layouts(scale_tensors),
        layout(out),
        torch.get_float32_matmul_precision(),
        config,
    )
    S = x.new_empty(p.S, dtype=dtype) if out is None else out
    if are_drawn(seeds):
        keeps, keep_bits, seeds = [], seeds.unbind(), None
    else:
        keeps = keep_bits = [x.new_empty(p.words, dtype=torch.int32) for _ in thresholds]
    execute(p, x, As, S, masks, keep_bits, seeds, scales or (1.0,) * n, scale_tensors)
    return S, keeps


def execute(p: Shrink, x, As, S, masks, keeps, seeds, scales, scale_tensors) -> None:
    """As only with the strides of the plan: a pointer is what is read of each."""
    of = tuple([keeps[m] if m >= 0 else None for m in masks])
    As, scales, scale_tensors = tuple(As), tuple(scales), tuple(scale_tensors)
    for adapters, columns, launch, partials, total in p.batches:
        part = S if len(p.batches) == 1 else S[:, columns]
        out = part if total is None else x.new_empty(partials, dtype=torch.float32)
        run(launch, x, As[adapters], out, of[adapters], seeds, scale_tensors[adapters], scales[adapters])
        if total is not None:
            run(total, out, (part,))


def _in_upper_half(threshold: int) -> int:
    """The largest int32 that _tile.draw drops: 16-bit decisions are compared as signed, in the upper half of a word."""
    return ((threshold - 32768) << 16) - 1
