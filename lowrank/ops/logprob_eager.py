"""The passes over a chunk's logits in PyTorch, in place, a few rows at a time; kernels/logprob.py has the same as kernels."""

import torch
from torch import Tensor

from .head import cached, scales_of

FAR = -1e4  # exp of this is 0, and it times 0 is 0, which −inf is not


def per_logit(dtype: torch.dtype, softcap: float) -> int:
    """Bytes of a chunk per logit: z and what stands beside it."""
    return (3 if softcap else 2) * dtype.itemsize


def forward(z, targets, ignore_index, scales, logp, entropy, stats) -> None:
    """z [C, V] → logp, entropy [C] and stats [3, C]."""
    for at in cached(z):
        _forward(z[at], targets[at], ignore_index, scales_of(scales, at), logp[at], entropy[at], stats[:, at])


def backward(z, targets, ignore_index, scales, stats, dlogp, dentropy, dtype) -> Tensor:
    """z [C, V] → the gradient of the GEMM's result, in ``dtype``; z is overwritten."""
    for at in cached(z):
        _backward(z[at], targets[at], ignore_index, scales_of(scales, at), stats[:, at], dlogp[at], dentropy[at])
    return z.to(dtype)


def _forward(z, targets, ignore_index, scales, logp, entropy, stats) -> None:
    transform(z, scales)
    inside = (targets >= 0) & (targets < z.shape[1])
    largest = z.amax(1)
    z -= largest[:, None]
    chosen = z.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]
    e = z.exp()
    total = row_sum(e)
    mean = row_sum(e.mul_(z.clamp_min_(FAR))) / total
    lse = total.log()
    stats[0], stats[1], stats[2] = largest, lse, mean
    ignored = targets == ignore_index
    logp.copy_(torch.where(inside, chosen - lse, torch.nan).masked_fill(ignored, 0))
    entropy.copy_((lse - mean).masked_fill(ignored, 0))


def _backward(z, targets, ignore_index, scales, stats, dlogp, dentropy) -> None:
    inside = (targets >= 0) & (targets < z.shape[1]) & (targets != ignore_index)
    slope = transform(z, scales, slope=True)
    largest, lse, mean = stats[:, :, None]
    g, h = (torch.where(inside, grad, 0)[:, None] for grad in (dlogp, dentropy))
    z -= largest
    p = (z - lse).exp_()
    z.clamp_min_(FAR).sub_(mean).mul_(-h).sub_(g).mul_(p)
    z.scatter_add_(1, torch.where(inside, targets, 0)[:, None], g)
    if isinstance(slope, Tensor) or slope != 1:
        z *= slope
    z.masked_fill_(~inside[:, None], 0)


def row_sum(t: Tensor) -> Tensor:
    """Sums of rows whose bits do not depend on how many there are: a single row would be split over threads."""
    return t.sum(1) if t.shape[0] != 1 else t.expand(2, -1).sum(1)[:1]


def transform(z: Tensor, scales, slope: bool = False):
    """Scale, cap and temperature in place; the derivative if it is asked for, a number or [C, 1] or [C, V]."""
    inv_t, logit_scale, softcap = scales
    inv_t = inv_t[:, None] if isinstance(inv_t, Tensor) else inv_t
    if not softcap:
        for factor in (logit_scale, inv_t):
            if isinstance(factor, Tensor) or factor != 1:
                z *= factor
        return logit_scale * inv_t if slope else None
    z.mul_(logit_scale / softcap).tanh_()
    derivative = (z * z).neg_().add_(1).mul_(logit_scale * inv_t) if slope else None
    z.mul_(softcap).mul_(inv_t)
    return derivative
