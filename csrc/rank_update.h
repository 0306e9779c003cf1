// out = round(W + B diag(m) A): the arithmetic, for host and device.  W, out [N, K], A [r, K], B [N, r], m [r] or one number.
//
//   acc = 0;  acc = fmaf(bm[n][j], a[j][k], acc) for j = 0, 1, ... r-1;  out = acc == 0 ? w : round_to_nearest_even(w + acc)
//
// bm = B m, rounded once to fp32; a: exact.  One chain of fused operations per element, whatever the tile, the vector
// width or the number of threads: the same bits everywhere.
//
// Floor: 4 bytes an element in 16 bits, 1/8 with the map of changed bits: 15.6 us (16.1) at 4096 x 4096 at 4.3 TB/s.
// 2r FLOPs an element: up to r = 16 or so they hide behind that, at r = 64 they take twice as long (67 TFLOP/s in fp32).
// A is read once per tile of rows, B once per tile of columns: with 64 x 256, r/8 bytes an element out of caches, in fp32.
#pragma once

#include "dtype.h"

namespace lowrank {

struct RankUpdate {
  const void *w, *a, *b;
  const float* m;
  void* out;
  void* back;        // null, or what out becomes when the same update is taken off it; only beside stats
  uint8_t* changed;  // null, or bit i % 8 of byte i / 8: whether element i of the row-major out (or of back) is not w's bits
  double* stats;     // null, or zeros [tiles(), 3] to fill with partial sums of: delta², delta (out − w), changed elements
  int64_t N, K, r, m_stride;
  Dtype w_type, a_type, b_type;
};

constexpr int TILE_ROWS = 64;  // a multiple of 8: a tile of whole rows is then whole bytes of the map
constexpr int TILE_COLUMNS = 256;

namespace {

LOWRANK_HD float scaled_b(const RankUpdate& u, int64_t n, int64_t j) {
  return load(u.b, u.b_type, n * u.r + j) * u.m[j * u.m_stride];
}

LOWRANK_HD float add_rank(float acc, float bm, float a) { return __builtin_fmaf(bm, a, acc); }

template <class T>
LOWRANK_HD typename T::Bits add_to_weight(typename T::Bits w, float delta) {
  const typename T::Bits sum = T::round(T::value(w) + delta);
  return delta == 0 ? w : sum;  // so that a zero update keeps -0, and every NaN's payload
}

// The terms of the report's two sums.
LOWRANK_HD double asked(float delta) { return double(delta) * delta; }

template <class T>
LOWRANK_HD double done(float delta, typename T::Bits w, typename T::Bits out) {
  return delta * (double(T::value(out)) - T::value(w));
}

}  // namespace

}  // namespace lowrank
