"""Device functions that several kernels share: the dot, dropout's decisions, unpacking bits."""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32.  One of a, b may be fp32 over the other's 16 bits: nothing of it is lost.

    An fp32 operand over bf16 is split into three bf16 parts (8 + 8 + 8 bits of mantissa), so that three MMAs give fp32's
    result.  Over fp16, which TF32 holds exactly, TF32 with its own three-way split does (PRECISION "tf32x3").  Their sum
    is added to acc outside the MMA, because tensor cores truncate when they accumulate (Ootomo and Yokota 2022, arXiv
    2203.03341).
    """
    if a.dtype == b.dtype:
        acc = _mma(a, b, acc, PRECISION)
    elif a.dtype == tl.float16 or b.dtype == tl.float16:
        zero = tl.zeros(acc.shape, tl.float32)
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), zero, input_precision=PRECISION)
    elif a.dtype == tl.float32:
        hi, mid, lo = _split(a)
        part = _mma(lo, b, tl.zeros(acc.shape, tl.float32), PRECISION)
        acc += _mma(hi, b, _mma(mid, b, part, PRECISION), PRECISION)
    else:
        hi, mid, lo = _split(b)
        part = _mma(a, lo, tl.zeros(acc.shape, tl.float32), PRECISION)
        acc += _mma(a, hi, _mma(a, mid, part, PRECISION), PRECISION)
    return acc


@triton.jit
def cast(t, DTYPE: tl.constexpr):
    """t in DTYPE, rounded to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE and t.dtype == tl.float32:  # where t.to(bf16) truncates
        bits = t.to(tl.uint32, bitcast=True)
        bits = tl.where(t == t, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return t.to(DTYPE)


@triton.jit
def _split(t):
    hi = cast(t, tl.bfloat16)
    rest = t - hi.to(tl.float32)
    mid = cast(rest, tl.bfloat16)
    return hi, mid, cast(rest - mid.to(tl.float32), tl.bfloat16)


@triton.jit
def _mma(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:  # whose tl.dot multiplies bf16's bit patterns as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# Masks are handled by the byte, 8 columns: what one thread holds of a row of 16-bit elements, so that no layout is converted.


@triton.jit
def draw(base, threshold, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keep bits int32 [BLOCK_M, BLOCK_K / 8], each 0..255, for columns k..: bit i of a byte is its column i.

    ops/dropout.py's function.  base: uint64 [BLOCK_M], seed + 0x9E3779B97F4A7C15 * (index of the row's first draw).
    """
    steps = (k // 4 + 2 * tl.arange(0, BLOCK_K // 8)).to(tl.uint64) * 0x9E3779B97F4A7C15
    start = base[:, None] + steps[None, :]
    return _decide(start, threshold) | (_decide(start + 0x9E3779B97F4A7C15, threshold) << 4)


@triton.jit
def _decide(z, threshold):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    # four 16-bit decisions, compared in the upper half of an int32: what lies below cannot change the order
    first, second = z.to(tl.int32), (z >> 32).to(tl.int32)
    bits = tl.where((first << 16) > threshold, 1, 0) | tl.where(first > threshold, 2, 0)
    return bits | tl.where((second << 16) > threshold, 4, 0) | tl.where(second > threshold, 8, 0)


@triton.jit
def words(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 [BLOCK_M, BLOCK_K / 32] of bytes [BLOCK_M, BLOCK_K / 8]."""
    return tl.sum(tl.reshape(bits, (BLOCK_M, BLOCK_K // 32, 4)) << (8 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def unpack(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool [BLOCK_M, BLOCK_K] of bytes [BLOCK_M, BLOCK_K / 8]."""
    return tl.reshape((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (BLOCK_M, BLOCK_K)) != 0
