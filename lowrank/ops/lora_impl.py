"""What torch.ops.lowrank.lora_linears and lora_linears_backward do: thin products around one GEMM per projection.

The thin products are thin_eager.py's or kernels/thin.py's, which offer the same four functions; the big GEMM is torch's.
Argument names and the order of the gradients are those of the schemas in ops/lora.py.
"""

from types import ModuleType

import torch
from torch import Tensor

from .. import bits
from . import dropout, thin_eager
from ._boundary import dense, no_autocast, plus, rows_of
from ._choice import choice
from ._dispatch import in_kernels
from .thin_eager import add_product_, times


def thin_products(x, weights, bases_or_dys, As, Bs, thin_dtype, has_dropout) -> ModuleType:
    """thin_eager.py or kernels/thin.py for one call.  ``bases_or_dys``: each [..., N] or [M, N], or None."""
    if not As or choice(As[0].device).backend == "eager":
        return thin_eager
    activations = [t for t in (x, *bases_or_dys) if t is not None]
    widths = [
        t.shape[-1] if weight is None else weight.shape[0] for t, weight in zip(bases_or_dys, weights, strict=True)
    ]
    rows = activations[0].numel() // max(activations[0].shape[-1], 1)
    if rows == 0 or 0 in widths:
        return thin_eager
    sizes = rows, As[0].shape[1], sum(widths), activations[0].dtype, (*As, *Bs), thin_dtype, has_dropout
    if not in_kernels(activations, max(A.shape[0] for A in As), thin_dtype, sizes):
        return thin_eager
    from ..kernels import thin

    return thin


def forward(
    x,
    weights,
    biases,
    bases,
    As,
    Bs,
    lora_biases,
    scaling_tensors,
    scalings,
    counts,
    masks,
    ps,
    seeds,
    dtype,
    thin_dtype,
):
    with no_autocast(x.device):
        x = rows_of(x, dtype)
        thin = thin_products(x, weights, bases, As, Bs, thin_dtype, bool(ps))
        scalings, scaling_tensors = _on_device(scalings, scaling_tensors, x.device)
        scales = _scales(scalings, masks, ps)
        keeps: list[Tensor] = []
        S = x.new_empty((x.shape[0], 0), dtype=thin_dtype)
        if As:
            S, keeps = thin.shrink(x, As, thin_dtype, masks, [dropout.threshold(p) for p in ps], seeds)

        ys = []
        for i, (span, columns) in enumerate(_spans(counts, As)):
            weight, base = weights[i], bases[i]
            constants = [] if biases[i] is None else [biases[i]]
            if counts[i] and weight is not None and may_overflow(dtype, thin_dtype):
                base, weight = torch.nn.functional.linear(x, weight.to(dtype), *[b.to(dtype) for b in constants]), None
                constants = []
            constants += [
                times(lora_biases[j].to(thin_dtype), scalings[j], scaling_tensors[j])
                for j in range(span.start, span.stop)
                if lora_biases[j] is not None
            ]
            if base is not None:
                constants.append(base.reshape(x.shape[0], base.shape[-1]))
            start = sum(constants[1:], constants[0]) if constants else None
            several = start is not None or counts[i] > 1  # their sum may overflow where none of them does
            if counts[i] and weight is not None and may_overflow(dtype, thin_dtype, several):
                start = None if start is None else start.to(dtype)
                start, weight = torch.nn.functional.linear(x, weight.to(dtype), start), None
            out_dtype = dtype if base is None else base.dtype
            if counts[i]:
                y = thin.expand(S[:, columns], Bs[span], scales[span], scaling_tensors[span], start, out_dtype)
                ys.append(y if weight is None else y.addmm_(x, weight.to(dtype).mT))
            else:
                start = None if start is None else start.to(dtype)
                ys.append(torch.nn.functional.linear(x, weight.to(dtype), start))
        return ys, S, keeps


