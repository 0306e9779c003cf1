"""Proxy-tuning's arithmetic on logits: base + alpha (expert - antiexpert) (Liu et al. 2024, arXiv 2401.08565).

Plain PyTorch: three models run for every one of these calls.

Files: tests/ops/test_combine.py.
"""

import functools
import math

import torch

from ._head_checks import check_logits


def combine_logits(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    alpha: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """``base + alpha * (expert - antiexpert)`` in fp32 (fp64 if one of them is): proxy-tuning (arXiv 2401.08565).

    Args:
        base: [..., V], fp16, bf16, fp32 or fp64.
        expert, antiexpert: [..., V_e] and [..., V_a] with base's leading dimensions, in any of these dtypes.  Models pad
            their vocabularies differently: tokens beyond V are dropped, tokens of base that either lacks keep base's logit.
        alpha: a number, or a float tensor with base's leading dimensions or the first of them, with or without a last 1:
            [B] or [B,1] for each sequence of base [B,T,V], [B,T] or [B,T,1] for each row.

    Where a logit is -inf a token is excluded, and no difference of infinities is ever taken:

        base excludes it                       -inf, whatever the others hold
        expert and antiexpert exclude it       base's logit: they do not differ
        only the expert does                   -inf
        only the antiexpert does               base's logit: that a token is impossible for a small untuned model is no
                                               reason to make it certain, which +inf would

    Under a negative alpha expert and antiexpert change places; alpha = 0 is base.  Otherwise NaN propagates.

    A model's logits are known up to a constant per row, which a token that keeps base's logit does not share: give expert
    and antiexpert as log-probabilities where one of them lacks or excludes tokens.

    Gradients for base, expert, antiexpert and alpha.

    Returns: [..., V].

    Raises: ValueError or TypeError that names the argument, what came and what was expected.  On a CPU, an alpha that
        holds NaN or infinity raises too; on a GPU, where reading it would wait for the device, NaN propagates.
    """
    check_logits(base, expert, antiexpert, alpha)
    tensors = (base, expert, antiexpert)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    common = min(t.shape[-1] for t in tensors)
    base, rest = base.to(dtype).split((common, base.shape[-1] - common), -1)
    expert, antiexpert = expert[..., :common].to(dtype), antiexpert[..., :common].to(dtype)
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.to(dtype).reshape(*alpha.shape, *[1] * (base.dim() - alpha.dim()))
    no_expert, no_antiexpert = expert == -math.inf, antiexpert == -math.inf
    silent = (no_expert | no_antiexpert) & ~(expert.isnan() | antiexpert.isnan())
    difference = expert.masked_fill(silent, 0) - antiexpert.masked_fill(silent, 0)
    excluded = silent & ((no_expert & ~no_antiexpert & (alpha > 0)) | (no_antiexpert & ~no_expert & (alpha < 0)))
    combined = (base + alpha * difference).masked_fill(excluded | (base == -math.inf), -math.inf)
    return torch.cat((combined, rest), -1) if rest.shape[-1] else combined
