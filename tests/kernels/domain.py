"""The calls whose launches are every (kernel, config) pair that pick_config can return: one call per branch of its rules."""

import itertools

import torch

from lowrank.kernels import dora, kl, logprob, svf, thin
from lowrank.kernels.logits import logits
from lowrank.kernels.materialize import materialize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # activations, thin products
ROWS = [16, 32, 8192]
RANKS = [(16,), (32,), (64,), (128,), (512,), (16, 16), (16, 16, 16), (64, 64)]
SHAPE = 4096, 1024  # K, N of k_proj in an 8B model; M and the ranks are what configs depend on
RAGGED = 300, 77


def calls(dtype, thin_dtype, M, ranks, shape=SHAPE, with_svf=True):
    """Everything a LoRA linear launches forward and backward at these sizes, with and without dropout."""
    K, N = shape

    def empty(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    As, Bs = [empty(r, K, dtype=thin_dtype) for r in ranks], [empty(N, r, dtype=thin_dtype) for r in ranks]
    n, x, dY = len(ranks), empty(M, K), empty(M, N)
    seeds, scales, none = empty(n, dtype=torch.int64), [0.5] * n, [None] * n
    for masks in ([-1] * n, [0] * n, list(range(n))):
        S, keeps = thin.shrink(x, As, thin_dtype, masks, [6554] * (max(masks) + 1), seeds)
        dX, needed = empty(M, K), [True] * n
        thin.x_pass(x, list(S.split(ranks, 1)), As, needed, dX, masks, keeps)
        thin.x_pass(None, list(S.split(ranks, 1)), As, [False] * n, dX, masks, keeps)
        if (dtype, thin_dtype) == (FP16, FP32):
            thin.x_pass(None, list(S.split(ranks, 1)), As, [False] * n, dX, masks, keeps, add=True)
    thin.expand(S, Bs, scales, none, empty(N), dtype)
    thin.expand(S, Bs, scales, none, empty(M, N), dtype)
    thin.dy_pass(dY, Bs, scales, none, S, [True] * n, True, thin_dtype)
    thin.dy_pass(dY, Bs, scales, none, S, [True] * n, False, thin_dtype)
    thin.dy_pass(dY, Bs, scales, none, None, [False] * n, True, thin_dtype)
    if n == 1 and with_svf:
        svf_calls(dtype, thin_dtype, M, ranks[0], shape)
    if n == 1:
        dora_calls(dtype, thin_dtype, M, ranks[0], shape)
    m, changed = empty(ranks[0], dtype=FP32), None if K % 8 else empty(N * K // 32, dtype=torch.int32)
    for scale in (m, m[:1]):
        materialize(empty(N, K), As[0], scale, Bs[0], empty(N, K), changed)


def svf_calls(dtype, thin_dtype, M, k, shape):
    """Everything an SVF linear launches beside shrink and x_pass, one expert and several."""
    _, N = shape

    def empty(*size, dtype=thin_dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    S, B, dY = empty(M, k), empty(N, k), empty(M, N, dtype=dtype)
    for scales, mix in (
        (empty(k, dtype=FP32), None),
        (empty(4, k, dtype=FP32), empty(M, 4, dtype=FP32)),
    ):
        svf.expand(S, B, scales, mix, empty(N, dtype=dtype), dtype)
        svf.dy_pass(dY, B, scales, mix, S, True, thin_dtype)
        svf.dy_pass(dY, B, scales, mix, None, True, thin_dtype)
        if k == max(RANKS)[0]:  # beyond MAX_RANK these two run alone; below, svf_scale is the end of a split dy_pass
            svf.scale(S, scales, mix)
            svf.scale_and_dot(S, scales, mix, S, True)


def dora_calls(dtype, A_dtype, M, rank, shape):
    """Everything a DoRA linear launches beside shrink, dy_pass and x_pass; its thin products are fp32."""
    K, N = shape

    def empty(*size, dtype=FP32):
        return torch.empty(*size, dtype=dtype, device="meta")

    x, v, gain = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype), empty(N)
    A, B = empty(rank, K, dtype=A_dtype), empty(N, rank)
    for alone in (False, True):
        dora.norm(empty(N, K, dtype=dtype), A, B, alone)
    S, (keep,) = dora.shrink(x, [A.to(FP32)], FP32, [0], [6554], empty(1, dtype=torch.int64))
    for bias in (None, gain.to(dtype)):
        dora.expand(S, B, v, gain, bias)
        dora.expand(S, B, None, gain, bias, v)
    dora.expand(S, B, v, gain, None, v)
    dora.gain_dy(v, gain, v, True, True)
    dora.gain_dy(v, gain, v, True, False)
    dora.gain_dy(v, gain, v, True, False, gain.to(dtype))
    dora.drop(x, keep)
    dora.drop(x, keep, x)


def head_calls(dtype, C=8, V=128256):
    """Everything a vocabulary head launches for one chunk of rows."""

    def empty(*size, dtype=FP32):
        return torch.empty(*size, dtype=dtype, device="meta")

    h, W, bias = empty(C, 4096, dtype=dtype), empty(V, 4096, dtype=dtype), empty(V, dtype=dtype)
    logits(h, W, bias)
    for factors in dict.fromkeys((dtype, FP32)):
        t = logits(h, empty(16, 4096, dtype=factors))
        logits(h, W, None, t, empty(V, 16, dtype=factors))
    z, targets, row, stats = empty(C, V), empty(C, dtype=torch.int64), empty(C), empty(3, C)
    for scales in ((1.0, 1.0, 0.0), (row, 1.0, 30.0)):
        logprob.forward(z, targets, -100, scales, row, row, stats)
        logprob.backward(z, targets, -100, scales, stats, row, row, dtype)
        kl.forward(z, z, scales, scales, row, empty(5, C))
        kl.backward(z, z, scales, scales, empty(5, C), row, dtype)


def every_call(dtypes=DTYPES, rows=ROWS, ranks=RANKS, shape=SHAPE, svf_ranks=RANKS):
    for (dtype, thin_dtype), M, r in itertools.product(dtypes, rows, ranks):
        calls(dtype, thin_dtype, M, r, shape, r in svf_ranks)
    for dtype in dict.fromkeys(dtype for dtype, _ in dtypes):
        head_calls(dtype, V=shape[1])
