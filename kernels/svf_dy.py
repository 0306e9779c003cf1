"""dS = (dY B) ∘ m and h = S ∘ (dY B) summed: the backward of singular-value scaling in one read of dY.

dY [M, N], B [N, k] (any strides) -> dS [M, k] in the thin dtype; S [M, k]; scales, mix and the sums of h as in svf_scale.py,
whose device functions are the epilogue here.  fp32 accumulation; dY B itself is never rounded.  Few rows: N is split over
programs, and svf_scale.py sums the fp32 partials and finishes.
Floor: M N itemsize bytes; 15.6 us at 8192 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/svf_eager.py.  Benchmark: bench/registry.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, pad_rank, planned, precision, run
from ._tile import cast, dot
from .shrink import WIDTH, Config, pick_config
from .svf_scale import Sums, check_mix, scale_tile, store_dots, svf_scale


@triton.jit
def _svf_dy_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    scales_ptr,
    mix_ptr,
    out_ptr,
    dscales_ptr,
    dmix_ptr,
    M,
    N,
    R,
    E,
    N_SPLIT,
    stride_dym,
    stride_bn,
    stride_br,
    stride_sm,
    stride_om,
    stride_os,
    stride_dmix,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_r = tl.program_id(0) % R_BLOCKS  # programs that share dY run side by side
    block_m = (tl.program_id(0) // R_BLOCKS).to(tl.int64)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_r = offs_m < M, offs_r < R
    mask = mask_m[:, None] & mask_r[None, :]
    first_n = tl.program_id(1) * N_SPLIT

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n in range(first_n, min(first_n + N_SPLIT, N), BLOCK_N):
        mask_n = n + offs_n < N
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + (n + offs_n)[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + (n + offs_n)[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        )
        acc = dot(dy, cast(b, DTYPE), acc, PRECISION)

    if not SPLIT:
        if s_ptr is not None:
            s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
            store_dots(
                acc * s,
                scales_ptr,
                mix_ptr,
                dscales_ptr,
                dmix_ptr,
                offs_m,
                offs_r,
                mask_m,
                mask_r,
                R,
                E,
                block_m,
                block_r,
                stride_dmix,
            )
        acc *= scale_tile(scales_ptr, mix_ptr, offs_m, offs_r, mask_m, mask_r, R, E, BLOCK_M, BLOCK_R)
    if out_ptr is not None:
        out = out_ptr + tl.program_id(1) * stride_os + offs_m[:, None] * stride_om + offs_r[None, :]
        tl.store(out, cast(acc, out_ptr.dtype.element_ty), mask=mask)


class SVFdY(NamedTuple):
    out: Layout | None  # dS, or its fp32 partials over splits of N
    launch: Plan
    sums: Sums | None
    scale: bool  # whether svf_scale finishes


@planned
def plan(
    dY: Layout,
    B: Layout,
    scales: Layout,
    mix: Layout | None,
    S: Layout | None,
    need_dS: bool,
    dtype: torch.dtype,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> SVFdY | None:
    """Of :func:`svf_dy`; None where dY is empty."""
    (M, N), R = dY.shape, B.shape[1]
    check("svf_dy", dY, dtype, [B] if S is None else [B, S], [R])
    check_mix("svf_dy", scales, mix, M, R)
    if B.shape[0] != N or (S is not None and (S.shape != (M, R) or (S.strides[-1] != 1 and R > 1))):
        of_S = None if S is None else list(S.shape)
        raise ValueError(f"svf_dy: B {list(B.shape)} and S {of_S} do not fit dY [{M}, {N}]")
    if M == 0:
        return None
    gpu, how, block_r = gpu or GPU.of(dY.device), dot_kind(dY.dtype, dtype), min(WIDTH, pad_rank(R))
    c = config or pick_config(M, N, block_r, 0, how, gpu.arch, gpu.sms)
    n_split = triton.cdiv(triton.cdiv(N, c.split_k), c.block_k) * c.block_k
    splits, blocks_m, blocks_r = triton.cdiv(N, n_split), triton.cdiv(M, c.block_m), triton.cdiv(R, block_r)
    out = sums = None
    if splits > 1:
        out = Layout.new((splits, M, R), torch.float32, dY.device)
    else:
        out = Layout.new((M, R), dtype, dY.device) if need_dS else None
        sums = None if S is None else Sums.of(scales, mix, blocks_m, blocks_r)
    launch = Plan(
        _svf_dy_kernel,
        (blocks_m * blocks_r, splits),
        (dY, B, S if splits == 1 else None, scales, mix, out, *((None, None) if sums is None else sums.partials)),
        (
            M,
            N,
            R,
            0 if mix is None else mix.shape[1],
            n_split,
            dY.strides[0],
            *B.strides,
            0 if S is None else S.strides[0],
            R,
            M * R,
            0 if mix is None else mix.numel,
        ),
        dict(
            SPLIT=splits > 1,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_k,
            BLOCK_R=block_r,
            R_BLOCKS=blocks_r,
            DTYPE=DTYPES[dtype],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )
    return SVFdY(out, launch, sums, splits > 1)


def svf_dy(
    dY: torch.Tensor,
    B: torch.Tensor,
    scales: torch.Tensor,
    mix: torch.Tensor | None,
    S: torch.Tensor | None,
    need_dS: bool,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dS [M, k] in the thin ``dtype`` if needed, dscales and dmix if S is given; dmix only beside a mix).

    Raises: ValueError before anything is launched (see _launch.check).
    """
    p = plan(
        layout(dY),
        layout(B),
        layout(scales),
        layout(mix),
        layout(S),
        need_dS,
        dtype,
        torch.get_float32_matmul_precision(),
        config,
    )
    if p is None:
        return svf_scale(dY.new_empty((0, B.shape[1])), scales, mix, S, dtype if need_dS else None)
    out = p.out and torch.empty(p.out.shape, dtype=p.out.dtype, device=dY.device)
    partials = (None, None) if p.sums is None else p.sums.empty()
    run(p.launch, dY, B, None if p.scale else S, scales, mix, out, *partials)
    if p.scale:
        return svf_scale(out, scales, mix, S, dtype if need_dS else None)
    return out, *((None, None) if p.sums is None else p.sums.total(partials, scales, mix))
