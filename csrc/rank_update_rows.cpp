// The tile loop of a CPU, compiled once per instruction set (-DISA=...): no torch, no std, so that nothing but this one
// function leaves the object.
#include "rank_update.h"

namespace lowrank {
namespace {

constexpr int STRIP = 512;  // columns at a time: their sums stay in the L1 cache, and so does A up to r = 16 or so

// delta[i][k] += the next RANKS products of ROWS rows, in order.
template <int ROWS, int RANKS>
inline void add_ranks(float (*__restrict delta)[STRIP], const float* bm, const float* __restrict a, int columns) {
  float b[ROWS][RANKS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < RANKS; ++j) b[i][j] = bm[j * TILE_ROWS + i];
  for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      float acc = delta[i][k];
#pragma GCC unroll 8
      for (int j = 0; j < RANKS; ++j) acc = add_rank(acc, b[i][j], a[j * STRIP + k]);
      delta[i][k] = acc;
    }
  }
}

struct Sums {
  double asked[8] = {}, done[8] = {};  // by column modulo 8, so that the vector width does not matter
  int64_t changed = 0;

  template <class T>
  void add(const float* delta, const typename T::Bits* w, const typename T::Bits* out, int columns) {
    int k = 0;
    for (; k + 8 <= columns; k += 8)
      for (int lane = 0; lane < 8; ++lane) {
        asked[lane] += lowrank::asked(delta[k + lane]);
        done[lane] += lowrank::done<T>(delta[k + lane], w[k + lane], out[k + lane]);
      }
    for (int lane = 0; k < columns; ++k, ++lane) {
      asked[lane] += lowrank::asked(delta[k]);
      done[lane] += lowrank::done<T>(delta[k], w[k], out[k]);
    }
    for (k = 0; k < columns; ++k) changed += w[k] != out[k];
  }
};

template <class T, int ROWS>
inline void rows(const RankUpdate& u, int64_t first, const float* bm, const float* a, int columns, Sums& sums) {
  float delta[ROWS][STRIP];
  memset(delta, 0, sizeof(delta));
  int64_t j = 0;
  for (; j + 8 <= u.r; j += 8) add_ranks<ROWS, 8>(delta, bm + j * TILE_ROWS, a + j * STRIP, columns);
  for (; j < u.r; ++j) add_ranks<ROWS, 1>(delta, bm + j * TILE_ROWS, a + j * STRIP, columns);
  for (int i = 0; i < ROWS; ++i) {
    const auto* w = static_cast<const typename T::Bits*>(u.w) + first + i * u.K;
    auto* __restrict out = static_cast<typename T::Bits*>(u.out) + first + i * u.K;
    for (int k = 0; k < columns; ++k) out[k] = add_to_weight<T>(w[k], delta[i][k]);
    if (u.back) {
      auto* __restrict back = static_cast<typename T::Bits*>(u.back) + first + i * u.K;
      for (int k = 0; k < columns; ++k) back[k] = add_to_weight<T>(out[k], -delta[i][k]);
    }
    if (u.stats) sums.add<T>(delta[i], w, out, columns);
  }
}

template <class T>
void tile(const RankUpdate& u, int64_t index, float* scratch) {
  const int64_t n0 = index * TILE_ROWS, count = u.N - n0 < TILE_ROWS ? u.N - n0 : TILE_ROWS;
  float *bm = scratch, *a = scratch + u.r * TILE_ROWS;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < u.r; ++j) bm[j * TILE_ROWS + i] = scaled_b(u, n0 + i, j);

  Sums sums;
  for (int64_t k0 = 0; k0 < u.K; k0 += STRIP) {
    const int columns = u.K - k0 < STRIP ? u.K - k0 : STRIP;
    for (int64_t j = 0; j < u.r; ++j) {
      const int64_t from = j * u.K + k0;
      float* to = a + j * STRIP;
      if (u.a_type == Dtype::bf16) {  // chosen outside the loop, which then runs in vectors
        for (int k = 0; k < columns; ++k) to[k] = load(u.a, Dtype::bf16, from + k);
      } else if (u.a_type == Dtype::fp16) {
        for (int k = 0; k < columns; ++k) to[k] = load(u.a, Dtype::fp16, from + k);
      } else {
        for (int k = 0; k < columns; ++k) to[k] = load(u.a, Dtype::fp32, from + k);
      }
    }
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) rows<T, 2>(u, (n0 + i) * u.K + k0, bm + i, a, columns, sums);
    for (; i < count; ++i) rows<T, 1>(u, (n0 + i) * u.K + k0, bm + i, a, columns, sums);
  }

  if (u.stats) {
    double* stats = u.stats + 3 * index * tiles_of(u.K, TILE_COLUMNS);
    for (int lane = 0; lane < 8; ++lane) stats[0] += sums.asked[lane], stats[1] += sums.done[lane];
    stats[2] = sums.changed;
  }
  if (u.changed) {
    const auto* w = static_cast<const typename T::Bits*>(u.w);
    const auto* out = static_cast<const typename T::Bits*>(u.back ? u.back : u.out);
    const int64_t end = (n0 + count) * u.K;
    for (int64_t e = n0 * u.K; e < end; e += 8) u.changed[e / 8] = changed_bits(w + e, out + e, end - e);
  }
}

}  // namespace

#define LOWRANK_JOIN(a, b) a##b
#define LOWRANK_NAME(isa) LOWRANK_JOIN(rank_update_rows_, isa)

// Tiles of TILE_ROWS rows, first to last.  scratch: r (TILE_ROWS + 512) floats.
void LOWRANK_NAME(ISA)(const RankUpdate& u, int64_t first, int64_t last, float* scratch) {
  for (int64_t index = first; index < last; ++index) switch (u.w_type) {
      case Dtype::bf16: tile<Bf16>(u, index, scratch); break;
      case Dtype::fp16: tile<Fp16>(u, index, scratch); break;
      default: tile<Fp32>(u, index, scratch);
    }
}

}  // namespace lowrank
