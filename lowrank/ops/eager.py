"""The four thin products of a LoRA linear in plain PyTorch: what a CPU runs, and what the kernels must agree with.

    shrink    S  = drop(x) Aᵀ                       one read of x
    expand    Y  = T Bᵀ + start                     one write of Y
    dy_pass   dS = dY B,  dB = dYᵀ T                one read of dY
    x_pass    dA = dSᵀ drop(x),  dX += dropᵀ(dS A)  one read of x, one write of dX

x [M,K], A [R,K], S, T, dS [M,R], B [N,R], Y, dY [M,N].  drop() only zeroes: the factor 1/(1-p) is part of the scale that
makes T of S.  Where the thin side is wider than the activations (fp32 factors over bf16), x and dY are upcast in transient
blocks of rows, never as a whole, and sums over rows are kept in the wide type.
"""

from collections.abc import Iterator

import torch

from .. import bits
from . import dropout


def shrink(
    x: torch.Tensor, A: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [M,R] in A's dtype and, if a 0-d int64 ``seed`` is given, the keep bits int32 [M, ceil(K/32)]."""
    M, K = x.shape
    S = A.new_empty((M, A.shape[0]))
    if seed is None:
        for rows in _blocks(x, A.dtype):
            S[rows] = _times(x[rows].to(A.dtype), A.mT)
        return S, None
    keep = torch.empty((M, (K + 31) // 32), dtype=torch.int32, device=x.device)
    for rows, mask in dropout.draw(seed, M, K, p):
        keep[rows] = bits.pack(mask).view(-1, keep.shape[1])
        block = x[rows].to(A.dtype)
        S[rows] = _times(dropout.apply(block, mask, out=torch.empty_like(block)), A.mT)
    return S, keep


def expand(T: torch.Tensor, B: torch.Tensor, start: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Y [M,N] in ``dtype``, rounded once.  ``start``: nothing, a bias [N] or a tensor [M,N] to add to."""
    if T.dtype == dtype:
        return T @ B.mT if start is None else torch.addmm(start.to(dtype), T, B.mT)
    Y = T.new_empty((T.shape[0], B.shape[0]), dtype=dtype)
    for rows in _blocks(Y, T.dtype):
        if start is None:
            Y[rows] = T[rows] @ B.mT
        else:
            Y[rows] = torch.addmm((start[rows] if start.dim() == 2 else start).to(T.dtype), T[rows], B.mT)
    return Y


def dy_pass(
    dY: torch.Tensor, B: torch.Tensor, T: torch.Tensor | None, need_dS: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dS unscaled or None, dB if T is given) in B's dtype."""
    dS = B.new_empty((dY.shape[0], B.shape[1])) if need_dS else None
    dB = B.new_zeros(B.shape) if T is not None else None
    for rows in _blocks(dY, B.dtype):
        block = dY[rows].to(B.dtype)
        if dS is not None:
            dS[rows] = _times(block, B)
        if dB is not None:
            dB += (T[rows].mT @ block).mT
    return dS, dB


def x_pass(
    x: torch.Tensor | None,
    dS: torch.Tensor,
    A: torch.Tensor,
    keep: torch.Tensor | None,
    dX: torch.Tensor | None,
    add: bool,
) -> torch.Tensor | None:
    """dA if x is given; dX [M,K], if given, is overwritten, or added to if ``add``."""
    dA = None
    if x is not None and x.dtype == A.dtype:
        # dX is about to be overwritten: until then it holds drop(x), and one GEMM sums over all rows
        scratch = torch.empty_like(x) if dX is None or add else dX
        dA = dS.mT @ (x if keep is None else _dropped(x, keep, out=scratch))
    elif x is not None:
        dA = A.new_zeros(A.shape, dtype=torch.promote_types(A.dtype, torch.float32))
        for rows in dropout.row_blocks(*x.shape, x.device):
            block = x[rows].to(A.dtype)
            block = block if keep is None else _dropped(block, keep[rows], out=block)
            dA += dS[rows].mT.to(dA.dtype) @ block.to(dA.dtype)
    if dX is not None and dX.dtype == A.dtype and not add:
        torch.mm(dS, A, out=dX)
        if keep is not None:
            _dropped(dX, keep, out=dX)
    elif dX is not None:
        for rows in dropout.row_blocks(*dX.shape, dX.device):
            part = dS[rows] @ A
            part = part if keep is None else _dropped(part, keep[rows], out=part)
            dX[rows] = dX[rows] + part if add else part
    return dA


def _times(wide: torch.Tensor, thin: torch.Tensor) -> torch.Tensor:
    """wide [M,K] @ thin [K,R].  In 16 bits a CPU GEMM is 1.6 times faster the other way round (2048 x 2048, R = 16, the
    copy of [M,R] included); in fp32 it is no faster, and less exact for small K.
    """
    return (thin.mT @ wide.mT).mT if wide.element_size() == 2 else wide @ thin


def _dropped(t: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` = t [rows, columns] with 0 where the keep bits are; ``out`` may be t."""
    words = keep.shape[1]
    for rows in dropout.row_blocks(*t.shape, t.device):
        mask = bits.unpack(keep[rows].reshape(-1), (len(t[rows]), 32 * words))
        dropout.apply(t[rows], mask, out=out[rows])
    return out


def _blocks(activations: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """All rows at once where nothing transient is made of them, else row blocks of a few MB."""
    if activations.dtype == dtype:
        return iter((slice(0, activations.shape[0]),))
    return dropout.row_blocks(*activations.shape, activations.device)
