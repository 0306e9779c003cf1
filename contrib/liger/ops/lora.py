"""LoRA on a linear layer (Hu et al. 2021, arXiv 2106.09685): y = x W^T + bias + scaling (x A^T) B^T.

The two thin products are written first, by two kernels that read x and write y once, and the frozen GEMM adds to y in place
(addmm_, beta = 1): cuBLAS at full speed, and no pass over y afterwards. The backward does the same with dx, and a third
kernel reduces dA and dB over the rows. Saved for backward: x itself and S = x A^T, [tokens, rank].
"""

import torch
import triton
import triton.language as tl

from liger_kernel.ops.utils import device_context
from liger_kernel.ops.utils import ensure_contiguous

MAX_RANK = 128
_ROWS_PER_SPLIT = 1024  # of the reductions dA and dB: enough programs on a large GPU, the same sum on every one


@triton.jit
def _lora_shrink_kernel(
    x_ptr, x_stride, a_ptr, a_stride_r, a_stride_k, s_ptr, s_stride, scaling, n_rows, n_cols, rank,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = scaling x A^T"""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, n_cols, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        x_mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        a_mask = (cols < n_cols)[:, None] & (ranks < rank)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=x_mask, other=0.0)
        a = tl.load(a_ptr + cols[:, None] * a_stride_k + ranks[None, :] * a_stride_r, mask=a_mask, other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    # a scalar is fp64 when Inductor launches the kernel: uncast, it would take the epilogue with it
    s = (acc * tl.cast(scaling, tl.float32)).to(s_ptr.dtype.element_ty)
    tl.store(
        s_ptr + rows[:, None] * s_stride + ranks[None, :], s, mask=(rows < n_rows)[:, None] & (ranks < rank)[None, :]
    )


@triton.jit
def _lora_expand_kernel(
    s_ptr, s_stride, b_ptr, b_stride_n, b_stride_r, bias_ptr, y_ptr, y_stride, scaling, n_rows, n_cols, rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = scaling S B^T + bias"""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    s_mask = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
    b_mask = (ranks < rank)[:, None] & (cols < n_cols)[None, :]
    s = tl.load(s_ptr + rows[:, None] * s_stride + ranks[None, :], mask=s_mask, other=0.0)
    b = tl.load(b_ptr + cols[None, :] * b_stride_n + ranks[:, None] * b_stride_r, mask=b_mask, other=0.0)
    y = tl.dot(s, b, input_precision=PRECISION) * tl.cast(scaling, tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    y_mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(y_ptr + rows[:, None] * y_stride + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _lora_outer_kernel(
    y_ptr, y_stride, s_ptr, s_stride, out_ptr, scaling, n_rows, n_cols, rank, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split] = scaling Y^T S over this split's ROWS rows, [n_cols, rank] in fp32"""
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(0, ROWS, BLOCK_M):
        rows = split * ROWS + m + tl.arange(0, BLOCK_M)
        y_mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        s_mask = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
        y = tl.load(y_ptr + rows[:, None] * y_stride + cols[None, :], mask=y_mask, other=0.0)
        s = tl.load(s_ptr + rows[:, None] * s_stride + ranks[None, :], mask=s_mask, other=0.0)
        acc = tl.dot(tl.trans(y), s, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + (split * n_cols + cols[:, None]) * rank + ranks[None, :]
    tl.store(out_ptrs, acc * tl.cast(scaling, tl.float32), mask=(cols < n_cols)[:, None] & (ranks < rank)[None, :])


def _settings(rank, dtype):
    """(block of rows and columns, keyword arguments); exact fp32 has no tensor cores, and spills from larger blocks"""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    block_r = max(16, triton.next_power_of_2(rank))
    block = 64 if dtype is not torch.float32 or precision == "tf32" else 32 if block_r <= 64 else 16
    return block, {"BLOCK_M": block, "BLOCK_R": block_r, "PRECISION": precision, "num_warps": 4, "num_stages": 2}


def _shrink(x, A, scaling):
    """scaling * x @ A.T for x [M, K] and A [R, K] of any strides"""
    (M, K), R = x.shape, A.shape[0]
    S = torch.empty((M, R), dtype=x.dtype, device=x.device)
    block, settings = _settings(R, x.dtype)
    with device_context(x.device):
        _lora_shrink_kernel[(triton.cdiv(M, block),)](
            x, x.stride(0), A, A.stride(0), A.stride(1), S, S.stride(0), float(scaling), M, K, R,
            BLOCK_K=block, **settings,
        )  # fmt: skip
    return S


def _expand(S, B, scaling, bias=None):
    """scaling * S @ B.T + bias for S [M, R] and B [N, R] of any strides"""
    (M, R), N = S.shape, B.shape[0]
    Y = torch.empty((M, N), dtype=S.dtype, device=S.device)
    block, settings = _settings(R, S.dtype)
    with device_context(S.device):
        _lora_expand_kernel[(triton.cdiv(M, block), triton.cdiv(N, block))](
            S, S.stride(0), B, B.stride(0), B.stride(1), bias, Y, Y.stride(0), float(scaling), M, N, R,
            BLOCK_N=block, **settings,
        )  # fmt: skip
    return Y


def _outer(Y, S, scaling):
    """scaling * Y.T @ S in fp32 for Y [M, N] and S [M, R]; summed in the same order every time"""
    (M, N), R = Y.shape, S.shape[1]
    splits = triton.cdiv(M, _ROWS_PER_SPLIT)
    out = torch.empty((splits, N, R), dtype=torch.float32, device=Y.device)
    block, settings = _settings(R, Y.dtype)
    with device_context(Y.device):
        _lora_outer_kernel[(triton.cdiv(N, block), splits)](
            Y, Y.stride(0), S, S.stride(0), out, float(scaling), M, N, R, ROWS=_ROWS_PER_SPLIT,
            BLOCK_N=block, **settings,
        )  # fmt: skip
    return out.sum(0)


def lora_forward(x, weight, lora_A, lora_B, scaling, bias=None):
    """(y [M, N], S [M, R]) for x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], all of one dtype"""
    S = _shrink(x, lora_A, 1.0)
    return _expand(S, lora_B, scaling, bias).addmm_(x, weight.t()), S


def lora_backward(dy, x, S, weight, lora_A, lora_B, scaling, needs):
    """Gradients of (x, weight, lora_A, lora_B, bias), None where ``needs`` says so"""
    need_x, need_weight, need_A, need_B, need_bias = needs
    dx = dA = None
    if need_x or need_A:
        dS = _shrink(dy, lora_B.t(), scaling)
        if need_x:
            dx = _expand(dS, lora_A.t(), 1.0).addmm_(dy, weight)
        if need_A:
            dA = _outer(x, dS, 1.0).t()
    dB = _outer(dy, S, scaling) if need_B else None
    dweight = dy.t() @ x if need_weight else None
    dbias = dy.sum(0, dtype=torch.float32) if need_bias else None
    return dx, dweight, dA, dB, dbias


class LigerLoRAFunction(torch.autograd.Function):
    @staticmethod
    @ensure_contiguous
    def forward(ctx, x, weight, lora_A, lora_B, scaling: float = 1.0, bias=None):
        """
        x: (..., in_features)
        weight: (out_features, in_features), usually frozen: its gradient is computed only if asked for
        lora_A: (rank, in_features), lora_B: (out_features, rank), of any dtype; computed with in x's (in autocast's)
        bias: (out_features,), optional
        """
        (N, K), R = weight.shape, lora_A.shape[0]
        if x.shape[-1] != K or lora_A.shape != (R, K) or lora_B.shape != (N, R):
            raise ValueError(
                f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)} and"
                f" lora_B {tuple(lora_B.shape)} do not fit together"
            )
        if not 1 <= R <= MAX_RANK:
            raise ValueError(f"rank must be between 1 and {MAX_RANK}, got {R}")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.shape, ctx.scaling = x.shape, scaling
        x, weight, lora_A, lora_B = (t.to(dtype) for t in (x.view(-1, K), weight, lora_A, lora_B))
        y, S = lora_forward(x, weight, lora_A, lora_B, scaling, bias)
        ctx.save_for_backward(x, S, weight, lora_A, lora_B)
        return y.view(*ctx.shape[:-1], N)

    @staticmethod
    @ensure_contiguous
    def backward(ctx, dy):
        x, S, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, need_weight, need_A, need_B, _, need_bias = ctx.needs_input_grad
        needs = (need_x, need_weight, need_A, need_B, need_bias)
        dy = dy.view(-1, dy.shape[-1])
        dx, dweight, dA, dB, dbias = lora_backward(dy, x, S, weight, lora_A, lora_B, ctx.scaling, needs)
        return None if dx is None else dx.view(ctx.shape), dweight, dA, dB, None, dbias
