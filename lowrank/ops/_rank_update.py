"""round(W + B diag(m) A), and what rounding made of it: what ops/materialize.py and ops/fold.py share.

Three forms, chosen by the rank alone, so that the same call gives the same bits:

    r <= 64   csrc/rank_update: one chain of fused multiply-adds per element, the same bits on CPU and GPU
    r > 64    kernels/materialize.py on a GPU, fp32 GEMMs in row blocks on a CPU

What is not there (no compiler when lowrank was installed) is done by the next one, counted in ``stats()``.
All: fp32 sum, one rounding, out of place; where the update is exactly 0, W's own bits.
"""

import math
from typing import NamedTuple

import torch

from .. import bits
from .._memory import overlap
from ._boundary import was_written
from ._choice import backend
from ._dispatch import in_csrc
from .dropout import row_blocks
from .validation import DTYPES

THIN_RANK = 64
TILE = 64, 256  # rows and columns of W per row of stats: csrc/rank_update.h's

_lib = torch.library.Library("lowrank", "FRAGMENT")
# m is fp32 [r] or [1].  stats: zeros, fp64 [tiles, 3], to fill with partial sums of Δ², Δ (out − W) and changed elements.
_SCHEMA = "(Tensor weight, Tensor A, Tensor m, Tensor B, Tensor(a!) out, Tensor(b!)? changed, Tensor(c!)? stats"
_lib.define(f"materialize{_SCHEMA}) -> ()")
# csrc/'s; every tensor contiguous.  back: what out becomes when the update is taken off again; changed is then its map
_lib.define(f"rank_update{_SCHEMA}, Tensor(d!)? back=None) -> ()")


class MergeReport(NamedTuple):
    """What rounding made of an update Δ: ``kept`` = Σ Δ (out − W) / Σ Δ² (1 if Δ is 0), and how many elements changed."""

    kept: float
    changed: int
    numel: int


def check(op: str, weight, A, m, B) -> tuple[torch.Tensor, ...]:
    """The arguments with ``m`` as a tensor; raises on what does not fit, in the name of ``op``."""
    for name, t in (("weight", weight), ("A", A), ("B", B)):
        check_matrix(op, name, t, weight)
    (N, K), (r, _) = weight.shape, A.shape
    if A.shape[1] != K or r == 0:
        raise ValueError(f"{op}: expected A [r, {K}], r >= 1, for weight {list(weight.shape)}, got {list(A.shape)}")
    if B.shape != (N, r):
        raise ValueError(f"{op}: expected B [{N}, {r}] beside A {list(A.shape)}, got {list(B.shape)}")
    for name, t in (("A", A), ("B", B)):
        if t.dtype is torch.float64 and weight.dtype is not torch.float64:
            raise TypeError(f"{op}: expected {name} in fp32 or less beside a weight in {weight.dtype}, got {t.dtype}")
    return weight, A, _as_vector(op, m, r, weight), B


def check_matrix(op: str, name: str, t, weight) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{op}: expected {name} in {', '.join(map(str, DTYPES))}, got {t.dtype}")
    if t.device != weight.device:
        raise ValueError(f"{op}: expected {name} on weight's device {weight.device}, got {t.device}")
    if t.dim() != 2:
        raise ValueError(f"{op}: expected {name} with two dimensions, got {list(t.shape)}")


