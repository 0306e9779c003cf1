"""Packed masks: bit i of int32 word w is element 32w+i.  Every mask and change map of the package has this layout.

Beside them, what ops do with bits where csrc/ is not: numbers as integers, and SplitMix64.
"""

import torch

__all__ = ["pack", "unpack"]

# Bytes are packed and unpacked eight at a time as int64, so byte order matters: little-endian, as every host we run on.
# Multiplying by this moves the low bit of byte i to bit 56+i; no two of the 64 partial products meet, so nothing carries.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101  # a byte into all eight bytes
_DIAGONAL = 0x8040201008040201 - (1 << 64)  # bit i of byte i, as the signed integer torch wants


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor of any shape into int32 words ``[ceil(numel / 32)]``; the tail bits of the last word are 0."""
    if mask.dtype is not torch.bool:
        raise TypeError(f"bits.pack: mask must be a bool tensor, got {mask.dtype}")
    flat = mask.reshape(-1)
    if pad := -flat.numel() % 32:
        flat = torch.cat([flat, flat.new_zeros(pad)])
    elif flat.data_ptr() % 8:  # a slice that starts off an int64 boundary
        flat = flat.clone()
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The bool tensor of ``shape`` whose packed form is ``words`` (int32 ``[ceil(numel / 32)]``)."""
    if words.dtype is not torch.int32:
        raise TypeError(f"bits.unpack: words must be int32, got {words.dtype}")
    numel = torch.Size(shape).numel()
    if words.numel() != (numel + 31) // 32:
        raise ValueError(f"bits.unpack: shape {tuple(shape)} needs {(numel + 31) // 32} words, got {words.numel()}")
    byte = words.contiguous().view(torch.uint8).view(-1).to(torch.int64)
    spread = byte.mul_(_REPEAT).bitwise_and_(_DIAGONAL)  # byte i: 0 or 1 << i; adding 0x7F lifts what is not 0 to bit 7
    ones = spread.add_(0x7F * _REPEAT).bitwise_right_shift_(7).bitwise_and_(_REPEAT)
    return ones.view(torch.bool)[:numel].view(shape)


def popcount(words: torch.Tensor) -> torch.Tensor:
    """int64: how many bits of each int32 word are set."""
    x = words.long() & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101 >> 24) & 0xFF


def bitcast(t: torch.Tensor) -> torch.Tensor:
    """A view of t as signed integers of its width, of 16, 32 or 64 bits."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def wrap_int64(n: int) -> int:
    """n modulo 2**64 as int64 has it: the sign of torch's scalars."""
    return (n + 2**63) % 2**64 - 2**63


def logical_shift_right(t: torch.Tensor, by: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """int64 t >> by, filled with zeros: torch shifts copies of the sign in."""
    shifted = torch.bitwise_right_shift(t, by, out=out)
    return shifted.bitwise_and_((1 << (64 - by)) - 1) if by else shifted


GOLDEN_GAMMA = wrap_int64(0x9E3779B97F4A7C15)
_ROUNDS = ((30, wrap_int64(0xBF58476D1CE4E5B9)), (27, wrap_int64(0x94D049BB133111EB)))


def splitmix64_(z: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") of int64 z, in place: number i of
    the sequence that starts at a seed is splitmix64(seed + (i + 1) GOLDEN_GAMMA).  ``scratch``: memory like z.
    """
    for shift, factor in _ROUNDS:
        z.bitwise_xor_(logical_shift_right(z, shift, scratch)).mul_(factor)
    return z.bitwise_xor_(logical_shift_right(z, 31, scratch))
