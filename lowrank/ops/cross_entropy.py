"""linear_cross_entropy: torch.nn.functional's own function, over linear_logprob.

Files: logprob.py; tests/ops/test_cross_entropy.py; bench linear_logprob.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _stats
from .logprob import linear_logprob

if TYPE_CHECKING:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: "LinearCrossEntropyOptions | None" = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`` without the logits.

    The arguments are those of ``torch.nn.functional.linear_cross_entropy``, whose own ``options`` for chunking are not needed
    here, and ``lora``: (A [r, H], B [V, r], scaling) on the head.  input [..., H], target int64 [...].  Differences: the loss
    is fp32 under 16-bit inputs, a frozen linear_weight costs no gradient, and any number of leading dimensions will do.

    Label smoothing, class probabilities and K-dimensional heads are torch's: handed over and counted in :func:`lowrank.stats`,
    or refused beside a ``lora``.

    Raises: ValueError or TypeError that names the argument; NotImplementedError for what only torch does, beside a ``lora`` or
        where torch is older than the function.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    reason = _not_ours(linear_weight, target, label_smoothing)
    if reason:
        torchs = getattr(torch.nn.functional, "linear_cross_entropy", None)
        if lora is not None or torchs is None:
            beside = "beside a lora" if lora is not None else f"by torch {torch.__version__}"
            raise NotImplementedError(f"{reason} in linear_cross_entropy is not supported {beside}")
        _stats.op_fell_back(f"linear_cross_entropy: {reason}")
        return torchs(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    logp, _ = linear_logprob(input, linear_weight, target, bias=linear_bias, lora=lora, ignore_index=ignore_index)
    loss, counted = -logp, target != ignore_index
    if weight is not None:
        if weight.shape != (linear_weight.shape[0],):
            raise ValueError(f"weight: expected [{linear_weight.shape[0]}], got {list(weight.shape)}")
        counted = torch.where(counted, weight.detach().to(loss.dtype)[target.clamp(0, len(weight) - 1)], 0)
        loss = loss * counted
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def _not_ours(linear_weight, target, label_smoothing) -> str | None:
    if label_smoothing:
        return "label smoothing"
    if isinstance(target, Tensor) and target.is_floating_point():
        return "a target of class probabilities"
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        return "a K-dimensional linear_weight"
    return None
