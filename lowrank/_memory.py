"""Which tensors share memory."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that a spans, from its first element to its last, meets that which b spans."""
    if a.is_meta or a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    (first_a, end_a, *_), (first_b, end_b, *_) = _pieces(a), _pieces(b)
    return first_a < end_b and first_b < end_a


class Memory:
    """Where tensors lie: the spans of each device's memory that they take, apart and in order."""

    def __init__(self):
        self.pointers: list[int] = []
        self.spans: dict[torch.device, list[tuple[int, int, list[Tensor]]]] = {}  # first byte, end, whose

    def add(self, tensors: list[Tensor]) -> list[Tensor]:
        """The first two that share an element, or one that has it twice, if there are any: then all of this is void."""
        crowded: dict[int, list[Tensor]] = {}
        for t in tensors:
            self.pointers.append(t.data_ptr())
            if t.is_meta or t.numel() == 0:
                continue
            first, end, run, outer = _pieces(t)
            spans = self.spans.setdefault(t.device, [])
            touched = slice(bisect_right(spans, first, key=itemgetter(1)), bisect_left(spans, end, key=itemgetter(0)))
            owners: list[Tensor] = []
            for start, stop, residents in spans[touched]:
                first, end = min(first, start), max(end, stop)
                crowded.pop(id(residents), None)
                owners = [*owners, *residents] if owners else residents
            if not any(t is owner for owner in owners):
                owners.append(t)
            spans[touched] = [(first, end, owners)]
            if len(owners) > 1 or any(stride < inner for stride, inner in _nesting(run, outer)):
                crowded[id(owners)] = owners
        return next((shared for owners in crowded.values() if (shared := _first_overlap(owners))), [])


def _pieces(t: Tensor) -> tuple[int, int, int, list[tuple[int, int]]]:
    """(first byte, end, bytes of a contiguous piece, [(stride in bytes, size)]: how these repeat, from the inside)."""
    run, outer = t.element_size(), []
    strides = sorted((stride * run, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
    for stride, size in strides:
        if stride == run and not outer:
            run *= size
        else:
            outer.append((stride, size))
    first = t.data_ptr()
    return first, first + run + sum(stride * (size - 1) for stride, size in outer), run, outer


def _nesting(run: int, outer: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """(stride, what it has to step over) of each."""
    for stride, size in outer:
        yield stride, run
        run += stride * (size - 1)


def _first_overlap(tensors: list[Tensor]) -> list[Tensor]:
    """On a map of the memory that they span, in the largest unit that all of their pieces are whole multiples of."""
    pieces = [_pieces(t) for t in tensors]
    start, end = min(first for first, *_ in pieces), max(end for _, end, *_ in pieces)
    unit = math.gcd(*(n for first, _, run, outer in pieces for n in (first - start, run, *(s for s, _ in outer))))
    occupied = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")

    def place(first, _, run, outer, on=occupied):
        sizes, strides = [*(size for _, size in outer), run // unit], [*(stride // unit for stride, _ in outer), 1]
        return on.as_strided(sizes, strides, (first - start) // unit)

    for t, piece in zip(tensors, pieces, strict=True):
        if place(*piece).any():
            occupied.zero_()
            place(*piece).fill_(True)
            return [next(first for first, there in zip(tensors, pieces, strict=True) if place(*there).any()), t]
        place(*piece).fill_(True)
        if any(stride < inner for stride, inner in _nesting(*piece[2:])):
            alone = torch.zeros_like(occupied)
            place(*piece, on=alone).fill_(True)
            if int(alone.sum()) != place(*piece).numel():
                return [t]
    return []
