// AdamW on a CPU, block by block, compiled once per instruction set (-DISA=...): no torch, no std.
#include "adamw.h"

namespace lowrank {
namespace {

// A block in the L1 cache: everything in fp32, so that each loop below runs in vectors.
struct Block {
  alignas(64) float p[ADAMW_BLOCK], g[ADAMW_BLOCK];
  alignas(64) uint32_t active[ADAMW_BLOCK + 8];  // mask bits, or the indices of those that are set
  alignas(64) uint16_t random[ADAMW_BLOCK];
};

// Which bits of a byte are set, and how many.
struct SetBits {
  uint8_t at[256][8] = {}, count[256] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) at[byte][count[byte]++] = bit;
  }
};
constexpr SetBits SET_BITS;

template <class T>
inline void widen(float* __restrict to, const void* from, int64_t at, int n) {
  const auto* bits = static_cast<const typename T::Bits*>(from) + at;
  for (int i = 0; i < n; ++i) to[i] = T::value(bits[i]);
}

inline void draw(Block& b, const AdamWTask& t, int64_t at, int n, const AdamWScalars& s) {
  const uint64_t group = uint64_t(t.first + at) / 8;
  uint32_t words[4][ADAMW_BLOCK / 8];
  const int groups = (n + 7) / 8;
  for (int i = 0; i < groups; ++i) {
    const Random random = random_of(group + i, t.stream, s);
    for (int j = 0; j < 4; ++j) words[j][i] = random.word[j];
  }
  for (int i = 0; i < groups; ++i)
    for (int j = 0; j < 4; ++j) memcpy(b.random + 8 * i + 2 * j, &words[j][i], 4);  // little-endian
}

template <class T, bool STOCHASTIC>
inline typename T::Bits stored_as(float p, uint32_t random) {
  return STOCHASTIC ? round_stochastically<T>(p, random) : T::round(p);
}

// Moments of active elements only: these are gathered, stepped side by side, and put back.
template <class T, class G, bool STOCHASTIC>
inline void compact_block(const AdamWTask& t, int64_t index, const AdamWScalars& s, Block& b) {
  const int64_t at = index * ADAMW_BLOCK;
  const int n = t.n - at < ADAMW_BLOCK ? t.n - at : ADAMW_BLOCK;
  auto* const stored = static_cast<typename T::Bits*>(t.p) + at;
  const auto* const g = static_cast<const typename G::Bits*>(t.g) + at;
  float *const m = t.m + t.offsets[index], *const v = t.v + t.offsets[index], *const master = t.master ? t.master + at : nullptr;
  const uint8_t* const mask = t.mask + at / 8;
  typename T::Bits fresh[ADAMW_BLOCK];
  int count = 0;
  for (int i = 0; i < n; i += 8) {  // eight are written, as many as are set stay
    for (int bit = 0; bit < 8; ++bit) b.active[count + bit] = i + SET_BITS.at[mask[i / 8]][bit];
    count += SET_BITS.count[mask[i / 8]];
  }
  if (count == 0) return;
  for (int j = 0; j < count; ++j) b.g[j] = G::value(g[b.active[j]]);
  if (master)
    for (int j = 0; j < count; ++j) b.p[j] = start_of<T>(master[b.active[j]], stored[b.active[j]]);
  else
    for (int j = 0; j < count; ++j) b.p[j] = T::value(stored[b.active[j]]);
  for (int j = 0; j < count; ++j) adamw_element(b.p[j], b.g[j], m[j], v[j], s);
  if (master)
    for (int j = 0; j < count; ++j) master[b.active[j]] = b.p[j];
  if (STOCHASTIC) draw(b, t, at, n, s);
  memcpy(fresh, stored, n * sizeof(*fresh));
  for (int j = 0; j < count; ++j) fresh[b.active[j]] = stored_as<T, STOCHASTIC>(b.p[j], STOCHASTIC ? b.random[b.active[j]] : 0);
  if (t.changes)
    for (int i = 0; i < n; i += 8) t.changes[(at + i) / 8] |= changed_bits(stored + i, fresh + i, n - i);
  memcpy(stored, fresh, n * sizeof(*fresh));
}

