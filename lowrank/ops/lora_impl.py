"""What torch.ops.lowrank.lora_linears and lora_linears_backward do: thin products around one GEMM per projection.

The thin products come from a backend module (eager today) that offers shrink, expand, dy_pass and x_pass; the big GEMM is
always torch's.  Argument names and the order of the gradients are those of the schemas in ops/lora.py.
"""

import contextlib

import torch
from torch import Tensor

from . import dropout, eager
from ._dispatch import backend


def forward(
    x, weights, biases, bases, As, Bs, lora_biases, scaling_tensors, scalings, counts, masks, ps, seeds, dtype, thin_dtype
):  # fmt: skip
    backend(x.device)  # one answer today, and an error where LOWRANK_BACKEND asks for another
    with _no_autocast(x.device):
        x = _rows(x, dtype)
        keeps: list[Tensor] = [None] * len(ps)
        parts: list[Tensor] = [x.new_empty((x.shape[0], 0), dtype=thin_dtype)] * max(len(As), 1)
        for mask, group in _groups(masks):
            A = _as([As[j] for j in group], thin_dtype, 0)
            if mask < 0:
                part, _ = eager.shrink(x, A)
            else:
                part, keeps[mask] = eager.shrink(x, A, seeds[mask], ps[mask])
            _spread(part, parts, group, As, 1)
        S = _as(parts, thin_dtype, 1)
        scales = _scales(scalings, masks, ps)

        ys = []
        for i, (mine, columns) in enumerate(_spans(counts, As)):
            constants = [] if biases[i] is None else [biases[i]]
            constants += [
                _times(lora_biases[j].to(thin_dtype), scalings[j], scaling_tensors[j])
                for j in mine
                if lora_biases[j] is not None
            ]
            if bases[i] is not None:
                constants.append(bases[i].reshape(x.shape[0], bases[i].shape[-1]))
            start = sum(constants[1:], constants[0]) if constants else None
            out_dtype = dtype if bases[i] is None else bases[i].dtype
            if mine:
                T, alpha = _scaled(S[:, columns], mine, As, scales, scaling_tensors)
                y = eager.expand(T, _as([Bs[j] for j in mine], thin_dtype, 1), start, out_dtype, alpha)
                ys.append(y if weights[i] is None else y.addmm_(x, weights[i].to(dtype).mT))
            else:
                start = None if start is None else start.to(dtype)
                ys.append(torch.nn.functional.linear(x, weights[i].to(dtype), start))
        return ys, S, keeps


def backward(dys, x, weights, As, Bs, scaling_tensors, S, keeps, scalings, counts, masks, ps, dtype, thin_dtype, needs):
    with _no_autocast(dys[0].device):
        n, a = len(counts), len(As)
        need_x, need_W, need_b, need_A, need_B, need_lb = runs(needs, (1, n, n, a, a, a))
        need_x, need_dS = need_x[0], need_x[0] or any(need_A)
        dys = [_dense(dy) for dy in dys]
        x = None if x is None else _rows(x, dtype)
        scales = _scales(scalings, masks, ps)

        dW, db, dlb = [None] * n, [None] * n, [None] * a
        dS: list[Tensor] = [None] * a
        dB: list[Tensor] = [None] * a
        for i, (mine, columns) in enumerate(_spans(counts, As)):
            if need_W[i]:
                dW[i] = dys[i].mT @ x
            if need_b[i] or any(need_lb[j] for j in mine):
                db[i] = dys[i].sum(0, dtype=torch.promote_types(thin_dtype, torch.float32))
                for j in mine:
                    dlb[j] = _times(db[i], scalings[j], scaling_tensors[j])
            if mine and (need_dS or any(need_B[j] for j in mine)):
                T = S[:, columns] if any(need_B[j] for j in mine) else None
                T, alpha = _scaled(T, mine, As, scales, scaling_tensors)
                d, grad = eager.dy_pass(dys[i], _as([Bs[j] for j in mine], thin_dtype, 1), T, need_dS, alpha)
                _spread(d, dS, mine, As, 1)
                _spread(grad, dB, mine, As, 1)

        dX, dA = None, [None] * a
        if need_x:
            dX = dys[0].new_empty((dys[0].shape[0], (*As, *weights)[0].shape[1]), dtype=dtype)
        for g, (mask, group) in enumerate(_groups(masks) if need_dS else []):
            thin, alpha = _scaled(_as([dS[j] for j in group], thin_dtype, 1), group, As, scales, scaling_tensors)
            grad = eager.x_pass(
                x if any(need_A[j] for j in group) else None,
                thin,
                _as([As[j] for j in group], thin_dtype, 0),
                keeps[mask] if mask >= 0 else None,
                dX,
                g > 0,
                alpha,
            )
            _spread(grad, dA, group, As, 0)
        if need_x:
            for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
                if weight is not None:
                    dX.addmm_(dy, weight.to(dtype), beta=1 if a or i else 0)

        # several are views of one joined tensor, which an op may not return
        dA = [None if d is None else d.to(A.dtype, copy=a > 1) for d, A in zip(dA, As, strict=True)]
        dB = [None if d is None else d.to(B.dtype, copy=a > 1).contiguous() for d, B in zip(dB, Bs, strict=True)]
        return [grad for grad, need in zip([dX, *dW, *db, *dA, *dB, *dlb], needs, strict=True) if need]


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes are explicit below; the context is entered only where autocast would interfere."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.dtype is dtype else x.to(dtype)


