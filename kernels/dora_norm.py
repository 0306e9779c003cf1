"""‖W_n + (B A)_n‖² in parts that add up, with one read of W: what DoRA divides its magnitude by.

W [N, K], A [R, K], B fp32 [N, R], BG = B A Aᵀ fp32 [N, R] -> fp32 [P, N], to be summed over P:

    Σ_k W² + 2 (W Aᵀ) · B + BG · B

where · sums over a row, and Σ_k W² apart if asked for: in bits what the whole is where B is 0.  Neither B A nor anything else
of W's size is formed.  P: splits of K, and of R above WIDTH.
Floor: N K itemsize bytes; 7.8 us at 4096 x 4096 in bf16 at 4.3 TB/s.
Eager form: lowrank/ops/dora_eager.py.  Benchmark: bench/registry.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, GPU, Layout, Plan, check, dot_kind, layout, pad_rank, planned, precision, run
from ._tile import cast, dot

WIDTH = 64  # padded columns of W Aᵀ one program accumulates


@dataclass(frozen=True)
class Config:
    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def pick_config(N: int, K: int, block_r: int, kind: str, sms: int) -> Config:
    """Pure; ``kind``: _launch.dot_kind's.  Chosen so that nothing spills; no threshold has been measured yet."""
    block_n = 32 if kind == "fp32" else 64
    block_k = 64 if block_r <= 32 or kind == "same" else 32
    programs = triton.cdiv(N, block_n)
    split_k = max(1, min(2 * sms // programs, triton.cdiv(K, 4 * block_k), 32))
    return Config(block_n, block_k, split_k, 8 if block_r > 32 else 4)


@triton.jit
def _dora_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    bg_ptr,
    out_ptr,
    squares_ptr,
    N,
    K,
    R,
    K_SPLIT,
    stride_wn,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_bgn,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_r = tl.program_id(0) % R_BLOCKS  # programs that share W run side by side
    offs_n = (tl.program_id(0) // R_BLOCKS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_r = offs_n < N, offs_r < R
    first_k = tl.program_id(1) * K_SPLIT

    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(first_k, min(first_k + K_SPLIT, K), BLOCK_K):
        mask_k = k + offs_k < K
        w = tl.load(
            w_ptr + offs_n[:, None] * stride_wn + (k + offs_k)[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + (k + offs_k)[None, :].to(tl.int64) * stride_ak,
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = dot(w, cast(a, DTYPE).T, acc, PRECISION)
        w32 = w.to(tl.float32)
        square += tl.sum(w32 * w32, 1)

    mask = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :], mask=mask, other=0.0)
    acc *= 2.0
    if tl.program_id(1) == 0:
        acc += tl.load(bg_ptr + offs_n[:, None] * stride_bgn + offs_r[None, :], mask=mask, other=0.0)
    total = tl.sum(acc * b, 1)
    if pid_r == 0:
        total += square
    part = tl.program_id(1) * R_BLOCKS + pid_r
    tl.store(out_ptr + part.to(tl.int64) * N + offs_n, total, mask=mask_n)
    if squares_ptr is not None:
        tl.store(squares_ptr + part.to(tl.int64) * N + offs_n, tl.where(pid_r == 0, square, 0.0), mask=mask_n)


@planned
def plan(
    W: Layout,
    A: Layout,
    B: Layout,
    BG: Layout,
    alone: bool = False,
    matmul: str = "highest",
    config: Config | None = None,
    gpu: GPU | None = None,
) -> tuple[tuple[int, int], Plan]:
    """Of :func:`dora_norm`: the parts' shape, and the launch."""
    (N, K), R = W.shape, A.shape[0]
    thin = torch.promote_types(W.dtype, A.dtype)
    check("dora_norm", W, thin, [A, B, BG], [R])
    if A.shape[1] != K:
        raise ValueError(f"dora_norm: expected A [r, {K}], got {list(A.shape)}")
    for name, t in (("B", B), ("BG", BG)):
        if t.shape != (N, R) or t.dtype is not torch.float32 or (t.strides[1] != 1 and R > 1):
            raise ValueError(f"dora_norm: expected {name} [{N}, {R}] in fp32, last dim contiguous, got {list(t.shape)}")
    gpu, how, block_r = gpu or GPU.of(W.device), dot_kind(W.dtype, thin), min(WIDTH, pad_rank(R))
    c = config or pick_config(N, K, block_r, how, gpu.sms)
    k_split = triton.cdiv(triton.cdiv(K, c.split_k), c.block_k) * c.block_k
    splits, r_blocks = triton.cdiv(K, k_split), triton.cdiv(R, block_r)
    parts = Layout.new((splits * r_blocks, N), torch.float32, W.device)
    launch = Plan(
        _dora_norm_kernel,
        (triton.cdiv(N, c.block_n) * r_blocks, splits),
        (W, A, B, BG, parts, parts if alone else None),
        (N, K, R, k_split, W.strides[0], *A.strides, B.strides[0], BG.strides[0]),
        dict(
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=block_r,
            R_BLOCKS=r_blocks,
            DTYPE=DTYPES[thin],
            PRECISION=precision(how, matmul, gpu),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        ),
    )
    return parts.shape, launch


def dora_norm(
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    BG: torch.Tensor,
    config: Config | None = None,
    alone: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Parts [P, N] of the squared norms, and with ``alone`` parts [P, N] of those of W.  Any strides for A; W, B and BG with a
    contiguous last dim.

    Raises: ValueError before anything is launched (see _launch.check).
    """
    matmul = torch.get_float32_matmul_precision()
    shape, launch = plan(layout(W), layout(A), layout(B), layout(BG), alone, matmul, config)
    parts = torch.empty(shape, dtype=torch.float32, device=W.device)
    squares = torch.empty_like(parts) if alone else None
    run(launch, W, A, B, BG, parts, squares)
    return (parts, squares) if alone else parts
