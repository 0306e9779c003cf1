"""z = h Wᵀ + t Bᵀ + bias in fp32: a vocabulary head's logits, each row with the same bits wherever and beside whatever it is.

h [C, H], W [V, H] and B [V, r] (any strides), t fp32 [C, r] -> z fp32 [C, V].  One tile size for every C and no split-K: what
a row's sum is made of, and in what order, depends on H and r alone.  The LoRA's steps follow the main loop, into the same
accumulator: a guard inside it would cost its pipelining.
Floor: 2 C V H FLOPs; 0.27 ms for 256 x 4096 x 128256 in bf16 at 1 PFLOP/s, and in bytes V H itemsize + 4 C V.
Eager form: lowrank/ops/head.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, GPU, Layout, Plan, layout, pad_rank, planned, precision, run
from ._tile import dot

MAX_BLOCK_R = 16


@dataclass(frozen=True)
class Config:
    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3


def pick_config(V: int, kind: str, tail: bool, arch: int) -> Config:
    """Pure, and blind to the number of rows.  Chosen so that nothing spills; no threshold has been measured yet."""
    if V <= 64 or kind == "split":  # the LoRA's own h Aᵀ
        return Config(64, 16 if kind == "split" else min(64, pad_rank(V)), 32, 4, 2)
    if kind == "fp32" or arch == 0:
        return Config(64, 64, 32, 8, 2)
    return Config(block_n=64 if tail and arch != 90 else 128)


@triton.jit
def _logits_kernel(
    h_ptr,
    w_ptr,
    bias_ptr,
    t_ptr,
    b_ptr,
    z_ptr,
    C,
    V,
    H,
    R,
    stride_hc,
    stride_hh,
    stride_wv,
    stride_wh,
    stride_tc,
    stride_bv,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL_PRECISION: tl.constexpr,
):
    blocks_m = tl.cdiv(C, BLOCK_M)  # programs that share a block of W run side by side
    first_m = (tl.program_id(0) % blocks_m).to(tl.int64) * BLOCK_M
    first_n = (tl.program_id(0) // blocks_m).to(tl.int64) * BLOCK_N
    rows, columns, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    offs_m, offs_n = first_m + rows, first_n + columns
    mask_m, mask_n = offs_m < C, offs_n < V
    h_ptr += first_m * stride_hc  # within a tile 32 bits do
    w_ptr += first_n * stride_wv

    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        mask_k = k + offs_k < H
        h = tl.load(
            h_ptr + rows[:, None] * stride_hc + offs_k[None, :] * stride_hh,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + columns[:, None] * stride_wv + offs_k[None, :] * stride_wh,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        z = dot(h, w.T, z, PRECISION)
        h_ptr += BLOCK_K * tl.cast(stride_hh, tl.int64)
        w_ptr += BLOCK_K * tl.cast(stride_wh, tl.int64)
    if t_ptr is not None:
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            t = tl.load(
                t_ptr + offs_m[:, None] * stride_tc + offs_r[None, :],
                mask=mask_m[:, None] & (offs_r < R)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + offs_n[:, None] * stride_bv + offs_r[None, :].to(tl.int64) * stride_br,
                mask=mask_n[:, None] & (offs_r < R)[None, :],
                other=0.0,
            )
            z = dot(t, b.T, z, TAIL_PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(z_ptr + offs_m[:, None] * V + offs_n[None, :], z, mask=mask_m[:, None] & mask_n[None, :])


@planned
def plan(
    h: Layout,
    W: Layout,
    bias: Layout | None,
    t: Layout | None,
    B: Layout | None,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> Plan | None:
    """Of :func:`logits`; None where z is empty."""
    (C, H), V = h.shape, W.shape[0]
    operands = [x for x in (h, W, bias, t, B) if x is not None]
    if any(x.dtype not in DTYPES or x.device != h.device for x in operands):
        raise ValueError(f"logits: expected fp16, bf16 or fp32 on {h.device}, got {[x.dtype for x in operands]}")
    if h.dtype is not W.dtype and torch.float32 not in (h.dtype, W.dtype):
        raise ValueError(f"logits: expected h and W in one dtype, or one in fp32, got {h.dtype} and {W.dtype}")
    if W.shape[1] != H or (bias is not None and (bias.shape != (V,) or bias.strides[0] != 1)):
        raise ValueError(f"logits: W {list(W.shape)} and bias do not fit h {list(h.shape)}")
    if (t is None) != (B is None) or (t is not None and (t.shape != (C, B.shape[1]) or B.shape[0] != V)):
        raise ValueError(f"logits: expected t [{C}, r] and B [{V}, r], or neither")
    if t is not None and (t.dtype is not torch.float32 or not t.contiguous):
        raise ValueError(f"logits: expected contiguous fp32 t, got {t.dtype} {t.strides}")
    if C * V == 0:
        return None
    gpu = gpu or GPU.of(h.device)
    kind = "same" if h.dtype is W.dtype is not torch.float32 else "fp32" if h.dtype is W.dtype else "split"
    c = config or pick_config(V, kind, B is not None, gpu.arch)
    R = 0 if t is None else t.shape[1]
    return Plan(
        _logits_kernel,
        (triton.cdiv(C, c.block_m) * triton.cdiv(V, c.block_n),),
        (h, W, bias, t, B, Layout.new((C, V), torch.float32, h.device)),
        (C, V, H, R, *h.strides, *W.strides, R, *((0, 0) if B is None else B.strides)),
        dict(
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=MAX_BLOCK_R,
            PRECISION=precision(kind, matmul, gpu),
            TAIL_PRECISION=precision("fp32" if kind == "fp32" else "split", matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )


def logits(
    h: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None = None,
    t: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """z fp32 [C, V].  h in W's dtype, or one of them fp32 over 16 bits; t, contiguous, comes with B in any of the dtypes.

    Raises: ValueError before anything is launched.
    """
    matmul = torch.get_float32_matmul_precision()
    p = plan(layout(h), layout(W), layout(bias), layout(t), layout(B), matmul, config)
    z = h.new_empty((h.shape[0], W.shape[0]), dtype=torch.float32)
    if p is not None:
        run(p, h, W, bias, t, B, z)
    return z
