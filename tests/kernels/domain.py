"""The plans whose launches are every (kernel, config) pair that pick_config can return: one call per branch of its rules."""

import itertools

import torch
from cross import GPU, layout

from lowrank.kernels import (
    act_backward,
    act_expand,
    combine_expand,
    dora_norm,
    drop,
    dy_pass,
    expand,
    gain_dy,
    gather_shrink,
    kl,
    logits,
    logprob,
    materialize,
    shrink,
    svf_dy,
    svf_scale,
    x_pass,
)
from lowrank.kernels._launch import Layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # activations, thin products
ROWS = [16, 32, 8192]
RANKS = [(16,), (32,), (64,), (128,), (512,), (16, 16), (16, 16, 16), (64, 64)]
SHAPE = 4096, 1024  # K, N of k_proj in an 8B model; M and the ranks are what configs depend on
RAGGED = 300, 77


def lora(gpu: GPU, dtype, thin_dtype, M, ranks, shape=SHAPE):
    """Everything a LoRA linear plans forward and backward at these sizes, with and without dropout."""
    (K, N), n = shape, len(ranks)
    x, dY, S = layout(M, K, dtype=dtype), layout(M, N, dtype=dtype), layout(M, sum(ranks), dtype=thin_dtype)
    As = tuple(layout(r, K, dtype=thin_dtype) for r in ranks)
    Bs = tuple(layout(N, r, dtype=thin_dtype) for r in ranks)
    seeds, none, dS = layout(n, dtype=torch.int64), (None,) * n, S.split(ranks)
    keep, needed, unneeded = layout(M, -(-K // 32), dtype=torch.int32), (True,) * n, (False,) * n
    for masks in ((-1,) * n, (0,) * n, tuple(range(n))):
        m = max(masks) + 1
        yield shrink.plan(x, As, thin_dtype, masks, (6554,) * m, seeds, none, None, gpu=gpu)
        if m == 1:
            drawn = layout(1, *keep.shape, dtype=torch.int32)
            yield shrink.plan(x, As, thin_dtype, masks, (6554,), drawn, none, None, gpu=gpu)
        yield x_pass.plan(x, dS, As, needed, x, masks, (keep,) * m, False, gpu=gpu)
        yield x_pass.plan(None, dS, As, unneeded, x, masks, (keep,) * m, False, gpu=gpu)
        if (dtype, thin_dtype) == (FP16, FP32):
            yield x_pass.plan(None, dS, As, unneeded, x, masks, (keep,) * m, True, gpu=gpu)
    for start in (layout(N, dtype=dtype), dY):
        yield expand.plan_new(S, Bs, dtype, none, start, none, None, None, None, None, gpu=gpu)
    yield dy_pass.plan(dY, Bs, none, S, needed, True, thin_dtype, gpu=gpu)
    yield dy_pass.plan(dY, Bs, none, S, needed, False, thin_dtype, gpu=gpu)
    yield dy_pass.plan(dY, Bs, none, None, unneeded, True, thin_dtype, gpu=gpu)
    m, changed = layout(ranks[0], dtype=FP32), None if K % 8 else layout(N * K // 32, dtype=torch.int32)
    for scale in (m, layout(1, dtype=FP32)):
        W = layout(N, K, dtype=dtype)
        yield materialize.plan(W, As[0], scale, Bs[0], W, changed, gpu=gpu)


def svf(gpu: GPU, dtype, thin_dtype, M, k, shape):
    """Everything an SVF linear plans beside shrink and x_pass, one expert and several."""
    _, N = shape
    S, B, dY = layout(M, k, dtype=thin_dtype), layout(N, k, dtype=thin_dtype), layout(M, N, dtype=dtype)
    for scales, mix in (
        (layout(k, dtype=FP32), None),
        (layout(4, k, dtype=FP32), layout(M, 4, dtype=FP32)),
    ):
        start = layout(N, dtype=dtype)
        yield expand.plan_new(S, (B,), dtype, (scales,), start, (None,), mix, None, None, None, gpu=gpu)
        for saved_S in (S, None):
            p = svf_dy.plan(dY, B, scales, mix, saved_S, True, thin_dtype, gpu=gpu)
            yield p
            if p.scale:
                yield svf_scale.plan(p.out, scales, mix, saved_S, thin_dtype)
        if k == max(RANKS)[0]:  # beyond MAX_RANK these two run alone; below, svf_scale is the end of a split dy_pass
            yield svf_scale.plan(S, scales, mix, None, thin_dtype)
            yield svf_scale.plan(S, scales, mix, S, thin_dtype)


def dora(gpu: GPU, dtype, A_dtype, M, rank, shape):
    """Everything a DoRA linear plans beside shrink, dy_pass and x_pass; its thin products are fp32."""
    K, N = shape
    x, v, gain = layout(M, K, dtype=dtype), layout(M, N, dtype=dtype), layout(N, dtype=FP32)
    A, B, S = layout(rank, K, dtype=A_dtype), layout(N, rank, dtype=FP32), layout(M, rank, dtype=FP32)
    for alone in (False, True):
        yield dora_norm.plan(layout(N, K, dtype=dtype), A, B, B, alone, gpu=gpu)
    A_fp32 = A._replace(dtype=FP32)
    seeds, keep = layout(1, dtype=torch.int64), layout(M, -(-K // 32), dtype=torch.int32)
    yield shrink.plan(x, (A_fp32,), FP32, (0,), (6554,), seeds, (None,), None, gpu=gpu)
    for start, bias, base in itertools.product((v, None), (None, gain._replace(dtype=dtype)), (None, v)):
        if (start or base) and not (start and bias and base):
            yield expand.plan_new(S, (B,), dtype, (None,), start, (None,), None, gain, bias, base, gpu=gpu)
    yield gain_dy.plan(v, gain, v, True, True, None)
    yield gain_dy.plan(v, gain, v, True, False, None)
    yield gain_dy.plan(v, gain, v, True, False, gain._replace(dtype=dtype))
    yield drop.plan(x, keep, None)
    yield drop.plan(x, keep, x)


def head(gpu: GPU, dtype, C=8, V=128256):
    """Everything a vocabulary head plans for one chunk of rows."""
    h, W, bias = layout(C, 4096, dtype=dtype), layout(V, 4096, dtype=dtype), layout(V, dtype=dtype)
    yield logits.plan(h, W, bias, None, None, gpu=gpu)
    for factors in dict.fromkeys((dtype, FP32)):
        yield logits.plan(h, layout(16, 4096, dtype=factors), None, None, None, gpu=gpu)
        yield logits.plan(h, W, None, layout(C, 16, dtype=FP32), layout(V, 16, dtype=factors), gpu=gpu)
    z, targets, row = layout(C, V, dtype=FP32), layout(C, dtype=torch.int64), layout(C, dtype=FP32)
    for inv_t, capped in ((None, False), (row, True)):
        stats = layout(3, C, dtype=FP32)
        yield logprob.plan_forward(z, targets, inv_t, row, row, stats, -100, capped)
        yield logprob.plan_backward(z, targets, inv_t, stats, row, row, -100, capped, dtype)
        stats = layout(5, C, dtype=FP32)
        yield kl.plan_forward(z, z, inv_t, inv_t, row, stats, capped, capped)
        yield kl.plan_backward(z, z, inv_t, inv_t, stats, row, capped, capped, dtype)


# experts, those of a token, hidden size, an expert's, activation, gate, interleaved
MIXTURES = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768, "silu", True, False),
    "gpt-oss-20b": (32, 4, 2880, 2880, "clamped", True, True),
    "Mixtral-8x7B": (8, 2, 4096, 14336, "silu", True, False),
    "DeepSeek-V3": (256, 8, 7168, 2048, "silu", True, False),
    "Nemotron-3-Nano": (128, 6, 2688, 1856, "relu2", False, False),
}


def experts(gpu: GPU, dtype, thin, tokens, rank, mixture):
    """Everything a mixture's layer plans forward and backward for so many tokens; adapted, and frozen."""
    E, k, hidden, inner, *act = mixture
    rows, columns = tokens * k, 2 * inner if act[1] else inner
    order, ends, w = layout(rows, dtype=torch.int64), layout(E, dtype=torch.int32), layout(rows, dtype=dtype)

    def factors(K, N):
        """A [E,r,K] and B [E,N,r], as PEFT has them."""
        A = layout(E, rank, K, dtype=thin)
        return A, Layout((E, N, rank), (1, rank * E, E), thin, A.device)

    def turned(t):
        (E, a, b), (e, i, j) = t.shape, t.strides
        return t._replace(shape=(E, b, a), strides=(e, j, i))

    (A1, B1), (A2, B2) = factors(hidden, columns), factors(inner, hidden)
    x, padded = layout(tokens, hidden, dtype=dtype), -(-rank // 8) * 8
    S = layout(rows, padded, dtype=thin)._replace(shape=(rows, rank))
    G, Z, h = (layout(rows, width, dtype=dtype) for width in (columns, hidden, inner))
    b1, b2 = (layout(E, width, dtype=dtype) if act[0] == "clamped" else None for width in (columns, hidden))
    for A in (A1, turned(B2)):  # backward gathers dout
        yield gather_shrink.plan(x, A, order, ends, k, thin, padded, gpu=gpu)
    yield act_expand.plan(G, S, B1, b1, ends, *act, gpu=gpu)
    yield combine_expand.plan(Z, S, B2, b2, w, order, ends, gpu=gpu)
    yield combine_expand.plan(Z, S, turned(A1), None, None, order, ends, gpu=gpu)
    yield act_backward.plan(h, G, S, B1, b1, S, A2, w, order, ends, *act, True, gpu=gpu)
    if (dtype, rank) == (BF16, 16):
        yield gather_shrink.plan(x, None, order, ends, k, thin, 0, gpu=gpu)
        yield act_expand.plan(G, None, None, b1, ends, *act, gpu=gpu)
        yield combine_expand.plan(Z, None, None, b2, w, order, ends, gpu=gpu)
        yield act_backward.plan(h, G, None, None, b1, None, None, w, order, ends, *act, True, gpu=gpu)


def mixtures(gpu: GPU, dtype, thin, M, rank, shape, names):
    """Real ones for M tokens; at another shape than the default a small one of it."""
    if rank > gather_shrink.MAX_RANK:
        return
    chosen = [MIXTURES[name] for name in names] if shape == SHAPE else [(4, 2, *shape, "silu", True, False)]
    for mixture in chosen:
        yield from experts(gpu, dtype, thin, M, rank, mixture)


def everything(gpu: GPU, dtypes=DTYPES, rows=ROWS, ranks=RANKS, shape=SHAPE, svf_ranks=RANKS, names=("Qwen3-30B-A3B",)):
    """What the launchers' plans return for all of these."""
    for (dtype, thin_dtype), M, r in itertools.product(dtypes, rows, ranks):
        yield from lora(gpu, dtype, thin_dtype, M, r, shape)
        if len(r) == 1 and r in svf_ranks:
            yield from svf(gpu, dtype, thin_dtype, M, r[0], shape)
        if len(r) == 1:
            yield from dora(gpu, dtype, thin_dtype, M, r[0], shape)
            yield from mixtures(gpu, dtype, thin_dtype, M, r[0], shape, names)
    for dtype in dict.fromkeys(dtype for dtype, _ in dtypes):
        yield from head(gpu, dtype, V=shape[1])
