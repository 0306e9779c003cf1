"""Dropout decisions as a pure function of (seed, row, column): one bit per element, the same bits on every device.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") on the element's index: no state
to save, no host synchronisation, safe under checkpointing and CUDA graphs.  Each 64-bit output decides four elements by
comparing 16 bits with a threshold, so p is exact to 2**-17 (7.6e-6).  The stream differs from nn.Dropout's; the
distribution is the same.  Or the decisions are nn.Dropout's own (:func:`as_torch`), drawn before the pass that needs them.

Files: kernels/_tile.py, csrc/dropout.*, csrc/splitmix64.h; tests/ops/test_dropout.py.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import bits
from ._boundary import is_plain
from ._choice import choice

_lib = torch.library.Library("lowrank", "FRAGMENT")
# csrc/dropout_cpu.cpp's.  draw: ``keep`` int32 [rows, words] gets the bits of the rows from first_row on, and ``out`` [rows, K]
# x where they are set, else 0.  apply: ``out`` gets x where the bits are set, else 0, added to what is there if asked for.
_lib.define("dropout_draw_(Tensor x, Tensor seed, int first_row, int cut, Tensor(a!) out, Tensor(b!) keep) -> ()")
_lib.define("dropout_apply_(Tensor x, Tensor keep, Tensor(a!) out, bool add) -> ()")
draw_, apply_ = torch.ops.lowrank.dropout_draw_.default, torch.ops.lowrank.dropout_apply_.default


def in_one_pass(t: torch.Tensor) -> bool:
    """Whether :data:`draw_` and :data:`apply_` do there what :func:`draw`, :func:`apply` and bits.py do, in one pass."""
    return t.is_cpu and choice(t.device).native


def draw_seeds(n: int, device: torch.device) -> torch.Tensor:
    """int64 [n] from torch's own generator for ``device``: what torch.utils.checkpoint saves and restores."""
    return torch.randint(0, 2**63 - 1, (n,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Decisions below this, of 65536, drop the element."""
    return round(p * 65536)


def drawable(p: float) -> float:
    """The p that the 16-bit threshold stands for."""
    return threshold(p) / 65536


def keep_scale(p: float) -> float:
    """1 / (1 - p); 0 at p = 1, where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


class Drawn(NamedTuple):
    """Dropout that is drawn already: p, and the mask's keep bits, int32 [M, ceil(K / 32)]."""

    p: float
    keep: torch.Tensor


def as_torch(x: torch.Tensor, p: float) -> Drawn:
    """What nn.Dropout in training decides for x [..., K], by torch's own generator and with what that leaves of it."""
    x = x.detach()
    if p == 1 or x.numel() == 0:  # where F.dropout draws nothing
        mask = torch.zeros_like(x, dtype=torch.bool)
    elif x.is_cpu:
        mask = torch.empty_like(x).bernoulli_(1 - p) != 0
    else:  # where it depends on x's strides and alignment
        mask = torch.native_dropout(x, p, True)[1]
    return Drawn(p, (_pack_rows if is_plain(x) else torch.ops.lowrank.dropout_pack.default)(mask))


def are_drawn(seeds: torch.Tensor | None) -> bool:
    """Whether ``seeds`` are no int64 [n] to draw n masks from, but the masks' keep bits, int32 [n, M, ceil(K / 32)]."""
    return seeds is not None and seeds.dtype is torch.int32


def _pack_rows(mask: torch.Tensor) -> torch.Tensor:
    M, K = math.prod(mask.shape[:-1]), mask.shape[-1]
    return bits.pack(torch.nn.functional.pad(mask.reshape(M, K), (0, -K % 32))).view(M, -(-K // 32))


# Nothing is drawn in it: compilers take two calls of an op that they do not know for one.
_lib.define("dropout_pack(Tensor mask) -> Tensor")
_lib.impl("dropout_pack", _pack_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::dropout_pack", lib=_lib)
def _(mask):
    return mask.new_empty((math.prod(mask.shape[:-1]), (mask.shape[-1] + 31) // 32), dtype=torch.int32)


def draw(seed: torch.Tensor, rows: int, columns: int, cut: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (row block, bool [block, columns rounded up to 32]): True where an element is kept.

    ``seed``: 0-d int64.  ``cut``: :func:`threshold` of p.  kernels/_tile.py draws the same bits.
    """
    per_row = -(-columns // 32) * 8  # int64 words, four elements each
    steps = z = scratch = None
    for block in row_blocks(rows, 4 * per_row, seed.device):
        n = (block.stop - block.start) * per_row
        if steps is None:
            steps = torch.arange(n, dtype=torch.int64, device=seed.device).mul_(bits.GOLDEN_GAMMA)
            z, scratch = torch.empty_like(steps), torch.empty_like(steps)
        first = bits.wrap_int64(block.start * per_row * bits.GOLDEN_GAMMA)
        torch.add(steps[:n], seed + first, out=z[:n])
        drawn = bits.splitmix64_(z[:n], scratch[:n]).view(torch.int16)
        if cut == 65536:
            drawn.zero_()
        else:
            drawn.ge_(cut - 32768)  # as int16, narrowed below: faster than a comparison that writes bools
        yield block, drawn.to(torch.uint8).view(torch.bool).view(-1, 4 * per_row)


def apply(t: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` = t [rows, columns], 0 where ``mask`` [rows, >= columns] is False, even if t is inf or nan there."""
    # all-ones or all-zeros integers and a bitwise and: ten times faster on a CPU than torch.where
    t = bits.bitcast(t)
    ones = mask[:, : t.shape[1]].view(torch.int8).neg().to(t.dtype)
    torch.bitwise_and(t, ones, out=bits.bitcast(out))
    return out


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that make blocks of about a million elements (cache-sized) on a CPU, 64 million on a GPU."""
    step = max(1, (1 << 20 if device.type == "cpu" else 1 << 26) // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