def _as_vector(op: str, m, r: int, weight: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    if isinstance(m, torch.Tensor):
        if m.dtype not in DTYPES:
            raise TypeError(f"{op}: expected m in {', '.join(map(str, DTYPES))}, got {m.dtype}")
        if m.dim() and m.shape != (r,):
            raise ValueError(f"{op}: expected m a number or [{r}], got {list(m.shape)}")
        if m.dim() and m.device != weight.device:
            raise ValueError(f"{op}: expected m on weight's device {weight.device}, got {m.device}")
        return m.detach().to(weight.device, dtype).reshape(-1).contiguous()
    if isinstance(m, bool) or not isinstance(m, (int, float)):
        raise TypeError(f"{op}: expected m a float or a tensor, got {type(m).__name__}")
    return torch.full((1,), float(m), dtype=dtype, device=weight.device)


def run_with_sums(weight, A, m, B) -> tuple[torch.Tensor, list[float]]:
    """Checked arguments -> (out, [Σ Δ², Σ Δ (out − W), changed elements])."""
    stats = _stats_of(weight)
    return run(weight, A, m, B, stats=stats), _sums(stats)


def there_and_back(weight, A, m, B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
    """Checked arguments of a form with fixed bits -> (out, out − Δ, the map of where that is not weight, the sums)."""
    if form_of(weight, A.shape[0]) != "native" or weight.numel() == 0:
        out, sums = run_with_sums(weight, A, m, B)
        back, words = run(out, A, -m, B), weight.new_zeros(-(-weight.numel() // 32), dtype=torch.int32)
        if weight.numel():
            _map_changes(weight, back, words)
        return out, back, words, sums
    out, back, stats = torch.empty_like(weight), torch.empty_like(weight), _stats_of(weight)
    words = weight.new_empty(-(-weight.numel() // 32), dtype=torch.int32)
    words[-1:].zero_()
    torch.ops.lowrank.rank_update.default(weight, A.contiguous(), m, B.contiguous(), out, words, stats, back)
    return out, back, words, _sums(stats)


def _stats_of(weight) -> torch.Tensor:
    tiles = math.prod(-(-size // tile) for size, tile in zip(weight.shape, TILE, strict=True))
    return torch.zeros((tiles, 3), dtype=torch.float64, device=weight.device)


def _sums(stats: torch.Tensor) -> list[float]:
    return [sum(column) for column in stats.mT.tolist()]  # on the host: in one order


def merge_report(sums: list[float], numel: int) -> MergeReport:
    square, kept, changed = sums
    return MergeReport(kept / square if square else 1.0, int(changed), numel)


def run(weight, A, m, B, out=None, changed=None, stats=None) -> torch.Tensor:
    """Checked arguments -> out, through the op."""
    with torch.no_grad():
        out = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.lowrank.materialize.default(weight, A, m, B, out, changed, stats)
    return out


def _materialize(weight, A, m, B, out, changed, stats) -> None:
    refuse_overlap(out, weight, A, m, B)
    form = form_of(weight, A.shape[0])
    if weight.numel() == 0:
        return
    weight = weight.contiguous()
    if changed is not None:
        changed[-1:].zero_()  # the bits after the last element
    if form == "native":
        torch.ops.lowrank.rank_update.default(weight, A.contiguous(), m, B.contiguous(), out, changed, stats)
        was_written(out)
        return
    if form == "triton":
        from ..kernels.materialize import materialize

        in_kernel = weight.shape[1] % 8 == 0  # a row's bits then start on a byte
        materialize(weight, A, m, B, out, changed if in_kernel else None)
        was_written(out)
    else:
        in_kernel = False
        _in_torch(weight, A, m, B, out)
    if changed is not None and not in_kernel:
        _map_changes(weight, out, changed)
    if stats is not None:
        _sum_changes(weight, A, m, B, out, stats)


def form_of(weight: torch.Tensor, r: int) -> str:
    """ "native", "triton" or "torch"."""
    if r <= THIN_RANK and in_csrc(weight, "materialize"):
        return "native"
    if weight.dtype is not torch.float64 and backend(weight.device)[0] == "triton":
        return "triton"
    return "torch"


def _deltas(weight, A, m, B):
    """(row block, its B diag(m) A) with no N x K temporary."""
    acc_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    A, m = A.to(acc_dtype), m.to(acc_dtype)
    for rows in row_blocks(*weight.shape, weight.device):
        with torch.autocast(weight.device.type, enabled=False):
            delta = (B[rows].to(acc_dtype) * m) @ A
        yield rows, delta


def _in_torch(weight, A, m, B, out) -> None:
    for rows, delta in _deltas(weight, A, m, B):
        same = delta == 0
        out[rows] = delta.add_(weight[rows])
        torch.where(same, weight[rows], out[rows], out=out[rows])


def _map_changes(weight, out, changed) -> None:
    old, new = bits.bitcast(weight).view(-1), bits.bitcast(out).view(-1)
    for block in row_blocks(changed.numel(), 32, weight.device):
        elements = slice(32 * block.start, 32 * block.stop)
        changed[block] = bits.pack(old[elements] != new[elements])


def _sum_changes(weight, A, m, B, out, stats) -> None:
    for rows, delta in _deltas(weight, A, m, B):
        delta, step = delta.double(), out[rows].double() - weight[rows].double()
        stats[0, 0] += delta.square().sum()
        stats[0, 1] += (delta * step).sum()
        stats[0, 2] += (bits.bitcast(out[rows]) != bits.bitcast(weight[rows])).sum()


def refuse_overlap(out, weight, A, m, B) -> None:
    for name, t in (("weight", weight), ("A", A), ("m", m), ("B", B)):
        if out is not None and overlap(out, t):
            raise ValueError(f"materialize: expected out apart from {name}, got memory that overlaps")


_lib.impl("materialize", _materialize, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::materialize", lib=_lib)
def _(weight, A, m, B, out, changed, stats):
    pass


@torch.library.register_fake("lowrank::rank_update", lib=_lib)
def _(weight, A, m, B, out, changed, stats, back=None):
    pass
