"""What torch.ops.lowrank.linear_logprob and its backward do: chunks of rows through head.py's GEMMs, and a pass over each.

    forward    z = logits(h);          rows: z → logp, H and max, ℓ, Ē
    backward   z = logits(h) again;    rows: z → dz;    dh = dz W (+ u A),  dW += dzᵀ h, ...

The row passes are kernels/logprob.py on a GPU and logprob_eager.py elsewhere.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import logprob_eager
from ._boundary import no_autocast
from .head import Gradients, Products, chunks, in_kernels
from .logprob_eager import FAR


def row_passes(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """kernels/logprob.py or logprob_eager.py, for logits of ``dtype``."""
    if not in_kernels(device, dtype):
        return logprob_eager
    from ..kernels import logprob

    return logprob


def forward(*arguments):
    """(logp [T], entropy [T], stats [3, T])."""
    *head, targets, ignore_index, chunk_bytes, batch_invariant, dtype = arguments
    hidden, weight = head[:2]
    with no_autocast(hidden.device):
        products = Products(*head, dtype, batch_invariant)
        acc_dtype, (T, V) = products.acc_dtype, (hidden.shape[0], weight.shape[0])
        logp, entropy, stats = (hidden.new_empty(shape, dtype=acc_dtype) for shape in (T, T, (3, T)))
        passes = row_passes(hidden.device, acc_dtype)
        for at in chunks(T, V, chunk_bytes, passes.per_logit(products.dz_dtype, products.softcap)):
            z, _ = products.logits(_without(products.rows(at), targets[at] == ignore_index))
            passes.forward(z, targets[at], ignore_index, products.scales(at), logp[at], entropy[at], stats[:, at])
    return logp, entropy, stats


def formula(*arguments):
    """:func:`forward` in operations that autograd, torch.func and forward mode follow; all logits are kept."""
    *head, targets, ignore_index, _, _, dtype = arguments
    with no_autocast(head[0].device):
        ignored = targets == ignore_index
        z = plain_logits(_without(head[0], ignored), *head[1:], dtype)
        inside = (targets >= 0) & (targets < z.shape[1])
        largest = z.detach().amax(1, keepdim=True)
        z = z - largest
        lse = z.exp().sum(1, keepdim=True).log()
        p = (z - lse).exp()
        mean = (p * z.clamp_min(FAR)).sum(1)
        chosen = z.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]
        lse, largest = lse[:, 0], largest[:, 0]
        logp, entropy = torch.where(inside, chosen - lse, torch.nan), lse - mean
        entropy = torch.where(inside, entropy, entropy.detach())  # as logp: no gradient beside a bad target
        stats = torch.stack((largest, lse.detach(), mean.detach()))
        return torch.where(ignored, 0, logp), torch.where(ignored, 0, entropy), stats


def plain_logits(hidden, weight, bias, A, B, inv_t, numbers, dtype) -> Tensor:
    """z [T, V] in fp32 or wider, after scale, cap and temperature, out of place."""
    scaling, inv_temperature, logit_scale, softcap = numbers
    acc_dtype = torch.promote_types(dtype, torch.float32)
    h = hidden.to(dtype).to(acc_dtype)
    z = torch.nn.functional.linear(h, weight.to(dtype).to(acc_dtype), None if bias is None else bias.to(acc_dtype))
    if A is not None:
        z = z + scaling * (h @ A.to(acc_dtype).mT) @ B.to(acc_dtype).mT
    z = z * logit_scale
    z = softcap * (z / softcap).tanh() if softcap else z
    return z * (inv_temperature if inv_t is None else inv_t[:, None])


def backward(dlogp, dentropy, stats, *arguments):
    """The gradients of hidden, weight, bias, A and B that are needed, in that order and in their dtypes."""
    *head, targets, ignore_index, chunk_bytes, batch_invariant, dtype, needs = arguments
    hidden, weight = head[:2]
    with no_autocast(hidden.device):
        products = Products(*head, dtype, batch_invariant)
        grads = Gradients(products, head[:5], needs)
        passes = row_passes(hidden.device, products.acc_dtype)
        per_logit = passes.per_logit(products.dz_dtype, products.softcap)
        for at in chunks(hidden.shape[0], weight.shape[0], chunk_bytes, per_logit):
            h = _without(products.rows(at), targets[at] == ignore_index)
            z, t = products.logits(h)
            dz = passes.backward(
                z,
                targets[at],
                ignore_index,
                products.scales(at),
                stats[:, at],
                dlogp[at],
                dentropy[at],
                products.dz_dtype,
            )
            del z
            grads.add(at, h, t, dz)
        return grads.as_list()


def _without(h: Tensor, ignored: Tensor) -> Tensor:
    """Zeros in rows that do not count, so that what they hold goes nowhere."""
    return h.masked_fill(ignored[:, None], 0)
