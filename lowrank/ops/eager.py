"""The four thin products of a LoRA linear in plain PyTorch: what a CPU runs, and what the kernels must agree with.

    shrink    S  = drop(x) Aᵀ                                   one read of x
    expand    Y  = alpha S Bᵀ + start                           one write of Y
    dy_pass   dS = dY B,  dB = alpha dYᵀ S                      one read of dY
    x_pass    dA = alpha dSᵀ drop(x),  dX += alpha drop(dS A)   one read of x, one write of dX

x [M,K], A [R,K], S, dS [M,R], B [N,R], Y, dY [M,N].  drop() only zeroes: its factor 1/(1-p) is part of alpha, which GEMMs
apply to their accumulator.  Where the thin side is wider than the activations (fp32 factors over bf16), x and dY are upcast
in transient blocks of rows, never as a whole, and sums over rows are kept in the wide type.
"""

import torch

from .. import bits
from . import dropout


def shrink(
    x: torch.Tensor, A: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [M,R] in A's dtype and, if a 0-d int64 ``seed`` is given, the keep bits int32 [M, ceil(K/32)]."""
    if seed is None and x.dtype == A.dtype:
        return _times(x, A.mT), None
    M, K = x.shape
    S = A.new_empty((M, A.shape[0]))
    if seed is None:
        for rows in dropout.row_blocks(M, K, x.device):
            S[rows] = _times(x[rows].to(A.dtype), A.mT)
        return S, None
    keep = torch.empty((M, (K + 31) // 32), dtype=torch.int32, device=x.device)
    kept = None  # one buffer for every block: fresh memory costs more than what is done to it
    for rows, mask in dropout.draw(seed, M, K, p):
        keep[rows] = bits.pack(mask).view(-1, keep.shape[1])
        block = x[rows].to(A.dtype)
        kept = torch.empty_like(block, memory_format=torch.contiguous_format) if kept is None else kept[: len(block)]
        S[rows] = _times(dropout.apply(block, mask, out=kept), A.mT)
    return S, keep


def expand(
    S: torch.Tensor, B: torch.Tensor, start: torch.Tensor | None, dtype: torch.dtype, alpha: float = 1.0
) -> torch.Tensor:
    """Y [M,N] in ``dtype``, rounded once.  ``start``: nothing, a bias [N] or a tensor [M,N] to add to."""
    if S.dtype == dtype:
        return _mm(S, B.mT, alpha) if start is None else torch.addmm(start.to(dtype), S, B.mT, alpha=alpha)
    Y = S.new_empty((S.shape[0], B.shape[0]), dtype=dtype)
    for rows in dropout.row_blocks(*Y.shape, Y.device):
        if start is None:
            Y[rows] = _mm(S[rows], B.mT, alpha)
        else:
            Y[rows] = torch.addmm((start[rows] if start.dim() == 2 else start).to(S.dtype), S[rows], B.mT, alpha=alpha)
    return Y


def dy_pass(
    dY: torch.Tensor, B: torch.Tensor, S: torch.Tensor | None, need_dS: bool, alpha: float = 1.0
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dS without its alpha or None, dB if S is given) in B's dtype."""
    if dY.dtype == B.dtype:
        return _times(dY, B) if need_dS else None, None if S is None else _mm(S.mT, dY, alpha).mT
    dS = B.new_empty((dY.shape[0], B.shape[1])) if need_dS else None
    dB = None if S is None else B.new_zeros(B.shape)
    for rows in dropout.row_blocks(*dY.shape, dY.device):
        block = dY[rows].to(B.dtype)
        if dS is not None:
            dS[rows] = _times(block, B)
        if dB is not None:
            dB.addmm_(block.mT, S[rows], alpha=alpha)
    return dS, dB


def x_pass(
    x: torch.Tensor | None,
    dS: torch.Tensor,
    A: torch.Tensor,
    keep: torch.Tensor | None,
    dX: torch.Tensor | None,
    add: bool = False,
    alpha: float = 1.0,
) -> torch.Tensor | None:
    """dA if x is given; dX [M,K], if given, is overwritten, or added to if ``add``."""
    M, K = dS.shape[0], A.shape[1]
    if keep is None and all(t is None or t.dtype == A.dtype for t in (x, dX)):
        if dX is not None:
            dX.addmm_(dS, A, beta=int(add), alpha=alpha)
        return None if x is None else _mm(dS.mT, x, alpha)
    dA = None if x is None else A.new_empty(A.shape)
    for words in dropout.row_blocks(-(-K // 32), 32 * M, A.device):  # blocks of columns: each is one sum over all rows
        columns = slice(32 * words.start, min(32 * words.stop, K))
        mask = None
        if keep is not None:
            mask = bits.unpack(keep[:, words].reshape(-1), (M, 32 * (words.stop - words.start)))
        if dA is not None:
            block = x[:, columns].to(A.dtype)
            if mask is not None:
                block = dropout.apply(block, mask, out=torch.empty_like(block, memory_format=torch.contiguous_format))
            dA[:, columns] = _mm(dS.mT, block, alpha)
        if dX is not None:
            part = _mm(dS, A[:, columns], alpha)
            part = part if mask is None else dropout.apply(part, mask, out=part)
            dX[:, columns] = dX[:, columns] + part if add else part
    return dA


def _mm(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha a @ b, rounded once."""
    if alpha == 1.0:
        return a @ b
    return a.new_empty((a.shape[0], b.shape[1])).addmm_(a, b, beta=0, alpha=alpha)


def _times(wide: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
    """wide [M,K] @ thin [K,R].  In 16 bits a CPU GEMM is 1.6 times faster the other way round (2048 x 2048, R = 16, the
    copy of [M,R] included); in fp32 it is no faster, and less exact for small K.
    """
    return (thin.mT @ wide.mT).mT.contiguous() if wide.element_size() == 2 else wide @ thin
