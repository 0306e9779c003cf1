// torch.ops.lowrank.mixed_mm_: out = a b in fp32 from bf16 operands, by AVX512-BF16's dot products, where PyTorch's GEMMs give bf16.
// An element of out is a sum over k in one order, whatever the shapes, the strides and the threads beside it; subnormals are 0.
//
//   blocks of out, one to a thread at a time    stay in L2
//     KC of k                                   packed in pairs of k, as the instruction takes them: a's rows, then 64 of b's columns
//       tiles of 6 x 64                         in registers, then added to out
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define LOWRANK_BF16_DOT
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own unpacklo and unpackhi
#include <immintrin.h>
// of functions that hold nothing of torch or of the standard library
#define LOWRANK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif

namespace lowrank {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Matrix {
  const uint16_t* data;
  int64_t stride[2];
  const uint16_t* at(int64_t i, int64_t j) const { return data + i * stride[0] + j * stride[1]; }
};

constexpr int64_t MR = 6, NR = 64, KC = 256, MC = 192, NC = 640;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef LOWRANK_BF16_DOT

inline uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

// out[k / 2][PANEL] = the pairs (k, k + 1) of n of PANEL lines; zeros beyond.  Strides: between lines, along k.
template <int64_t PANEL>
void pack_some(const uint16_t* in, int64_t line, int64_t along, int64_t n, int64_t K, uint32_t* out) {
  if (n == PANEL && along == 1)
    for (; K > 1; K -= 2, in += 2, out += PANEL)
      for (int64_t i = 0; i < PANEL; ++i) memcpy(out + i, in + i * line, 4);
  for (int64_t k = 0; k < K; k += 2, out += PANEL) {
    const uint16_t* const first = in + k * along;
    for (int64_t i = 0; i < PANEL; ++i)
      out[i] = i < n ? pair(first[i * line], k + 1 < K ? first[i * line + along] : 0) : 0;
  }
}

// Panels of MR rows, one after the other.
void pack_rows(const Matrix& a, int64_t m, int64_t M, int64_t k, int64_t K, uint32_t* out) {
  const int64_t pairs = ceil_div(K, 2), whole = M / MR * MR;
  const uint16_t* const in = a.at(m, k);
  if (a.stride[0] == 1) {  // along the memory, not from one row of it to the next
    for (int64_t p = 0; p < K / 2; ++p) {
      const uint16_t *const low = in + 2 * p * a.stride[1], *const high = low + a.stride[1];
      for (int64_t i = 0; i < whole; i += MR)
        for (int64_t j = 0; j < MR; ++j) out[i * pairs + p * MR + j] = pair(low[i + j], high[i + j]);
    }
    if (K % 2)
      for (int64_t i = 0; i < whole; ++i)
        out[(i / MR + 1) * MR * pairs - MR + i % MR] = in[(K - 1) * a.stride[1] + i];
  } else {
    for (int64_t i = 0; i < whole; i += MR) pack_some<MR>(in + i * a.stride[0], a.stride[0], a.stride[1], MR, K, out + i * pairs);
  }
  if (whole < M)
    pack_some<MR>(in + whole * a.stride[0], a.stride[0], a.stride[1], M - whole, K, out + whole * pairs);
}

// 16 pairs of 16 lines, transposed into columns of a panel.
LOWRANK_AVX512 inline void transpose(const uint16_t* in, int64_t line, uint32_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * line);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    const int row = j % 4 + j / 4 * 4;
    _mm512_storeu_si512(out + NR * row, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
    _mm512_storeu_si512(out + NR * (row + 8), _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
  }
}

// Columns [n, n + N) as one panel; N <= 64.
LOWRANK_AVX512 void pack_columns(const Matrix& b, int64_t k, int64_t K, int64_t n, int64_t N, uint32_t* out) {
  const uint16_t* const in = b.at(k, n);
  const int64_t whole = K / 32 * 32;
  if (N == NR && b.stride[0] == 1) {
    for (int64_t i = 0; i < whole; i += 32)
      for (int64_t j = 0; j < NR; j += 16) transpose(in + i + j * b.stride[1], b.stride[1], out + i / 2 * NR + j);
    pack_some<NR>(in + whole, b.stride[1], 1, N, K - whole, out + whole / 2 * NR);
  } else if (N == NR && b.stride[1] == 1) {
    alignas(64) uint16_t turn[64];
    for (int i = 0; i < 32; ++i) {
      turn[2 * i] = uint16_t(i);
      turn[2 * i + 1] = uint16_t(32 + i);
    }
    const __m512i low = _mm512_load_si512(turn), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < K; i += 2)
      for (int64_t j = 0; j < NR; j += 32) {
        const __m512i even = _mm512_loadu_si512(in + i * b.stride[0] + j);
        const __m512i odd = i + 1 < K ? _mm512_loadu_si512(in + (i + 1) * b.stride[0] + j) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + i / 2 * NR + j, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(out + i / 2 * NR + j + 16, _mm512_permutex2var_epi16(even, high, odd));
      }
  } else {
    pack_some<NR>(in, b.stride[1], b.stride[0], N, K, out);
  }
}

