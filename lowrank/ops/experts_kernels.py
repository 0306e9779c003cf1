"""What torch.ops.lowrank.experts_layer does on a GPU: thin products but the second shrink ride on passes of the layer's own.

    X, S1 = gather(x) · G = X W1ᵀ · h = act(G + s S1 B1ᵀ + b1) · S2 = h A2ᵀ · Z = h W2ᵀ · U = w (Z + s S2 B2ᵀ + b2), unsorted
    dO, D = gather(dout), its rows by B2 · H = dO W2 · dG, h, <H, h> in one pass · dX = dG W1 + dS1 A1, unsorted

One adapter a stack, without dropout; else experts_layer.py's own order of operations.  G is saved as the product gives it, and
the adapter's term in it made again.  Argument names and the order of the gradients are those of experts_layer.py's schemas.
"""

import torch

from ._boundary import no_autocast
from ._choice import choice
from ._dispatch import in_kernels, outlasts_host
from .activations import Activation
from .experts import dropped_outer, factor_gradient
from .experts_eager import Groups, outer, route, rows, sums, widened

NAMES = ("silu", "gelu", "gelu_tanh", "relu2", "clamped")


def takes(x, index, layer, ps, thin_dtype) -> bool:
    """Whether a call of ``layer`` runs so.  What it cannot is counted by in_kernels, where a GPU would be there for it."""
    if choice(x.device).backend == "eager" or x.numel() == 0 or index.numel() == 0 or any(ps):
        return False
    adapters = layer.up.adapters, layer.down.adapters
    ranks = [a.A.shape[1] for of in adapters for a in of]
    if layer.act.name not in NAMES or max(map(len, adapters)) > 1 or max(ranks, default=1) > 64:
        return False
    _, N, K = layer.up.weight.shape
    big = choice(x.device).forced or outlasts_host(index.numel(), K, N, x.element_size())
    return big and in_kernels([x if x.stride(-1) == 1 else x.contiguous()], max(ranks, default=1), thin_dtype)


def forward(x, index, weights, W1, b1, W2, b2, As, Bs, first, scalings, full, act: Activation, thin_dtype):
    from ..kernels import experts as kernels

    with no_autocast(x.device):
        order, place, groups = route(index, len(W1), full)
        (A1, B1, s1), (A2, B2, s2) = _two(As, Bs, scalings, first)
        ends, k = groups.ends, index.shape[1]
        X, S1 = kernels.gather_shrink(_flat(x), A1, order, ends, k, thin_dtype, _width(A1, thin_dtype), full)
        G = rows(X, W1, groups)
        del X
        h = kernels.act_expand(G, _cut(S1, A1), B1, s1, _flat(b1), ends, act, full)
        S2 = None if A2 is None else rows(h.to(thin_dtype), widened(A2, 1, _width(A2, thin_dtype), thin_dtype), groups)
        Z = rows(h, W2, groups)
        del h
        U = kernels.combine_expand(Z, _cut(S2, A2), B2, s2, _flat(b2), _flat(weights.reshape(-1)), order, ends, full)
        out = U.view(*index.shape, -1).sum(1)
        return out, G, order, place, ends, [S for S in (S1, S2) if S is not None], []


