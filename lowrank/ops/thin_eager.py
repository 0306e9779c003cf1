"""The four thin products of a LoRA linear in plain PyTorch: what a CPU runs, and what the kernels must agree with.

    shrink    S_j  = drop_j(x) A_jᵀ                                      one read of x
    expand    Y    = start + sum of scale_j S_j B_jᵀ                     one write of Y
    dy_pass   dS_j = scale_j dY B_j,  dB_j = scale_j dYᵀ S_j             one read of dY
    x_pass    dA_j = dS_jᵀ drop_j(x), dX = sum of drop_j(dS_j A_j)       one read of x, one write of dX

x [M,K], A_j [R_j,K], S and dS [M,R_0+R_1+...], B_j [N,R_j], Y and dY [M,N]; j counts adapters.  masks[j] is the index of
adapter j's dropout mask, or -1: drop_j() only zeroes, its factor 1/(1-p) is part of scale_j.  A scale is a float, times a
0-d tensor if scale_tensors[j] is one.  Where the thin side is wider than the activations (fp32 factors over bf16), x and dY
are upcast in transient blocks, never as a whole, and sums over rows are kept in the wide type.

kernels/thin.py offers the same four functions in Triton.
"""

import torch
from torch import Tensor

from .. import bits
from . import dropout


def shrink(
    x: Tensor, As: list[Tensor], dtype: torch.dtype, masks: list[int], thresholds: list[int], seeds: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """S in ``dtype``, and int32 [M, ceil(K/32)] keep bits per entry of ``thresholds`` (of 65536) and ``seeds`` (int64).

    ``seeds`` may be the bits themselves (:func:`dropout.are_drawn`): then they alone say what is kept, and none are returned.
    """
    if not thresholds:
        return _shrink(x, _joined(As, dtype, 0)), []
    keeps: list[Tensor] = [None] * len(thresholds)
    parts: list[Tensor] = [None] * len(As)
    for mask, group in _groups(masks):
        A = _joined([As[j] for j in group], dtype, 0)
        if mask < 0:
            part = _shrink(x, A)
        elif dropout.are_drawn(seeds):
            part = _shrink_kept(x, A, seeds[mask])
        else:
            part, keeps[mask] = _shrink_dropped(x, A, seeds[mask], thresholds[mask])
        _spread(part, parts, group, As, 0, 1)
    return _joined(parts, dtype, 1), [] if dropout.are_drawn(seeds) else keeps


def expand(
    S: Tensor,
    Bs: list[Tensor],
    scales: list[float],
    scale_tensors: list[Tensor | None],
    start: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Y in ``dtype``, rounded once.  ``start``: nothing, a bias [N] or a tensor [M,N] to add to."""
    B = _joined(Bs, S.dtype, 1)
    S, alpha = _scaled(S, Bs, scales, scale_tensors)
    if S.dtype is dtype:
        return _mm(S, B.mT, alpha) if start is None else torch.addmm(start.to(dtype), S, B.mT, alpha=alpha)
    Y = S.new_empty((S.shape[0], B.shape[0]), dtype=dtype)
    for rows in dropout.row_blocks(*Y.shape, Y.device):
        if start is None:
            Y[rows] = _mm(S[rows], B.mT, alpha)
        else:
            Y[rows] = torch.addmm((start[rows] if start.dim() == 2 else start).to(S.dtype), S[rows], B.mT, alpha=alpha)
    return Y


def dy_pass(
    dY: Tensor,
    Bs: list[Tensor],
    scales: list[float],
    scale_tensors: list[Tensor | None],
    S: Tensor | None,
    need_dB: list[bool],
    need_dS: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(dS_j in ``dtype`` if needed, dB_j in B_j's dtype where needed); S is read only where a dB is."""
    B = _joined(Bs, dtype, 1)
    T, alpha = _scaled(S if any(need_dB) else None, Bs, scales, scale_tensors)
    one_scale = (len(Bs) == 1 and scale_tensors[0] is None) or _one_scale(scales, scale_tensors)
    if dY.dtype is dtype:
        dS = _times(dY, B, alpha if one_scale else 1.0) if need_dS else None
        dB = None if T is None else _mm(T.mT, dY, alpha).mT
    else:
        dS = B.new_empty((dY.shape[0], B.shape[1])) if need_dS else None
        dB = None if T is None else B.new_zeros(B.shape)
        for rows in dropout.row_blocks(*dY.shape, dY.device):
            block = dY[rows].to(dtype)
            if need_dS:
                dS[rows] = _times(block, B, alpha if one_scale else 1.0)
            if dB is not None:
                dB.addmm_(block.mT, T[rows], alpha=alpha)
    if len(Bs) == 1 and one_scale:
        return [dS], [None if dB is None else dB.to(Bs[0].dtype).contiguous()]
    dSs: list[Tensor | None] = [None] * len(Bs)
    dBs: list[Tensor | None] = [None] * len(Bs)
    everyone = range(len(Bs))
    _spread(dS, dSs, everyone, Bs, 1, 1)
    _spread(dB, dBs, everyone, Bs, 1, 1)
    if need_dS and not one_scale:
        dSs = [times(d, s, t) for d, s, t in zip(dSs, scales, scale_tensors, strict=True)]
    # parts are views of one joined tensor, which an op may not return
    several = len(Bs) > 1
    dBs = [
        d.to(B.dtype, copy=several).contiguous() if need and d is not None else None
        for d, B, need in zip(dBs, Bs, need_dB, strict=True)
    ]
    return dSs, dBs


def x_pass(
    x: Tensor | None,
    dS: list[Tensor],
    As: list[Tensor],
    need_dA: list[bool],
    dX: Tensor | None,
    masks: list[int],
    keeps: list[Tensor],
    add: bool = False,
) -> list[Tensor | None]:
    """dA_j in A_j's dtype where needed (x may be None if nowhere); ``dX`` [M,K], if given, is overwritten, or added to and
    rounded once.
    """
    if add and dX is not None and dX.dtype is not dS[0].dtype:
        total = dX.to(dS[0].dtype)
        dAs = x_pass(x, dS, As, need_dA, total, masks, keeps, add)
        dX.copy_(total)
        return dAs
    if len(As) == 1:
        keep = keeps[masks[0]] if masks[0] >= 0 else None
        A = As[0] if As[0].dtype is dS[0].dtype else As[0].to(dS[0].dtype)
        dA = _x_pass(x if need_dA[0] else None, dS[0], A, keep, dX, add)
        return [None if dA is None else dA.to(As[0].dtype)]
    dAs: list[Tensor | None] = [None] * len(As)
    for g, (mask, group) in enumerate(_groups(masks)):
        thin = _joined([dS[j] for j in group], dS[0].dtype, 1)
        wanted = x if any(need_dA[j] for j in group) else None
        A = _joined([As[j] for j in group], thin.dtype, 0)
        _spread(_x_pass(wanted, thin, A, keeps[mask] if mask >= 0 else None, dX, add or g > 0), dAs, group, As, 0, 0)
    several = len(As) > 1
    return [
        d.to(A.dtype, copy=several) if need and d is not None else None
        for d, A, need in zip(dAs, As, need_dA, strict=True)
    ]


def times(t: Tensor, scale: float, scale_tensor: Tensor | None) -> Tensor:
    """t times both, in t's dtype."""
    if scale_tensor is not None:
        return t * (scale_tensor.double() * scale)  # 0-d: t keeps its dtype, the product loses nothing
    return t if scale == 1.0 else t * scale


def _shrink(x: Tensor, A: Tensor) -> Tensor:
    if x.dtype == A.dtype:
        return _times(x, A.mT)
    S = A.new_empty((x.shape[0], A.shape[0]))
    for rows in dropout.row_blocks(*x.shape, x.device):
        S[rows] = _times(x[rows].to(A.dtype), A.mT)
    return S


def _shrink_dropped(x: Tensor, A: Tensor, seed: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    S = A.new_empty((M, A.shape[0]))
    keep = torch.empty((M, (K + 31) // 32), dtype=torch.int32, device=x.device)
    kept = None  # one buffer for every block: fresh memory costs more than what is done to it
    if dropout.in_one_pass(x):
        x = x if x.stride(1) == 1 else x.contiguous()
        for rows in dropout.row_blocks(M, 32 * keep.shape[1], x.device):
            block = x[rows]
            kept = block.new_empty(block.shape, dtype=A.dtype) if kept is None else kept[: len(block)]
            dropout.draw_(block, seed, rows.start, threshold, kept, keep[rows])
            S[rows] = _times(kept, A.mT)
        return S, keep
    for rows, mask in dropout.draw(seed, M, K, threshold):
        keep[rows] = bits.pack(mask).view(-1, keep.shape[1])
        block = x[rows].to(A.dtype)
        kept = torch.empty_like(block, memory_format=torch.contiguous_format) if kept is None else kept[: len(block)]
        S[rows] = _times(dropout.apply(block, mask, out=kept), A.mT)
    return S, keep


def _shrink_kept(x: Tensor, A: Tensor, keep: Tensor) -> Tensor:
    M = x.shape[0]
    S, kept, native = A.new_empty((M, A.shape[0])), None, dropout.in_one_pass(x)
    x = x if x.stride(1) == 1 or not native else x.contiguous()
    for rows in dropout.row_blocks(M, 32 * keep.shape[1], x.device):
        block = x[rows]
        kept = block.new_empty(block.shape, dtype=A.dtype) if kept is None else kept[: len(block)]
        if native:
            dropout.apply_(block, keep[rows], kept, False)
        else:
            mask = bits.unpack(keep[rows].reshape(-1), (len(block), 32 * keep.shape[1]))
            dropout.apply(block.to(A.dtype, memory_format=torch.contiguous_format), mask, out=kept)
        S[rows] = _times(kept, A.mT)
    return S


def _x_pass(
    x: Tensor | None, dS: Tensor, A: Tensor, keep: Tensor | None, dX: Tensor | None, add: bool
) -> Tensor | None:
    M, K = dS.shape[0], A.shape[1]
    if keep is None and (x is None or x.dtype is A.dtype) and (dX is None or dX.dtype is A.dtype):
        if dX is not None:
            dX.addmm_(dS, A, beta=int(add))
        return None if x is None else dS.mT @ x
    dA = None if x is None else A.new_empty(A.shape)
    native = keep is not None and dropout.in_one_pass(A)
    if native and x is not None and x.stride(1) != 1:
        x = x.contiguous()
    for words in dropout.row_blocks(-(-K // 32), 32 * M, A.device):  # blocks of columns: each is one sum over all rows
        columns = slice(32 * words.start, min(32 * words.stop, K))
        mask = None
        if keep is not None and not native:
            mask = bits.unpack(keep[:, words].reshape(-1), (M, 32 * (words.stop - words.start)))
        if dA is not None:
            block = x[:, columns]
            if native:
                kept = block.new_empty(block.shape, dtype=A.dtype)
                dropout.apply_(block, keep[:, words], kept, False)
                block = kept
            block = block.to(A.dtype)
            if mask is not None:
                block = dropout.apply(block, mask, out=torch.empty_like(block, memory_format=torch.contiguous_format))
            dA[:, columns] = dS.mT @ block
        if dX is not None:
            part = dS @ A[:, columns]
            if native:
                dropout.apply_(part, keep[:, words], dX[:, columns], add)
                continue
            part = part if mask is None else dropout.apply(part, mask, out=part)
            dX[:, columns] = dX[:, columns] + part if add else part
    return dA


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, in place, by the GEMM.

    For three fp32 rows and fewer MKL starts its sum at ``out``, and beside a large ``out`` small products lose digits (up to
    1.7 times the error): there the product is made apart.
    """
    if out.shape[0] < 4 and out.dtype is torch.float32 and out.device.type == "cpu":
        return out.add_(a @ b)
    return out.addmm_(a, b)


def _groups(masks: list[int]) -> list[tuple[int, list[int]]]:
    """Adapters that see the same dropped x share its pass: (mask, adapters) by first appearance."""
    groups: dict[int, list[int]] = {}
    for j, mask in enumerate(masks):
        groups.setdefault(mask, []).append(j)
    return list(groups.items())


def _joined(tensors: list[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
    """All of them in ``dtype``, side by side along ``dim``."""
    if len(tensors) == 1:
        return tensors[0] if tensors[0].dtype is dtype else tensors[0].to(dtype)
    return torch.cat([t if t.dtype is dtype else t.to(dtype) for t in tensors], dim)


def _spread(joined: Tensor | None, slots: list, group, factors: list[Tensor], rank_dim: int, dim: int) -> None:
    """Put the parts of ``joined``, as wide along ``dim`` as the factors' ranks, into the slots of ``group``."""
    if joined is not None and len(group) == 1:
        slots[group[0]] = joined
    elif joined is not None:
        for j, part in zip(group, joined.split([factors[j].shape[rank_dim] for j in group], dim), strict=True):
            slots[j] = part


def _one_scale(scales: list[float], scale_tensors: list[Tensor | None]) -> bool:
    return all(s == scales[0] and t is None for s, t in zip(scales, scale_tensors, strict=True))


def _scaled(S: Tensor | None, Bs, scales, scale_tensors) -> tuple[Tensor | None, float]:
    """(T, alpha): alpha T is S with each adapter's columns times its scale; one scale for all is left to the GEMMs."""
    if (len(Bs) == 1 and scale_tensors[0] is None) or _one_scale(scales, scale_tensors):
        return S, scales[0]
    if S is None:
        return None, 1.0
    parts = S.split([B.shape[1] for B in Bs], 1)
    return _joined(
        [times(part, s, t) for part, s, t in zip(parts, scales, scale_tensors, strict=True)], S.dtype, 1
    ), 1.0


def _mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha a @ b, rounded once."""
    if alpha == 1.0:
        return a @ b
    return a.new_empty((a.shape[0], b.shape[1])).addmm_(a, b, beta=0, alpha=alpha)


def _times(wide: Tensor, thin: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha wide [M,K] @ thin [K,R].  In 16 bits a CPU GEMM is 1.6 times faster the other way round (2048 x 2048, R = 16,
    the copy of [M,R] included); in fp32 it is no faster, and less exact for small K.
    """
    if wide.element_size() == 2:
        return _mm(thin.mT, wide.mT, alpha).mT.contiguous()
    return _mm(wide, thin, alpha)
