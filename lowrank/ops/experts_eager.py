"""Products of rows with their experts' matrices, in plain PyTorch: what a CPU runs, and what kernels must agree with.

Rows [S, ...] are sorted by expert, ``Groups`` says where each expert's end; matrices are stacks [E, ...] in any strides.

    rows      y_s   = x_s W_eᵀ                      [S,K], [E,N,K] -> [S,N]
    outer     D_e   = sum over its rows of a_s b_sᵀ      [S,N], [S,K] -> [E,N,K]
    sums      d_e   = sum over its rows of a_s           [S,N] -> [E,N]

On ``torch.nn.functional.grouped_mm``, whose traps are closed here (2.13): it wants strides that are multiples of 16 bytes, has
no fp64 and leaves rows behind the last group uninitialised.  What it does not take goes expert by expert, which waits for the
device.  A CPU has csrc's products in its place.

Files: csrc/experts_cpu.cpp; tests/ops/test_experts.py.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._boundary import dense, is_plain
from ._choice import choice

ALIGNED = 16  # bytes
SMALL = 1 << 14  # elements: below, a transposition costs its calls

_lib = torch.library.Library("lowrank", "FRAGMENT")
# On a CPU alone: rows' and outer's results, into ``out``.
_lib.define("grouped_rows_(Tensor x, Tensor stack, Tensor ends, Tensor(a!) out) -> ()")
_lib.define("grouped_outer_(Tensor a, Tensor b, Tensor ends, Tensor(a!) out) -> ()")
_rows_, _outer_ = torch.ops.lowrank.grouped_rows_.default, torch.ops.lowrank.grouped_outer_.default


@dataclass(frozen=True)
class Groups:
    """``ends`` int32 [E]: where in S sorted rows each expert's end.  full: no row is behind the last end."""

    ends: Tensor
    rows: int
    full: bool

    @functools.cached_property
    def native(self) -> bool:
        """Whether csrc/experts_cpu.cpp multiplies, an expert to a thread."""
        return self.ends.is_cpu and is_plain(self.ends) and choice(self.ends.device).native

    @functools.cached_property
    def experts(self) -> Tensor:
        """int64 [S]: each row's expert; behind the last end, the last."""
        at = torch.arange(self.rows, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, at, right=True).clamp_(max=len(self.ends) - 1)

    @functools.cached_property
    def behind(self) -> Tensor:
        """bool [S,1]: the rows of no expert."""
        return (torch.arange(self.rows, device=self.ends.device) >= self.ends[-1])[:, None]

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of the experts that have rows.  Waits for the device."""
        spans, first = [], 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > first:
                spans.append((expert, first, end))
                first = end
        return spans

    def clear(self, y: Tensor) -> Tensor:
        """y [S, ...], written to: zero behind the last end."""
        return y if self.full else y.masked_fill_(self.behind, 0)


class Routing(NamedTuple):
    """order int64 [S]: which choice (token times choices, and the choice's number) each sorted row is; place: its inverse."""

    order: Tensor
    place: Tensor
    groups: Groups


def route(index: Tensor, experts: int, full: bool) -> Routing:
    """Sort the choices ``index`` int [T,k] by expert; ids from ``experts`` on are of no expert here, and come last.

    full: there are none.
    """
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    ids = torch.arange(experts, device=index.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, ids, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Routing(order, place, Groups(ends, len(order), full))


def rows(x: Tensor, stack: Tensor, groups: Groups) -> Tensor:
    """[S,N] = each row of x [S,K] times its expert's matrix of ``stack`` [E,N,K], transposed."""
    if x.shape[0] == 0 or 0 in stack.shape:
        return x.new_zeros((x.shape[0], stack.shape[1]))
    x = dense(x)
    if groups.native:
        y = x.new_empty((x.shape[0], stack.shape[1]))
        _rows_(_bare(x), _bare(stack), groups.ends, y)
        return y
    if _takes(x) and _takes(stack):
        return groups.clear(torch.nn.functional.grouped_mm(x, stack.mT, offs=groups.ends).contiguous())
    y = x.new_empty((x.shape[0], stack.shape[1])) if groups.full else x.new_zeros((x.shape[0], stack.shape[1]))
    for expert, first, end in groups.spans():
        torch.mm(x[first:end], stack[expert].mT, out=y[first:end])
    return y


def outer(a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """[E,N,K] = the sum over each expert's rows of a [S,N] times b [S,K]; zeros where it has none."""
    E, N, K = len(groups.ends), a.shape[1], b.shape[1]
    if 0 in (a.shape[0], N, K):
        return a.new_zeros((E, N, K))
    a, b = dense(a), dense(b)
    if groups.native:
        out = a.new_empty((E, N, K))
        _outer_(_bare(a), _bare(b), groups.ends, out)
        return out
    if _takes(a) and _takes(b):
        return torch.nn.functional.grouped_mm(a.mT, b, offs=groups.ends).contiguous()
    out = a.new_zeros((E, N, K))
    for expert, first, end in groups.spans():
        torch.mm(a[first:end].mT, b[first:end], out=out[expert])
    return out


def sums(a: Tensor, groups: Groups) -> Tensor:
    """[E,N]: the sum over each expert's rows of a [S,N], in fp32 or fp64; added up in fp64, in whatever order a GPU has."""
    total = torch.zeros((len(groups.ends), a.shape[1]), dtype=torch.float64, device=a.device)
    wide = groups.clear(a.to(torch.float64, copy=True))
    return total.index_add_(0, groups.experts, wide).to(torch.promote_types(a.dtype, torch.float32))


def padded(rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns of S: what a row of them has to be for grouped_mm, which csrc's products need not."""
    if device.type == "cpu" and choice(device).native:
        return rank
    step = max(1, ALIGNED // dtype.itemsize)
    return -(-rank // step) * step


class Thin(NamedTuple):
    """An adapter's factors as grouped_mm takes them: A [E,r',K] and B [E,N,r'], zeros beyond its rank.

    one_by_one: [S,r,K] and [S,N,r] instead, those of each row's expert.
    """

    A: Tensor
    B: Tensor
    scale: float
    rank: int
    one_by_one: bool = False


def thin(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, groups: Groups, grad: bool) -> Thin:
    """Of A [E,r,K] and B [E,N,r] in any strides.  Where rows are fewer than experts, as in decoding, only those are read that
    have one; not where gradients of all follow (``grad``).
    """
    rank = A.shape[1]
    if not grad and groups.rows < len(groups.ends):
        return Thin(A[groups.experts].to(dtype), B[groups.experts].to(dtype), scale, rank, True)
    width = padded(rank, dtype, A.device)
    return Thin(widened(A, 1, width, dtype), widened(B, 2, width, dtype), scale, rank)


def thin_A(A: Tensor, S: Tensor, groups: Groups) -> Tensor:
    """:func:`thin`'s A alone, beside S or its gradient."""
    return widened(A, 1, S.shape[1], S.dtype)


def shrink(x: Tensor, thin: Thin, groups: Groups) -> Tensor:
    """S [S,r'] = x [S,K] by A, in the factors' dtype."""
    x = x.to(thin.A.dtype)
    return _one_by_one(x, thin.A, groups) if thin.one_by_one else rows(x, thin.A, groups)


def expand_(y: Tensor, S: Tensor, thin: Thin, groups: Groups, bias: Tensor | None = None) -> None:
    """y [S,N] += scale times S by B, and the experts' bias [E,N], rounded once more."""
    part = _one_by_one(S, thin.B, groups) if thin.one_by_one else rows(S, thin.B, groups)
    if bias is None:
        y.add_(part, alpha=thin.scale)
    else:
        y.add_(bias_rows(bias, part.dtype, groups).add_(part, alpha=thin.scale))


def bias_rows(bias: Tensor, dtype: torch.dtype, groups: Groups) -> Tensor:
    """[S,N]: each row's expert's bias."""
    return groups.clear(bias[groups.experts].to(dtype))


def _one_by_one(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    return groups.clear(torch.bmm(matrices, x[:, :, None])[:, :, 0])


def widened(t: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    """A factor with zeros up to ``size`` along ``dim``, in strides that grouped_mm takes; itself where it is that."""
    whole = t.shape[dim] == size
    if whole and t.dtype is dtype and (t.element_size() == 8 or _takes(t)):
        return t
    if whole and t.numel() < SMALL:
        return t.detach().to(dtype).contiguous()
    shape = list(t.shape)
    shape[dim] = size
    if whole and t.dim() == 3 and t.stride() == (1, t.shape[2] * t.shape[0], t.shape[0]):
        flat = (
            t.detach().permute(1, 2, 0).reshape(-1, t.shape[0])
        )  # PEFT's B: a transposition in two dimensions is blocked
        return flat.mT.contiguous().to(dtype).view(t.shape)
    wide = t.new_empty(shape, dtype=dtype)
    wide.narrow(dim, 0, t.shape[dim]).copy_(t)
    wide.narrow(dim, t.shape[dim], size - t.shape[dim]).zero_()
    return wide


def _bare(t: Tensor) -> Tensor:
    """Without autograd, of which other threads know nothing."""
    return t.detach() if t.requires_grad else t


def _takes(t: Tensor) -> bool:
    """Whether grouped_mm does: one of the last two dimensions is contiguous, and the other's strides aligned."""
    if t.element_size() == 8 or t.data_ptr() % ALIGNED or not _has_grouped_mm(t.device):
        return False
    step, (*_, rows, columns), (*_, down, across) = ALIGNED // t.element_size(), t.shape, t.stride()
    if t.dim() == 3 and t.stride(0) % step:
        return False
    return (across == 1 and down % step == 0 and down >= columns) or (
        down == 1 and across % step == 0 and across >= rows
    )


@functools.cache
def _has_grouped_mm(device: torch.device) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
