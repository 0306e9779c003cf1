"""Sparse deltas of one tensor: torch.ops.lowrank.delta (csrc/delta.h has the format), and the same in PyTorch.

A delta is three flat tensors: heads, uint16 [ceil(numel / 1024)]; index, uint8; values, in the tensor's dtype.  It goes by
the elements in row-major order, and by their bits: NaN and zeros of either sign are what they are.  Elements of 16 and 32
bits run natively, of 64 in PyTorch; the bytes are the same.  All tensors of a call on one device.

Files: lowrank/delta.py, csrc/delta.*; tests/test_delta.py; bench delta.
"""

import torch
from torch import Tensor

from .. import bits
from ._boundary import was_written
from ._dispatch import in_csrc

BLOCK = 1024
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.int32,
    torch.int64,
)
_PASSES = ("map", "size", "encode", "check", "apply", "mark", "fingerprint")  # csrc/delta.h's DeltaPass
_GAPS, _INDICES, _BITMAP, _CODES = range(4)
_NEXT, _BEFORE, _VALUE = 1, 2, 3

_lib = torch.library.Library("lowrank", "FRAGMENT")
_lib.define(
    "delta(int which, int numel, Tensor(a!)? data, Tensor? old, Tensor(b!)? changed, Tensor(c!)? heads, Tensor(d!)? index,"
    " Tensor(e!)? values, Tensor? starts, Tensor(f!)? found) -> ()"
)


@torch.library.register_fake("lowrank::delta", lib=_lib)
def _(*args):
    pass


