// Storage types and what every stream over weights does with them, for host and device: the same bits on both.
// A NaN that rounding makes is 0x7fff..., as a GPU's arithmetic has it.
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

enum class Dtype { fp32, bf16, fp16, fp64 };  // fp64: of dropout alone

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

LOWRANK_HD int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace

}  // namespace lowrank
