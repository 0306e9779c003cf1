"""Two passes over a chunk of fp32 logits z [C, V]: forward to log-probability and entropy, backward to the logits' gradient.

    y    = softcap tanh(z logit_scale / softcap) / temperature           (without a cap: y = z logit_scale / temperature)
    logp = (y_t − max) − ℓ       H = ℓ − Ē       ℓ = log Σ exp(y − max),  Ē = Σ p (y − max)
    dz_v = [g_logp (1[v = t] − p_v) − g_H p_v (y_v − max − Ē)] dy/dz

A program owns a row and walks it once: nothing is summed across programs, so the same row gives the same bits wherever it is.
Σ e and Σ e (y − max) are kept relative to the running maximum.  Ignored rows: 0.  A target outside [0, V): NaN, no gradient.
Floor: bytes.  Forward reads 4 C V; backward reads as much and writes C V in the GEMMs' dtype: 16 us and 23 us at 128 x 128256
at 4.3 TB/s.  Eager form: lowrank/ops/logprob_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, Layout, Plan, layout, planned, run
from ._tile import cast


@dataclass(frozen=True)
class Config:
    block: int = 4096
    num_warps: int = 8


def pick_config(V: int) -> Config:
    """Pure; no threshold has been measured yet."""
    block = min(4096, max(128, triton.next_power_of_2(V)))
    return Config(block, 8 if block > 1024 else 4)


@triton.jit
def _tanh(x):
    """To a few units in the last place: Taylor's series up to 1/2, where 1 - 2 / (e^2x + 1) would cancel."""
    s = x * x
    c = -0.3333333333 + s * (0.1333333333 + s * (-0.0539682540 + s * (0.0218694885 + s * -0.0088632355)))
    c = c + s * s * s * s * s * (0.0035921280 + s * (-0.0014558344 + s * 0.0005900274))
    return tl.where(s < 0.25, x + x * s * c, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def transform(z, scale, cap, CAPPED: tl.constexpr):
    """y, and the value of tanh (0 without a cap)."""
    if CAPPED:
        t = _tanh(z * scale)
        return t * cap, t
    else:
        return z * scale, tl.zeros_like(z)


@triton.jit
def row_scales(inv_t, inv_t_ptr, row, logit_scale, softcap, CAPPED: tl.constexpr):
    """(of z, of tanh, of dy/dz)."""
    temperature = tl.cast(inv_t, tl.float32)
    if inv_t_ptr is not None:
        temperature *= tl.load(inv_t_ptr + row)
    scale, cap = tl.cast(logit_scale, tl.float32), tl.cast(softcap, tl.float32)
    slope = scale * temperature
    if CAPPED:
        return scale / cap, cap * temperature, slope
    else:
        return slope, temperature, slope


@triton.jit
def online(y, largest, total):
    """(maximum, Σ exp(y - maximum), its factor and shift from the maximum before, y - maximum, exp of that) with a block y."""
    fresh = tl.maximum(largest, tl.max(y, 0))  # a NaN may be lost here: e holds it
    shift = tl.where(largest == float("-inf"), 0.0, largest - fresh)
    d = y - fresh
    e = tl.where(y == float("-inf"), 0.0, tl.exp(d))
    factor = tl.exp(shift)
    return fresh, factor * total + tl.sum(e, 0), factor, shift, d, e


@triton.jit
def _logprob_kernel(
    z_ptr,
    targets_ptr,
    logp_ptr,
    entropy_ptr,
    stats_ptr,
    inv_t_ptr,
    inv_t,
    logit_scale,
    softcap,
    V,
    stride_z,
    stride_stats,
    ignore_index,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    scale, cap, _slope = row_scales(inv_t, inv_t_ptr, row, logit_scale, softcap, CAPPED)
    z_ptr += row * stride_z

    largest = tl.cast(float("-inf"), tl.float32)
    total = tl.cast(0.0, tl.float32)
    moment = tl.cast(0.0, tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        y, _t = transform(tl.load(z_ptr + offs, mask=offs < V, other=0.0), scale, cap, CAPPED)
        y = tl.where(offs < V, y, float("-inf"))
        before = total
        largest, total, factor, shift, d, e = online(y, largest, total)
        # where e or the factor is 0, what it multiplies may be infinite
        moment = tl.where(factor == 0.0, 0.0, factor * (moment + before * shift))
        moment += tl.sum(tl.where(e == 0.0, 0.0, e * d), 0)

    lse = tl.log(total)
    mean = moment / total
    inside = (target >= 0) & (target < V)
    chosen, _t = transform(tl.load(z_ptr + tl.where(inside, target, 0)), scale, cap, CAPPED)
    logp = tl.where(inside, (chosen - largest) - lse, float("nan"))
    ignored = target == ignore_index
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, lse - mean))
    tl.store(stats_ptr + row, largest)
    tl.store(stats_ptr + stride_stats + row, lse)
    tl.store(stats_ptr + 2 * stride_stats + row, mean)


@triton.jit
def _dlogits_kernel(
    z_ptr,
    targets_ptr,
    stats_ptr,
    dlogp_ptr,
    dentropy_ptr,
    dz_ptr,
    inv_t_ptr,
    inv_t,
    logit_scale,
    softcap,
    V,
    stride_z,
    stride_stats,
    stride_dlogp,
    stride_dentropy,
    ignore_index,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    scale, cap, slope = row_scales(inv_t, inv_t_ptr, row, logit_scale, softcap, CAPPED)
    inside = (target >= 0) & (target < V) & (target != ignore_index)
    g = tl.load(dlogp_ptr + row * stride_dlogp)
    h = tl.load(dentropy_ptr + row * stride_dentropy)
    largest = tl.load(stats_ptr + row)
    lse = tl.load(stats_ptr + stride_stats + row)
    mean = tl.load(stats_ptr + 2 * stride_stats + row)
    y, t = transform(tl.load(z_ptr + row * stride_z + offs, mask=offs < V, other=0.0), scale, cap, CAPPED)
    d = y - largest
    p = tl.exp(d - lse)
    dz = tl.where(offs == target, g, 0.0) - p * (g + h * (tl.where(p == 0.0, 0.0, d) - mean))
    dz *= slope * (1.0 - t * t)
    dz = tl.where(inside, dz, 0.0)
    tl.store(dz_ptr + row * V + offs, cast(dz, dz_ptr.dtype.element_ty), mask=offs < V)


def per_logit(dtype: torch.dtype, softcap: float) -> int:
    """Bytes of a chunk per logit: fp32 logits and their gradient in ``dtype``."""
    return 4 + dtype.itemsize


@planned
def plan_forward(
    z: Layout,
    targets: Layout,
    inv_t: Layout | None,
    logp: Layout,
    entropy: Layout,
    stats: Layout,
    ignore_index: int,
    capped: bool,
    config: Config | None = None,
) -> Plan | None:
    """Of :func:`forward`; None where z is empty."""
    C, V = check_rows("logprob", z, targets, inv_t, logp, entropy, row_of(stats))
    if C == 0:
        return None
    c = config or pick_config(V)
    return Plan(
        _logprob_kernel,
        (C,),
        (z, targets, logp, entropy, stats, inv_t, float, float, float),
        (V, z.strides[0], stats.strides[0], ignore_index),
        dict(CAPPED=capped, BLOCK=c.block, num_warps=c.num_warps),
    )


@planned
def plan_backward(
    z: Layout,
    targets: Layout,
    inv_t: Layout | None,
    stats: Layout,
    dlogp: Layout,
    dentropy: Layout,
    ignore_index: int,
    capped: bool,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Plan | None:
    """Of :func:`backward`; None where z is empty."""
    C, V = check_rows("logprob", z, targets, inv_t, row_of(stats))
    if dtype not in DTYPES or not dlogp.shape == dentropy.shape == (C,):
        raise ValueError(f"logprob: expected gradients [{C}] and fp16, bf16 or fp32 for z's, got {dtype}")
    if C == 0:
        return None
    c = config or pick_config(V)
    return Plan(
        _dlogits_kernel,
        (C, triton.cdiv(V, c.block)),
        (z, targets, stats, dlogp, dentropy, Layout.new((C, V), dtype, z.device), inv_t, float, float, float),
        (V, z.strides[0], stats.strides[0], dlogp.strides[0], dentropy.strides[0], ignore_index),
        dict(CAPPED=capped, BLOCK=c.block, num_warps=c.num_warps),
    )


def forward(z, targets, ignore_index, scales, logp, entropy, stats, config: Config | None = None) -> None:
    """z fp32 [C, V] -> logp, entropy fp32 [C] and stats fp32 [3, C] (max, ℓ, Ē), all overwritten.

    targets: int64 [C].  scales: 1 / temperature as a float or fp32 [C], logit_scale, softcap (0: none).
    Raises: ValueError before anything is launched.
    """
    inv_t, floats = apart(scales)
    p = plan_forward(
        layout(z),
        layout(targets),
        layout(inv_t),
        layout(logp),
        layout(entropy),
        layout(stats),
        ignore_index,
        scales[2] != 0,
        config,
    )
    if p is not None:
        run(p, z, targets, logp, entropy, stats, inv_t, *floats)


def backward(
    z, targets, ignore_index, scales, stats, dlogp, dentropy, dtype, config: Config | None = None
) -> torch.Tensor:
    """The gradient of z [C, V] in ``dtype``, from :func:`forward`'s stats and the gradients [C] of its results."""
    inv_t, floats = apart(scales)
    p = plan_backward(
        layout(z),
        layout(targets),
        layout(inv_t),
        layout(stats),
        layout(dlogp),
        layout(dentropy),
        ignore_index,
        scales[2] != 0,
        dtype,
        config,
    )
    dz = z.new_empty(z.shape, dtype=dtype)
    if p is not None:
        run(p, z, targets, stats, dlogp, dentropy, dz, inv_t, *floats)
    return dz


def apart(scales) -> tuple[torch.Tensor | None, tuple[float, float, float]]:
    """What row_scales takes: the pointer to 1 / temperature or None, and (1 / temperature, logit_scale, softcap)."""
    inv_t, logit_scale, softcap = scales
    if isinstance(inv_t, torch.Tensor):
        return inv_t, (1.0, logit_scale, softcap)
    return None, (inv_t, logit_scale, softcap)


def row_of(stats: Layout) -> Layout:
    return stats._replace(shape=stats.shape[1:], strides=stats.strides[1:])


def check_rows(name: str, z: Layout, *rows: Layout | None) -> tuple[int, int]:
    """z's shape; raises ValueError unless it is fp32 with contiguous rows, and each of ``rows`` one number for each."""
    if z.dtype is not torch.float32 or len(z.shape) != 2 or (z.strides[1] != 1 and z.shape[1] > 1):
        raise ValueError(
            f"{name}: expected fp32 z [C, V] with contiguous rows, got {z.dtype} {list(z.shape)} {z.strides}"
        )
    for t in rows:
        if t is not None and (t.shape != z.shape[:1] or t.device != z.device or not t.contiguous):
            raise ValueError(
                f"{name}: expected contiguous [{z.shape[0]}] on {z.device} beside z, got {list(t.shape)} on {t.device}"
            )
    return tuple(z.shape)
