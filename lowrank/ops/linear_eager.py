"""The plain LoRA linear in PyTorch's operations, in thin_eager.py's order and of its bits, inline: functions are what a small
call costs a host.
"""

import torch
from torch import Tensor

from .thin_eager import add_product_

_linear, _unsafe_view = torch.nn.functional.linear, torch.ops.aten._unsafe_view.default


def is_small(x, Bs) -> bool:
    """Whether ops/thin_eager.py widens x and every dY as one block."""
    K = x.shape[-1]
    return x.numel() // K * (max(K, *[B.shape[0] for B in Bs]) + 31) <= 1 << 20


def _nothing(like: Tensor) -> Tensor:
    """What addmm starts from under beta = 0, which does not read it."""
    key = like.dtype, like.device
    nothing = _nothings.get(key)
    if nothing is None:
        with torch.inference_mode(False):
            nothing = _nothings[key] = like.new_zeros(1)
    return nothing


_nothings: dict[tuple, Tensor] = {}


def forward(call, weights, starts, x, As, Bs):
    """(ys, S, no keep bits) of a plain call (linear.py) without masks, whose base does not go first."""
    dtype, thin_dtype, scales, shape = call.dtype, call.thin_dtype, call.scales, x.shape
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    if x.dtype is not dtype:
        x = x.to(dtype)
    same, halves = thin_dtype is dtype, thin_dtype.itemsize == 2
    A = As[0] if len(As) == 1 else torch.cat(As)
    if A.dtype is not thin_dtype:
        A = A.to(thin_dtype)
    wide = x if same else x.to(thin_dtype)
    S = torch.mm(A, wide.mT).mT.contiguous() if halves else _linear(wide, A)
    nothing = _nothing(S)
    part, first, ys = S, 0, []
    for i, B in enumerate(Bs):
        if len(Bs) > 1:
            part, first = S[:, first : first + B.shape[1]], first + B.shape[1]
        if B.dtype is not thin_dtype:
            B = B.to(thin_dtype)
        start, scale = starts[i] if starts else None, scales[i]
        if start is not None:
            start = start if start.dim() == 1 else start.reshape(x.shape[0], start.shape[-1])
            y = torch.addmm(start if start.dtype is thin_dtype else start.to(thin_dtype), part, B.mT, alpha=scale)
        elif scale == 1.0:
            y = _linear(part, B)
        else:
            y = torch.addmm(nothing, part, B.mT, beta=0, alpha=scale)
        if not same:
            y = y.to(dtype)
        if weights:
            weight = weights[i]
            y.addmm_(x, (weight if weight.dtype is dtype else weight.to(dtype)).mT)
        ys.append(y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], y.shape[1])))
    return tuple(ys), S, ()


def backward(call, dys, x, S, As, Bs, weights, need_x):
    """[dx or None, dA, dB of the first adapter, of the second, ...]."""
    dtype, thin_dtype, scales, shape = call.dtype, call.thin_dtype, call.scales, x.shape
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    if x.dtype is not dtype:
        x = x.to(dtype)
    same, halves, n = thin_dtype is dtype, thin_dtype.itemsize == 2, len(As)
    part, first, rows, dSs, dBs, nothing = S, 0, [], [], [], _nothing(S)
    for dy, factor, scale in zip(dys, Bs, scales, strict=True):
        if dy.dim() != 2:
            dy = dy.reshape(-1, dy.shape[-1])
        strides = dy.stride()
        if 1 not in strides or 0 in strides:
            dy = dy.contiguous()
        rows.append(dy)
        B = factor if factor.dtype is thin_dtype else factor.to(thin_dtype)
        if n > 1:
            part, first = S[:, first : first + B.shape[1]], first + B.shape[1]
        wide = dy if same else dy.to(thin_dtype)
        left, right = (B.mT, wide.mT) if halves else (wide, B)
        dS = torch.mm(left, right) if scale == 1.0 else torch.addmm(nothing, left, right, beta=0, alpha=scale)
        if halves:
            dS = dS.mT.contiguous()
        if not same:
            dB = B.new_zeros(B.shape).addmm_(wide.mT, part, alpha=scale)
        elif scale == 1.0:
            dB = torch.mm(part.mT, wide).mT.contiguous()
        else:
            dB = torch.addmm(nothing, part.mT, wide, beta=0, alpha=scale).mT.contiguous()
        dSs.append(dS)
        dBs.append(dB if dB.dtype is factor.dtype else dB.to(factor.dtype))
    dS, A = (dSs[0], As[0]) if n == 1 else (torch.cat(dSs, 1), torch.cat(As))
    dA = torch.mm(dS.mT, x if same else x.to(thin_dtype))
    dX = None
    if need_x:
        dX = torch.mm(dS, A if A.dtype is thin_dtype else A.to(thin_dtype))
        if not same:
            dX = dX.to(dtype)
        for dy, weight in zip(rows, weights, strict=bool(weights)):
            add_product_(dX, dy, weight if weight.dtype is dtype else weight.to(dtype))
        if len(shape) != 2:
            dX = dX.view(shape)
    grads, first = [dX], 0
    for factor, dB in zip(As, dBs, strict=True):
        own = dA if n == 1 else dA[first : first + factor.shape[0]].clone()
        first += factor.shape[0]
        grads += own if own.dtype is factor.dtype else own.to(factor.dtype), dB
    return grads
