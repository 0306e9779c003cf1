"""What torch.ops.lowrank.kl_to and its backward do: head.py's GEMMs of both sides, then kernels/kl.py or kl_eager.py."""

from types import ModuleType

import torch

from . import kl_eager
from ._boundary import no_autocast
from .head import Gradients, Products, chunks, in_kernels
from .logprob_impl import plain_logits


def row_passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """kernels/kl.py or kl_eager.py, for logits of ``dtype``."""
    if not in_kernels(device, dtype):
        return kl_eager
    from ..kernels import kl

    return kl


def forward(*arguments):
    """(kl [T], stats [5, T])."""
    policy, base, passes, parts = _setup(*arguments)
    hidden = policy.hidden
    with no_autocast(hidden.device):
        kl, stats = (
            hidden.new_empty(shape, dtype=policy.acc_dtype) for shape in (hidden.shape[0], (5, hidden.shape[0]))
        )
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
        return grads.as_list()


def _setup(*arguments):
    *heads, chunk_bytes, batch_invariant, dtype = arguments
    with no_autocast(heads[0].device):
        policy, base = (Products(*head, dtype, batch_invariant) for head in (heads[:7], heads[7:]))
    passes = row_passes(policy.hidden.device, policy.acc_dtype)
    per_logit = passes.per_logit(policy.dz_dtype, policy.softcap)
    return policy, base, passes, chunks(policy.hidden.shape[0], policy.weight.shape[0], chunk_bytes, per_logit)
