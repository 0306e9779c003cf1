"""One AdamW step of many parameters: torch.ops.lowrank.adamw (csrc/adamw), and the same in PyTorch where it is not built.

Lists of tensors, one entry per parameter; ``masters``, ``masks``, ``offsets`` and ``changes`` may be empty, or have entries
without elements for parameters that have none.  ``scalars``: grad_scale, 1 - beta1, beta2, 1 - beta2, 1 - lr wd,
lr / (1 - beta1^t), sqrt(1 - beta2^t), eps.  Everything is written in place.

Files: lowrank/optim.py, csrc/adamw.*; tests/test_optim.py; bench adamw.
"""

import torch
from torch import Tensor

from .. import bits
from ._boundary import was_written
from ._dispatch import in_csrc

BLOCK = 1024  # elements per entry of offsets: csrc/adamw.h's

_lib = torch.library.Library("lowrank", "FRAGMENT")
_lib.define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters,"
    " Tensor[] masks, Tensor[] offsets, Tensor(e!)[] changes, int[] firsts, int[] streams, float[] scalars, int seed,"
    " int step, bool stochastic) -> ()"
)


@torch.library.register_fake("lowrank::adamw", lib=_lib)
def _(*args):
    pass


def step(params: list[Tensor], *args) -> None:
    """All on one device, of one dtype, contiguous, and checked by the caller (lowrank/optim.py)."""
    if not in_csrc(params[0], "adamw"):
        return _in_torch(params, *args)
    torch.ops.lowrank.adamw.default(params, *args)
    was_written(*params, *args[1], *args[2], *args[3], *args[6])


def block_offsets(words: Tensor, numel: int) -> Tensor:
    """int64 [ceil(numel / 1024) + 1]: how many mask bits are set before each block, and in all."""
    counts = bits.popcount(words)
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % 32)).view(-1, 32).sum(1)
    blocks = -(-numel // BLOCK)
    return torch.nn.functional.pad(counts[:blocks].cumsum(0), (1, 0))


def _in_torch(
    params, grads, ms, vs, masters, masks, offsets, changes, firsts, streams, scalars, seed, step, stochastic
) -> None:
    for i, (p, g, m, v) in enumerate(zip(params, grads, ms, vs, strict=True)):
        if p.numel() == 0:
            continue
        entry = [lst[i] if lst and lst[i].numel() else None for lst in (masters, masks, offsets, changes)]
        master, mask, offset, changed = entry
        active = None if mask is None else bits.unpack(mask, p.shape)
        acc_dtype = torch.float64 if p.dtype is torch.float64 else torch.float32
        x = p.to(acc_dtype, copy=True)
        if master is not None:  # where it is not the stored number's any more, somebody has replaced that
            x = torch.where(bits.bitcast(master.to(p.dtype)) == bits.bitcast(p), master, x)
        mi, vi = m, v
        if offset is not None:
            mi, vi = (torch.zeros(p.shape, dtype=acc_dtype, device=p.device).masked_scatter_(active, s) for s in (m, v))
        elif active is not None:
            mi, vi = m.clone(), v.clone()
        _element(x, g.to(acc_dtype), mi, vi, scalars)
        if stochastic and p.dtype in (torch.bfloat16, torch.float16):
            fresh = round_stochastically(x, p.dtype, firsts[i], streams[i], seed, step)
        else:
            fresh = x.to(p.dtype)
        if active is not None:
            fresh = torch.where(active, fresh, p)
            if master is not None:
                x = torch.where(active, x, master)
            if offset is not None:
                m.copy_(mi[active]), v.copy_(vi[active])
            else:
                m.copy_(torch.where(active, mi, m)), v.copy_(torch.where(active, vi, v))
        if changed is not None:
            changed |= bits.pack(bits.bitcast(fresh) != bits.bitcast(p))
        p.copy_(fresh)
        if master is not None:
            master.copy_(x)


def _element(p, g, m, v, scalars) -> None:
    grad_scale, lerp, beta2, beta2_rest, decay, step_size, bias2_sqrt, eps = scalars
    g = g * grad_scale
    m.lerp_(g, lerp)
    v.mul_(beta2).addcmul_(g, g, value=beta2_rest)
    p.mul_(decay).addcdiv_(m, v.sqrt().div_(bias2_sqrt).add_(eps), value=-step_size)


def random_bits(numel: int, first: int, stream: int, seed: int, step: int, device=None) -> Tensor:
    """The 16-bit random numbers of a step, int64 [numel]: Philox4x32-10, one call for eight elements (csrc/adamw.h)."""
    group = torch.arange(first // 8, -(-(first + numel) // 8), device=device)
    low = 0xFFFFFFFF
    c = [group & low, group >> 32, torch.full_like(group, stream & low), torch.full_like(group, step & low)]
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [b_high ^ c[1] ^ k0, b_low, a_high ^ c[3] ^ k1, a_low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    halves = [half for word in c for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).view(-1)[:numel]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a * b, both below 2^32, in int64 without overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high  # below 2^49
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def round_stochastically(x: Tensor, dtype: torch.dtype, first: int, stream: int, seed: int, step: int) -> Tensor:
    """fp32 x in bf16 or fp16, up or down with the probability of its distance from the other neighbour."""
    random = random_bits(x.numel(), first, stream, seed, step, x.device).view(x.shape)
    word = bits.bitcast(x).long() & 0xFFFFFFFF
    rest, nearest = word & 0x7FFFFFFF, x.to(dtype)
    if dtype is torch.bfloat16:
        rounded, limit = (word + random) >> 16, 0x7F7F0000
    else:
        scaled = torch.where(rest < 0x38800000, x.abs() * 2.0**24, 0)
        whole = scaled.floor()
        subnormal = whole.long() + ((scaled - whole) * 65536 > (65535 - random).float() + 0.5)
        normal = (rest - (112 << 23) + (random >> 3)) >> 13
        rounded, limit = word >> 16 & 0x8000 | torch.where(rest < 0x38800000, subnormal, normal), 0x477FE000
    rounded = ((rounded & 0xFFFF) ^ 0x8000) - 0x8000  # as int16
    return torch.where(rest >= limit, nearest, rounded.to(torch.int16).view(dtype))
