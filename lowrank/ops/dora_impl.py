"""What torch.ops.lowrank.dora_norm, dora_linear and dora_linear_backward do, and their passes in PyTorch.

    n² = Σ_k W² + (2 (W Aᵀ) + B A Aᵀ) · B    by rows of W [N,K]: no B A is ever formed       (B times the scaling)
    S  = drop(x) Aᵀ,   v = x' Wᵀ             x' is x, or drop(x) where the base's input is dropped too ("twice")
    Y  = gain ∘ v + S Bᵀ + bias;   twice: Y.addmm_(x, Wᵀ)
    dS = dY B,  dB = dYᵀ S,  dA = dSᵀ drop(x),  dgain = Σ_t dY ∘ v,  dbias = Σ_t dY
    dX = drop(dS A) + (gain ∘ dY) W;         twice: dX = drop(dS A + (gain ∘ dY) W) + dY W

drop() only zeroes: its factor 1/(1-p) is part of B and, twice, of gain.  Thin products, gain and sums over rows are fp32 or
wider.  _dispatch.dora_products chooses between Eager here and kernels/dora.py.
"""

import torch
from torch import Tensor

from .. import bits
from . import dropout, eager
from ._dispatch import dora_products
from .lora_impl import dense, no_autocast, rows_of


def norm(weight, A, B) -> Tensor:
    """‖W + B A‖ of each row, [N] in fp32 or wider."""
    with no_autocast(weight.device):
        return dora_products(weight, A, B.dtype).norm(weight, A, B)


def forward(x, weight, bias, A, B, gain, p, seed, twice, dtype):
    """(y [M,N], S [M,r], v [M,N], [keep bits] under dropout)."""
    with no_autocast(x.device):
        x, weight = rows_of(x, dtype), weight.to(dtype)
        products, cut = dora_products(x, A, B.dtype), dropout.threshold(p)
        masks, cuts = ([0], [cut]) if cut else ([-1], [])
        S, keeps = products.shrink(x, [A.to(B.dtype)], B.dtype, masks, cuts, seed)
        v = (products.drop(x, keeps[0]) if twice else x) @ weight.mT
        y = products.expand(S, B, v, gain, bias)
        return y.addmm_(x, weight.mT) if twice else y, S, v, keeps


def backward(dy, x, weight, A, B, gain, S, v, keeps, twice, dtype, needs):
    """The gradients of x [M,K], bias, A, B and gain that are needed, in that order."""
    with no_autocast(dy.device):
        need_x, need_b, need_A, need_B, need_gain = needs
        dy = dense(dy)
        products = dora_products(dy, A, B.dtype)
        scaled, dgain, db = products.gain_dy(dy, gain, v if need_gain else None, need_x, need_b)
        dS = dB = dA = dX = None
        if need_B or need_x or need_A:
            (dS,), (dB,) = products.dy_pass(
                dy, [B], [1.0], [None], S if need_B else None, [need_B], need_x or need_A, B.dtype
            )
        if need_x:
            weight, dX = weight.to(dtype), dy.new_empty((dy.shape[0], A.shape[1]), dtype=dtype)
        if need_x or need_A:
            x = rows_of(x, dtype) if need_A else None
            (dA,) = products.x_pass(x, [dS], [A.to(B.dtype)], [need_A], dX, [0] if keeps else [-1], keeps)
            dA = dA.to(A.dtype) if need_A else None
        if need_x and twice:
            products.drop(scaled @ weight, keeps[0], dX)
        if need_x:
            eager.add_product_(dX, dy if twice else scaled, weight)
        return [grad for grad, need in zip((dX, db, dA, dB, dgain), needs, strict=True) if need]


class Eager:
    """The passes in PyTorch, by blocks that stay in a cache."""

    shrink = staticmethod(eager.shrink)
    dy_pass = staticmethod(eager.dy_pass)
    x_pass = staticmethod(eager.x_pass)

    @staticmethod
    def norm(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        A, B = A.to(B.dtype), B.contiguous()
        crossed = B @ (A @ A.mT)
        square = B.new_empty(W.shape[0])
        for rows in dropout.row_blocks(*W.shape, W.device):
            block = W[rows].to(B.dtype)
            thin = (2 * (block @ A.mT) + crossed[rows]).mul_(B[rows])
            square[rows] = thin.sum(1) + block.square().sum(1)
        return square.clamp_(min=0).sqrt_()

    @staticmethod
    def expand(S: Tensor, B: Tensor, v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """gain ∘ v + S Bᵀ + bias in v's dtype, rounded once."""
        y = torch.empty_like(v)
        for rows in dropout.row_blocks(*v.shape, v.device):
            start = v[rows] * gain if bias is None else torch.addcmul(bias.to(gain.dtype), v[rows].to(gain.dtype), gain)
            y[rows] = start.addmm_(S[rows], B.mT)
        return y

    @staticmethod
    def gain_dy(dy: Tensor, gain: Tensor, v: Tensor | None, need_scaled: bool, need_sum: bool):
        """(gain ∘ dY in dY's dtype, Σ_t dY ∘ v, Σ_t dY), each if needed; the sums have gain's dtype."""
        scaled = torch.empty_like(dy) if need_scaled else None
        dots = None if v is None else torch.zeros_like(gain)
        for rows in dropout.row_blocks(*dy.shape, dy.device):
            if need_scaled:
                torch.mul(dy[rows], gain, out=scaled[rows])
            if dots is not None:
                dots += (dy[rows].to(gain.dtype) * v[rows]).sum(0)
        return scaled, dots, dy.sum(0, dtype=gain.dtype) if need_sum else None

    @staticmethod
    def drop(t: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
        """t [M,K] with 0 where its keep bit is 0; added to ``out`` if that is given."""
        dropped = torch.empty_like(t, memory_format=torch.contiguous_format) if out is None else out
        for rows in dropout.row_blocks(*t.shape, t.device):
            words = keep[rows]
            mask = bits.unpack(words.reshape(-1), (len(words), 32 * words.shape[1]))
            block = t[rows].contiguous()
            if out is None:
                dropout.apply(block, mask, out=dropped[rows])
            else:
                dropped[rows] += dropout.apply(block, mask, out=torch.empty_like(block))
        return dropped
