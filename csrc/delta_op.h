// From the tensors of torch.ops.lowrank.delta, which lowrank/ops/delta.py has checked, to the pointers of delta.h.  That starts
// and heads fit is not checked again.
#pragma once

#include <optional>

#include "delta.h"
#include "op.h"

namespace lowrank {

using MaybeTensor = std::optional<Tensor>;

struct DeltaCall {
  Delta d;
  DeltaPass pass;
  bool wide;  // 32-bit elements
};

inline DeltaCall delta_call(int64_t pass, int64_t numel, const MaybeTensor& data, const MaybeTensor& old,
                            const MaybeTensor& changed, const MaybeTensor& heads, const MaybeTensor& index,
                            const MaybeTensor& values, const MaybeTensor& starts, const MaybeTensor& found) {
  STD_TORCH_CHECK(pass >= 0 && pass <= int64_t(DeltaPass::fingerprint) && numel >= 0, "delta: no such pass");
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
  const ScalarType type = data ? data->scalar_type() : ScalarType::Short;
  STD_TORCH_CHECK(type == ScalarType::Short || type == ScalarType::Int, "delta: expected data as int16 or int32");
  const auto data_if = [&](const MaybeTensor& t, ScalarType type, int64_t numel, const char* name) {
    return t ? data_of(*t, type, numel, heads ? *heads : *data, "delta: ", name) : nullptr;
  };
  const int64_t blocks = tiles_of(numel, DELTA_BLOCK);
  Delta d{};
  d.n = numel, d.blocks = blocks;
  d.data = data_if(data, type, numel, "data");
  d.old = data_if(old, type, numel, "old");
  d.changed = static_cast<uint8_t*>(data_if(changed, ScalarType::Int, tiles_of(numel, 32), "changed"));
  d.heads = static_cast<uint16_t*>(data_if(heads, ScalarType::UInt16, blocks, "heads"));
  d.index = static_cast<uint8_t*>(data_if(index, ScalarType::Byte, -1, "index"));
  d.values = data_if(values, type, -1, "values");
  d.starts = static_cast<const int64_t*>(data_if(starts, ScalarType::Long, 2 * (blocks + 1), "starts"));
  d.found = static_cast<int64_t*>(data_if(found, ScalarType::Long, blocks, "found"));
  return {d, p, type == ScalarType::Int};
}

}  // namespace lowrank
