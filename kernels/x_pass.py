"""One read of x for the backward's two products on its side: dA_j = dS_jᵀ drop_j(x) and dX = sum over j of drop_j(dS_j A_j).

x [M, K], dS_j [M, R_j], A_j [R_j, K] (any strides), keeps int32 [M, ceil(K / 32)] -> dA_j, dX [M, K].
A program keeps dA's columns in registers and walks down a chunk of rows; chunks leave fp32 partials, summed in a fixed order.
``outer`` is the first product alone: with x = dY and dS = S it is the backward's dB, scaled.
Floor: one read of x and one write of dX, 2 M K itemsize bytes; 31.2 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, WGMMA, as_bytes, batches, check, device_facts, dot_kind, on, pad_rank, precision
from ._reduce import reduce
from ._tile import cast, dot, unpack
from .expand import expand_into

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
    x_ptr, ds_ptrs, a_ptrs, keep_ptrs, da_ptrs, dx_ptr, scales, scale_ptrs,
    ranks, M, K, ROWS, stride_xm, strides_dsm, strides_ar, strides_ak, strides_dar, strides_dak, stride_dac, stride_dxm,
    MASKS: tl.constexpr, PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
                    keep_ptrs[j] + offs_m[:, None] * row_bytes + offs_b[None, :],
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
    if dX is None and not any(need_dA):
        return [None] * len(As)
    dAs = [
        torch.empty_like(A, memory_format=torch.contiguous_format) if need else None
        for A, need in zip(As, need_dA, strict=True)
    ]
    _check("x_pass", dX if x is None else x, dS, As, dX, masks, keeps)
    ranks = [A.shape[0] for A in As]
    how = dot_kind((dX if x is None else x).dtype, dS[0].dtype)
    fused = any(need_dA) and fits(len(ranks) * pad_rank(max(ranks)), how, device_facts(dS[0].device)[0])
    if dX is not None and (add or not fused):
        of = [keeps[m] if m >= 0 else None for m in masks]
        n = len(As)
        expand_into(dX, dS, [A.mT for A in As], [1.0] * n, [None] * n, dX if add else None, of)
        dX = None
    for batch in batches(ranks, WIDTH[how]):
        mine = slice(batch.start, batch.stop)
        if any(need_dA[mine]):
            strides = [(A.shape[1], 1) for A in As[mine]]
            _launch(x, dS[mine], As[mine], dAs[mine], strides, dX, masks[mine], keeps, None, None, config)
    return dAs


def outer(
    x: torch.Tensor,
    S: list[torch.Tensor],
    outs: list[torch.Tensor | None],
    scales: list[float],
    scale_tensors: list[torch.Tensor | None],
    config: Config | None = None,
) -> None:
    """outs[j] [K, R_j] (contiguous) = scale_j xᵀ S_j, where it is not None."""
    _check("outer", x, S, [], None, [-1] * len(S), ())
    for batch in batches([s.shape[1] for s in S], WIDTH[dot_kind(x.dtype, S[0].dtype)]):
        mine = slice(batch.start, batch.stop)
        if any(out is not None for out in outs[mine]):
            strides, masks = [(1, s.shape[1]) for s in S[mine]], [-1] * len(batch)
            _launch(x, S[mine], None, outs[mine], strides, None, masks, (), scales[mine], scale_tensors[mine], config)


def _check(name, x, dS, As, dX, masks, keeps):
    check(name, x, dS[0].dtype, [*dS, *As, *([] if dX is None else [dX])], [d.shape[1] for d in dS])
    for d in dS:
        if d.shape[0] != x.shape[0] or d.dtype is not dS[0].dtype or (d.stride(-1) != 1 and d.shape[1] > 1):
            raise ValueError(
                f"{name}: {d.dtype} [M, R] {list(d.shape)} with strides {d.stride()} does not fit x {list(x.shape)}"
            )
    if any(A.shape != (d.shape[1], x.shape[1]) for d, A in zip(dS, As, strict=False)):
        raise ValueError(f"{name}: expected factors [R, {x.shape[1]}], got {[list(A.shape) for A in As]}")
    if dX is not None and (dX.shape != x.shape or dX.stride(-1) != 1):
        raise ValueError(
            f"{name}: expected dX {list(x.shape)} with a contiguous last dim, got {list(dX.shape)} {dX.stride()}"
        )
    words = (x.shape[0], triton.cdiv(x.shape[1], 32))
    if max(masks) >= len(keeps) or any(keep.shape != words for keep in keeps):
        raise ValueError(f"{name}: masks {masks} do not fit {len(keeps)} keep tensors {list(words)}")


def _launch(x, dS, As, outs, strides, dX, masks, keeps, scales, scale_tensors, config):
    (M, K), n, ranks = x.shape, len(dS), [d.shape[1] for d in dS]
    how = dot_kind(x.dtype, dS[0].dtype)
    block_r = min(WIDTH[how], pad_rank(max(ranks)))
    c = config or pick_config(M, K, n * block_r, how, *device_facts(x.device))
    rows = max(1, triton.cdiv(triton.cdiv(M, c.chunks), c.block_m)) * c.block_m
    chunks = max(1, triton.cdiv(M, rows))
    wanted = [out for out in outs if out is not None]
    targets, between = outs, 0
    if chunks > 1:
        between = sum(out.numel() for out in wanted)
        partials = torch.empty((chunks, between), dtype=torch.float32, device=x.device)
        parts = iter(partials.split([out.numel() for out in wanted], 1))
        targets = [None if out is None else next(parts) for out in outs]
    scales, scale_tensors = scales or [1.0] * n, scale_tensors or [None] * n
    with on(x):
        _x_pass_kernel[(chunks, triton.cdiv(K, c.block_k), triton.cdiv(max(ranks), block_r))](
            x, tuple(dS), None if dX is None else tuple(As), as_bytes(keeps[m] if m >= 0 else None for m in masks),
            tuple(targets), dX, tuple(scales), tuple(scale_tensors),
            tuple(ranks), M, K, rows, x.stride(0), tuple(d.stride(0) for d in dS),
            (0,) * n if As is None else tuple(A.stride(0) for A in As),
            (0,) * n if As is None else tuple(A.stride(1) for A in As),
            tuple(s[0] for s in strides), tuple(s[1] for s in strides), between, 0 if dX is None else dX.stride(0),
            MASKS=tuple(masks), PER_COLUMN=tuple(t is not None and t.dim() == 1 for t in scale_tensors),
            BLOCK_M=c.block_m, BLOCK_K=c.block_k, BLOCK_R=block_r, DTYPE=DTYPES[dS[0].dtype],
            PRECISION=precision(how),
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    if chunks > 1:
        reduce(partials, wanted)
