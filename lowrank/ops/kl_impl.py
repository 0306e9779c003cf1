"""What torch.ops.lowrank.kl_to and its backward do: head.py's GEMMs of both sides, then kernels/kl.py or Eager."""

import torch
from torch import Tensor

from ._boundary import no_autocast
from .head import Gradients, Products, cached, chunks, row_passes, scales_of
from .logprob_impl import plain_logits, row_sum, transform


def forward(*arguments):
    """(kl [T], stats [5, T])."""
    policy, base, passes, parts = _setup(*arguments)
    hidden = policy.hidden
    with no_autocast(hidden.device):
        kl, stats = (hidden.new_empty(shape, dtype=policy.wide) for shape in (hidden.shape[0], (5, hidden.shape[0])))
        for at in parts:
            (z, _), (z0, _) = policy.logits(policy.rows(at)), base.logits(base.rows(at))
            passes.forward(z, z0, policy.scales(at), base.scales(at), kl[at], stats[:, at])
    return kl, stats


def formula(*arguments):
    """:func:`forward`'s kl in operations that autograd, torch.func and forward mode follow; all logits are kept."""
    *heads, _, _, dtype = arguments
    with no_autocast(heads[0].device):
        log_p, log_q = (plain_logits(*head, dtype).log_softmax(1) for head in (heads[:7], heads[7:]))
        p, q = log_p.exp(), log_q.exp()
        delta = torch.where(p == 0, 0, log_p - log_q)
        near = delta.abs() < 0.5
        small = torch.where(near, delta, 0)
        # near p = q the same without a difference of large numbers
        terms = torch.where(near, p * (torch.expm1(-small) + small), p * delta + q - p)
        return torch.where(p == 0, q, terms).sum(1)


def backward(dkl, stats, *arguments):
    """The gradients of the policy's hidden, weight, bias, A and B that are needed, in that order and in their dtypes."""
    *arguments, needs = arguments
    policy, base, passes, parts = _setup(*arguments)
    with no_autocast(policy.hidden.device):
        grads = Gradients(policy, arguments[:5], needs)
        for at in parts:
            h = policy.rows(at)
            (z, t), (z0, _) = policy.logits(h), base.logits(base.rows(at))
            dz = passes.backward(z, z0, policy.scales(at), base.scales(at), stats[:, at], dkl[at], policy.dz_dtype)
            del z, z0
            grads.add(at, h, t, dz)
        return grads.found()


def _setup(*arguments):
    *heads, chunk_bytes, batch_invariant, dtype = arguments
    with no_autocast(heads[0].device):
        policy, base = (Products(*head, dtype, batch_invariant) for head in (heads[:7], heads[7:]))
    passes = row_passes("kl", Eager, policy.hidden.device, policy.wide)
    per_logit = passes.per_logit(policy.dz_dtype, policy.softcap)
    return policy, base, passes, chunks(policy.hidden.shape[0], policy.weight.shape[0], chunk_bytes, per_logit)


class Eager:
    """The two passes over a chunk's logits in PyTorch, a few rows at a time."""

    @staticmethod
    def per_logit(dtype: torch.dtype, softcap: float) -> int:
        """Bytes of a chunk per logit: log p, log q, δ, p, q and a term."""
        return (7 if softcap else 6) * dtype.itemsize

    @staticmethod
    def forward(z, base, scales, base_scales, kl, stats) -> None:
        """z, base [C, V] → kl [C] and stats [5, C]; both chunks are overwritten."""
        for at in cached(z):
            _forward(z[at], base[at], scales_of(scales, at), scales_of(base_scales, at), kl[at], stats[:, at])

    @staticmethod
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
