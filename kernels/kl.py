"""KL(p || q) of two chunks of fp32 logits z, z' [C, V], and its gradient to the first: exact, over the whole vocabulary.

    δ_v = log p_v - log q_v        KL = Σ (q - p + p δ)        dz_v = g p_v (δ_v - KL) dy/dz
    log p_v = (y_v - max) - ℓ,  log q_v likewise;  y: logprob.py's

Σ q - p = 0: with it no term is negative, and near δ = 0 each is p f(δ), f(δ) = e^-δ - 1 + δ = δ²/2 - ..., so that a small
KL is not the difference of large numbers, and an error of ℓ counts in second order.  Where both sides hold the same bits, δ
is 0: KL and gradient are exactly 0.  A program owns a row and walks it twice.
Floor: bytes.  Forward reads 16 C V, backward reads 8 C V and writes C V in the GEMMs' dtype.
Eager form: lowrank/ops/kl_eager.py.
"""

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, Layout, Plan, layout, planned, run
from ._tile import cast
from .logprob import Config, apart, check_rows, online, pick_config, row_of, row_scales, transform


@triton.jit
def _log_total(z_ptr, V, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """(max y, ℓ) of a row."""
    largest = tl.cast(float("-inf"), tl.float32)
    total = tl.cast(0.0, tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        y, _t = transform(tl.load(z_ptr + offs, mask=offs < V, other=0.0), scale, cap, CAPPED)
        y = tl.where(offs < V, y, float("-inf"))
        largest, total, _factor, _shift, _d, _e = online(y, largest, total)
    return largest, tl.log(total)


@triton.jit
def _excess(delta, p, q):
    """q - p + p δ."""
    f = 1.0 / 40320 - delta * (1.0 / 362880)
    f = 1.0 / 720 - delta * (1.0 / 5040 - delta * f)
    f = 0.5 - delta * (1.0 / 6 - delta * (1.0 / 24 - delta * (1.0 / 120 - delta * f)))
    near = tl.abs(delta) < 0.5
    return tl.where(p == 0.0, q, tl.where(near, p * (delta * delta * f), q - p + p * delta))


@triton.jit
def _kl_kernel(
    z_ptr,
    base_ptr,
    kl_ptr,
    stats_ptr,
    inv_t_ptr,
    base_inv_t_ptr,
    inv_t,
    logit_scale,
    softcap,
    base_inv_t,
    base_logit_scale,
    base_softcap,
    V,
    stride_z,
    stride_base,
    stride_stats,
    CAPPED: tl.constexpr,
    BASE_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale, cap, _slope = row_scales(inv_t, inv_t_ptr, row, logit_scale, softcap, CAPPED)
    base_scale, base_cap, _s = row_scales(base_inv_t, base_inv_t_ptr, row, base_logit_scale, base_softcap, BASE_CAPPED)
    z_ptr += row * stride_z
    base_ptr += row * stride_base
    largest, lse = _log_total(z_ptr, V, scale, cap, CAPPED, BLOCK)
    base_largest, base_lse = _log_total(base_ptr, V, base_scale, base_cap, BASE_CAPPED, BLOCK)

    kl = tl.cast(0.0, tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        y, _t = transform(tl.load(z_ptr + offs, mask=offs < V, other=0.0), scale, cap, CAPPED)
        y0, _t0 = transform(tl.load(base_ptr + offs, mask=offs < V, other=0.0), base_scale, base_cap, BASE_CAPPED)
        lp, lq = (y - largest) - lse, (y0 - base_largest) - base_lse
        kl += tl.sum(tl.where(offs < V, _excess(lp - lq, tl.exp(lp), tl.exp(lq)), 0.0), 0)

    tl.store(kl_ptr + row, kl)
    tl.store(stats_ptr + row, largest)
    tl.store(stats_ptr + stride_stats + row, lse)
    tl.store(stats_ptr + 2 * stride_stats + row, base_largest)
    tl.store(stats_ptr + 3 * stride_stats + row, base_lse)
    tl.store(stats_ptr + 4 * stride_stats + row, kl)


@triton.jit
def _dkl_kernel(
    z_ptr,
    base_ptr,
    stats_ptr,
    dkl_ptr,
    dz_ptr,
    inv_t_ptr,
    base_inv_t_ptr,
    inv_t,
    logit_scale,
    softcap,
    base_inv_t,
    base_logit_scale,
    base_softcap,
    V,
    stride_z,
    stride_base,
    stride_stats,
    stride_dkl,
    CAPPED: tl.constexpr,
    BASE_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale, cap, slope = row_scales(inv_t, inv_t_ptr, row, logit_scale, softcap, CAPPED)
    base_scale, base_cap, _s = row_scales(base_inv_t, base_inv_t_ptr, row, base_logit_scale, base_softcap, BASE_CAPPED)
    stats_ptr += row
    y, t = transform(tl.load(z_ptr + row * stride_z + offs, mask=offs < V, other=0.0), scale, cap, CAPPED)
    y0, _t0 = transform(
        tl.load(base_ptr + row * stride_base + offs, mask=offs < V, other=0.0), base_scale, base_cap, BASE_CAPPED
    )
    lp = (y - tl.load(stats_ptr)) - tl.load(stats_ptr + stride_stats)
    lq = (y0 - tl.load(stats_ptr + 2 * stride_stats)) - tl.load(stats_ptr + 3 * stride_stats)
    p = tl.exp(lp)
    delta = tl.where(p == 0.0, 0.0, lp - lq)
    dz = tl.load(dkl_ptr + row * stride_dkl) * (p * (delta - tl.load(stats_ptr + 4 * stride_stats)))
    dz *= slope * (1.0 - t * t)
    tl.store(dz_ptr + row * V + offs, cast(dz, dz_ptr.dtype.element_ty), mask=offs < V)


def per_logit(dtype: torch.dtype, softcap: float) -> int:
    """Bytes of a chunk per logit: two of them in fp32, and the gradient in ``dtype``."""
    return 8 + dtype.itemsize


@planned
def plan_forward(
    z: Layout,
    base: Layout,
    inv_t: Layout | None,
    base_inv_t: Layout | None,
    kl: Layout,
    stats: Layout,
    capped: bool,
    base_capped: bool,
    config: Config | None = None,
) -> Plan | None:
    """Of :func:`forward`; None where z is empty."""
    C, V = _check(z, base, inv_t, base_inv_t, kl, stats)
    if C == 0:
        return None
    c = config or pick_config(V)
    return Plan(
        _kl_kernel,
        (C,),
        (z, base, kl, stats, inv_t, base_inv_t, *(float,) * 6),
        (V, z.strides[0], base.strides[0], stats.strides[0]),
        dict(CAPPED=capped, BASE_CAPPED=base_capped, BLOCK=c.block, num_warps=c.num_warps),
    )


@planned
def plan_backward(
    z: Layout,
    base: Layout,
    inv_t: Layout | None,
    base_inv_t: Layout | None,
    stats: Layout,
    dkl: Layout,
    capped: bool,
    base_capped: bool,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Plan | None:
    """Of :func:`backward`; None where z is empty."""
    C, V = _check(z, base, inv_t, base_inv_t, None, stats)
    if dtype not in DTYPES or dkl.shape != (C,):
        raise ValueError(f"kl: expected dkl [{C}] and fp16, bf16 or fp32 for z's gradient, got {dtype}")
    if C == 0:
        return None
    c = config or pick_config(V)
    return Plan(
        _dkl_kernel,
        (C, triton.cdiv(V, c.block)),
        (z, base, stats, dkl, Layout.new((C, V), dtype, z.device), inv_t, base_inv_t, *(float,) * 6),
        (V, z.strides[0], base.strides[0], stats.strides[0], dkl.strides[0]),
        dict(CAPPED=capped, BASE_CAPPED=base_capped, BLOCK=c.block, num_warps=c.num_warps),
    )


def _check(z, base, inv_t, base_inv_t, kl, stats) -> tuple[int, int]:
    if check_rows("kl", base, base_inv_t) != check_rows("kl", z, inv_t, kl, row_of(stats)):
        raise ValueError(f"kl: z {list(z.shape)} and base {list(base.shape)} differ")
    return tuple(z.shape)


def forward(z, base, scales, base_scales, kl, stats, config: Config | None = None) -> None:
    """z, base fp32 [C, V] -> kl fp32 [C] and stats fp32 [5, C] (max and ℓ of both, KL), all overwritten.

    scales, base_scales: as logprob.forward's.  Raises: ValueError before anything is launched.
    """
    (inv_t, floats), (base_inv_t, base_floats) = apart(scales), apart(base_scales)
    p = plan_forward(
        layout(z),
        layout(base),
        layout(inv_t),
        layout(base_inv_t),
        layout(kl),
        layout(stats),
        scales[2] != 0,
        base_scales[2] != 0,
        config,
    )
    if p is not None:
        run(p, z, base, kl, stats, inv_t, base_inv_t, *floats, *base_floats)


def backward(z, base, scales, base_scales, stats, dkl, dtype, config: Config | None = None) -> torch.Tensor:
    """The gradient of z [C, V] in ``dtype``, from :func:`forward`'s stats and the gradient [C] of its result."""
    (inv_t, floats), (base_inv_t, base_floats) = apart(scales), apart(base_scales)
    p = plan_backward(
        layout(z),
        layout(base),
        layout(inv_t),
        layout(base_inv_t),
        layout(stats),
        layout(dkl),
        scales[2] != 0,
        base_scales[2] != 0,
        dtype,
        config,
    )
    dz = z.new_empty(z.shape, dtype=dtype)
    if p is not None:
        run(p, z, base, stats, dkl, dz, inv_t, base_inv_t, *floats, *base_floats)
    return dz
