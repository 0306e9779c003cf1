// From the tensors of torch.ops.lowrank.delta to the pointers of delta.h.  Python has checked them with better messages
// (lowrank/ops/delta.py), and that starts and heads fit; these checks keep a direct call of the op from the plainest mistakes.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "delta.h"

namespace lowrank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

struct DeltaCall {
  Delta d;
  DeltaPass pass;
  bool wide;  // 32-bit elements
};

inline void* delta_data(const MaybeTensor& t, ScalarType type, int64_t numel, const char* what) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == type && (numel < 0 || t->numel() == numel) && t->is_contiguous(), "delta: ", what,
                  " does not fit its tensor");
  return t->data_ptr();
}

inline DeltaCall delta_call(int64_t pass, int64_t numel, const MaybeTensor& data, const MaybeTensor& old,
                            const MaybeTensor& changed, const MaybeTensor& heads, const MaybeTensor& index,
                            const MaybeTensor& values, const MaybeTensor& starts, const MaybeTensor& found) {
  STD_TORCH_CHECK(pass >= 0 && pass <= int64_t(DeltaPass::fingerprint) && numel >= 0, "delta: no such pass");
  const int64_t blocks = tiles_of(numel, DELTA_BLOCK);
  const ScalarType type = data ? data->scalar_type() : ScalarType::Short;
  STD_TORCH_CHECK(type == ScalarType::Short || type == ScalarType::Int, "delta: expected data as int16 or int32");
  Delta d{};
  d.n = numel, d.blocks = blocks;
  d.data = delta_data(data, type, numel, "data");
  d.old = delta_data(old, type, numel, "old");
  d.changed = static_cast<uint8_t*>(delta_data(changed, ScalarType::Int, tiles_of(numel, 32), "changed"));
  d.heads = static_cast<uint16_t*>(delta_data(heads, ScalarType::UInt16, blocks, "heads"));
  d.index = static_cast<uint8_t*>(delta_data(index, ScalarType::Byte, -1, "index"));
  d.values = delta_data(values, type, -1, "values");
  d.starts = static_cast<const int64_t*>(delta_data(starts, ScalarType::Long, 2 * (blocks + 1), "starts"));
  d.found = static_cast<int64_t*>(delta_data(found, ScalarType::Long, blocks, "found"));
  const DeltaPass p{int(pass)};
  const bool reads_parts = p == DeltaPass::encode || p == DeltaPass::check || p == DeltaPass::apply || p == DeltaPass::mark;
  STD_TORCH_CHECK(
      (data || p == DeltaPass::check || p == DeltaPass::mark || (p == DeltaPass::size && !old)) &&
          (old || p != DeltaPass::map) &&
          (changed || reads_parts || p == DeltaPass::fingerprint) && (changed || (p != DeltaPass::mark && p != DeltaPass::encode)) &&
          (heads || !(reads_parts || p == DeltaPass::size)) && ((index && starts) || !reads_parts) &&
          (values || (p != DeltaPass::encode && p != DeltaPass::apply)) &&
          (found || (p != DeltaPass::check && p != DeltaPass::fingerprint)),
      "delta: pass ", pass, " lacks a tensor");
  for (const MaybeTensor* t : {&data, &old, &changed, &heads, &index, &values, &starts, &found})
    STD_TORCH_CHECK(!*t || (*t)->device() == (heads ? heads : data)->device(), "delta: tensors on several devices");
  return {d, p, type == ScalarType::Int};
}

}  // namespace lowrank
