"""fold_ and unfold_: a rank update written into a weight in place, and taken out again to the last bit.

    fold      W' = round(W + Δ)                                   Δ = B diag(m) A; the same bits as materialize
    unfold    W  = round(W' − Δ), then the fix-ups of the receipt

Rounding loses what the receipt keeps: the elements that subtracting Δ does not bring back, found at fold time by subtracting
it.  They are kept as a delta (lowrank/ops/delta.py): sparse, or a dense code of two bits where that is smaller, or verbatim
where nothing is.  Where the sums of Δ may come out otherwise next time (PyTorch's GEMMs: another number of threads, another
alignment), the receipt is a copy of the weight.

Files: _rank_update.py, delta.py; tests/ops/test_fold.py; bench fold.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._memory import overlap
from . import delta
from ._rank_update import MergeReport, check, form_of, merge_report, run, run_with_sums, there_and_back

CHUNK = 1 << 19  # elements at a time on a CPU: the new weights stay in its caches until they are compared and written


@dataclass(frozen=True)
class Receipt:
    """What :func:`unfold_` needs to restore a weight bit for bit: what was folded into what, and the fix-ups.

    report: how much of the update the rounding kept.
    """

    shape: torch.Size
    dtype: torch.dtype
    report: MergeReport
    factors: str
    folded: int
    form: str
    fixes: tuple[Tensor, ...] = field(repr=False)  # heads, index, values of lowrank.ops.delta; or the weight alone

    @property
    def nbytes(self) -> int:
        """Bytes that the fix-ups take."""
        return sum(t.numel() * t.element_size() for t in self.fixes)


@torch.no_grad()
def fold_(weight: Tensor, A: Tensor, m: float | Tensor, B: Tensor) -> Receipt:
    """``weight += B @ diag(m) @ A`` in place, summed in fp32 and rounded once; :func:`unfold_` restores every bit.

    Args: :func:`lowrank.materialize`'s, the weight contiguous.  Waits for the device.

    Returns: the receipt.  For 16-bit weights and an update of a thousandth of them it takes 0.01 bytes an element, of a
    hundredth 0.04, of a tenth 0.23; above rank 64 on a CPU, and without lowrank's compiled library, as many as the weight.

    Raises: ValueError or TypeError that names the argument, before anything is written.
    """
    weight, A, m, B, form = _check(weight, A, m, B)
    factors = _hash(A, m, B)
    chunk_fixes: list[tuple[Tensor, ...]] = []
    sums = []
    for rows in _chunks(weight, form):
        old = weight[rows]
        if form == "torch":
            new, part = run_with_sums(old, A, m, B[rows])
            chunk_fixes.append((old.clone(),))
        else:
            new, back, lost, part = there_and_back(old, A, m, B[rows])
            chunk_fixes.append(delta.encode(old, lost, old=back, codes=True))
        sums.append(part)
        old.copy_(new)
    fixes = tuple(torch.cat(parts) for parts in zip(*chunk_fixes, strict=True))
    report = merge_report([sum(column) for column in zip(*sums, strict=True)], weight.numel())
    return Receipt(weight.shape, weight.dtype, report, factors, delta.fingerprint(weight), form, fixes)


@torch.no_grad()
def unfold_(weight: Tensor, A: Tensor, m: float | Tensor, B: Tensor, receipt: Receipt) -> None:
    """Undo :func:`fold_`: the weight has every bit it had before.

    Args: fold_'s own, and its receipt.

    Raises: ValueError for other factors, another scale, another weight, or one that was written to since; TypeError.  Nothing
        has been written then.
    """
    if not isinstance(receipt, Receipt):
        raise TypeError(f"unfold_: expected receipt from fold_, got {type(receipt).__name__}")
    weight, A, m, B, form = _check(weight, A, m, B, "unfold_")
    if (weight.shape, weight.dtype) != (receipt.shape, receipt.dtype):
        raise ValueError(
            f"unfold_: expected the weight of the receipt, {list(receipt.shape)} in {receipt.dtype}, got"
            f" {list(weight.shape)} in {weight.dtype}"
        )
    if _hash(A, m, B) != receipt.factors:
        raise ValueError("unfold_: expected the factors and scale that were folded; these are others")
    if receipt.form != "torch" and form != receipt.form:
        raise ValueError(
            f"unfold_: folded by the form {receipt.form!r}, which here would be {form!r}: other bits; unfold where it was"
            " folded"
        )
    if delta.fingerprint(weight) != receipt.folded:
        raise ValueError("unfold_: the weight is not what fold_ left: written to since, or unfolded before")
    fixes = tuple(t.to(weight.device) for t in receipt.fixes)
    if receipt.form == "torch":
        weight.copy_(fixes[0])
        return
    for rows in _chunks(weight, form):
        weight[rows].copy_(run(weight[rows], A, -m, B[rows]))
    delta.apply_(weight, *fixes)


def _check(
    weight: Tensor, A: Tensor, m: float | Tensor, B: Tensor, op: str = "fold_"
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    weight, A, m, B = check(op, weight, A, m, B)
    if not weight.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous weight, got strides {weight.stride()}")
    for name, t in (("A", A), ("m", m), ("B", B)):
        if overlap(weight, t):
            raise ValueError(f"{op}: expected {name} apart from weight, got memory that overlaps")
    return weight.detach(), A.detach(), m, B.detach(), form_of(weight, A.shape[0])


def _chunks(weight: Tensor, form: str):
    """Slices of rows, each but the last of whole blocks of a delta; all at once where bits may depend on the rows."""
    N, K = weight.shape
    step = delta.BLOCK // math.gcd(max(K, 1), delta.BLOCK)
    rows = (
        max(step, CHUNK // max(K, 1) // step * step) if form == "native" and weight.device.type == "cpu" else max(N, 1)
    )
    return [slice(first, min(first + rows, N)) for first in range(0, max(N, 1), rows)]


def _hash(A: Tensor, m: Tensor, B: Tensor) -> str:
    parts = (f"{t.dtype} {list(t.shape)} {delta.fingerprint(t.contiguous()):016x}" for t in (A, m, B))
    return "; ".join(parts)