def backward(dys, x, weights, As, Bs, scaling_tensors, S, keeps, scalings, counts, masks, ps, dtype, thin_dtype, needs):
    whole = [dy for dy in dys if dy is not None]  # None: an output that got no gradient, of which nothing is needed
    some = whole[0]
    with no_autocast(some.device):
        n, a = len(counts), len(As)
        need_x, need_W, need_b, need_A, need_B, need_lb = runs(needs, (1, n, n, a, a, a))
        need_x, need_dS = need_x[0], need_x[0] or any(need_A)
        dys = [None if dy is None else dense(dy) for dy in dys]
        x = None if x is None else rows_of(x, dtype)
        live_dys, live_weights = dys, weights
        if len(whole) < n:
            live_dys, live_weights = zip(
                *(pair for pair in zip(dys, weights, strict=True) if pair[0] is not None), strict=True
            )
        thin = thin_products(x, live_weights, live_dys, As, Bs, thin_dtype, bool(ps))
        scalings, scaling_tensors = _on_device(scalings, scaling_tensors, some.device)
        scales = _scales(scalings, masks, ps)

        dW, db, dlb = [None] * n, [None] * n, [None] * a
        dS: list[Tensor] = [None] * a
        dB: list[Tensor] = [None] * a
        for i, (span, columns) in enumerate(_spans(counts, As)):
            if dys[i] is None:
                continue
            if need_W[i]:
                dW[i] = dys[i].mT @ x
            if need_b[i] or any(need_lb[span]):
                db[i] = dys[i].sum(0, dtype=torch.promote_types(thin_dtype, torch.float32))
                for j in range(span.start, span.stop):
                    dlb[j] = times(db[i], scalings[j], scaling_tensors[j])
            if counts[i] and (need_dS or any(need_B[span])):
                dS[span], dB[span] = thin.dy_pass(
                    dys[i],
                    Bs[span],
                    scales[span],
                    scaling_tensors[span],
                    S[:, columns] if any(need_B[span]) else None,
                    need_B[span],
                    need_dS,
                    thin_dtype,
                )

        dX, dA = None, [None] * a
        if need_x:
            K = next(t for t in (x, *As, *weights) if t is not None).shape[-1]
            dX = some.new_empty((some.shape[0], K), dtype=dtype)
        first = need_x and may_overflow(dtype, thin_dtype)
        started = first and add_base(dX, dys, weights, False)
        used = [j for j in range(a) if dS[j] is not None]
        if used:
            arguments = dS, As, need_A, masks
            if len(used) < a:
                arguments = [[of[j] for j in used] for of in arguments]
            *arguments, masks = arguments
            grads = thin.x_pass(x if any(need_A) else None, *arguments, dX, masks, keeps, add=started)
            for j, grad in zip(used, grads, strict=True):
                dA[j] = grad
            started = True
        if need_x and not first:
            started = add_base(dX, dys, weights, started)
        if need_x and not started:
            dX.zero_()
        return [grad for grad, need in zip([dX, *dW, *db, *dA, *dB, *dlb], needs, strict=True) if need]


def may_overflow(dtype: torch.dtype, thin_dtype: torch.dtype, several: bool = False) -> bool:
    """Whether a thin term, or the sum of ``several``, finite in its own dtype, may be infinite in the GEMM's: then the base
    goes first.
    """
    return dtype is torch.float16 and (several or thin_dtype is not dtype)


def add_base(dX, dys, weights, started: bool) -> bool:
    """dX += Σ dY W, or = where nothing is there yet; whether anything is there then."""
    for dy, weight in zip(dys, weights, strict=True):
        if dy is None or weight is None:
            continue
        if started:
            add_product_(dX, dy, weight.to(dX.dtype))
        else:
            dX.addmm_(dy, weight.to(dX.dtype), beta=0)
        started = True
    return started


def formula(
    x, weights, biases, bases, As, Bs, lora_biases, scaling_tensors, scalings, counts, masks, ps, dtype, thin_dtype
):
    """:func:`forward`'s ys, in x's leading shape and in operations that torch.func, forward mode and tracers follow.

    Dropout is torch's own, which vmap knows how to draw.
    """
    with no_autocast(x.device):
        x = x.to(dtype)
        wide = x.to(thin_dtype)
        dropped = [torch.nn.functional.dropout(wide, p) for p in ps]
        scalings, scaling_tensors = _on_device(scalings, scaling_tensors, x.device)
        ys = []
        for i, (span, _) in enumerate(_spans(counts, As)):
            bias = None if biases[i] is None else biases[i].to(dtype)
            y = bases[i]
            if y is None:
                y = torch.nn.functional.linear(x, weights[i].to(dtype), bias)
            out_dtype = y.dtype
            for j in range(span.start, span.stop):
                S = (wide if masks[j] < 0 else dropped[masks[j]]) @ As[j].to(thin_dtype).mT
                constant = None if lora_biases[j] is None else lora_biases[j].to(thin_dtype)
                term = torch.nn.functional.linear(S, Bs[j].to(thin_dtype), constant)
                y = y + times(term, scalings[j], scaling_tensors[j])
            ys.append(y.to(out_dtype))
        return ys


