"""dS = D ∘ m over [M, k], with h = S ∘ D summed on the way: dscales = Σ_t h_t, or under a mix mixᵀ h and dmix = h scalesᵀ.

D [M, k], or fp32 partials [P, M, k] of it -> dS [M, k]; S [M, k]; scales fp32 [k], or [E, k] with mix fp32 [M, E] and
m_t = mix_t @ scales.  Neither m nor h as [M, k] is ever in memory.  Sums over rows: fp32, one partial per block of rows,
then _reduce.py; fixed order.
Floor: 3 M k itemsize bytes (read D and S, write dS); 2 without the sums.
Eager form: lowrank/ops/svf_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _reduce
from ._launch import DTYPES, Layout, Plan, layout, planned, run
from ._tile import cast


@dataclass(frozen=True)
class Config:
    block_m: int = 32
    block_r: int = 128
    num_warps: int = 4


def pick_config(M: int, k: int) -> Config:
    """Pure.  Tall blocks for narrow matrices; no threshold has been measured yet."""
    block_r = min(128, max(16, triton.next_power_of_2(k)))
    return Config(16 if M <= 16 else 4096 // block_r, block_r)


@triton.jit
def scale_tile(scales_ptr, mix_ptr, offs_m, offs_r, mask_m, mask_r, R, E, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """m of a tile: fp32 [1, BLOCK_R], or [BLOCK_M, BLOCK_R] under a mix."""
    if mix_ptr is None:
        m = tl.load(scales_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    else:
        m = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for e in range(E):
            scale = tl.load(scales_ptr + e * R + offs_r, mask=mask_r, other=0.0)
            weight = tl.load(mix_ptr + offs_m * E + e, mask=mask_m, other=0.0)
            m += weight[:, None] * scale[None, :]
    return m


@triton.jit
def store_dots(
    h, scales_ptr, mix_ptr, dscales_ptr, dmix_ptr, offs_m, offs_r, mask_m, mask_r, R, E, block_m, block_r, stride_dmix
):
    """Sums of a tile of h: over its rows to row ``block_m`` of dscales' partials, over its columns to dmix's ``block_r``."""
    if mix_ptr is None:
        tl.store(dscales_ptr + block_m * R + offs_r, tl.sum(h, 0), mask=mask_r)
    else:
        for e in range(E):
            scale = tl.load(scales_ptr + e * R + offs_r, mask=mask_r, other=0.0)
            weight = tl.load(mix_ptr + offs_m * E + e, mask=mask_m, other=0.0)
            tl.store(dscales_ptr + (block_m * E + e) * R + offs_r, tl.sum(h * weight[:, None], 0), mask=mask_r)
            tl.store(dmix_ptr + block_r * stride_dmix + offs_m * E + e, tl.sum(h * scale[None, :], 1), mask=mask_m)


@triton.jit
def _svf_scale_kernel(
    d_ptr,
    s_ptr,
    scales_ptr,
    mix_ptr,
    ds_ptr,
    dscales_ptr,
    dmix_ptr,
    M,
    R,
    E,
    P,
    stride_dp,
    stride_dm,
    stride_sm,
    stride_dsm,
    stride_dmix,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block_m, block_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    mask = mask_m[:, None] & mask_r[None, :]

    d = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for p in range(P):
        part = d_ptr + p * stride_dp + offs_m[:, None] * stride_dm + offs_r[None, :]
        d += tl.load(part, mask=mask, other=0.0).to(tl.float32)
    if s_ptr is not None:
        s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
        store_dots(
            d * s,
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
    if ds_ptr is not None:
        m = scale_tile(scales_ptr, mix_ptr, offs_m, offs_r, mask_m, mask_r, R, E, BLOCK_M, BLOCK_R)
        tl.store(
            ds_ptr + offs_m[:, None] * stride_dsm + offs_r[None, :], cast(d * m, ds_ptr.dtype.element_ty), mask=mask
        )


class Sums(NamedTuple):
    """What store_dots leaves of h, and how it is totalled: of the scales' gradient, and of the mix's or None."""

    partials: tuple[Layout, Layout | None]  # fp32 [blocks_m, scales' elements], [blocks_r, mix's]
    totals: tuple[Plan, Plan | None]

    @classmethod
    def of(cls, scales: Layout, mix: Layout | None, blocks_m: int, blocks_r: int) -> "Sums":
        partials, totals = [], []
        for t, blocks in ((scales, blocks_m), (mix, blocks_r)):
            if t is None:
                partials.append(None)
                totals.append(None)
                continue
            matrix = Layout.new((t.numel // t.shape[-1], t.shape[-1]), t.dtype, t.device)
            partials.append(Layout.new((blocks, t.numel), torch.float32, t.device))
            totals.append(_reduce.plan(blocks, t.numel, (matrix,)))
        return cls(tuple(partials), tuple(totals))

    def empty(self) -> list[torch.Tensor | None]:
        return [t and torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in self.partials]

    def total(self, partials, scales: torch.Tensor, mix: torch.Tensor | None) -> list[torch.Tensor | None]:
        """[dscales, dmix]."""
        grads = [t if t is None else torch.empty_like(t) for t in (scales, mix)]
        for plan, part, grad in zip(self.totals, partials, grads, strict=True):
            if plan is not None:
                run(plan, part, (grad,))
        return grads


@planned
def plan(
    D: Layout,
    scales: Layout,
    mix: Layout | None,
    S: Layout | None,
    dtype: torch.dtype | None,
    config: Config | None = None,
) -> tuple[Plan, Sums | None] | None:
    """Of :func:`svf_scale`; None where D is empty."""
    P, M, R = (1, *D.shape) if len(D.shape) == 2 else D.shape
    check_mix("svf_scale", scales, mix, M, R)
    for t in (D, S):
        if t is not None and (t.dtype not in DTYPES or t.shape[-2:] != (M, R) or (t.strides[-1] != 1 and R > 1)):
            raise ValueError(
                f"svf_scale: expected [{M}, {R}] fp16, bf16 or fp32 with a contiguous last dim, got {t.dtype}"
                f" {list(t.shape)} {t.strides}"
            )
    if M == 0:
        return None
    c = config or pick_config(M, R)
    grid = triton.cdiv(M, c.block_m), triton.cdiv(R, c.block_r)
    sums = None if S is None else Sums.of(scales, mix, *grid)
    launch = Plan(
        _svf_scale_kernel,
        grid,
        (
            D,
            S,
            scales,
            mix,
            None if dtype is None else Layout.new((M, R), dtype, D.device),
            *((None, None) if sums is None else sums.partials),
        ),
        (
            M,
            R,
            0 if mix is None else mix.shape[1],
            P,
            D.strides[0] if P > 1 else 0,
            D.strides[-2],
            0 if S is None else S.strides[0],
            R,
            0 if mix is None else mix.numel,
        ),
        dict(BLOCK_M=c.block_m, BLOCK_R=c.block_r, num_warps=c.num_warps),
    )
    return launch, sums


def svf_scale(
    D: torch.Tensor,
    scales: torch.Tensor,
    mix: torch.Tensor | None,
    S: torch.Tensor | None,
    dtype: torch.dtype | None,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dS in ``dtype`` unless that is None, dscales and dmix if S is given; dmix only beside a mix).

    Raises: ValueError before anything is launched.
    """
    p = plan(layout(D), layout(scales), layout(mix), layout(S), dtype, config)
    dS = None if dtype is None else D.new_empty(D.shape[-2:], dtype=dtype)
    if p is None:  # no rows: their sum is 0
        return dS, *((None if S is None or t is None else torch.zeros_like(t)) for t in (scales, mix))
    launch, sums = p
    partials = (None, None) if sums is None else sums.empty()
    run(launch, D, S, scales, mix, dS, *partials)
    return dS, *((None, None) if sums is None else sums.total(partials, scales, mix))


def check_mix(name: str, scales: Layout, mix: Layout | None, M: int, R: int) -> None:
    """scales fp32 [R], or fp32 [E, R] beside mix fp32 [M, E]; contiguous."""
    shapes = ((R,),) if mix is None else ((mix.shape[1], R), (M, mix.shape[1]))
    for t, shape in zip((scales, mix), shapes, strict=False):
        if t.shape != shape or t.dtype is not torch.float32 or not t.contiguous:
            raise ValueError(
                f"{name}: expected contiguous fp32 {list(shape)}, got {t.dtype} {list(t.shape)} {t.strides}"
            )
