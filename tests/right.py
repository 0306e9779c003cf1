"""What the numeric tests share: lowrank.testing's two budgets over lists of results, and where they apply."""

import os

import torch

from lowrank.testing import DRAWS, ENOUGH, assert_as_right, assert_within, stacked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# dtypes of activations and of what is adapted beside them
PAIRS = [(torch.float32, torch.float32)]
PAIRS += [(dtype, thin) for dtype in (torch.bfloat16, torch.float16) for thin in (dtype, torch.float32)]


def in_the_mean(draw, names, draws=DRAWS):
    """``draw()`` -> (ours, eager, oracle), lists of tensors by ``names``: as right as eager over ``draws`` of them.

    The interpreter is slow, sums one by one and knows no FMA: there it is four draws of what is rounded to 16 bits, and what
    is fp32 or then has too few numbers for a ratio is held to the bound of a single draw alone.
    """
    for name, ours, eager, oracle in zip(names, *stacked(draw, 4 if INTERPRETED else draws), strict=True):
        if not INTERPRETED or (ours.element_size() == 2 and ours.numel() >= ENOUGH):
            assert_as_right(ours, eager.to(ours.dtype), oracle, name)


def within(ours, oracle, scales, names, roundings=3, unit=None):
    """One draw, lists of tensors by ``names``; ``scales``: f(|inputs|), ``unit``: the dtype of the arithmetic."""
    for name, *values in zip(names, ours, oracle, scales, strict=True):
        assert_within(*values, name, roundings, unit)


def rounded_once(ours, oracle, what):
    """Lists of results in 16 bits: no farther from fp64 than fp64 itself rounded to them, but for rare double roundings."""
    for i, (out, truth) in enumerate(zip(ours, oracle, strict=True)):
        nearest = truth.to(out.dtype).double()
        assert (out.double() - truth).norm() <= 1.15 * (nearest - truth).norm(), f"{what}[{i}]"


def head_scales(h, W, b, A, B, d, amplified=1.0, scaling=0.7):
    """f(|inputs|) of a vocabulary head's logits z and of the gradients of its leaves (those that are not None).

    ``d``: what bounds the terms of dz; ``amplified``: what multiplies |z|, whose rounding in fp32 is a relative error in every
    probability.
    """
    h, W, b, A, B = (None if t is None else t.detach().double().abs() for t in (h, W, b, A, B))
    z = h @ W.mT + (0 if b is None else b) + (0 if A is None else scaling * (h @ A.mT) @ B.mT)
    dz = d.abs() * (1 + amplified * float(z.max()))
    grads = [dz @ W + (0 if A is None else scaling * (dz @ B) @ A), dz.mT @ h, None if b is None else dz.sum(0)]
    grads += [None, None] if A is None else [scaling * (dz @ B).mT @ h, scaling * dz.mT @ (h @ A.mT)]
    return z, [g for g in grads if g is not None]