def differentiable(
    dys, dS, x, weights, As, Bs, scaling_tensors, S, keeps, scalings, counts, masks, ps, dtype, thin_dtype, needs
):
    """:func:`backward`'s gradients in out-of-place operations, which autograd and vmap follow.  A dy may be None.

    S is computed again from x where x or A has a graph; without x it is a constant, or an output of the node, which ``dS`` is
    then the gradient of.
    """
    with no_autocast(As[0].device if As else x.device if x is not None else weights[0].device):
        n, a = len(counts), len(As)
        need_x, need_W, need_b, need_A, need_B, need_lb = runs(needs, (1, n, n, a, a, a))
        x = None if x is None else rows_of(x, dtype)
        wide = None if x is None else x.to(thin_dtype)
        constant = x is None or not (need_x[0] or any(need_A))  # S
        scalings, scaling_tensors = _on_device(scalings, scaling_tensors, As[0].device if As else None)
        scales, drop = _scales(scalings, masks, ps), dropper(keeps, As[0].shape[1] if As else 0)
        ranks = [A.shape[0] for A in As]
        parts = [None] * a if S is None else S.split(ranks, 1)
        handed = [None] * a if dS is None else dS.split(ranks, 1)
        dX, low, dW, db = None, None, [None] * n, [None] * n
        dA, dB, dlb = [None] * a, [None] * a, [None] * a
        for i, (span, _) in enumerate(_spans(counts, As)):
            dy = dys[i]
            if dy is not None and need_x[0] and weights[i] is not None:
                dX = plus(dX, dy @ weights[i].to(dtype))
            if dy is not None and need_W[i]:
                dW[i] = dy.mT @ x
            if dy is not None and (need_b[i] or any(need_lb[span])):
                db[i] = dy.sum(0, dtype=torch.promote_types(thin_dtype, torch.float32))
            for j in range(span.start, span.stop):
                scaled = None if dy is None else times(dy.to(thin_dtype), scales[j], scaling_tensors[j])
                if scaled is not None and need_B[j]:
                    dB[j] = scaled.mT @ (parts[j] if constant else drop(wide, masks[j]) @ As[j].to(thin_dtype).mT)
                if db[i] is not None and need_lb[j]:
                    dlb[j] = times(db[i], scalings[j], scaling_tensors[j])
                if not (need_x[0] or need_A[j]):
                    continue
                d = plus(handed[j], None if scaled is None else scaled @ Bs[j].to(thin_dtype))
                if d is not None and need_A[j]:
                    dA[j] = d.mT @ drop(wide, masks[j])
                if d is not None and need_x[0]:
                    low = plus(low, drop(d @ As[j].to(thin_dtype), masks[j]))
        dX = plus(dX, low)
        dX = None if dX is None else dX.to(dtype)
        return [grad for grad, need in zip([dX, *dW, *db, *dA, *dB, *dlb], needs, strict=True) if need]


def dropper(keeps: list[Tensor], columns: int):
    """drop(t [M,columns], mask): t, 0 where the mask's keep bit is 0; mask -1 is no mask."""
    masks = [bits.unpack(keep.reshape(-1), (keep.shape[0], 32 * keep.shape[1]))[:, :columns] for keep in keeps]
    return lambda t, mask: t if mask < 0 else torch.where(masks[mask], t, 0)


def _on_device(scalings, scaling_tensors, device: torch.device | None) -> tuple[list[float], list[Tensor | None]]:
    """A scaling tensor that lives on the CPU beside a model that does not is read: nothing has to be waited for."""
    scalings, scaling_tensors = list(scalings), list(scaling_tensors)
    for j, t in enumerate(scaling_tensors):
        if t is not None and t.device != device:
            scalings[j], scaling_tensors[j] = scalings[j] * float(t), None
    return scalings, scaling_tensors


def _scales(scalings, masks, ps) -> list[float]:
    return [s * (dropout.keep_scale(ps[mask]) if mask >= 0 else 1.0) for s, mask in zip(scalings, masks, strict=True)]


def _spans(counts, As) -> list[tuple[slice, slice]]:
    """Per projection: its adapters, and their columns of S."""
    spans, j, column = [], 0, 0
    for count in counts:
        width = sum(A.shape[0] for A in As[j : j + count])
        spans.append((slice(j, j + count), slice(column, column + width)))
        j, column = j + count, column + width
    return spans


def runs(items, sizes) -> list[list]:
    """Consecutive runs of the given sizes."""
    lists, start = [], 0
    for size in sizes:
        lists.append(list(items[start : start + size]))
        start += size
    return lists
