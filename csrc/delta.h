// A sparse delta of a tensor: which elements changed, and their new bits, in blocks of 1024 elements; for host and device.
//
//   heads   a block's u16: n in bits 0-10, kind in 11-12, escapes in 13-15
//   index   kind 0  n + escapes bytes: unchanged elements before each changed one; 255 skips 255 and goes on (an escape)
//           kind 1  2n bytes: u16 indices in the block, little-endian
//           kind 2  ceil(length / 8) bytes: a bitmap
//           kind 3  ceil(length / 4) bytes: 2-bit codes, 0 the same, 1 the next number, 2 the one before, 3 a value
//   values  n elements: of the changed ones, of kind 3 those with code 3
//
// The smallest kind wins, ties to the lower; kind 3 only where asked for, against index and values together.  Where a block
// starts in index and values follows from the heads: a cumsum, between the passes "size" and "encode".
//
// Floor: bytes.  Bitmap, heads, index and values once; the tensor where it changed (a pass over both, from old and new).
#pragma once

#include "splitmix64.h"

namespace lowrank {

constexpr int DELTA_BLOCK = 1024;

enum class DeltaPass { map, size, encode, check, apply, mark, fingerprint };  // lowrank/ops/delta.py's _PASSES

struct Delta {           // null: what the pass does not use
  void* data;            // [n], 16 or 32 bits each: new, or what apply writes
  const void* old;       // [n]: map; size and encode with codes
  uint8_t* changed;      // bit i % 8 of byte i / 8, in whole words; written by map and, from zeros, by mark
  uint16_t* heads;       // [blocks]
  uint8_t* index;
  void* values;
  const int64_t* starts;  // [2, blocks + 1]: of each block in index, and in values
  int64_t* found;         // [blocks]: fingerprint's sums; check's 1 for a block that does not fit
  int64_t n, blocks;
};

namespace {

enum Kind { GAPS, INDICES, BITMAP, CODES };
constexpr int SAME = 0, NEXT = 1, BEFORE = 2, VALUE = 3;  // codes
constexpr int ESCAPE = 255;

LOWRANK_HD int lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

LOWRANK_HD int ones(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

LOWRANK_HD int block_length(const Delta& d, int64_t block) {
  const int64_t left = d.n - block * DELTA_BLOCK;
  return left < DELTA_BLOCK ? int(left) : DELTA_BLOCK;
}

// Bits i ... i + 31 of a block's bitmap; those after its end are 0 whatever is there.
LOWRANK_HD uint32_t changed_word(const Delta& d, int64_t block, int i, int length) {
  uint32_t word;
  memcpy(&word, __builtin_assume_aligned(d.changed + block * (DELTA_BLOCK / 8) + i / 8, 4), 4);
  return length - i < 32 ? word & ((1u << (length - i)) - 1) : word;
}

template <class Visit>
LOWRANK_HD void each_changed(const Delta& d, int64_t block, Visit visit) {
  const int length = block_length(d, block);
#ifdef __CUDA_ARCH__
  for (int i = 0; i < length; i += 32)
    for (uint32_t word = changed_word(d, block, i, length); word; word &= word - 1) visit(i + lowest_bit(word));
#else  // first all of them, two per word whatever it is: a branch on each sparse word would be mispredicted
  constexpr uint32_t SENTINEL = 1u << 31;
  uint16_t at[DELTA_BLOCK + 2];
  int n = 0;
  for (int i = 0; i < length; i += 32) {
    uint32_t word = changed_word(d, block, i, length);
    const int count = ones(word);
    at[n] = uint16_t(i + lowest_bit(word | SENTINEL)), word &= word - 1;
    at[n + 1] = uint16_t(i + lowest_bit(word | SENTINEL)), word &= word - 1;
    for (int j = 2; j < count; ++j) at[n + j] = uint16_t(i + lowest_bit(word)), word &= word - 1;
    n += count;
  }
  for (int j = 0; j < n; ++j) visit(int(at[j]));
#endif
}

// The place of a number among all of its dtype, NaN at both ends; and back.
template <class Bits>
LOWRANK_HD Bits order_of(Bits bits) {
  constexpr Bits TOP = Bits(1) << (8 * sizeof(Bits) - 1);
  return bits & TOP ? ~bits : bits | TOP;
}

template <class Bits>
LOWRANK_HD Bits stepped(Bits bits, int code) {
  constexpr Bits TOP = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits order = order_of(bits) + (code == NEXT ? 1 : -1);
  return order & TOP ? order ^ TOP : Bits(~order);
}

template <class Bits>
LOWRANK_HD int code_of(Bits old, Bits fresh) {
  const Bits step = order_of(fresh) - order_of(old);
  return step == 0 ? SAME : step == 1 ? NEXT : step == Bits(-1) ? BEFORE : VALUE;
}

// The head of a block.
template <class Bits>
LOWRANK_HD uint16_t delta_size(const Delta& d, int64_t block) {
  const int length = block_length(d, block);
  int n = 0, escapes = 0, next = 0;
  each_changed(d, block, [&](int i) { escapes += (i - next) / ESCAPE, next = i + 1, ++n; });
  int kind = GAPS, bytes = n + escapes;
  if (2 * n < bytes) kind = INDICES, bytes = 2 * n;
  if ((length + 7) / 8 < bytes) kind = BITMAP, bytes = (length + 7) / 8;
  if (d.old) {
    constexpr int WIDTH = sizeof(Bits);
    const auto* const old = static_cast<const Bits*>(d.old) + block * DELTA_BLOCK;
    const auto* const data = static_cast<const Bits*>(d.data) + block * DELTA_BLOCK;
    int values = 0;
    each_changed(d, block, [&](int i) { values += code_of(old[i], data[i]) == VALUE; });
    if ((length + 3) / 4 + WIDTH * values < bytes + WIDTH * n) return uint16_t(values | CODES << 11);
  }
  return uint16_t(n | kind << 11 | (kind == GAPS ? escapes : 0) << 13);
}

template <class Bits>
LOWRANK_HD void delta_encode(const Delta& d, int64_t block) {
  const int length = block_length(d, block), kind = d.heads[block] >> 11 & 3;
  const auto* const data = static_cast<const Bits*>(d.data) + block * DELTA_BLOCK;
  const auto* const old = static_cast<const Bits*>(d.old) + (d.old ? block * DELTA_BLOCK : 0);
  uint8_t* index = d.index + d.starts[block];
  auto* values = static_cast<Bits*>(d.values) + d.starts[d.blocks + 1 + block];
  if (kind == BITMAP)
    for (int i = 0; i < length; i += 8) index[i / 8] = uint8_t(changed_word(d, block, i & ~31, length) >> (i & 31));
  if (kind == CODES)
    for (int i = 0; i < length; i += 4) index[i / 4] = 0;
  int next = 0;
  each_changed(d, block, [&](int i) {
    if (kind == GAPS) {
      int gap = i - next;
      for (; gap >= ESCAPE; gap -= ESCAPE) *index++ = ESCAPE;
      *index++ = uint8_t(gap);
      next = i + 1;
    } else if (kind == INDICES) {
      *index++ = uint8_t(i), *index++ = uint8_t(i >> 8);
    } else if (kind == CODES) {
      const int code = code_of(old[i], data[i]);
      index[i / 4] |= uint8_t(code << 2 * (i % 4));
      if (code != VALUE) return;
    }
    *values++ = data[i];
  });
}

// visit(i, code) of each element of a block that its delta has.  Unless check has passed, i may be beyond the end.
template <class Visit>
LOWRANK_HD void each_stored(const Delta& d, int64_t block, Visit visit) {
  const int length = block_length(d, block), head = d.heads[block], n = head & 0x7ff;
  const uint8_t* const index = d.index + d.starts[block];
  switch (head >> 11 & 3) {
    case GAPS:
      for (int j = 0, i = 0; j < n + (head >> 13); ++j) {
        i += index[j];
        if (index[j] != ESCAPE) visit(i++, VALUE);
      }
      break;
    case INDICES:
      for (int j = 0; j < n; ++j) visit(index[2 * j] | index[2 * j + 1] << 8, VALUE);
      break;
    case BITMAP:
      for (int i = 0; i < length; i += 8)
        for (uint32_t byte = index[i / 8]; byte; byte &= byte - 1) visit(i + lowest_bit(byte), VALUE);
      break;
    default:
      for (int i = 0; i < (length + 3) / 4 * 4; ++i)
        if (const int code = index[i / 4] >> 2 * (i % 4) & 3) visit(i, code);
  }
}

// Whether apply and mark stay inside the block and use up its values.  Its bytes are in index: the totals fit.
LOWRANK_HD bool delta_fits(const Delta& d, int64_t block) {
  const int length = block_length(d, block), head = d.heads[block], n = head & 0x7ff, escapes = head >> 13;
  const bool gaps = (head >> 11 & 3) == GAPS;
  if (escapes && !gaps) return false;
  if (gaps && n + escapes && d.index[d.starts[block] + n + escapes - 1] == ESCAPE) return false;
  int next = 0, values = 0;
  bool fits = true;
  each_stored(d, block, [&](int i, int code) {
    fits &= i >= next && i < length;
    next = i + 1, values += code == VALUE;
  });
  return fits && values == n;
}

template <class Bits>
LOWRANK_HD void delta_apply(const Delta& d, int64_t block) {
  auto* const data = static_cast<Bits*>(d.data) + block * DELTA_BLOCK;
  const auto* values = static_cast<const Bits*>(d.values) + d.starts[d.blocks + 1 + block];
  each_stored(d, block, [&](int i, int code) { data[i] = code == VALUE ? *values++ : stepped(data[i], code); });
}

LOWRANK_HD void delta_mark(const Delta& d, int64_t block) {
  uint8_t* const changed = d.changed + block * (DELTA_BLOCK / 8);
  each_stored(d, block, [&](int i, int) { changed[i / 8] |= uint8_t(1 << i % 8); });
}

// SplitMix64's mixer of an element's place and bits.
LOWRANK_HD uint64_t delta_hash(uint64_t place, uint64_t bits) { return splitmix64((place + 1) * GOLDEN_GAMMA + bits); }

}  // namespace
}  // namespace lowrank
