// From the tensors of the ops of analysis.h to its tasks.  Python has checked them with better messages
// (lowrank/ops/analysis.py); these checks keep a direct call of an op from reading or writing past an end.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "analysis.h"

namespace lowrank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype analysis_dtype(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "analysis: expected fp16, bf16 or fp32");
  return type == ScalarType::Float ? Dtype::fp32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp16;
}

inline void* analysis_data(const Tensor& t, ScalarType type, int64_t numel, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel && t.is_contiguous() && t.device() == like.device(),
                  "analysis: ", what, " does not fit");
  return t.data_ptr();
}

inline DiffTask diff_task(const Tensor& before, const Tensor& after, double tol, double rel, int64_t ulp,
                          const Tensor& counts, const Tensor& sums) {
  const int64_t n = after.numel(), blocks = tiles_of(n, DIFF_BLOCK);
  return {analysis_data(before, after.scalar_type(), n, after, "old"),
          analysis_data(after, after.scalar_type(), n, after, "new"),
          n,
          float(tol),
          float(rel),
          uint32_t(ulp < 0xffffffff ? ulp : 0xffffffff),
          static_cast<int64_t*>(analysis_data(counts, ScalarType::Long, DIFF_COUNTS * blocks, after, "counts")),
          static_cast<double*>(analysis_data(sums, ScalarType::Double, DIFF_SUMS * blocks, after, "sums"))};
}

inline SelectTask select_task(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t above,
                              int64_t shift, bool tied, int64_t seed, int64_t first) {
  STD_TORCH_CHECK(0 <= shift && shift < above && above <= (tied ? 64 : 31) && above - shift <= 11,
                  "analysis: no digit of 11 bits");
  SelectTask t{};
  t.after = analysis_data(after, after.scalar_type(), after.numel(), after, "new");
  if (before) t.before = analysis_data(*before, after.scalar_type(), after.numel(), after, "old");
  t.n = after.numel(), t.first = first, t.seed = uint64_t(seed), t.hash = uint64_t(hash), t.key = uint32_t(key);
  t.above = int(above), t.shift = int(shift), t.tied = tied;
  return t;
}

inline OverlapTask overlap_task(const std::vector<Tensor>& masks, const Tensor& counts) {
  const int64_t count = int64_t(masks.size());
  STD_TORCH_CHECK(0 < count && count <= OVERLAP_MASKS, "analysis: expected 1 to ", OVERLAP_MASKS, " masks");
  OverlapTask t{{}, int(count), masks[0].numel(), nullptr};
  for (int64_t i = 0; i < count; ++i)
    t.mask[i] = static_cast<uint32_t*>(analysis_data(masks[i], ScalarType::Int, t.words, masks[0], "a mask"));
  t.counts = static_cast<int64_t*>(analysis_data(counts, ScalarType::Long, count * count, masks[0], "counts"));
  return t;
}

}  // namespace lowrank
