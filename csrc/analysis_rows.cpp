// The loops of analysis.h on a CPU, block by block in the L1 cache, compiled once per instruction set (-DISA=...): no torch,
// no std.
#include "analysis.h"

namespace lowrank {
namespace {

template <class T>
inline void diff_block(const DiffTask& t, int64_t index) {
  using Bits = typename T::Bits;
  const int64_t at = index * DIFF_BLOCK, n = t.n - at;
  auto *before = static_cast<const Bits*>(t.before) + at, *after = static_cast<const Bits*>(t.after) + at;
  Bits padded[2][DIFF_BLOCK];
  if (n < DIFF_BLOCK) {  // zeros, which do not differ
    memset(padded, 0, sizeof(padded));
    memcpy(padded[0], before, n * sizeof(Bits)), memcpy(padded[1], after, n * sizeof(Bits));
    before = padded[0], after = padded[1];
  }
  alignas(64) double squares[DIFF_LANES] = {}, olds[DIFF_LANES] = {};
  alignas(64) float d[DIFF_LANES], old[DIFF_LANES], most[DIFF_LANES] = {};
  alignas(64) uint32_t flags[DIFF_LANES] = {};  // 16 rows do not fill a byte
  const float tol = t.tol, rel = t.rel;
  const uint32_t ulp = t.ulp;
  for (int row = 0; row < DIFF_BLOCK; row += DIFF_LANES) {
    for (int i = 0; i < DIFF_LANES; ++i) {
      const Diff diff = difference<T>(before[row + i], after[row + i], tol, rel, ulp);
      flags[i] += diff.flags;
      most[i] = diff.d > most[i] ? diff.d : most[i];
      d[i] = diff.d, old[i] = diff.old;
    }
    for (int i = 0; i < DIFF_LANES; ++i) squares[i] = add_square(squares[i], d[i]), olds[i] = add_square(olds[i], old[i]);
  }
  int64_t* const counts = t.counts + DIFF_COUNTS * index;
  for (int c = 0; c < DIFF_COUNTS; ++c) {
    uint32_t sum = 0;
    for (int i = 0; i < DIFF_LANES; ++i) sum += flags[i] >> 8 * c & 0xff;
    counts[c] = sum;
  }
  for (int half = DIFF_LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) {
      squares[i] += squares[i + half], olds[i] += olds[i + half];
      most[i] = most[i] > most[i + half] ? most[i] : most[i + half];
    }
  double* const sums = t.sums + DIFF_SUMS * index;
  sums[0] = most[0], sums[1] = squares[0], sums[2] = olds[0];
}

// A block's keys; returns how many there are.
template <class T>
inline int score_keys(const SelectTask& t, int64_t at, uint32_t* __restrict keys) {
  using Bits = typename T::Bits;
  const int n = t.n - at < SELECT_BLOCK ? t.n - at : SELECT_BLOCK;
  const auto *before = static_cast<const Bits*>(t.before), *after = static_cast<const Bits*>(t.after) + at;
  if (before)
    for (int i = 0; i < n; ++i) keys[i] = score_key<T, true>(before[at + i], after[i]);
  else
    for (int i = 0; i < n; ++i) keys[i] = score_key<T, false>(0, after[i]);
  return n;
}

// Which of a block's n keys equal ``key`` in the bits above ``shift``; returns how many.
inline int indices_of(const uint32_t* keys, int n, uint32_t key, int shift, uint32_t* __restrict indices) {
  uint8_t matches[SELECT_BLOCK + 8];
  for (int i = 0; i < n; ++i) matches[i] = keys[i] >> shift == key;
  memset(matches + n, 0, 8);
  int count = 0;
  for (int i = 0; i < n; i += 8) {
    uint64_t eight;
    memcpy(&eight, matches + i, 8);
    if (eight == 0) continue;
    for (int j = 0; j < 8; ++j) indices[count] = i + j, count += matches[i + j];
  }
  return count;
}

// Four tables, so that neighbours with one digit do not wait for each other.
template <class T>
inline void histogram_block(const SelectTask& task, int64_t index, uint32_t (*tables)[DIGIT_BINS + 1]) {
  const SelectTask t = task;  // which no write to a table can change
  uint32_t keys[SELECT_BLOCK], indices[SELECT_BLOCK + 1];
  const int64_t at = index * SELECT_BLOCK;
  const int n = score_keys<T>(t, at, keys);
  if (t.tied) {
    const int count = indices_of(keys, n, t.key, 0, indices);
    for (int j = 0; j < count; ++j) {
      const uint64_t hash = hash_of(t.seed, uint64_t(t.first + at) + indices[j]);
      if (hash_is_under(hash, t)) ++tables[j % 4][digit(hash, t)];
    }
  } else if (t.above < 31) {
    const int count = indices_of(keys, n, t.key, t.above, indices);
    for (int j = 0; j < count; ++j) ++tables[j % 4][digit(keys[indices[j]], t)];
  } else {
    uint32_t nans = 0;
    for (int i = 0; i < n; ++i) nans += above(keys[i], INFINITE);
    tables[0][NAN_BIN] += nans;
    for (int i = 0; i < n; ++i) indices[i] = keys[i] >> t.shift;
    int i = 0;
    for (; i + 4 <= n; i += 4)
      for (int j = 0; j < 4; ++j) ++tables[j][indices[i + j]];
    for (; i < n; ++i) ++tables[0][indices[i]];
  }
}

template <class T>
inline void emit_block(const SelectTask& t, int64_t index, uint8_t* bytes) {
  uint32_t keys[SELECT_BLOCK], indices[SELECT_BLOCK + 1];
  uint8_t selected[SELECT_BLOCK + 8];
  const int64_t at = index * SELECT_BLOCK;
  const int n = score_keys<T>(t, at, keys);
  memset(selected + n, 0, 8);
  for (int i = 0; i < n; ++i) selected[i] = keys[i] > t.key;
  const int count = indices_of(keys, n, t.key, 0, indices);
  for (int j = 0; j < count; ++j) selected[indices[j]] = is_taken(t.key, uint64_t(t.first + at) + indices[j], t);
  for (int i = 0; i < n; i += 8) {
    uint64_t eight;
    memcpy(&eight, selected + i, 8);
    bytes[(at + i) / 8] = eight * 0x0102040810204080 >> 56;  // little-endian: the low bit of byte i goes to bit 56 + i
  }
}

// In vectors without an instruction for it.
inline uint32_t popcount(uint32_t x) {
  x = x - (x >> 1 & 0x55555555);
  x = (x & 0x33333333) + (x >> 2 & 0x33333333);
  return ((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
}

}  // namespace

#define LOWRANK_JOIN(a, b) a##b
#define LOWRANK_NAMED(name, isa) LOWRANK_JOIN(name, isa)

// Blocks first to last of DIFF_BLOCK elements.
void LOWRANK_NAMED(diff_rows_, ISA)(const DiffTask& t, Dtype type, int64_t first, int64_t last) {
  for (int64_t index = first; index < last; ++index) switch (type) {
      case Dtype::bf16: diff_block<Bf16>(t, index); break;
      case Dtype::fp16: diff_block<Fp16>(t, index); break;
      default: diff_block<Fp32>(t, index);
    }
}

// Blocks first to last of SELECT_BLOCK elements, added to ``tables``.
void LOWRANK_NAMED(histogram_rows_, ISA)(const SelectTask& t, Dtype type, int64_t first, int64_t last,
                                         uint32_t (*tables)[DIGIT_BINS + 1]) {
  for (int64_t index = first; index < last; ++index) switch (type) {
      case Dtype::bf16: histogram_block<Bf16>(t, index, tables); break;
      case Dtype::fp16: histogram_block<Fp16>(t, index, tables); break;
      default: histogram_block<Fp32>(t, index, tables);
    }
}

void LOWRANK_NAMED(emit_rows_, ISA)(const SelectTask& t, Dtype type, int64_t first, int64_t last, uint8_t* bytes) {
  for (int64_t index = first; index < last; ++index) switch (type) {
      case Dtype::bf16: emit_block<Bf16>(t, index, bytes); break;
      case Dtype::fp16: emit_block<Fp16>(t, index, bytes); break;
      default: emit_block<Fp32>(t, index, bytes);
    }
}

// Blocks first to last of OVERLAP_WORDS words, added to counts [count, count].
void LOWRANK_NAMED(overlap_rows_, ISA)(const OverlapTask& t, int64_t first, int64_t last, int64_t* counts) {
  for (int64_t at = first * OVERLAP_WORDS; at < last * OVERLAP_WORDS; at += OVERLAP_WORDS) {
    const int n = t.words - at < OVERLAP_WORDS ? t.words - at : OVERLAP_WORDS;
    for (int i = 0; i < t.count; ++i)
      for (int j = i; j < t.count; ++j) {
        const uint32_t *const x = t.mask[i] + at, *const y = t.mask[j] + at;
        uint32_t sum = 0;
        for (int w = 0; w < n; ++w) sum += popcount(x[w] & y[w]);
        counts[i * t.count + j] += sum;
      }
  }
}

}  // namespace lowrank
