"""The thin products of singular-value scaling in PyTorch; kernels/svf.py has the same functions as kernels."""

import torch
from torch import Tensor

from . import dropout, thin_eager
from .thin_eager import shrink, x_pass

__all__ = ["dy_pass", "expand", "scale", "scale_and_dot", "shrink", "x_pass"]


def expand(S, B, scales, mix, start, dtype) -> Tensor:
    """(S ∘ m) Bᵀ + start in ``dtype``."""
    return thin_eager.expand(scale(S, scales, mix), [B], [1.0], [None], start, dtype)


def dy_pass(dy, B, scales, mix, S, need_dS, dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dS [M,k] if needed, dscales and dmix if S is given; dmix only beside a mix)."""
    (D,), _ = thin_eager.dy_pass(dy, [B], [1.0], [None], None, [False], True, dtype)
    return scale_and_dot(D, scales, mix, S, need_dS)


def scale(S: Tensor, scales: Tensor, mix: Tensor | None) -> Tensor:
    """S ∘ m in S's dtype, rounded once."""
    out = torch.empty_like(S)
    for rows in dropout.row_blocks(*S.shape, S.device):
        torch.mul(S[rows], scales if mix is None else mix[rows] @ scales, out=out[rows])
    return out


def scale_and_dot(D: Tensor, scales: Tensor, mix: Tensor | None, S: Tensor | None, need_dS: bool):
    """:func:`dy_pass` from D = dY B on; dS overwrites D."""
    dscales = None if S is None else torch.zeros_like(scales)
    dmix = None if S is None or mix is None else torch.empty_like(mix)
    for rows in dropout.row_blocks(*D.shape, D.device):
        if S is not None:
            h = D[rows].to(torch.promote_types(D.dtype, scales.dtype)) * S[rows]
            if mix is None:
                dscales += h.sum(0)
            else:
                dscales += mix[rows].to(h.dtype).mT @ h
                dmix[rows] = h @ scales.to(h.dtype).mT
        if need_dS:
            torch.mul(D[rows], scales if mix is None else mix[rows] @ scales, out=D[rows])
    return D if need_dS else None, dscales, dmix
