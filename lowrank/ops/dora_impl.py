"""What torch.ops.lowrank.dora_norm, dora_linear and dora_linear_backward do.

    n² = Σ_k W² + (2 (W Aᵀ) + B A Aᵀ) · B    by rows of W [N,K]: no B A is ever formed       (B times the scaling)
    S  = drop(x) Aᵀ,   v = x Wᵀ + bias       as the base layer computes it
    Y  = v + (gain - 1) ∘ (v - bias) + S Bᵀ: v itself where gain is 1 and B is 0
    twice, where the base's input is dropped too: Y = (x Wᵀ + bias) + gain ∘ v + S Bᵀ,  v = drop(x) Wᵀ
    dS = dY B,  dB = dYᵀ S,  dA = dSᵀ drop(x),  dgain = Σ_t dY ∘ (v - bias); twice: Σ_t dY ∘ v
    dbias = Σ_t dY
    dX = drop(dS A) + (gain ∘ dY) W;         twice: dX = drop(dS A + (gain ∘ dY) W) + dY W

drop() only zeroes: its factor 1/(1-p) is part of B and, twice, of gain.  Thin products, gain and sums over rows are fp32 or
wider.  The passes are dora_eager.py's or kernels/dora.py's.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from . import dora_eager, dropout
from ._boundary import dense, no_autocast, rows_of
from ._dispatch import in_kernels
from .lora_impl import dropper, may_overflow
from .thin_eager import add_product_


def dora_products(activations, A, thin_dtype) -> ModuleType:
    """dora_eager.py or kernels/dora.py for the passes of one call over ``activations`` (x, dY or the weight)."""
    if activations.numel() == 0 or not in_kernels([activations], A.shape[0], thin_dtype):
        return dora_eager
    from ..kernels import dora

    return dora


def norm(weight, A, B, start=None) -> Tensor:
    """‖W + B A‖ of each row, [N] in fp32 or wider.

    ``start``, a dtype: times what torch's own norm of W in that dtype is of ours, a constant of W.  A magnitude that was made
    from it, as PEFT makes them, then is the norm, bit for bit, where B is 0.
    """
    with no_autocast(weight.device):
        products = dora_products(weight, A, B.dtype)
        if start is None:
            return products.norm(weight, A, B)
        whole, alone = products.norm(weight, A, B, alone=True)
        return _started(_torch_norm(weight, start).to(alone.dtype), whole, alone)


def norm_formula(weight, A, B, start: torch.dtype) -> Tensor:
    """:func:`norm` in operations that torch.func, forward mode and tracers follow."""
    W = weight.to(B.dtype)
    whole, alone = (torch.linalg.vector_norm(t, dim=1) for t in (W + B @ A.to(B.dtype), W))
    return _started(torch.linalg.vector_norm(weight.to(start), dim=1).to(B.dtype), whole, alone)


def _started(first: Tensor, whole: Tensor, alone: Tensor) -> Tensor:
    usable = (first > 0) & (first < math.inf) & (alone > 0)  # not where 16 bits have no number for it
    return torch.where(usable, first * (whole / alone), whole)


def _torch_norm(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.promote_types(weight.dtype, dtype) is dtype:  # no copy of W, and the bits of one
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    norms = weight.new_empty(weight.shape[0], dtype=dtype)
    for rows in dropout.row_blocks(*weight.shape, weight.device):
        norms[rows] = torch.linalg.vector_norm(weight[rows].to(dtype), dim=1)
    return norms


def forward(x, weight, bias, A, B, gain, p, seed, twice, dtype):
    """(y [M,N], S [M,r], v [M,N], [keep bits] where they are drawn here)."""
    with no_autocast(x.device):
        weight, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        base = torch.nn.functional.linear(x.to(dtype), weight, b).reshape(-1, weight.shape[0])
        x = rows_of(x, dtype)
        products = dora_products(x, A, B.dtype)
        masks, cuts = ([-1], []) if seed is None else ([0], [dropout.threshold(p)])
        S, keeps = products.shrink(x, [A.to(B.dtype)], B.dtype, masks, cuts, seed)
        if not twice:
            return products.expand(S, B, None, gain - 1, bias, base), S, base, keeps
        v = products.drop(x, keeps[0] if keeps else seed[0]) @ weight.mT
        return products.expand(S, B, v, gain, None, base), S, v, keeps


def backward(dy, x, weight, A, B, gain, S, v, keeps, twice, dtype, needs, bias=None):
    """The gradients of x [M,K], bias, A, B and gain that are needed, in that order.  ``bias``: what is part of v."""
    with no_autocast(dy.device):
        need_x, need_b, need_A, need_B, need_gain = needs
        dy = dense(dy)
        products = dora_products(dy, A, B.dtype)
        scaled, dgain, db = products.gain_dy(dy, gain, v if need_gain else None, need_x, need_b, bias)
        dS = dB = dA = dX = None
        if need_B or need_x or need_A:
            (dS,), (dB,) = products.dy_pass(
                dy, [B], [1.0], [None], S if need_B else None, [need_B], need_x or need_A, B.dtype
            )
        if need_x:
            weight, dX = weight.to(dtype), dy.new_empty((dy.shape[0], A.shape[1]), dtype=dtype)
        if need_x or need_A:
            x = rows_of(x, dtype) if need_A else None
            first = need_x and not twice and may_overflow(dtype, B.dtype)
            if first:
                dX.addmm_(scaled, weight, beta=0)
            (dA,) = products.x_pass(x, [dS], [A.to(B.dtype)], [need_A], dX, [0] if keeps else [-1], keeps, add=first)
            dA = dA.to(A.dtype) if need_A else None
        if need_x and twice:
            products.drop(scaled @ weight, keeps[0], dX)
        if need_x and not first:
            add_product_(dX, dy if twice else scaled, weight)
        return [grad for grad, need in zip((dX, db, dA, dB, dgain), needs, strict=True) if need]


def differentiable(dy, x, weight, A, B, gain, S, v, keeps, twice, dtype, needs, bias=None):
    """:func:`backward`'s gradients in out-of-place operations, which autograd and vmap follow.

    S and v are computed again from x, through which their graphs go; without x they are constants.
    """
    with no_autocast(A.device):
        need_x, need_b, need_A, need_B, need_gain = needs
        drop, mask = dropper(keeps, A.shape[1]), 0 if keeps else -1
        weight, thin = None if weight is None else weight.to(dtype), A.to(B.dtype)
        x = None if x is None else rows_of(x, dtype)
        dropped = None if x is None else drop(x, mask).to(B.dtype)
        wide = dy.to(B.dtype)
        dS = wide @ B if need_x or need_A else None
        dA = dS.mT @ dropped if need_A else None
        dB = wide.mT @ (S if x is None else dropped @ thin.mT) if need_B else None
        if need_gain and x is not None and weight is not None:
            v = (dropped.to(dtype) if twice else x) @ weight.mT
        elif need_gain and bias is not None:
            v = v - bias.detach()  # x Wᵀ, in which no bias is
        dgain = (wide * v).sum(0) if need_gain else None
        dX = None
        if need_x:
            scaled = (dy * gain).to(dtype) @ weight
            dX = drop(dS @ thin + (scaled if twice else 0), mask) + (dy @ weight if twice else scaled)
            dX = dX.to(dtype)
        db = wide.sum(0) if need_b else None
        return [grad for grad, need in zip((dX, db, dA, dB, dgain), needs, strict=True) if need]


def formula(x, weight, bias, A, B, gain, p, twice, dtype):
    """:func:`forward`'s y [..., N] in operations that torch.func, forward mode and tracers follow; dropout is torch's."""
    with no_autocast(x.device):
        x, weight = x.to(dtype), weight.to(dtype)
        dropped = torch.nn.functional.dropout(x, p) * (1 - p)
        v = (dropped if twice else x) @ weight.mT
        y = v * gain + (dropped.to(B.dtype) @ A.to(B.dtype).mT) @ B.mT
        y = y if bias is None else y + bias
        return (y + x @ weight.mT if twice else y).to(dtype)