def map_changes(old: Tensor, new: Tensor) -> Tensor:
    """int32 [ceil(numel / 32)] (:mod:`lowrank.bits`): which elements differ in their bits."""
    old, new = _flat(old), _flat(new)
    if not in_csrc(new, "delta"):
        return bits.pack(old != new)
    words = new.new_empty(-(-new.numel() // 32), dtype=torch.int32)
    _run("map", new.numel(), data=new, old=old, changed=words)
    return words


def encode(new: Tensor, changed: Tensor, old: Tensor | None = None, codes: bool = False) -> tuple[Tensor, ...]:
    """(heads, index, values) of the elements whose bit in ``changed`` is set.  Waits for the device once.

    Args:
        codes: beside ``old``, blocks of kind 3 where that is smaller: neighbours of the old number as 2-bit codes.
    """
    if codes and old is None:
        raise ValueError("delta: codes need old")
    data, before, changed = _flat(new), _flat(old) if codes else None, changed.contiguous()
    numel = data.numel()
    if not in_csrc(data, "delta"):
        heads, index, values = _encode(data, changed, before)
        return heads, index, values.view(new.dtype)
    heads = torch.empty(-(-numel // BLOCK), dtype=torch.uint16, device=new.device)
    _run("size", numel, data=data, old=before, changed=changed, heads=heads)
    starts = _starts(numel, heads)
    index_bytes, count = starts[:, -1].tolist()
    index = torch.empty(index_bytes, dtype=torch.uint8, device=new.device)
    values = data.new_empty(count)
    _run(
        "encode", numel, data=data, old=before, changed=changed, heads=heads, index=index, values=values, starts=starts
    )
    return heads, index, values.view(new.dtype)


def check(numel: int, dtype: torch.dtype, heads: Tensor, index: Tensor, values: Tensor, *, codes: bool = True) -> None:
    """Raise ValueError unless they are a delta of ``numel`` elements in ``dtype``, with blocks of kind 3 only if ``codes``."""
    for name, t, expected in (("heads", heads, torch.uint16), ("index", index, torch.uint8), ("values", values, dtype)):
        if t.dtype is not expected or t.dim() != 1 or not t.is_contiguous():
            raise ValueError(f"delta: expected {name} flat in {expected}, got {list(t.shape)} in {t.dtype}")
    if len(heads) != -(-numel // BLOCK):
        raise ValueError(f"delta: expected {-(-numel // BLOCK)} heads for {numel} elements, got {len(heads)}")
    starts = _starts(numel, heads)
    totals = starts[:, -1].tolist()
    if totals != [len(index), len(values)]:
        raise ValueError(
            f"delta: the heads need {totals[0]} bytes of index and {totals[1]} values, got {len(index)} and {len(values)}"
        )
    if in_csrc(values, "delta"):
        misfits = torch.empty(len(heads), dtype=torch.int64, device=heads.device)
        _run("check", numel, heads=heads, index=index, starts=starts, found=misfits)
        bad = misfits != 0
    else:
        bad = _decode(numel, heads, index)[1]
    if not codes:
        bad = bad | (heads.view(torch.int16) >> 11 & 3 == _CODES)
    if bad.any():
        raise ValueError(f"delta: block {int(bad.nonzero()[0])} of {len(heads)} is damaged")


def apply_(tensor: Tensor, heads: Tensor, index: Tensor, values: Tensor) -> None:
    """Write a delta that :func:`check` has passed into a contiguous tensor, whose version counts on."""
    if not tensor.is_contiguous():
        raise ValueError(f"delta: expected a contiguous tensor, got strides {tensor.stride()}")
    data, values = _flat(tensor), _flat(values)
    if in_csrc(data, "delta"):
        starts = _starts(data.numel(), heads)
        _run("apply", data.numel(), data=data, heads=heads, index=index, values=values, starts=starts)
    else:
        codes, _ = _decode(data.numel(), heads, index)
        data[codes == _VALUE] = values
        for code, step in ((_NEXT, 1), (_BEFORE, -1)):
            order = _order(data[codes == code]) + step
            data[codes == code] = _order(order)
    was_written(tensor)


def changed_words(numel: int, heads: Tensor, index: Tensor) -> Tensor:
    """int32 [ceil(numel / 32)]: which elements a checked delta changes."""
    if not in_csrc(heads, "delta"):
        return bits.pack(_decode(numel, heads, index)[0] != 0)
    words = torch.zeros(-(-numel // 32), dtype=torch.int32, device=heads.device)
    _run("mark", numel, changed=words, heads=heads, index=index, starts=_starts(numel, heads))
    return words


def fingerprint(tensor: Tensor, changed: Tensor | None = None) -> int:
    """64 bits of all elements, or of those whose bit in ``changed`` is 0: the same before and after such a delta.

    A sum of hashes of place and bits: against mistakes, not against who means to deceive.  Waits for the device.
    """
    data = _flat(tensor)
    if in_csrc(data, "delta"):
        sums = torch.empty(-(-data.numel() // BLOCK), dtype=torch.int64, device=data.device)
        changed = None if changed is None else changed.contiguous()
        _run("fingerprint", data.numel(), data=data, changed=changed, found=sums)
        return int(sums.sum()) & 0xFFFFFFFFFFFFFFFF
    total = 0
    for first in range(0, data.numel(), 1 << 20):
        part = data[first : first + (1 << 20)]
        place = torch.arange(first + 1, first + len(part) + 1, device=data.device)
        unsigned = part.long() & ((1 << 8 * data.element_size()) - 1 if data.element_size() < 8 else -1)
        x = bits.splitmix64_(place.mul_(bits.GOLDEN_GAMMA).add_(unsigned))
        if changed is not None:
            x = x.masked_fill(bits.unpack(changed[first // 32 : -(-(first + len(part)) // 32)], part.shape), 0)
        total += int(x.sum())
    return total & 0xFFFFFFFFFFFFFFFF


def _flat(t: Tensor) -> Tensor:
    return bits.bitcast(t.detach().contiguous().view(-1))


def _run(
    which, numel, *, data=None, old=None, changed=None, heads=None, index=None, values=None, starts=None, found=None
):
    torch.ops.lowrank.delta.default(
        _PASSES.index(which), numel, data, old, changed, heads, index, values, starts, found
    )


def _lengths(numel: int, blocks: int, device) -> Tensor:
    return (numel - BLOCK * torch.arange(blocks, device=device)).clamp(max=BLOCK)


def _fields(numel: int, heads: Tensor) -> tuple[Tensor, ...]:
    """(n, kind, escapes, bytes of index) of each block."""
    head = heads.view(torch.int16).long() & 0xFFFF
    n, kind, escapes = head & 0x7FF, head >> 11 & 3, head >> 13
    length = _lengths(numel, len(heads), heads.device)
    sizes = torch.stack([n + escapes, 2 * n, length + 7 >> 3, length + 3 >> 2])
    return n, kind, escapes, sizes.gather(0, kind[None])[0]


def _starts(numel: int, heads: Tensor) -> Tensor:
    """int64 [2, blocks + 1]: where each block starts in index and in values; last, the totals."""
    n, _, _, size = _fields(numel, heads)
    return torch.nn.functional.pad(torch.stack([size, n]).cumsum(1), (1, 0))


def _order(raw: Tensor) -> Tensor:
    """The place of a number among all of its dtype, as signed integers; its own inverse."""
    return torch.where(raw < 0, ~raw ^ torch.iinfo(raw.dtype).min, raw)


def _bytes_of(kind: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(block, place in the block, kind of block) of each byte of index."""
    block = torch.repeat_interleave(torch.arange(len(kind), device=kind.device), size)
    place = torch.arange(len(block), device=kind.device) - (size.cumsum(0) - size)[block]
    return block, place, kind[block]


def _sum_by(block: Tensor, values: Tensor, blocks: int) -> Tensor:
    return torch.zeros(blocks, dtype=torch.int64, device=block.device).index_add_(0, block, values.long())


def _encode(data: Tensor, changed: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    device, blocks, width = data.device, -(-data.numel() // BLOCK), data.element_size()
    length = _lengths(data.numel(), blocks, device)
    at = bits.unpack(changed, data.shape).nonzero().view(-1)
    block, i = at // BLOCK, at % BLOCK
    follows = torch.zeros_like(block, dtype=torch.bool)
    follows[1:] = block[1:] == block[:-1]
    gap = i - torch.where(follows, i.roll(1) + 1, 0)
    n, escapes = _sum_by(block, torch.ones_like(i), blocks), _sum_by(block, gap // 255, blocks)
    sizes = torch.stack([n + escapes, 2 * n, length + 7 >> 3])
    kind, size = sizes.argmin(0), sizes.amin(0)
    code = torch.full_like(i, _VALUE)
    if old is not None:
        new, before = _order(data[at]), _order(old[at])
        for candidate, candidate_code in ((before, 0), (before + 1, _NEXT), (before - 1, _BEFORE)):
            code.masked_fill_(new == candidate, candidate_code)
        values = _sum_by(block, code == _VALUE, blocks)
        dense = length + 3 >> 2
        smaller = dense + width * values < size + width * n
        kind, n, size = kind.where(~smaller, _CODES), n.where(~smaller, values), size.where(~smaller, dense)
    heads = n | kind << 11 | escapes.where(kind == _GAPS, 0) << 13
    owner, place, which = _bytes_of(kind, size)
    index = torch.full((len(owner),), 255, dtype=torch.uint8, device=device)

    in_gaps = kind[block] == _GAPS
    gaps = torch.full(((gap[in_gaps] // 255 + 1).sum(),), 255, dtype=torch.uint8, device=device)
    gaps[(gap[in_gaps] // 255 + 1).cumsum(0) - 1] = (gap[in_gaps] % 255).to(torch.uint8)
    index[which == _GAPS] = gaps
    pairs = torch.stack([i & 255, i >> 8], 1)[kind[block] == _INDICES]
    index[which == _INDICES] = pairs.view(-1).to(torch.uint8)
    for packed, bit in ((_BITMAP, 1), (_CODES, 2)):
        per_byte = 8 // bit
        stored = code if packed == _CODES else torch.ones_like(code)
        dense = torch.zeros(blocks * BLOCK // per_byte, dtype=torch.int64, device=device)
        dense.index_add_(0, at // per_byte, stored << bit * (i % per_byte))
        of_kind = which == packed
        index[of_kind] = dense.view(blocks, BLOCK // per_byte)[owner[of_kind], place[of_kind]].to(torch.uint8)
    return _uint16(heads), index, data[at[(kind[block] != _CODES) | (code == _VALUE)]]


def _uint16(x: Tensor) -> Tensor:
    return ((x ^ 0x8000) - 0x8000).to(torch.int16).view(torch.uint16)


def _decode(numel: int, heads: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of all elements, uint8 [numel], 3 for every value; and which blocks do not fit, bool [blocks]."""
    n, kind, escapes, size = _fields(numel, heads)
    blocks, length = len(heads), _lengths(numel, len(heads), heads.device)
    owner, place, which = _bytes_of(kind, size)
    bad = (kind != _GAPS) & (escapes != 0)
    byte = index.long()
    parts = []  # (block, index in it, code)

    of_kind = which == _GAPS
    gap, block = byte[of_kind], owner[of_kind]
    steps = torch.where(gap == 255, 255, gap + 1)
    total = _sum_by(block, steps, blocks)
    at = steps.cumsum(0) - (total.cumsum(0) - total)[block] - 1
    parts.append((block[gap != 255], at[gap != 255], torch.full_like(gap[gap != 255], _VALUE)))
    ends = place[of_kind] == size[block] - 1
    bad[block[ends & (gap == 255)]] = True

    of_kind = which == _INDICES
    low, high = byte[of_kind].view(-1, 2).unbind(1)
    at, block = low | high << 8, owner[of_kind][::2]
    bad[block[1:][(block[1:] == block[:-1]) & (at[1:] <= at[:-1])]] = True
    parts.append((block, at, torch.full_like(at, _VALUE)))

    for packed, bit in ((_BITMAP, 1), (_CODES, 2)):
        of_kind, per_byte = which == packed, 8 // bit
        lanes = torch.arange(per_byte, device=heads.device)
        code = byte[of_kind][:, None] >> bit * lanes & (1 << bit) - 1
        at, block = place[of_kind][:, None] * per_byte + lanes, owner[of_kind][:, None].expand_as(code)
        parts.append((block[code != 0], at[code != 0], code[code != 0] if bit == 2 else code[code != 0] * _VALUE))

    block, at, code = map(torch.cat, zip(*parts, strict=True))
    bad |= _sum_by(block, code == _VALUE, blocks) != n
    bad[block[at >= length[block]]] = True
    codes = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=heads.device)
    codes[block * BLOCK + at.clamp(max=BLOCK - 1)] = code.to(torch.uint8)
    return codes[:numel], bad
