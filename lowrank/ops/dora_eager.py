"""The passes of a DoRA linear in PyTorch, by blocks that stay in a cache; kernels/dora.py has the same as kernels."""

import torch
from torch import Tensor

from .. import bits
from . import dropout
from .thin_eager import dy_pass, shrink, x_pass

__all__ = ["drop", "dy_pass", "expand", "gain_dy", "norm", "shrink", "x_pass"]


def norm(W: Tensor, A: Tensor, B: Tensor, alone: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """‖W + B A‖, and with ``alone`` ‖W‖, the same bits where B is 0."""
    A, B = A.to(B.dtype), B.contiguous()
    crossed = B @ (A @ A.mT)
    square, own = B.new_empty(W.shape[0]), B.new_empty(W.shape[0])
    for rows in dropout.row_blocks(*W.shape, W.device):
        block = W[rows].to(B.dtype)
        thin = (2 * (block @ A.mT) + crossed[rows]).mul_(B[rows])
        squares = block.square().sum(1)
        own[rows], square[rows] = squares, thin.sum(1) + squares
    norm = square.clamp_(min=0).sqrt_()
    return (norm, own.sqrt_()) if alone else norm


def expand(S: Tensor, B: Tensor, v: Tensor | None, gain: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    """base + (gain ∘ v + S Bᵀ) in base's dtype, rounded once; without a v, it is base - bias, as PyTorch rounds it."""
    y = torch.empty_like(base)
    for rows in dropout.row_blocks(*y.shape, y.device):
        free = v[rows] if v is not None else base[rows] if bias is None else base[rows] - bias
        y[rows] = base[rows] + (free * gain).addmm_(S[rows], B.mT)
    return y


def gain_dy(dy: Tensor, gain: Tensor, v: Tensor | None, need_scaled: bool, need_sum: bool, bias: Tensor | None = None):
    """(gain ∘ dY in dY's dtype, Σ_t dY ∘ (v - bias), Σ_t dY), each if needed; the sums have gain's dtype."""
    scaled = torch.empty_like(dy) if need_scaled else None
    dots = None if v is None else torch.zeros_like(gain)
    for rows in dropout.row_blocks(*dy.shape, dy.device):
        if need_scaled:
            torch.mul(dy[rows], gain, out=scaled[rows])
        if dots is not None:
            free = v[rows] if bias is None else v[rows].to(gain.dtype) - bias
            dots += (dy[rows].to(gain.dtype) * free).sum(0)
    return scaled, dots, dy.sum(0, dtype=gain.dtype) if need_sum else None


def drop(t: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """t [M,K] with 0 where its keep bit is 0; added to ``out`` if that is given."""
    dropped = torch.empty_like(t, memory_format=torch.contiguous_format) if out is None else out
    if dropout.in_one_pass(t):
        dropout.apply_(t if t.stride(1) == 1 else t.contiguous(), keep, dropped, out is not None)
        return dropped
    for rows in dropout.row_blocks(*t.shape, t.device):
        words = keep[rows]
        mask = bits.unpack(words.reshape(-1), (len(words), 32 * words.shape[1]))
        block = t[rows].contiguous()
        if out is None:
            dropout.apply(block, mask, out=dropped[rows])
        else:
            dropped[rows] += dropout.apply(block, mask, out=torch.empty_like(block))
    return dropped
