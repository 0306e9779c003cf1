"""linear_logprob: log-probabilities and entropies of a vocabulary head, without its logits ever being kept.

    z    = (h Wᵀ + bias + scaling (h Aᵀ) Bᵀ) logit_scale, capped, / temperature      fp32, a few rows at a time
    logp = (z_y − max) − ℓ        H = ℓ − Ē         ℓ = log Σ exp(z − max),  Ē = Σ p (z − max)
    dz_v = g_logp (1[v = y] − p_v) − g_H p_v (z_v − max − Ē)

Saved for backward: max, ℓ and Ē of each token.  lse and Σ p z alone would lose the entropy where the logits are large: its
digits go into their offset.  Rows are taken together (a chunk), never parts of the vocabulary: each row of dh is written once.

Files: head.py, logprob_impl.py, logprob_eager.py, kernels/logprob.py; tests/ops/test_logprob.py; bench linear_logprob.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _stats
from . import logprob_impl
from ._boundary import autocast_dtype, is_plain
from ._head_checks import check_head, check_logprob
from .head import CHUNK_BYTES, SCHEMA, Head, as_arguments
from .node import AGAIN, DIFFERENTIABLE, FORWARD_MODE, again, followed, has_tangent, must_follow

_lib = torch.library.Library("lowrank", "FRAGMENT")
# hidden [T,H], targets int64 [T].  stats: fp32 [3,T], max, ℓ and Ē.
_CALL = (
    SCHEMA.format("") + ", Tensor targets, int ignore_index, int chunk_bytes, bool batch_invariant, ScalarType dtype"
)
_lib.define(f"linear_logprob({_CALL}) -> (Tensor logp, Tensor entropy, Tensor stats)")
# needs: hidden, weight, bias, A, B; the gradients asked for come back in that order
_lib.define(f"linear_logprob_backward(Tensor dlogp, Tensor dentropy, Tensor stats, {_CALL}, bool[] needs) -> Tensor[]")


class LogProb(NamedTuple):
    """Of each token: log-probability of its target, and entropy of its distribution, in nats."""

    logp: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
    batch_invariant: bool = False,
) -> LogProb:
    """log softmax(z)[target] and the entropy of softmax(z), z = head(hidden) / temperature, in fp32 and differentiable.

    Args:
        hidden: [..., H], fp16, bf16, fp32 or fp64.
        weight: [V, H] in hidden's dtype.  A frozen one costs no gradient: none is computed or allocated.
        targets: int64 [...].  Where it is ``ignore_index`` both results are exactly 0, and so is every gradient.
        bias: [V].
        lora: (A [r, H], B [V, r], scaling) on the head, trained or not.
        temperature: > 0; a float, or a tensor [...] with one for each token.
        logit_scale, softcap: z = softcap tanh(z logit_scale / softcap), as Gemma and Cohere have it, before the temperature.
        chunk_bytes: of logits at a time, in fp32 with their gradient: what this needs beside its inputs and gradients.
        batch_invariant: a row's bits depend on its hidden row alone, not on how many rows there are; slower.

    Returns: LogProb(logp, entropy), fp32 [...] (fp64 for fp64).  Derivatives of every order, as :func:`lora_linear`'s; beyond
        the first ones in reverse mode all logits are kept.

    Raises: ValueError or TypeError that names the argument; on a CPU also for a target outside [0, V), which on a GPU gives
        NaN and no gradient.
    """
    head = Head(hidden, weight, bias, lora, temperature, logit_scale, softcap)
    return LogProb(*with_stats(head, targets, ignore_index, chunk_bytes, batch_invariant)[:2])


def with_stats(
    head: Head, targets: Tensor, ignore_index: int = -100, chunk_bytes: int = CHUNK_BYTES, batch_invariant: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_logprob`'s logp and entropy, and max, ℓ and Ē of each token, [3, T] and without gradient."""
    reason = followed()
    if reason is AGAIN:
        return again(with_stats, head, targets, ignore_index, chunk_bytes, batch_invariant)
    hidden, weight = head[:2]
    autocast = autocast_dtype(hidden) if isinstance(hidden, Tensor) else None
    check_head(head, autocast is not None)
    check_logprob(targets, hidden, weight.shape[0], ignore_index, chunk_bytes)
    lead, (tensors, numbers) = hidden.shape[:-1], as_arguments(head)
    call = (ignore_index, chunk_bytes, bool(batch_invariant), autocast or hidden.dtype)
    if reason is not None and (reason is not FORWARD_MODE or has_tangent(tensors)):
        _stats.op_fell_back(reason)
        logp, entropy, stats = logprob_impl.formula(*_arguments(numbers, call, targets, *tensors))
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        logp, entropy, stats = _LinearLogProb.apply(numbers, call, targets, *tensors)
    else:
        logp, entropy, stats = _forward(*_arguments(numbers, call, targets, *tensors))
    return logp.view(lead), entropy.view(lead), stats


