"""out = W + B diag(m) A on tensor cores: fp32 sum, one rounding, and optionally a bit per element that changed.

W, out [N, K] contiguous, A [r, K], B [N, r] (any strides, 16 bits or fp32 each), m fp32 [r] or [1].  A single m multiplies
the sum; an m per rank multiplies one factor in fp32, which dot() then splits so that nothing of it is lost (an infinity
becomes NaN).  Each block of r is summed outside the MMA, because tensor cores truncate when they accumulate.  Where the
sum is 0, W's own bits.
For ranks too large for csrc/rank_update's chains of FMAs.  FLOPs: 2 N K r, three times that for a split; floor: 4 N K bytes
in 16 bits (+ N K / 8 with the map), and the MMAs above r = 128 or so: 140 us at 4096 x 4096 x 1024, split, at 720 TFLOP/s.
Plain form: lowrank/ops/_rank_update.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, GPU, Layout, Plan, layout, planned, run
from ._tile import cast, dot


@dataclass(frozen=True)
class Config:
    block_n: int = 128
    block_k: int = 128
    block_r: int = 32
    num_warps: int = 8
    num_stages: int = 3


def pick_config(kind: str) -> Config:
    """Pure; ``kind``: "same", "split", "tf32x3" or "ieee" (:func:`_how`).  Chosen so that nothing spills; not measured yet."""
    if kind == "ieee":
        return Config(64, 64, 16, 4, 2)
    return Config() if kind == "same" else Config(128, 64) if kind == "split" else Config(64, 64, 32, 4, 2)


@triton.jit
def _materialize_kernel(
    w_ptr,
    a_ptr,
    m_ptr,
    b_ptr,
    out_ptr,
    changed_ptr,
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_n = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    mask = mask_n[:, None] & mask_k[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        b = tl.load(
            b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br,
            mask=mask_n[:, None] & mask_r[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak,
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        if SCALE == "B":
            b = b.to(tl.float32) * tl.load(m_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
        elif SCALE == "A":
            a = a.to(tl.float32) * tl.load(m_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        acc += dot(b, a, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), PRECISION)
    if SCALE == "sum":
        acc *= tl.load(m_ptr)

    offs = offs_n[:, None] * K + offs_k[None, :]
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    out = tl.where(acc == 0, w, cast(w.to(tl.float32) + acc, w.dtype))
    tl.store(out_ptr + offs, out, mask=mask)
    if changed_ptr is not None:
        integer: tl.constexpr = tl.int32 if w.dtype == tl.float32 else tl.int16
        differs = tl.where(w.to(integer, bitcast=True) != out.to(integer, bitcast=True), 1, 0)
        byte = tl.sum(tl.reshape(differs, (BLOCK_N, BLOCK_K // 8, 8)) << tl.arange(0, 8)[None, None, :], 2)
        columns = (tl.program_id(0) % tiles_k).to(tl.int64) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        tl.store(
            changed_ptr.to(tl.pointer_type(tl.uint8)) + offs_n[:, None] * (K // 8) + columns[None, :],
            byte.to(tl.uint8),
            mask=mask_n[:, None] & (columns < K // 8)[None, :],
        )


@planned
def plan(
    weight: Layout,
    A: Layout,
    m: Layout,
    B: Layout,
    out: Layout,
    changed: Layout | None,
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`materialize`; None where weight is empty."""
    (N, K), r = weight.shape, A.shape[0]
    for t in (weight, A, B, out):
        if t.dtype not in DTYPES:
            raise ValueError(f"materialize: expected fp16, bf16 or fp32, got {t.dtype}")
    if A.shape[1] != K or B.shape != (N, r) or m.shape not in ((r,), (1,)) or out.shape != weight.shape:
        shapes = [list(t.shape) for t in (A, m, B, out)]
        raise ValueError(f"materialize: A, m, B and out {shapes} do not fit weight [{N}, {K}]")
    if out.dtype is not weight.dtype or not (weight.contiguous and out.contiguous and m.contiguous):
        raise ValueError("materialize: weight and out must have one dtype and be contiguous, as must m")
    if changed is not None and (K % 8 or changed.numel != (N * K + 31) // 32):
        raise ValueError(f"materialize: a map of [{N}, {K}] needs K % 8 == 0 and as many words, got {changed.numel}")
    if weight.numel == 0:
        return None
    gpu = gpu or GPU.of(weight.device)
    scale, kind, precision = _how(weight.dtype, A.dtype, B.dtype, m.numel == 1, gpu.hip)
    c = config or pick_config(kind)
    return Plan(
        _materialize_kernel,
        (triton.cdiv(N, c.block_n) * triton.cdiv(K, c.block_k),),
        (weight, A, m, B, out, changed),
        (N, K, r, *A.strides, *B.strides),
        dict(
            SCALE=scale,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            PRECISION=precision,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )


def materialize(
    weight: torch.Tensor,
    A: torch.Tensor,
    m: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor,
    changed: torch.Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Fill ``out`` [N, K], and the first N K / 8 bytes of ``changed`` int32 [ceil(N K / 32)]; that needs K % 8 == 0.

    Raises: ValueError before anything is launched.
    """
    p = plan(layout(weight), layout(A), layout(m), layout(B), layout(out), layout(changed), config)
    if p is not None:
        run(p, weight, A, m, B, out, changed)


def _how(weight: torch.dtype, A: torch.dtype, B: torch.dtype, one_m: bool, hip: bool) -> tuple[str, str, str]:
    """(what m multiplies, kind of dot for pick_config, its input_precision).  Never tf32 alone: the sum is fp32's."""
    fp32 = torch.float32
    scale = "sum" if one_m else "A" if A is fp32 and B is not fp32 else "B"
    b, a = (fp32 if scale == "B" else B), (fp32 if scale == "A" else A)
    if b is a and a is not fp32:
        return scale, "same", "ieee"
    if fp32 in (a, b) and torch.bfloat16 in (a, b):
        return scale, "split", "ieee"
    # 16 bits of weight hide what tf32x3 leaves out of fp32 times fp32; fp16 it holds exactly
    exact = hip or (a is b is fp32 and weight is fp32)
    return (scale, "ieee", "ieee") if exact else (scale, "tf32x3", "tf32x3")