def backward(
    dout, x, weights, W1, b1, W2, b2, As, Bs, G, order, place, ends, Ss, first, scalings, full, act: Activation, thin_dtype,
    needs,
):  # fmt: skip
    from ..kernels import experts as kernels

    with no_autocast(dout.device):
        groups, n, k = Groups(ends, len(order), full), len(As), weights.shape[1]
        need_x, need_w, need_W1, need_b1, need_W2, need_b2, *need = needs
        (A1, B1, s1), (A2, B2, s2) = _two(As, Bs, scalings, first)
        saved = list(Ss)
        S1, S2 = (saved.pop(0) if A is not None else None for A in (A1, A2))
        of = {}
        for j in range(n):
            of[j >= first] = need[j], need[n + j]
        (need_A1, need_B1), (need_A2, need_B2) = (of.get(second, (False, False)) for second in (False, True))

        turned = None if B2 is None else B2.transpose(1, 2)
        dO, D = kernels.gather_shrink(_flat(dout), turned, order, ends, k, thin_dtype, _width(A2, thin_dtype), full)
        H = rows(dO, W2.mT, groups)
        need_h = need_A2 or need_W2
        first_part = H, G, _cut(S1, A1), B1, s1, _flat(b1)
        flat = _flat(weights.reshape(-1))
        dG, h, dots = kernels.act_backward(*first_part, _cut(D, A2), A2, s2, flat, order, ends, act, full, need_h)
        del H
        w = flat[order][:, None].to(torch.promote_types(thin_dtype, torch.float32))
        dA1 = dB1 = dA2 = dB2 = dw = None
        if need_w:
            dw = dots if D is None else dots + s2 * (D * S2).sum(1, dtype=dots.dtype)
            dw = dw if b2 is None else dw + (dO * b2[groups.experts]).sum(1, dtype=dots.dtype)
            dw = groups.clear(dw[:, None])[place].view(weights.shape).to(weights.dtype)
        if need_B2:
            dB2 = factor_gradient(dO.to(thin_dtype), (S2 * w).to(thin_dtype), s2, B2, groups)
        if need_A2:
            dA2 = dropped_outer((D * (s2 * w)).to(thin_dtype), h, None, A2.shape[1], groups, A2.dtype)
        weighted = dO * w.to(dO.dtype) if need_W2 or need_b2 else None
        dW2 = outer(weighted, h, groups) if need_W2 else None
        db2 = sums(weighted, groups) if need_b2 else None
        del dO, D, h, weighted

        wide, dS1 = dG.to(thin_dtype), None
        if need_B1:
            dB1 = factor_gradient(wide, S1, s1, B1, groups)
        if A1 is not None and (need_x or need_A1):
            dS1 = rows(wide, widened(B1, 2, _width(A1, thin_dtype), thin_dtype).mT, groups).mul_(s1)
        del wide
        dW1 = None
        if need_W1 or need_A1:
            X = x[order // k]
            dW1 = outer(dG, X, groups) if need_W1 else None
            dA1 = dropped_outer(dS1, X, None, A1.shape[1], groups, A1.dtype) if need_A1 else None
            del X
        db1, dx = sums(dG, groups) if need_b1 else None, None
        if need_x:
            dX = rows(dG, W1.mT, groups)
            turned = None if A1 is None else A1.transpose(1, 2)
            U = kernels.combine_expand(dX, _cut(dS1, A1), turned, 1.0, None, None, order, ends, full)
            dx = U.view(len(x), k, -1).sum(1)
        dAs = [dA1] * (first > 0) + [dA2] * (n > first)
        dBs = [dB1] * (first > 0) + [dB2] * (n > first)
        given = [dx, dw, dW1, db1, dW2, db2, *dAs, *dBs]
        return [grad for grad, needed in zip(given, needs, strict=True) if needed]


def _two(As, Bs, scalings, first):
    """(A, B, scaling) of each projection; (None, None, 1.0) without an adapter."""
    return tuple((of[0] if of else (None, None, 1.0)) for of in _split(list(zip(As, Bs, scalings, strict=True)), first))


def _split(adapters, first):
    return adapters[:first], adapters[first:]


def _width(A, thin_dtype: torch.dtype) -> int:
    """Columns of S: the rank, padded to what grouped_mm takes."""
    step = max(1, 16 // thin_dtype.itemsize)
    return 0 if A is None else -(-A.shape[1] // step) * step


def _cut(S, A):
    return None if S is None else S[:, : A.shape[1]]


def _flat(t):
    return t if t is None or t.is_contiguous() else t.contiguous()