def _arguments(numbers, call, targets, hidden, *head):
    """As the op takes them."""
    return hidden.reshape(-1, hidden.shape[-1]), *head, numbers, targets.reshape(-1), *call


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, call, targets, *tensors):
        logp, entropy, stats = _forward(*_arguments(numbers, call, targets, *tensors))
        ctx.numbers, ctx.call = numbers, call
        ctx.save_for_backward(stats, targets, *tensors)
        ctx.mark_non_differentiable(stats)
        return logp, entropy, stats

    @staticmethod
    def backward(ctx, dlogp, dentropy, _):
        stats, targets, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3:8])
        if must_follow((dlogp, dentropy)):

            def formula():
                return logprob_impl.formula(*_arguments(ctx.numbers, ctx.call, targets, *tensors))[:2]

            grads = differentiated(formula, tensors, needs, (dlogp, dentropy))
            return None, None, None, *grads, None
        grads = _backward(dlogp, dentropy, stats, *_arguments(ctx.numbers, ctx.call, targets, *tensors), needs)
        return None, None, None, *spread(grads, needs, tensors[0].shape), None


def differentiated(formula, tensors, needs: list[bool], grads) -> list[Tensor | None]:
    """The gradients of the first five of ``tensors`` that are needed, by autograd, through ``formula()`` of those tensors."""
    _stats.op_fell_back(DIFFERENTIABLE)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outs = formula()
    wanted = [t for t, need in zip(tensors, needs, strict=False) if need]
    input_grads = iter(torch.autograd.grad(outs, wanted, grads, create_graph=create_graph))
    return [next(input_grads) if need else None for need in needs]


def spread(grads, needs: list[bool], shape) -> list[Tensor | None]:
    """The gradients of hidden, weight, bias, A and B, None where none was asked for; hidden's in its ``shape``."""
    grads = iter(grads)
    dh, *head_grads = (next(grads) if need else None for need in needs)
    return [None if dh is None else dh.view(shape), *head_grads]


def _forward(hidden, *rest):
    run = logprob_impl.forward if is_plain(hidden) else torch.ops.lowrank.linear_logprob.default
    return run(hidden, *rest)


def _backward(dlogp, *rest):
    run = logprob_impl.backward if is_plain(dlogp) else torch.ops.lowrank.linear_logprob_backward.default
    return run(dlogp, *rest)


_lib.impl("linear_logprob", logprob_impl.forward, "CompositeExplicitAutograd")
_lib.impl("linear_logprob_backward", logprob_impl.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::linear_logprob", lib=_lib)
def _(hidden, *rest):
    acc_dtype = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    T = hidden.shape[0]
    return (
        hidden.new_empty(T, dtype=acc_dtype),
        hidden.new_empty(T, dtype=acc_dtype),
        hidden.new_empty((3, T), dtype=acc_dtype),
    )


@torch.library.register_fake("lowrank::linear_logprob_backward", lib=_lib)
def _(dlogp, dentropy, stats, *arguments):
    return [t.new_empty(t.shape) for t, need in zip(arguments[:5], arguments[-1], strict=True) if need]
