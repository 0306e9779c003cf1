// Sparse deltas on a CPU, block by block, compiled once per instruction set (-DISA=...): no torch, no std.
#include "delta.h"

namespace lowrank {
namespace {

template <class Bits>
inline void map_block(const Delta& d, int64_t block) {
  const int64_t at = block * DELTA_BLOCK;
  const auto *const old = static_cast<const Bits*>(d.old) + at, *const data = static_cast<const Bits*>(d.data) + at;
  const int length = block_length(d, block);
  uint8_t* const changed = d.changed + at / 8;
  for (int i = 0; i < length; i += 8) changed[i / 8] = changed_bits(old + i, data + i, length - i);
  for (int i = (length + 7) / 8; i % 4; ++i) changed[i] = 0;  // to the end of its word
}

template <class Bits>
inline int64_t sum_block(const Delta& d, int64_t block) {
  const int64_t at = block * DELTA_BLOCK;
  const auto* const data = static_cast<const Bits*>(d.data) + at;
  const int length = block_length(d, block);
  uint64_t sum = 0;
  for (int i = 0; i < length; ++i) sum += delta_hash(at + i, data[i]);
  if (d.changed) each_changed(d, block, [&](int i) { sum -= delta_hash(at + i, data[i]); });
  return int64_t(sum);
}

template <class Bits>
inline void blocks(const Delta& d, DeltaPass pass, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) switch (pass) {
      case DeltaPass::map: map_block<Bits>(d, block); break;
      case DeltaPass::size: d.heads[block] = delta_size<Bits>(d, block); break;
      case DeltaPass::encode: delta_encode<Bits>(d, block); break;
      case DeltaPass::check: d.found[block] = !delta_fits(d, block); break;
      case DeltaPass::apply: delta_apply<Bits>(d, block); break;
      case DeltaPass::mark: delta_mark(d, block); break;
      case DeltaPass::fingerprint: d.found[block] = sum_block<Bits>(d, block);
    }
}

}  // namespace

#define LOWRANK_JOIN(a, b) a##b
#define LOWRANK_NAME(isa) LOWRANK_JOIN(delta_rows_, isa)

// Blocks of DELTA_BLOCK elements, first to last, of 16 or 32 bits each.
void LOWRANK_NAME(ISA)(const Delta& d, DeltaPass pass, bool wide, int64_t first, int64_t last) {
  wide ? blocks<uint32_t>(d, pass, first, last) : blocks<uint16_t>(d, pass, first, last);
}

}  // namespace lowrank
