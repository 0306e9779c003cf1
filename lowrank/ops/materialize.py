"""W + B diag(m) A in W's own dtype, out of place: LoRA merge and SVF compose.

Computed by _rank_update.py, as ops/fold.py's fold and unfold are, so that all give the same bits.

Files: _rank_update.py, kernels/materialize.py, csrc/rank_update.*; tests/ops/test_materialize.py; bench materialize.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ._rank_update import MergeReport, check, check_matrix, merge_report, refuse_overlap, run, run_with_sums


@overload
def materialize(
    weight: Tensor,
    A: Tensor,
    m: float | Tensor,
    B: Tensor,
    *,
    out: Tensor | None = None,
    changed: Tensor | None = None,
) -> Tensor: ...
@overload
def materialize(
    weight: Sequence[Tensor],
    A: Sequence[Tensor],
    m: Sequence[float | Tensor],
    B: Sequence[Tensor],
    *,
    out: Sequence[Tensor | None] | None = None,
    changed: Sequence[Tensor | None] | None = None,
) -> list[Tensor]: ...
def materialize(
    weight: Tensor | Sequence[Tensor],
    A: Tensor | Sequence[Tensor],
    m: float | Tensor | Sequence[float | Tensor],
    B: Tensor | Sequence[Tensor],
    *,
    out: Tensor | Sequence[Tensor | None] | None = None,
    changed: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor | list[Tensor]:
    """``weight + B @ diag(m) @ A``, summed in fp32, rounded once, in a new tensor.

    Args:
        weight: [N, K], fp16, bf16, fp32 or fp64.
        A, B: [r, K] and [N, r], any strides; fp16, bf16 or fp32 (fp64 beside an fp64 weight only).
        m: a float, a 0-d tensor or a tensor [r]; taken in fp32.
        out: a contiguous tensor like weight to fill instead; it must not overlap the inputs.
        changed: int32 [ceil(N K / 32)] to fill: bit i of word w is whether element 32 w + i is not weight's, bit for bit
            (``lowrank.bits``).

    All six may be lists of equal length: then a list of tensors is returned.  No gradient flows.

    Returns: [N, K] in weight's dtype.  The same call gives the same bits; up to r = 64, on a CPU and on a GPU.

    Raises: ValueError or TypeError that names the argument, before anything is written.
    """
    if not isinstance(weight, (list, tuple)):
        return run(*_check(weight, A, m, B, out, changed))
    n = len(weight)
    lists = {"A": A, "m": m, "B": B, "out": [None] * n if out is None else out}
    lists["changed"] = [None] * n if changed is None else changed
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)) or len(values) != n:
            got = f"{len(values)} entries" if isinstance(values, (list, tuple)) else type(values).__name__
            raise ValueError(f"materialize: expected {name} to be a list of {n} like weight, got {got}")
    calls = [_check(*call) for call in zip(weight, *lists.values(), strict=True)]  # type: ignore[call-arg]  # all six
    if not torch.compiler.is_compiling():
        for w, a, scale, b, o, _ in calls:
            refuse_overlap(o, w, a, scale, b)
    return [run(*call) for call in calls]


def materialize_with_report(weight: Tensor, A: Tensor, m: float | Tensor, B: Tensor) -> tuple[Tensor, MergeReport]:
    """:func:`materialize` of one matrix, and how much of the update the rounding kept.  Waits for the device."""
    out, sums = run_with_sums(*check("materialize", weight, A, m, B))
    return out, merge_report(sums, weight.numel())


def _check(weight, A, m, B, out, changed):
    weight, A, m, B = check("materialize", weight, A, m, B)
    if out is not None:
        check_matrix("materialize", "out", out, weight)
        if out.dtype is not weight.dtype:
            raise TypeError(f"materialize: expected out in weight's dtype {weight.dtype}, got {out.dtype}")
        if out.shape != weight.shape or not out.is_contiguous():
            raise ValueError(
                f"materialize: expected out contiguous {list(weight.shape)}, got {list(out.shape)}, strides {out.stride()}"
            )
    if changed is not None:
        words = (weight.numel() + 31) // 32
        if not isinstance(changed, torch.Tensor) or changed.dtype is not torch.int32:
            raise TypeError(
                f"materialize: expected changed as int32 words, got {getattr(changed, 'dtype', type(changed))}"
            )
        if changed.shape != (words,) or not changed.is_contiguous() or changed.device != weight.device:
            raise ValueError(
                f"materialize: expected changed contiguous [{words}] on {weight.device} for weight {list(weight.shape)},"
                f" got {list(changed.shape)} on {changed.device}"
            )
    return weight, A, m, B, out, changed
