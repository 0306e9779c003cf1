"""What torch.ops.lowrank.lora_linears and lora_linears_backward do: thin products around one GEMM per projection.

The thin products are ops/eager.py's or kernels/thin.py's, which offer the same four functions (_dispatch.py chooses); the
big GEMM is always torch's.  Argument names and the order of the gradients are those of the schemas in ops/lora.py.
"""

import contextlib

import torch
from torch import Tensor

from . import dropout
from ._dispatch import thin_products
from .eager import add_product_, times


def forward(
    x, weights, biases, bases, As, Bs, lora_biases, scaling_tensors, scalings, counts, masks, ps, seeds, dtype, thin_dtype
):  # fmt: skip
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
        for i, (mine, columns) in enumerate(_spans(counts, As)):
            constants = [] if biases[i] is None else [biases[i]]
            constants += [
                times(lora_biases[j].to(thin_dtype), scalings[j], scaling_tensors[j])
                for j in range(mine.start, mine.stop)
                if lora_biases[j] is not None
            ]
            if bases[i] is not None:
                constants.append(bases[i].reshape(x.shape[0], bases[i].shape[-1]))
            start = sum(constants[1:], constants[0]) if constants else None
            out_dtype = dtype if bases[i] is None else bases[i].dtype
            if counts[i]:
                y = thin.expand(S[:, columns], Bs[mine], scales[mine], scaling_tensors[mine], start, out_dtype)
                ys.append(y if weights[i] is None else y.addmm_(x, weights[i].to(dtype).mT))
            else:
                start = None if start is None else start.to(dtype)
                ys.append(torch.nn.functional.linear(x, weights[i].to(dtype), start))
        return ys, S, keeps


def backward(dys, x, weights, As, Bs, scaling_tensors, S, keeps, scalings, counts, masks, ps, dtype, thin_dtype, needs):
    some = next(dy for dy in dys if dy is not None)  # None: an output that got no gradient, of which nothing is needed
    with no_autocast(some.device):
        n, a = len(counts), len(As)
        need_x, need_W, need_b, need_A, need_B, need_lb = runs(needs, (1, n, n, a, a, a))
        need_x, need_dS = need_x[0], need_x[0] or any(need_A)
        dys = [None if dy is None else dense(dy) for dy in dys]
        x = None if x is None else rows_of(x, dtype)
        live, theirs = zip(*(pair for pair in zip(dys, weights, strict=True) if pair[0] is not None), strict=True)
        thin = thin_products(x, theirs, live, As, Bs, thin_dtype, bool(ps))
        scalings, scaling_tensors = _on_device(scalings, scaling_tensors, some.device)
        scales = _scales(scalings, masks, ps)

        dW, db, dlb = [None] * n, [None] * n, [None] * a
        dS: list[Tensor] = [None] * a
        dB: list[Tensor] = [None] * a
        for i, (mine, columns) in enumerate(_spans(counts, As)):
            if dys[i] is None:
                continue
            if need_W[i]:
                dW[i] = dys[i].mT @ x
            if need_b[i] or any(need_lb[mine]):
                db[i] = dys[i].sum(0, dtype=torch.promote_types(thin_dtype, torch.float32))
                for j in range(mine.start, mine.stop):
                    dlb[j] = times(db[i], scalings[j], scaling_tensors[j])
            if counts[i] and (need_dS or any(need_B[mine])):
                dS[mine], dB[mine] = thin.dy_pass(
                    dys[i],
                    Bs[mine],
                    scales[mine],
                    scaling_tensors[mine],
                    S[:, columns] if any(need_B[mine]) else None,
                    need_B[mine],
                    need_dS,
                    thin_dtype,
                )

        dX, dA = None, [None] * a
        if need_x:
            K = next(t for t in (x, *As, *weights) if t is not None).shape[-1]
            dX = some.new_empty((some.shape[0], K), dtype=dtype)
        used = [j for j in range(a) if dS[j] is not None]
        if used:
            mine = ([of[j] for j in used] for of in (dS, As, need_A))
            found = thin.x_pass(x if any(need_A) else None, *mine, dX, [masks[j] for j in used], keeps)
            for j, grad in zip(used, found, strict=True):
                dA[j] = grad
        if need_x:
            started = bool(used)
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None and weight is not None:
                    if started:
                        add_product_(dX, dy, weight.to(dtype))
                    else:
                        dX.addmm_(dy, weight.to(dtype), beta=0)
                    started = True
            if not started:
                dX.zero_()
        return [grad for grad, need in zip([dX, *dW, *db, *dA, *dB, *dlb], needs, strict=True) if need]


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes are explicit below; the context is entered only where autocast would interfere."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.dtype is dtype else x.to(dtype)


def dense(dy: Tensor) -> Tensor:
    """A gradient with the strides a GEMM takes: ``y.sum().backward()`` hands over strides of 0."""
    return dy if 1 in dy.stride() and 0 not in dy.stride() else dy.contiguous()


def _on_device(scalings, scaling_tensors, device: torch.device) -> tuple[list[float], list[Tensor | None]]:
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
    found, start = [], 0
    for size in sizes:
        found.append(list(items[start : start + size]))
        start += size
    return found