template <class T, class G, bool STOCHASTIC, bool MASKED>
inline void block(const AdamWTask& t, int64_t index, const AdamWScalars& s, Block& b) {
  if (MASKED && t.offsets) return compact_block<T, G, STOCHASTIC>(t, index, s, b);
  const int64_t at = index * ADAMW_BLOCK;
  const int n = t.n - at < ADAMW_BLOCK ? t.n - at : ADAMW_BLOCK;
  auto* const stored = static_cast<typename T::Bits*>(t.p) + at;
  float *const m = t.m + at, *const v = t.v + at;
  typename T::Bits fresh[ADAMW_BLOCK];

  if (t.master)
    memcpy(b.p, t.master + at, n * sizeof(float));
  else
    widen<T>(b.p, t.p, at, n);
  widen<G>(b.g, t.g, at, n);
  if (STOCHASTIC) draw(b, t, at, n, s);
  if (MASKED) {
    for (int i = 0; i < n; i += 8)
      for (int bit = 0; bit < 8; ++bit) b.active[i + bit] = t.mask[(at + i) / 8] >> bit & 1;
    for (int i = 0; i < n; ++i) {
      float p = t.master ? start_of<T>(b.p[i], stored[i]) : b.p[i], mi = m[i], vi = v[i];
      adamw_element(p, b.g[i], mi, vi, s);
      const bool on = b.active[i];
      b.p[i] = on ? p : b.p[i], m[i] = on ? mi : m[i], v[i] = on ? vi : v[i];
    }
  } else {
    if (t.master)
      for (int i = 0; i < n; ++i) b.p[i] = start_of<T>(b.p[i], stored[i]);
    for (int i = 0; i < n; ++i) adamw_element(b.p[i], b.g[i], m[i], v[i], s);
  }

  for (int i = 0; i < n; ++i) fresh[i] = stored_as<T, STOCHASTIC>(b.p[i], STOCHASTIC ? b.random[i] : 0);
  if (MASKED)
    for (int i = 0; i < n; ++i) fresh[i] = b.active[i] ? fresh[i] : stored[i];
  if (t.changes)
    for (int i = 0; i < n; i += 8) t.changes[(at + i) / 8] |= changed_bits(stored + i, fresh + i, n - i);
  memcpy(stored, fresh, n * sizeof(*fresh));
  if (t.master) memcpy(t.master + at, b.p, n * sizeof(float));
}

template <class T, class G>
inline void block(const AdamWTask& t, int64_t index, const AdamWScalars& s, bool stochastic, Block& b) {
  if (stochastic)
    t.mask ? block<T, G, true, true>(t, index, s, b) : block<T, G, true, false>(t, index, s, b);
  else
    t.mask ? block<T, G, false, true>(t, index, s, b) : block<T, G, false, false>(t, index, s, b);
}

template <class T>
inline void block(const AdamWTask& t, int64_t index, const AdamWScalars& s, Dtype g, bool stochastic, Block& b) {
  if (g == Dtype::fp32)
    block<T, Fp32>(t, index, s, stochastic, b);
  else
    block<T, T>(t, index, s, stochastic, b);
}

}  // namespace

#define LOWRANK_JOIN(a, b) a##b
#define LOWRANK_NAME(isa) LOWRANK_JOIN(adamw_rows_, isa)

// Blocks of ADAMW_BLOCK elements of one parameter, first to last.  The gradient has the parameter's dtype, or fp32.
void LOWRANK_NAME(ISA)(const AdamWTask& t, const AdamWScalars& s, Dtype p, Dtype g, bool stochastic, int64_t first,
                       int64_t last) {
  Block b;
  for (int64_t index = first; index < last; ++index) switch (p) {
      case Dtype::bf16: block<Bf16>(t, index, s, g, stochastic, b); break;
      case Dtype::fp16: block<Fp16>(t, index, s, g, stochastic, b); break;
      default: block<Fp32>(t, index, s, g, false, b);
    }
}

}  // namespace lowrank
