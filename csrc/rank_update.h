// out = round(W + B diag(m) A): the arithmetic, for host and device.  W, out [N, K], A [r, K], B [N, r], m [r] or one number.
//
//   acc = 0;  acc = fmaf(bm[n][j], a[j][k], acc) for j = 0, 1, ... r-1;  out = acc == 0 ? w : round_to_nearest_even(w + acc)
//
// bm = B m, rounded once to fp32; a: exact.  One chain of fused operations per element, whatever the tile, the vector
// width or the number of threads: the same bits everywhere.  A NaN that this makes is 0x7fff..., as a GPU's arithmetic has it.
//
// Floor: 4 bytes an element in 16 bits, 1/8 with the map of changed bits: 15.6 us (16.1) at 4096 x 4096 at 4.3 TB/s.
// 2r FLOPs an element: up to r = 16 or so they hide behind that, at r = 64 they take twice as long (67 TFLOP/s in fp32).
// A is read once per tile of rows, B once per tile of columns: with 64 x 256, r/8 bytes an element out of caches, in fp32.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LOWRANK_HD __host__ __device__ __forceinline__
#else
#define LOWRANK_HD inline __attribute__((always_inline))
#endif

namespace lowrank {

enum class Dtype { fp32, bf16, fp16 };

struct RankUpdate {
  const void *w, *a, *b;
  const float* m;
  void* out;
  uint8_t* changed;  // null, or bit i % 8 of byte i / 8: whether element i of the row-major out is not w, bit for bit
  double* stats;     // null, or zeros [tiles(), 3] to fill with partial sums of: delta², delta (out − w), changed elements
  int64_t N, K, r, m_stride;
  Dtype w_type, a_type, b_type;
};

constexpr int TILE_ROWS = 64;  // a multiple of 8: a tile of whole rows is then whole bytes of the map
constexpr int TILE_COLUMNS = 256;

// What follows is compiled once per instruction set: without a name of its own, each object keeps its own copy.
namespace {

template <class To, class From>
LOWRANK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct Fp32 {
  using Bits = uint32_t;
  static LOWRANK_HD float value(Bits bits) { return bit_cast<float>(bits); }
  static LOWRANK_HD Bits round(float x) { return x != x ? 0x7fffffff : bit_cast<Bits>(x); }
};

struct Bf16 {
  using Bits = uint16_t;
  static LOWRANK_HD float value(Bits bits) { return bit_cast<float>(uint32_t(bits) << 16); }
  static LOWRANK_HD Bits round(float x) {
#ifdef __CUDA_ARCH__
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fff : rounded;
#endif
  }
};

struct Fp16 {
  using Bits = uint16_t;
  static LOWRANK_HD float value(Bits bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(rest)) * 0x1p-24f);
    const uint32_t normal = (rest << 13) + ((rest >= 0x7c00 ? 224u : 112u) << 23);
    return bit_cast<float>(sign | (rest < 0x400 ? subnormal : normal));
#endif
  }
  static LOWRANK_HD Bits round(float x) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000;  // 0.5's ulp is 2**-24
    const uint32_t shifted = rest - (112u << 23);
    const uint32_t normal = (shifted + 0xfff + ((shifted >> 13) & 1)) >> 13;
    const uint32_t magnitude = rest < 0x38800000 ? subnormal : rest < 0x47800000 ? normal : 0x7c00;
    return x != x ? 0x7fff : sign | magnitude;
#endif
  }
};

LOWRANK_HD float load(const void* p, Dtype type, int64_t i) {
  switch (type) {
    case Dtype::bf16: return Bf16::value(static_cast<const uint16_t*>(p)[i]);
    case Dtype::fp16: return Fp16::value(static_cast<const uint16_t*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

LOWRANK_HD float scaled_b(const RankUpdate& u, int64_t n, int64_t j) {
  return load(u.b, u.b_type, n * u.r + j) * u.m[j * u.m_stride];
}

LOWRANK_HD float add_rank(float acc, float bm, float a) { return __builtin_fmaf(bm, a, acc); }

template <class T>
LOWRANK_HD typename T::Bits add_to_weight(typename T::Bits w, float delta) {
  const typename T::Bits sum = T::round(T::value(w) + delta);
  return delta == 0 ? w : sum;  // so that a zero update keeps -0, and every NaN's payload
}

// A byte of the map: bit i is whether element i of ``count`` differs.
template <class Bits>
LOWRANK_HD uint8_t changed_bits(const Bits* w, const Bits* out, int64_t count) {
  unsigned byte = 0;
#ifndef __CUDA_ARCH__
  if (count >= 8) {  // 64 bits at a time: a lane's top bit is set where the lane is not 0, then moves to its place
    constexpr int LANES = 8 / sizeof(Bits), WIDTH = 8 * sizeof(Bits);
    constexpr uint64_t TOP = sizeof(Bits) == 2 ? 0x8000800080008000 : 0x8000000080000000;
    for (int i = 0; i < 8; i += LANES) {
      uint64_t x, y;
      memcpy(&x, w + i, 8), memcpy(&y, out + i, 8);
      x ^= y;
      const uint64_t differs = ((((x & ~TOP) + ~TOP) | x) & TOP) >> (WIDTH - 1);
      for (int lane = 0; lane < LANES; ++lane) byte |= (differs >> lane * (WIDTH - 1) & (1u << lane)) << i;
    }
    return byte;
  }
#endif
  for (int i = 0; i < 8; ++i)
    if (i < count) byte |= unsigned(w[i] != out[i]) << i;
  return byte;
}

// The terms of the report's two sums.
LOWRANK_HD double asked(float delta) { return double(delta) * delta; }

template <class T>
LOWRANK_HD double done(float delta, typename T::Bits w, typename T::Bits out) {
  return delta * (double(T::value(out)) - T::value(w));
}

}  // namespace

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace lowrank
