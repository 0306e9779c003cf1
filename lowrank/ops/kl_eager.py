"""The passes over both sides' logits in PyTorch, in place, a few rows at a time; kernels/kl.py has the same as kernels."""

import torch
from torch import Tensor

from .head import cached, scales_of
from .logprob_eager import row_sum, transform


def per_logit(dtype: torch.dtype, softcap: float) -> int:
    """Bytes of a chunk per logit: log p, log q, δ, p, q and a term."""
    return (7 if softcap else 6) * dtype.itemsize


def forward(z, base, scales, base_scales, kl, stats) -> None:
    """z, base [C, V] → kl [C] and stats [5, C]; both chunks are overwritten."""
    for at in cached(z):
        _forward(z[at], base[at], scales_of(scales, at), scales_of(base_scales, at), kl[at], stats[:, at])


def backward(z, base, scales, base_scales, stats, dkl, dtype) -> Tensor:
    """z, base [C, V] → the gradient of z, in ``dtype``; both chunks are overwritten."""
    for at in cached(z):
        _backward(z[at], base[at], scales_of(scales, at), scales_of(base_scales, at), stats[:, at], dkl[at])
    return z.to(dtype)


def _forward(z, base, scales, base_scales, kl, stats) -> None:
    for i, (logits, of) in enumerate(((z, scales), (base, base_scales))):
        transform(logits, of)
        stats[2 * i] = logits.amax(1)
        logits -= stats[2 * i, :, None]
        stats[2 * i + 1] = row_sum(logits.exp()).log()
        logits -= stats[2 * i + 1, :, None]
    p, q, delta = z.exp(), base.exp(), z.sub_(base)
    near = torch.expm1(-delta).add_(delta).mul_(p)
    terms = torch.where(delta.abs() < 0.5, near, delta.mul_(p).add_(q).sub_(p))
    kl.copy_(row_sum(torch.where(p == 0, q, terms)))
    stats[4] = kl


def _backward(z, base, scales, base_scales, stats, dkl) -> None:
    slope = transform(z, scales, slope=True)
    transform(base, base_scales)
    largest, lse, base_largest, base_lse, kl = stats[:, :, None]
    z.sub_(largest).sub_(lse)
    base.sub_(base_largest).sub_(base_lse)
    p = z.exp()
    z.sub_(base).masked_fill_(p == 0, 0).sub_(kl).mul_(p).mul_(dkl[:, None]).mul_(slope)