// out [M, N] (+)= the product of two panels; M <= 6, N <= 64.
LOWRANK_AVX512 void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out, int64_t stride, int64_t M, int64_t N,
                         bool add) {
  __m512 sum[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += MR, b += NR) {
    __m512i columns[4];
    for (int j = 0; j < 4; ++j) columns[j] = _mm512_load_si512(b + 16 * j);
    for (int i = 0; i < MR; ++i) {
      const __m512i row = _mm512_set1_epi32(int32_t(a[i]));
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)row, (__m512bh)columns[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t left = N - 16 * j;
      if (i >= M || left <= 0) continue;
      const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
      float* const place = out + i * stride + 16 * j;
      const __m512 started = add ? _mm512_maskz_loadu_ps(mask, place) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(started, sum[i][j]));
    }
}

void block(const Matrix& a, const Matrix& b, float* out, int64_t stride, int64_t m, int64_t M, int64_t n, int64_t N, int64_t K,
           bool add, uint32_t* rows, uint32_t* columns) {
  for (int64_t k = 0; k < K; k += KC) {
    const int64_t depth = std::min(KC, K - k), pairs = ceil_div(depth, 2);
    pack_rows(a, m, M, k, depth, rows);
    for (int64_t j = 0; j < N; j += NR) {
      const int64_t width = std::min(NR, N - j);
      pack_columns(b, k, depth, n + j, width, columns);
      for (int64_t i = 0; i < M; i += MR)
        tile(rows + i * pairs, columns, pairs, out + (m + i) * stride + n + j, stride, std::min(MR, M - i), width,
             add || k > 0);
    }
  }
}

bool has_bf16_dot() {
  static const bool has = [] {
    const char* asked = std::getenv("LOWRANK_ISA");
    return (!asked || !*asked || std::string(asked) == "avx512") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
  }();
  return has;
}

#else

bool has_bf16_dot() { return false; }

void block(const Matrix&, const Matrix&, float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, uint32_t*, uint32_t*) {}

#endif

Matrix matrix(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.dim() == 2, "mixed_mm_: expected bf16 matrices");
  return {static_cast<const uint16_t*>(t.data_ptr()), {t.stride(0), t.stride(1)}};
}

// The size of equal blocks of at most `most`, in multiples of `unit`, and at least `count` of them where there are as many units.
int64_t even(int64_t size, int64_t unit, int64_t most, int64_t count) {
  const int64_t units = ceil_div(size, unit), parts = std::min(units, std::max(count, ceil_div(size, most)));
  return ceil_div(units, std::max<int64_t>(parts, 1)) * unit;
}

}  // namespace

bool has_mixed_mm() { return has_bf16_dot(); }

void mixed_mm_(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const Matrix left = matrix(a), right = matrix(b);
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  STD_TORCH_CHECK(has_bf16_dot(), "mixed_mm_: this CPU, or LOWRANK_ISA, has no bf16 dot products");
  STD_TORCH_CHECK(b.size(0) == K && out.dim() == 2 && out.size(0) == M && out.size(1) == N &&
                      out.scalar_type() == ScalarType::Float && (out.stride(1) == 1 || N == 1),
                  "mixed_mm_: expected a [M, K], b [K, N] and fp32 out [M, N] with contiguous rows");
  float* const to = static_cast<float*>(out.data_ptr());
  const int64_t stride = out.stride(0);
  if (K == 0 && !add)
    for (int64_t m = 0; m < M; ++m) std::fill_n(to + m * stride, N, 0.0f);
  if (M == 0 || N == 0 || K == 0) return;
  // a few blocks to a thread, by rows before columns: a block packs its rows and its columns, and columns are packed faster
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads == 1 ? 1 : 3 * threads;
  const int64_t natural = ceil_div(N, even(N, NR, NC, 1));
  const int64_t rows = even(M, MR, MC, std::min(ceil_div(wanted, natural), ceil_div(M, 8 * MR))), down = ceil_div(M, rows);
  const int64_t columns = even(N, NR, NC, ceil_div(wanted, down)), across = ceil_div(N, columns);
  torch::stable::parallel_for(0, across * down, 1, [&](int64_t first, int64_t last) {
    const auto words = std::make_unique<uint32_t[]>(rows * KC / 2 + NR * KC / 2 + 16);
    auto* const panel = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(words.get()) + 63) / 64 * 64);
    for (int64_t i = first; i < last; ++i) {
      const int64_t m = i % down * rows, n = i / down * columns;
      block(left, right, to, stride, m, std::min(rows, M - m), n, std::min(columns, N - n), K, add, panel + NR * KC / 2, panel);
    }
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) { m.impl("mixed_mm_", TORCH_BOX(&lowrank::mixed_mm_)); }
STABLE_TORCH_LIBRARY_IMPL(lowrank, CompositeExplicitAutograd, m) { m.impl("has_mixed_mm", TORCH_BOX(&lowrank::has_mixed_mm)); }