def _dense(dy: Tensor) -> Tensor:
    """A gradient with the strides a GEMM takes: ``y.sum().backward()`` hands over strides of 0."""
    return dy if 1 in dy.stride() and 0 not in dy.stride() else dy.contiguous()


def _scales(scalings, masks, ps) -> list[float]:
    return [s * (dropout.keep_scale(ps[mask]) if mask >= 0 else 1.0) for s, mask in zip(scalings, masks, strict=True)]


def _groups(masks) -> list[tuple[int, list[int]]]:
    """Adapters that see the same dropped x share its pass: (mask, adapters) by first appearance."""
    groups: dict[int, list[int]] = {}
    for j, mask in enumerate(masks):
        groups.setdefault(mask, []).append(j)
    return list(groups.items())


def _spans(counts, As) -> list[tuple[range, slice]]:
    """Per projection: its adapters, and their columns of S."""
    spans, j, column = [], 0, 0
    for count in counts:
        width = sum(A.shape[0] for A in As[j : j + count])
        spans.append((range(j, j + count), slice(column, column + width)))
        j, column = j + count, column + width
    return spans


def runs(items, sizes) -> list[list]:
    """Consecutive runs of the given sizes."""
    found, start = [], 0
    for size in sizes:
        found.append(list(items[start : start + size]))
        start += size
    return found


def _spread(joined: Tensor | None, slots: list, group, As: list[Tensor], dim: int) -> None:
    """Put the parts of ``joined``, one per adapter of ``group``, into their slots."""
    if joined is not None and len(group) == 1:
        slots[group[0]] = joined
    elif joined is not None:
        for j, part in zip(group, joined.split([As[j].shape[0] for j in group], dim), strict=True):
            slots[j] = part


def _as(tensors: list[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
    """All of them in ``dtype``, joined along ``dim``."""
    tensors = [t if t.dtype is dtype else t.to(dtype) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _times(t: Tensor, scaling: float, scaling_tensor: Tensor | None) -> Tensor:
    if scaling_tensor is not None:
        return t * (scaling_tensor.double() * scaling)  # 0-d: t keeps its dtype, the product loses nothing
    return t if scaling == 1.0 else t * scaling


def _scaled(S: Tensor | None, group, As, scales, scaling_tensors) -> tuple[Tensor | None, float]:
    """(T, alpha): alpha T is S [M,R] with each adapter's columns times its scale; one scale for all is left to the GEMMs."""
    first = scales[group[0]]
    if all(scales[j] == first and scaling_tensors[j] is None for j in group):
        return S, first
    if S is None:
        return None, 1.0
    parts = S.split([As[j].shape[0] for j in group], 1)
    scaled = [_times(part, scales[j], scaling_tensors[j]) for part, j in zip(parts, group, strict=True)]
    return _as(scaled, S.dtype, 1), 1.0
