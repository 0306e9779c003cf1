// One AdamW step of one element, for host and device: the operations of torch.optim.AdamW (foreach=False, fused=False) in
// their order, moments in fp32.  Loshchilov and Hutter 2019, arXiv 1711.05101.
//
//   m = m + (1 - beta1) (g - m)          v = beta2 v + (1 - beta2) g g
//   p = p (1 - lr wd)                    p = p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Scalars are computed on the host, in double, and rounded once.  p is the fp32 master where there is one that rounds to the
// stored parameter, else the stored parameter, which somebody has replaced; it is stored rounded to nearest, or stochastically: Philox4x32-10 (Salmon et al. 2011) keyed by the seed, its
// counter (element / 8, stream, step), gives one call's 128 bits to 8 elements, so that shards and replays agree.
//
// A thread owns 8 elements: a byte of each mask, one 16-byte vector of each 16-bit tensor, one Philox call.
// Floor: bytes.  bf16 p and g, fp32 m and v: 22 an element; 30 with a master; 1/8 for the mask and for the changes each.
#pragma once

#include "dtype.h"

namespace lowrank {

struct AdamWTask {  // one parameter
  void* p;
  const void* g;
  float *m, *v;            // [n]; or, with offsets, one for each element whose mask bit is set
  float* master;           // null, or [n]
  const uint8_t* mask;     // null, or bit i % 8 of byte i / 8: a zero leaves p, m, v and master as they are
  const int64_t* offsets;  // null, or [ceil(n / 1024)]: how many bits are set before each block
  uint8_t* changes;        // null, or a map of bits to set where the stored p changed
  int64_t n, first;        // elements, and the index of the first in the whole parameter (a multiple of 8)
  int64_t stream;          // which parameter: another sequence of random numbers
};

struct AdamWScalars {
  float grad_scale, lerp, beta2, beta2_rest, decay, step_size, bias2_sqrt, eps;
  uint32_t key0, key1, step;
};

constexpr int ADAMW_BLOCK = 1024;  // elements per entry of offsets

namespace {

struct Random {
  uint32_t word[4];
  LOWRANK_HD uint32_t of(int i) const { return word[i / 2] >> 16 * (i % 2) & 0xffff; }
};

LOWRANK_HD Random philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c0, b = uint64_t(0xCD9E8D57) * c2;
    const uint32_t x = uint32_t(b >> 32) ^ c1 ^ k0, z = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b), c3 = uint32_t(a), c0 = x, c2 = z;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The 16-bit numbers of elements 8 group ... 8 group + 7 of a parameter.
LOWRANK_HD Random random_of(uint64_t group, int64_t stream, const AdamWScalars& s) {
  return philox(uint32_t(group), uint32_t(group >> 32), uint32_t(stream), s.step, s.key0, s.key1);
}

// x rounded to one of its two neighbours, up with the probability of its distance from the lower, in units of 2^-16 of theirs.
// Beyond the largest finite number, and what is not finite: to nearest.
template <class T>
LOWRANK_HD typename T::Bits round_stochastically(float x, uint32_t random);

template <>
LOWRANK_HD uint32_t round_stochastically<Fp32>(float x, uint32_t) {
  return Fp32::round(x);
}

template <>
LOWRANK_HD uint16_t round_stochastically<Bf16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t nearest = Bf16::round(x);
  return (bits & 0x7fffffff) >= 0x7f7f0000 ? nearest : uint16_t((bits + random) >> 16);
}

template <>
LOWRANK_HD uint16_t round_stochastically<Fp16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  const uint16_t nearest = Fp16::round(x);
  const uint32_t normal = (rest - (112u << 23) + (random >> 3)) >> 13;  // 13 bits are dropped
  // below 2^-14 the numbers are multiples of 2^-24: the fraction of x 2^24 against the random number
  const float scaled = bit_cast<float>(rest) * 0x1p24f;
  const int32_t whole = int32_t(rest < 0x38800000 ? scaled : 0.0f);
  const uint32_t subnormal = uint32_t(whole) + ((scaled - float(whole)) * 65536.0f > float(65535 - random) + 0.5f);
  const uint32_t magnitude = rest < 0x38800000 ? subnormal : normal;
  return rest >= 0x477fe000 ? nearest : uint16_t(sign | magnitude);
}

// What a step with a master starts from.
template <class T>
LOWRANK_HD float start_of(float master, typename T::Bits stored) {
  return T::round(master) == stored ? master : T::value(stored);
}

LOWRANK_HD void adamw_element(float& p, float g, float& m, float& v, const AdamWScalars& s) {
  g *= s.grad_scale;
  m = s.lerp < 0.5f ? __builtin_fmaf(s.lerp, g - m, m) : g - (g - m) * (1.0f - s.lerp);
  v = __builtin_fmaf(s.beta2_rest * g, g, v * s.beta2);
#ifdef __CUDA_ARCH__
  const float root = __fsqrt_rn(v);
#else
  const float root = __builtin_sqrtf(v);
#endif
  p = p * s.decay + (-s.step_size * m) / (root / s.bias2_sqrt + s.eps);
}

// How many bits are set in the first ``bytes`` bytes of a block's mask.
LOWRANK_HD int count_bits(const uint8_t* mask, int bytes) {
  int count = 0, i = 0;
  for (; i + 4 <= bytes; i += 4) {
    uint32_t word;
#ifdef __CUDA_ARCH__
    word = *reinterpret_cast<const uint32_t*>(mask + i);
    count += __popc(word);
#else
    memcpy(&word, mask + i, 4);
    count += __builtin_popcount(word);
#endif
  }
  for (; i < bytes; ++i) {
#ifdef __CUDA_ARCH__
    count += __popc(mask[i]);
#else
    count += __builtin_popcount(mask[i]);
#endif
  }
  return count;
}

}  // namespace
}  // namespace lowrank
