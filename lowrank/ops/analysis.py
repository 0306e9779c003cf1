"""Passes over weights for :mod:`lowrank.analysis`: csrc/analysis, and the same numbers in PyTorch where it is not built.

The caller (lowrank/analysis.py) has checked what comes in.  fp64 is PyTorch's alone.

Files: lowrank/analysis.py, csrc/analysis.*; tests/test_analysis.py; bench diff_stats, topk_mask.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import bits
from ._dispatch import in_csrc

# csrc/analysis.h's
BLOCK, LANES = 4096, 256
DIGIT, BINS = 11, 2048
MASKS = 32
CHUNK = 1 << 20  # elements that PyTorch widens at a time; whole blocks
_UNSIGNED = -(1 << 63)  # flips the order of signed numbers to that of unsigned ones

_lib = torch.library.Library("lowrank", "FRAGMENT")
for _schema in (
    "diff_stats(Tensor old, Tensor new, float tol, float rel, int ulp, Tensor(a!) counts, Tensor(b!) sums) -> ()",
    "topk_histogram(Tensor new, Tensor? old, int key, int hash, int above, int shift, bool tied, int seed, int first,"
    " Tensor(a!) counts) -> ()",
    "topk_emit(Tensor new, Tensor? old, int key, int hash, int seed, int first, Tensor(a!) words) -> ()",
    "mask_overlap(Tensor[] masks, Tensor(a!) counts) -> ()",
):
    _lib.define(_schema)
    torch.library.register_fake("lowrank::" + _schema.partition("(")[0], lambda *args: None, lib=_lib)


# differences


def diff(old: Tensor, new: Tensor, tol: float, rel: float, ulp: int) -> tuple[list[int], float, float, float]:
    """[changed, beyond tol, rel, ulp], max |d|, Σ d², Σ old² of contiguous tensors of one dtype.  Waits for the device."""
    blocks = -(-new.numel() // BLOCK)
    counts = torch.empty((blocks, 4), dtype=torch.int64, device=new.device)
    sums = torch.empty((blocks, 3), dtype=torch.float64, device=new.device)
    if in_csrc(new, "diff_stats"):
        torch.ops.lowrank.diff_stats.default(old, new, tol, rel, min(ulp, 2**63 - 1), counts, sums)
    else:
        _diff_in_torch(old.view(-1), new.view(-1), tol, rel, min(ulp, 2**63 - 1), counts, sums)
    largest, squares, olds = sums.mT.tolist()
    return counts.sum(0).tolist(), max(largest, default=0.0), sum(squares), sum(olds)  # on the host: in one order


def _diff_in_torch(old, new, tol, rel, ulp, counts, sums) -> None:
    for at in range(0, new.numel(), CHUNK):
        x, y = old[at : at + CHUNK], new[at : at + CHUNK]
        if pad := -len(x) % BLOCK:  # zeros, which do not differ
            x, y = (torch.nn.functional.pad(t, (0, pad)) for t in (x, y))
        rows = slice(at // BLOCK, (at + len(x)) // BLOCK)
        a, b = at_least_fp32(x), at_least_fp32(y)
        same = (a == b) | (a.isnan() & b.isnan())
        d = torch.where(same, 0, (b - a).abs())
        limit = (a.abs() * rel).nan_to_num(torch.finfo(a.dtype).max)  # an infinite d is beyond, too
        i, j = _ordered(x), _ordered(y)
        steps = torch.maximum(i, j) - torch.minimum(i, j)  # below 0: 2^63 or more
        beyond_ulp = (((steps > ulp) | (steps < 0)) & ~same) | d.isnan()
        flags = bits.bitcast(x) != bits.bitcast(y), ~(d <= tol), ~(d <= limit), beyond_ulp
        counts[rows] = torch.stack([f.view(-1, BLOCK).sum(1) for f in flags], 1)
        d, a = (torch.where(t.isnan(), 0, t.abs()) for t in (d, a))
        sums[rows, 0] = d.view(-1, BLOCK).amax(1).double()
        sums[rows, 1], sums[rows, 2] = _sum_of_squares(d.double()), _sum_of_squares(a.double())


def _sum_of_squares(t: Tensor) -> Tensor:
    """Of each block, in csrc/analysis.h's order."""
    lanes, half = torch.zeros((), dtype=t.dtype, device=t.device), LANES // 2
    for row in t.square().view(-1, BLOCK // LANES, LANES).unbind(1):
        lanes = lanes + row
    while half:
        lanes, half = lanes[:, :half] + lanes[:, half:], half // 2
    return lanes[:, 0]


def at_least_fp32(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


def _ordered(t: Tensor) -> Tensor:
    """int64 in the order of the numbers: neighbours differ by 1, -0 is +0."""
    raw = bits.bitcast(t)
    magnitude = (raw & torch.iinfo(raw.dtype).max).long()
    return torch.where(raw < 0, -magnitude, magnitude)


# selection


class NaNScoreError(ValueError):
    """A score is NaN, which is neither large nor small."""


class Scores(NamedTuple):
    """|new - old|, or |new| where old is None; ``seed`` of the name, ``first`` element's index in the whole tensor."""

    new: Tensor
    old: Tensor | None
    seed: int
    first: int


def threshold(scores: list[Scores], k: int, width: int, reduce: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """(key, hash) such that k elements have a larger key, or that key and at most that hash (unsigned).

    Radix selection: keys are ``width`` bits of |score| (31 of fp32, 63 of fp64), 1 <= k <= elements.  Ties go by hash.
    ``reduce`` adds an int64 tensor up over processes.

    Raises: NaNScoreError, in every process.
    """

    def keys(prefix, above, shift):
        return _histogram(scores, prefix, 0, above, shift, False, width, reduce)

    def hashes(prefix, above, shift):
        return _histogram(scores, key, prefix, above, shift, True, width, reduce)

    prefix, shift, left, tied = _select(keys, width, k, largest=True)
    key = prefix << shift
    if left == tied:
        return key, (1 << 64) - 1
    # two equal hashes of 64 bits at the boundary would both be taken
    prefix, shift, _, _ = _select(hashes, 64, left, largest=False)
    return key, ((prefix + 1) << shift) - 1


def _select(histogram, width: int, k: int, largest: bool) -> tuple[int, int, int, int]:
    """(prefix, shift, k, count): the k-th number starts with prefix, above shift bits; k of count such numbers are taken."""
    prefix, shift, count = 0, width, -1
    while shift and count != k:
        above, shift = shift, max(shift - DIGIT, 0)
        counts = histogram(prefix, above, shift)
        order = range((1 << (above - shift)) - 1, -1, -1) if largest else range(1 << (above - shift))
        for digit in order:
            count = counts[digit]
            if k <= count:
                break
            k -= count
        prefix = prefix << (above - shift) | digit
    return prefix, shift, k, count


def _histogram(scores, key, hash_, above, shift, tied, width, reduce) -> list[int]:
    """How often each digit (bits shift ... above - 1) occurs, of keys or of the ties' hashes, below the given prefix."""
    by_device: dict[torch.device, Tensor] = {}
    hash_ = bits.wrap_int64(hash_)
    for s in scores:
        if s.new.device not in by_device:
            by_device[s.new.device] = torch.zeros(BINS + 1, dtype=torch.int64, device=s.new.device)
        arguments = (s.new, s.old, key, hash_, above, shift, tied, s.seed, s.first, by_device[s.new.device])
        if width == 31 and in_csrc(s.new, "topk_mask"):
            torch.ops.lowrank.topk_histogram.default(*arguments)
        else:
            _histogram_in_torch(*arguments, width)
    total = reduce(sum((t.cpu() for t in by_device.values()), torch.zeros(BINS + 1, dtype=torch.int64)))
    *counts, nans = total.tolist()
    if nans and above == width and not tied:
        raise NaNScoreError(f"{nans} scores are NaN")
    return counts


def _histogram_in_torch(new, old, key, hash_, above, shift, tied, seed, first, counts, width) -> None:
    for at, keys in _keys(new, old, width):
        numbers = keys
        if tied:
            numbers = hashes((keys == key).nonzero().view(-1) + (first + at), seed)
        else:
            counts[BINS] += (keys > (0x7F800000 if width == 31 else 0x7FF0000000000000)).sum()
        if above < 64:
            under = bits.logical_shift_right(numbers, above) == (hash_ if tied else key)
            numbers = numbers[under]
        digits = bits.logical_shift_right(numbers, shift) & ((1 << (above - shift)) - 1)
        counts[:BINS] += torch.bincount(digits, minlength=BINS)


def emit(s: Scores, key: int, hash_: int, width: int) -> Tensor:
    """int32 words: whose key is larger, or the same with at most that hash."""
    words = torch.zeros(-(-s.new.numel() // 32), dtype=torch.int32, device=s.new.device)
    if width == 31 and in_csrc(s.new, "topk_mask"):
        torch.ops.lowrank.topk_emit.default(s.new, s.old, key, bits.wrap_int64(hash_), s.seed, s.first, words)
        return words
    for at, keys in _keys(s.new, s.old, width):
        selected = keys > key
        tied = (keys == key).nonzero().view(-1)
        selected[tied] = (hashes(tied + (s.first + at), s.seed) ^ _UNSIGNED) <= (bits.wrap_int64(hash_) ^ _UNSIGNED)
        words[at // 32 : (at + CHUNK) // 32] = bits.pack(selected)
    return words


def _keys(new: Tensor, old: Tensor | None, width: int):
    """(index of the first, int64 keys) of a chunk of elements at a time."""
    new, old = new.view(-1), None if old is None else old.view(-1)
    for at in range(0, new.numel(), CHUNK):
        score = at_least_fp32(new[at : at + CHUNK])
        if old is not None:
            score = score - at_least_fp32(old[at : at + CHUNK])
        yield at, bits.bitcast(score.abs() if width == 31 else score.abs().double()).long()


def hashes(index: Tensor, seed: int) -> Tensor:
    """SplitMix64's number ``index`` of the sequence that starts at ``seed``, in int64's bits."""
    return bits.splitmix64_((index + 1).mul_(bits.GOLDEN_GAMMA).add_(seed))


# masks


def intersections(masks: list[Tensor]) -> Tensor:
    """int64 [E, E] on the CPU: how many bits masks i and j share, for i <= j; int32 words of one length on one device."""
    E = len(masks)
    shared = torch.zeros((E, E), dtype=torch.int64)
    for rows in torch.arange(E).split(MASKS // 2):
        for columns in torch.arange(int(rows[0]), E).split(MASKS // 2):
            both = torch.cat([rows, columns]).unique()
            counts = torch.zeros((len(both), len(both)), dtype=torch.int64, device=masks[0].device)
            chosen = [masks[i] for i in both]
            if in_csrc(masks[0], "overlap"):
                torch.ops.lowrank.mask_overlap.default(chosen, counts)
            else:
                for i, j in torch.triu_indices(len(both), len(both)).mT.tolist():
                    counts[i, j] = bits.popcount(chosen[i] & chosen[j]).sum()
            shared[both[:, None], both] = counts.cpu()
    return shared
