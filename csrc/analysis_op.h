// From the tensors of the ops of analysis.h, which lowrank/analysis.py has checked, to its tasks.
#pragma once

#include <optional>
#include <vector>

#include "analysis.h"
#include "op.h"

namespace lowrank {

inline DiffTask diff_task(const Tensor& before, const Tensor& after, double tol, double rel, int64_t ulp,
                          const Tensor& counts, const Tensor& sums) {
  const int64_t n = after.numel(), blocks = tiles_of(n, DIFF_BLOCK);
  return {data_of(before, after.scalar_type(), n, after, "analysis: old"),
          data_of(after, after.scalar_type(), n, after, "analysis: new"),
          n,
          float(tol),
          float(rel),
          uint32_t(ulp < 0xffffffff ? ulp : 0xffffffff),
          data_of<int64_t>(counts, ScalarType::Long, DIFF_COUNTS * blocks, after, "analysis: counts"),
          data_of<double>(sums, ScalarType::Double, DIFF_SUMS * blocks, after, "analysis: sums")};
}

inline SelectTask select_task(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t above,
                              int64_t shift, bool tied, int64_t seed, int64_t first) {
  STD_TORCH_CHECK(0 <= shift && shift < above && above <= (tied ? 64 : 31) && above - shift <= 11,
                  "analysis: no digit of 11 bits");
  SelectTask t{};
  t.after = data_of(after, after.scalar_type(), after.numel(), after, "analysis: new");
  if (before) t.before = data_of(*before, after.scalar_type(), after.numel(), after, "analysis: old");
  t.n = after.numel(), t.first = first, t.seed = uint64_t(seed), t.hash = uint64_t(hash), t.key = uint32_t(key);
  t.above = int(above), t.shift = int(shift), t.tied = tied;
  return t;
}

inline OverlapTask overlap_task(const std::vector<Tensor>& masks, const Tensor& counts) {
  const int64_t count = int64_t(masks.size());
  STD_TORCH_CHECK(0 < count && count <= OVERLAP_MASKS, "analysis: expected 1 to ", OVERLAP_MASKS, " masks");
  OverlapTask t{{}, int(count), masks[0].numel(), nullptr};
  for (int64_t i = 0; i < count; ++i)
    t.mask[i] = data_of<uint32_t>(masks[i], ScalarType::Int, t.words, masks[0], "analysis: a mask");
  t.counts = data_of<int64_t>(counts, ScalarType::Long, count * count, masks[0], "analysis: counts");
  return t;
}

}  // namespace lowrank
