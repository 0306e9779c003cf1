"""kl_to: the exact KL divergence of one vocabulary head's distribution from another's, for each token, with its gradient.

    KL(p || q) = Σ p (log p − log q)        dKL/dz_v = p_v (log p_v − log q_v − KL)

Written so that no small KL is the difference of large numbers (kernels/kl.py).  Saved for backward: five numbers per token.

Files: head.py, kl_impl.py, kl_eager.py, kernels/kl.py; tests/ops/test_kl.py.
"""

import torch
from torch import Tensor

from .. import _stats
from . import kl_impl
from ._boundary import autocast_dtype, is_plain
from ._head_checks import check_chunk_bytes, check_heads
from .head import CHUNK_BYTES, SCHEMA, Head, as_arguments
from .logprob import differentiated, spread
from .node import AGAIN, FORWARD_MODE, again, followed, has_tangent, must_follow

_lib = torch.library.Library("lowrank", "FRAGMENT")
# hidden and base_hidden [T,H].  stats: fp32 [5,T], max and ℓ of both, KL.
_CALL = f"{SCHEMA.format('')}, {SCHEMA.format('base_')}, int chunk_bytes, bool batch_invariant, ScalarType dtype"
_lib.define(f"kl_to({_CALL}) -> (Tensor kl, Tensor stats)")
# needs: hidden, weight, bias, A, B; the gradients asked for come back in that order
_lib.define(f"kl_to_backward(Tensor dkl, Tensor stats, {_CALL}, bool[] needs) -> Tensor[]")


def kl_to(policy: Head, base: Head, *, chunk_bytes: int = CHUNK_BYTES, batch_invariant: bool = False) -> Tensor:
    """KL(softmax(policy's z) || softmax(base's z)) of each token, over the whole vocabulary, in nats.

    Args:
        policy: hidden [..., H], weight [V, H], bias, lora, temperature, logit_scale and softcap, each as in
            :func:`linear_logprob`.  What requires grad gets its gradient; a frozen weight costs none.
        base: of the same leading shape, vocabulary and dtype, held constant: often the same weight with another hidden, or the
            same hidden without ``lora``.
        chunk_bytes, batch_invariant: as in :func:`linear_logprob`.

    Returns: fp32 [...] (fp64 for fp64), never negative; exactly 0, with gradients of exactly 0, where both sides are the same
        tensors.  Derivatives of every order, as :func:`linear_logprob`'s.

    Raises: ValueError or TypeError that names the argument.
    """
    reason = followed()
    if reason is AGAIN:
        return again(kl_to, policy, base, chunk_bytes=chunk_bytes, batch_invariant=batch_invariant)
    autocast = autocast_dtype(policy.hidden) if isinstance(getattr(policy, "hidden", None), Tensor) else None
    check_heads(policy, base, Head, autocast is not None)
    check_chunk_bytes(chunk_bytes)
    (tensors, numbers), (base_tensors, base_numbers) = as_arguments(policy), as_arguments(base)
    base_tensors = [None if t is None else t.detach() for t in base_tensors]
    call = numbers, base_numbers, (chunk_bytes, bool(batch_invariant), autocast or policy.hidden.dtype)
    if reason is not None and (reason is not FORWARD_MODE or has_tangent(tensors)):
        _stats.op_fell_back(reason)
        kl = kl_impl.formula(*_arguments(call, tensors, base_tensors))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        kl = _KL.apply(call, base_tensors, *tensors)
    else:
        kl, _ = _forward(*_arguments(call, tensors, base_tensors))
    return kl.view(policy.hidden.shape[:-1])


def _arguments(call, tensors, base_tensors):
    """As the op takes them."""
    numbers, base_numbers, rest = call
    (hidden, *tensors), (base_hidden, *base_tensors) = tensors, base_tensors
    flat, base_flat = (h.reshape(-1, h.shape[-1]) for h in (hidden, base_hidden))
    return flat, *tensors, numbers, base_flat, *base_tensors, base_numbers, *rest


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, base_tensors, *tensors):
        kl, stats = _forward(*_arguments(call, tensors, base_tensors))
        ctx.call = call
        ctx.save_for_backward(stats, *tensors, *base_tensors)
        return kl

    @staticmethod
    def backward(ctx, dkl):
        stats, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:7])
        if must_follow((dkl,)):

            def formula():
                return (kl_impl.formula(*_arguments(ctx.call, tensors[:6], tensors[6:])),)

            grads = differentiated(formula, tensors, needs, (dkl,))
            return None, None, *grads, None
        grads = _backward(dkl, stats, *_arguments(ctx.call, tensors[:6], tensors[6:]), needs)
        return None, None, *spread(grads, needs, tensors[0].shape), None


def _forward(hidden, *rest):
    run = kl_impl.forward if is_plain(hidden) else torch.ops.lowrank.kl_to.default
    return run(hidden, *rest)


def _backward(dkl, *rest):
    run = kl_impl.backward if is_plain(dkl) else torch.ops.lowrank.kl_to_backward.default
    return run(dkl, *rest)


_lib.impl("kl_to", kl_impl.forward, "CompositeExplicitAutograd")
_lib.impl("kl_to_backward", kl_impl.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::kl_to", lib=_lib)
def _(hidden, *rest):
    acc_dtype = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    T = hidden.shape[0]
    return hidden.new_empty(T, dtype=acc_dtype), hidden.new_empty((5, T), dtype=acc_dtype)


@torch.library.register_fake("lowrank::kl_to_backward", lib=_lib)
def _(dkl, stats, *arguments):
    return [t.new_empty(t.shape) for t, need in zip(arguments[:5], arguments[-1], strict=True) if need]
