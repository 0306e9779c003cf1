"""What torch.ops.lowrank.linear_logprob and its backward do: chunks of rows through head.py's GEMMs, and a pass over each.

    forward    z = logits(h);          rows: z → logp, H and max, ℓ, Ē
    backward   z = logits(h) again;    rows: z → dz;    dh = dz W (+ u A),  dW += dzᵀ h, ...

The row passes are kernels/logprob.py on a GPU and Eager elsewhere.
"""

import torch
from torch import Tensor

from ._boundary import no_autocast
from .head import Gradients, Products, cached, chunks, row_passes, scales_of

FAR = -1e4  # exp of this is 0, and it times 0 is 0, which −inf is not


def forward(*arguments):
    """(logp [T], entropy [T], stats [3, T])."""
    *head, targets, ignore_index, chunk_bytes, batch_invariant, dtype = arguments
    hidden, weight = head[:2]
    with no_autocast(hidden.device):
        products = Products(*head, dtype, batch_invariant)
        wide, (T, V) = products.wide, (hidden.shape[0], weight.shape[0])
        logp, entropy, stats = (hidden.new_empty(shape, dtype=wide) for shape in (T, T, (3, T)))
        passes = row_passes("logprob", Eager, hidden.device, wide)
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
    wide = torch.promote_types(dtype, torch.float32)
    h = hidden.to(dtype).to(wide)
    z = torch.nn.functional.linear(h, weight.to(dtype).to(wide), None if bias is None else bias.to(wide))
    if A is not None:
        z = z + scaling * (h @ A.to(wide).mT) @ B.to(wide).mT
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
        passes = row_passes("logprob", Eager, hidden.device, products.wide)
        per_logit = passes.per_logit(products.dz_dtype, products.softcap)
        for at in chunks(hidden.shape[0], weight.shape[0], chunk_bytes, per_logit):
            h = _without(products.rows(at), targets[at] == ignore_index)
            z, t = products.logits(h)
            dz = passes.backward(
                z, targets[at], ignore_index, products.scales(at), stats[:, at], dlogp[at], dentropy[at], products.dz_dtype
            )  # fmt: skip
            del z
            grads.add(at, h, t, dz)
        return grads.found()


def _without(h: Tensor, ignored: Tensor) -> Tensor:
    """Zeros in rows that do not count, so that what they hold goes nowhere."""
    return h.masked_fill(ignored[:, None], 0)


class Eager:
    """The two passes over a chunk's logits in PyTorch, in place on z, and a few rows at a time."""

    @staticmethod
    def per_logit(dtype: torch.dtype, softcap: float) -> int:
        """Bytes of a chunk per logit: z and what stands beside it."""
        return (3 if softcap else 2) * dtype.itemsize

    @staticmethod
    def forward(z, targets, ignore_index, scales, logp, entropy, stats) -> None:
        """z [C, V] → logp, entropy [C] and stats [3, C]."""
        for at in cached(z):
            _forward(z[at], targets[at], ignore_index, scales_of(scales, at), logp[at], entropy[at], stats[:, at])

    @staticmethod
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
    found = (z * z).neg_().add_(1).mul_(logit_scale * inv_t) if slope else None
    z.mul_(softcap).mul_(inv_t)
    return found
