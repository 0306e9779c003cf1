// Rows of a dropout mask on a CPU, compiled once per instruction set (-DISA=...): no torch, no std.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "dropout.h"
#include "splitmix64.h"

namespace lowrank {
namespace {

template <class A, class B>
constexpr bool SAME = false;
template <class A>
constexpr bool SAME<A, A> = true;

struct Fp64 {
  using Bits = uint64_t;
  static double value(Bits bits) { return bit_cast<double>(bits); }
  static Bits round(double x) { return bit_cast<Bits>(x); }
};

// The keep bits of 32 elements: eight numbers, each of four decisions of 16 bits.
inline uint32_t draw_word(uint64_t place, int16_t threshold) {
  alignas(64) uint64_t z[8];
  for (int i = 0; i < 8; ++i) z[i] = splitmix64(place + i * GOLDEN_GAMMA);
#if defined(__AVX512BW__)
  return _mm512_cmpge_epi16_mask(_mm512_load_si512(z), _mm512_set1_epi16(threshold));
#elif defined(__AVX2__)
  const __m256i below = _mm256_set1_epi16(threshold), *const d = reinterpret_cast<const __m256i*>(z);
  const __m256i dropped = _mm256_packs_epi16(_mm256_cmpgt_epi16(below, d[0]), _mm256_cmpgt_epi16(below, d[1]));
  return ~uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(dropped, 0xd8)));
#else
  int16_t d[32];
  memcpy(d, z, 64);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t(d[i] >= threshold) << i;
  return bits;
#endif
}

// n of 32 elements in the same dtype: nothing is computed with them
template <class Bits>
inline void keep_bits(const Bits* in, Bits* out, uint32_t keep, int n) {
  if (n == 32) {
#ifdef __AVX512BW__
    for (int i = 0; i < 32; i += 64 / int(sizeof(Bits))) {
      __m512i kept;
      if constexpr (sizeof(Bits) == 2) kept = _mm512_maskz_loadu_epi16(keep, in);
      if constexpr (sizeof(Bits) == 4) kept = _mm512_maskz_loadu_epi32(__mmask16(keep >> i), in + i);
      if constexpr (sizeof(Bits) == 8) kept = _mm512_maskz_loadu_epi64(__mmask8(keep >> i), in + i);
      _mm512_storeu_si512(out + i, kept);
    }
    return;
#endif
    Bits ones[32];
    for (int i = 0; i < 32; ++i) ones[i] = Bits(0) - Bits(keep >> i & 1);
    for (int i = 0; i < 32; ++i) out[i] = in[i] & ones[i];
  } else {
    for (int i = 0; i < n; ++i) out[i] = keep >> i & 1 ? in[i] : Bits(0);
  }
}

template <class In, class Out, class Acc, bool ADD>
inline void keep_values(const typename In::Bits* in, typename Out::Bits* out, uint32_t keep, int n) {
  if (n == 32) {
    Acc kept[32];
    for (int i = 0; i < 32; ++i) kept[i] = keep >> i & 1 ? Acc(In::value(in[i])) : Acc(0);
    for (int i = 0; i < 32; ++i) out[i] = Out::round(ADD ? Acc(Out::value(out[i])) + kept[i] : kept[i]);
  } else {
    for (int i = 0; i < n; ++i) {
      const Acc value = keep >> i & 1 ? Acc(In::value(in[i])) : Acc(0);
      out[i] = Out::round(ADD ? Acc(Out::value(out[i])) + value : value);
    }
  }
}

template <class In, class Out, class Each>
inline void row(const Dropout& d, int64_t m, const Each& bits_of) {
  const auto* in = static_cast<const typename In::Bits*>(d.in) + m * d.in_stride;
  auto* out = static_cast<typename Out::Bits*>(d.out) + m * d.out_stride;
  for (int64_t k = 0; k < d.columns; k += 32) {
    const uint32_t keep = bits_of(k / 32);
    const int n = d.columns - k < 32 ? int(d.columns - k) : 32;
    constexpr bool WIDE = sizeof(typename In::Bits) == 8 || sizeof(typename Out::Bits) == 8;
    if constexpr (SAME<In, Out>) {
      if (!d.add) {
        keep_bits(in + k, out + k, keep, n);
        continue;
      }
    }
    if constexpr (WIDE) {
      d.add ? keep_values<In, Out, double, true>(in + k, out + k, keep, n)
            : keep_values<In, Out, double, false>(in + k, out + k, keep, n);
    } else {
      d.add ? keep_values<In, Out, float, true>(in + k, out + k, keep, n)
            : keep_values<In, Out, float, false>(in + k, out + k, keep, n);
    }
  }
}

template <class In, class Each>
inline void row_to(const Dropout& d, int64_t m, const Each& bits_of) {
  switch (d.to) {
    case Dtype::fp32: return row<In, Fp32>(d, m, bits_of);
    case Dtype::bf16: return row<In, Bf16>(d, m, bits_of);
    case Dtype::fp16: return row<In, Fp16>(d, m, bits_of);
    case Dtype::fp64: return row<In, Fp64>(d, m, bits_of);
  }
}

template <class Each>
inline void each_row(const Dropout& d, int64_t m, const Each& bits_of) {
  if (!d.in) {
    for (int64_t k = 0; k < d.columns; k += 32) bits_of(k / 32);
    return;
  }
  switch (d.from) {
    case Dtype::fp32: return row_to<Fp32>(d, m, bits_of);
    case Dtype::bf16: return row_to<Bf16>(d, m, bits_of);
    case Dtype::fp16: return row_to<Fp16>(d, m, bits_of);
    case Dtype::fp64: return row_to<Fp64>(d, m, bits_of);
  }
}

}  // namespace

#define LOWRANK_JOIN(a, b) a##_##b
#define LOWRANK_NAME(name, isa) LOWRANK_JOIN(name, isa)

DropoutDraw LOWRANK_NAME(dropout_draw, ISA);
DropoutApply LOWRANK_NAME(dropout_apply, ISA);

void LOWRANK_NAME(dropout_draw, ISA)(const Dropout& d, const Draw& draw, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const uint64_t row = draw.seed + uint64_t(draw.first_row + m) * uint64_t(8 * draw.words) * GOLDEN_GAMMA;
    uint32_t* const keep = d.keep + m * d.keep_stride;
    each_row(d, m, [&](int64_t w) {
      const uint32_t bits =
          draw.cut == 65536 ? 0 : draw_word(row + uint64_t(8 * w) * GOLDEN_GAMMA, int16_t(draw.cut - 32768));
      return keep[w] = bits;
    });
  }
}

void LOWRANK_NAME(dropout_apply, ISA)(const Dropout& d, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; ++m) {
    const uint32_t* const keep = d.keep + m * d.keep_stride;
    each_row(d, m, [&](int64_t w) { return keep[w]; });
  }
}

}  // namespace lowrank
