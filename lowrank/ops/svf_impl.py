"""What torch.ops.lowrank.svf_linear and svf_linear_backward do.

    S  = x Aᵀ                 Y  = (S ∘ m) Bᵀ + start;  Y.addmm_(x, Wᵀ)
    D  = dY B                 dS = D ∘ m,   h = S ∘ D
    dX = dS A;  dX.addmm_(dY, W)

m is ``scales`` [k], the same for every row, or ``mix @ scales`` with mix [M,E] and scales [E,k], which is never written to
memory as a whole.  h is not either: dscales = Σ_t h (or mixᵀ h) and dmix = h scalesᵀ are summed on the way.
Up to _dispatch.MAX_RANK columns kernels/svf.py does both thin products and their scales in one pass over the activations each;
beyond (svf_large_k.py) the products are GEMMs and only the passes over [M,k] are kernels; svf_eager.py is all of it in
PyTorch.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import svf_eager, svf_large_k
from ._boundary import dense, no_autocast, plus, rows_of
from ._dispatch import MAX_RANK, in_kernels
from .lora_impl import may_overflow
from .thin_eager import add_product_


def svf_products(x, base_or_x, A, B, thin_dtype) -> ModuleType:
    """kernels/svf.py, svf_eager.py or svf_large_k.py for one call.  ``base_or_x``: a base output, or a backward's x."""
    sizes = x.shape[0], A.shape[1], B.shape[0], x.dtype, (A, B), thin_dtype, False
    activations = [t for t in (x, base_or_x) if t is not None]
    if x.shape[0] == 0 or not in_kernels(activations, min(A.shape[0], MAX_RANK), thin_dtype, sizes):
        return svf_eager
    if A.shape[0] > MAX_RANK:
        return svf_large_k
    from ..kernels import svf

    return svf


def forward(x, weight, bias, base, A, B, scales, mix, dtype, thin_dtype):
    """(y [M,N], S [M,k])."""
    with no_autocast(x.device):
        x, scales, mix = rows_of(x, dtype), scales.contiguous(), _contiguous(mix)
        if base is not None:
            base = base.reshape(x.shape[0], base.shape[-1])
        elif weight is not None and may_overflow(dtype, thin_dtype, bias is not None):
            base, weight, bias = torch.nn.functional.linear(x, weight.to(dtype), bias), None, None
        products = svf_products(x, base, A, B, thin_dtype)
        S = products.shrink(x, [A], thin_dtype, [-1], [], None)[0]
        start = base if bias is None else bias if base is None else base + bias
        y = products.expand(S, B, scales, mix, start, dtype if base is None else base.dtype)
        return y if weight is None else y.addmm_(x, weight.to(dtype).mT), S


def backward(dy, x, weight, A, B, scales, mix, S, dtype, thin_dtype, needs):
    """The gradients of x [M,K], weight, bias, scales and mix that are needed, in that order.  Without S, x gives it."""
    with no_autocast(dy.device):
        need_x, need_W, need_b, need_scales, need_mix = needs
        dy, scales, mix = dense(dy), scales.contiguous(), _contiguous(mix)
        x = None if x is None else rows_of(x, dtype)
        products = svf_products(dy, x, A, B, thin_dtype)
        dots = need_scales or need_mix
        if dots and S is None:
            S = products.shrink(x, [A], thin_dtype, [-1], [], None)[0]
        dS = dscales = dmix = None
        if need_x or dots:
            dS, dscales, dmix = products.dy_pass(dy, B, scales, mix, S if dots else None, need_x, thin_dtype)
        dX = None
        if need_x:
            dX = dy.new_empty((dy.shape[0], A.shape[1]), dtype=dtype)
            first = weight is not None and may_overflow(dtype, thin_dtype)
            if first:
                dX.addmm_(dy, weight.to(dtype), beta=0)
            products.x_pass(None, [dS], [A], [False], dX, [-1], [], add=first)
            if weight is not None and not first:
                add_product_(dX, dy, weight.to(dtype))
        dW = dy.mT @ x if need_W else None
        db = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if need_b else None
        return [grad for grad, need in zip((dX, dW, db, dscales, dmix), needs, strict=True) if need]


def differentiable(dy, dS, x, weight, A, B, scales, mix, S, dtype, thin_dtype, needs):
    """:func:`backward`'s gradients in out-of-place operations, which autograd and vmap follow.  dy may be None.

    S is computed again from x, through which its graph goes; without x it is a constant, or an output of the node, which
    ``dS`` is then the gradient of.
    """
    with no_autocast(A.device):
        need_x, need_W, need_b, need_scales, need_mix = needs
        A, B, x = A.to(thin_dtype), B.to(thin_dtype), None if x is None else rows_of(x, dtype)
        dX = dW = db = dscales = dmix = None
        if dy is not None:
            D = dy.to(thin_dtype) @ B
            m = scales if mix is None else mix @ scales
            dS = plus(dS, (D * m).to(thin_dtype)) if need_x else None
            if need_x and weight is not None:
                dX = dy @ weight.to(dtype)
            if need_scales or need_mix:
                S = S if x is None else x.to(thin_dtype) @ A.mT
                h = D.to(torch.promote_types(thin_dtype, scales.dtype)) * S
                dscales = h.sum(0) if mix is None else mix.to(h.dtype).mT @ h
                dmix = None if mix is None else h @ scales.to(h.dtype).mT
            dW = dy.mT @ x if need_W else None
            db = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if need_b else None
        if need_x and dS is not None:
            dX = plus(dX, dS @ A).to(dtype)
        return [grad for grad, need in zip((dX, dW, db, dscales, dmix), needs, strict=True) if need]


def formula(x, weight, bias, base, A, B, scales, mix, dtype, thin_dtype):
    """:func:`forward`'s y [..., N] in operations that torch.func, forward mode and tracers follow."""
    with no_autocast(x.device):
        x = x.to(dtype)
        y, out_dtype = base, dtype if base is None else base.dtype
        if weight is not None:
            y = torch.nn.functional.linear(x, weight.to(dtype))
        m = scales if mix is None else (mix @ scales).reshape(*x.shape[:-1], A.shape[0])
        y = plus(y, ((x.to(thin_dtype) @ A.to(thin_dtype).mT) * m).to(thin_dtype) @ B.to(thin_dtype).mT)
        return plus(y, bias).to(out_dtype)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
