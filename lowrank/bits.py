"""Packed masks: bit i of int32 word w is element 32w+i.  Every mask and change map of the package has this layout."""

import torch

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
    spread = byte.mul_(_REPEAT).bitwise_and_(
        _DIAGONAL
    )  # byte i is 0 or 1 << i; adding 0x7F lifts what is not 0 to bit 7
    ones = spread.add_(0x7F * _REPEAT).bitwise_right_shift_(7).bitwise_and_(_REPEAT)
    return ones.view(torch.bool)[:numel].view(shape)
