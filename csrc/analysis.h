// What a fine-tuning changed, for host and device: differences counted, the largest selected, masks intersected.
//
// diff_stats    d = new - old in fp32, from exactly widened values.  A block of 4,096 elements is 16 rows of 256 lanes: a
//               lane adds its squares in fp64 row by row, then lanes are halved, i += i + 128, 64 ... 1.  d² is exact in fp64.
// topk_mask     the fp32 bits of |score| as integers: histograms of 11 bits at a time find the key T of the last element
//               taken; among elements with that key those of the smallest hash are taken, found in the same way.
// mask_overlap  popcounts of every pair.
//
// Floor: bytes.  16 bits: 4 an element for diff_stats and for each pass of topk_mask over a pair.
#pragma once

#include "splitmix64.h"

namespace lowrank {

constexpr int DIFF_BLOCK = 4096, DIFF_LANES = 256, DIFF_COUNTS = 4, DIFF_SUMS = 3;
constexpr int DIGIT_BINS = 2048, NAN_BIN = DIGIT_BINS;  // 11 bits; and how many scores are NaN
constexpr int SELECT_BLOCK = 1024;
constexpr int OVERLAP_MASKS = 32, OVERLAP_WORDS = 256;  // in one call, and in a cache at a time

struct DiffTask {
  const void *before, *after;
  int64_t n;
  float tol, rel;
  uint32_t ulp;
  int64_t* counts;  // [blocks, 4]: changed; beyond tol, rel, ulp
  double* sums;     // [blocks, 3]: the largest |d|; sums of d² and of old²
};

struct SelectTask {
  const void *before, *after;  // the score is |after - before|, or |after| where before is null
  int64_t n, first;            // elements, and the index of the first in the whole tensor
  uint64_t seed, hash;         // of the tensor's name; the bits above ``above``, or the last hash taken
  uint32_t key;                // the bits above ``above``; or, of ties, all of them
  int above, shift;            // which digit is counted: bits shift ... above - 1 of the key, or of the hash of ties
  bool tied;
};

struct OverlapTask {
  const uint32_t* mask[OVERLAP_MASKS];
  int count;
  int64_t words;
  int64_t* counts;  // [count, count], upper triangle: to be added to
};

namespace {

struct Diff {
  uint32_t flags;  // a byte each, 0 or 1: changed; beyond tol, rel, ulp
  float d, old;    // |d| and |old|, 0 for NaN
};

// Distance of two stored numbers in their order; -0 is +0.
template <class T>
LOWRANK_HD uint32_t steps_between(uint32_t x, uint32_t y) {
  constexpr int SIGN = 8 * sizeof(typename T::Bits) - 1;
  const int32_t s = -int32_t(x >> SIGN), t = -int32_t(y >> SIGN);  // -1 below zero
  const int32_t i = (int32_t(x & ((1u << SIGN) - 1)) ^ s) - s, j = (int32_t(y & ((1u << SIGN) - 1)) ^ t) - t;
  return uint32_t(i > j ? i : j) - uint32_t(i > j ? j : i);
}

LOWRANK_HD uint32_t magnitude(float x) { return bit_cast<uint32_t>(x) & 0x7fffffff; }  // the order of |x|; NaN is last

constexpr uint32_t INFINITE = 0x7f800000, LARGEST = INFINITE - 1;

// 1 where a > b, both below 2^31: in vectors arithmetic is cheaper than comparing.
LOWRANK_HD uint32_t above(uint32_t a, uint32_t b) { return (b - a) >> 31; }

// Equal infinities, and NaN in both, differ by 0; NaN in one is beyond everything.  Bits of -0 and +0 differ, by 0.
template <class T>
LOWRANK_HD Diff difference(uint32_t before, uint32_t after, float tol, float rel, uint32_t ulp) {
  const float x = T::value(before), y = T::value(after);
  const uint32_t old = magnitude(x), changed = before != after ? 1 : 0, x_nan = above(old, INFINITE);
  const uint32_t differs = changed & ~(x_nan & above(magnitude(y), INFINITE));
  const uint32_t d = magnitude(y - x) & -differs, nan = above(d, INFINITE);
  const uint32_t allowed = magnitude(rel * x), limit = allowed < LARGEST ? allowed : LARGEST;  // infinite: beyond
  const uint32_t far = steps_between<T>(before, after) > ulp ? differs : 0;
  return {changed | above(d, magnitude(tol)) << 8 | above(d, limit) << 16 | (far | nan) << 24,
          bit_cast<float>(d & (nan - 1)), bit_cast<float>(old & (x_nan - 1))};
}

// sum + x², where x² is exact: the bits are those of a multiplication and an addition.
LOWRANK_HD double add_square(double sum, float x) {
#if defined(__FMA__) || defined(__CUDA_ARCH__)
  return __builtin_fma(double(x), double(x), sum);
#else
  return sum + double(x) * double(x);
#endif
}

// |score| as an integer of the same order; above 0x7f800000 it is NaN.
template <class T, bool PAIR>
LOWRANK_HD uint32_t score_key(typename T::Bits before, typename T::Bits after) {
  const float x = PAIR ? T::value(after) - T::value(before) : T::value(after);
  return magnitude(x);
}

// Number ``index`` of the sequence that starts at ``seed``.
LOWRANK_HD uint64_t hash_of(uint64_t seed, uint64_t index) { return splitmix64(seed + (index + 1) * GOLDEN_GAMMA); }

LOWRANK_HD int digit(uint64_t bits, const SelectTask& t) { return int(bits >> t.shift & ((1u << (t.above - t.shift)) - 1)); }

LOWRANK_HD bool hash_is_under(uint64_t hash, const SelectTask& t) { return t.above == 64 || hash >> t.above == t.hash; }

LOWRANK_HD bool is_taken(uint32_t key, uint64_t index, const SelectTask& t) {
  return key > t.key || (key == t.key && hash_of(t.seed, index) <= t.hash);
}

}  // namespace
}  // namespace lowrank
