// From tensors to the rows of dropout.h, on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "dropout.h"
#include "isa.h"
#include "op.h"

namespace lowrank {

LOWRANK_DECLARE_ISAS(DropoutDraw, dropout_draw);
LOWRANK_DECLARE_ISAS(DropoutApply, dropout_apply);

inline Dropout dropout_of(const Tensor& in, const Tensor& keep, const Tensor& out, bool add) {
  const int64_t rows = in.size(0), columns = in.size(1);
  STD_TORCH_CHECK(out.size(0) == rows && out.size(1) == columns && keep.size(0) == rows &&
                      keep.size(1) >= (columns + 31) / 32 && keep.scalar_type() == ScalarType::Int,
                  "dropout: expected out [", rows, ", ", columns, "] and int32 bits of as many");
  STD_TORCH_CHECK((in.stride(1) == 1 || columns == 1) && (out.stride(1) == 1 || columns == 1) && keep.stride(1) == 1,
                  "dropout: expected contiguous last dims");
  return {in.data_ptr(),
          in.stride(0),
          out.data_ptr(),
          out.stride(0),
          dtype_of(in, "dropout", true),
          dtype_of(out, "dropout", true),
          add,
          static_cast<uint32_t*>(keep.data_ptr()),
          keep.stride(0),
          columns};
}

inline int64_t rows_per_thread(int64_t columns) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(columns, 1)); }

// keep [rows, words] = the bits of rows [first_row, first_row + rows) of the mask of that seed; out = in where they are set, else 0.
inline void draw_dropout(const Tensor& in, int64_t seed, int64_t first_row, int64_t cut, const Tensor& out, const Tensor& keep) {
  const Dropout d = dropout_of(in, keep, out, false);
  const Draw draw{uint64_t(seed), int32_t(cut), first_row, (d.columns + 31) / 32};
  auto* const rows = LOWRANK_BEST_ISA(dropout_draw);
  torch::stable::parallel_for(0, in.size(0), rows_per_thread(d.columns),
                              [&](int64_t first, int64_t last) { rows(d, draw, first, last); });
}

// out = in where the bits of keep are set, else 0; added to what is in out, if asked for, and rounded once.
inline void apply_dropout(const Tensor& in, const Tensor& keep, const Tensor& out, bool add) {
  const Dropout d = dropout_of(in, keep, out, add);
  auto* const rows = LOWRANK_BEST_ISA(dropout_apply);
  torch::stable::parallel_for(0, in.size(0), rows_per_thread(d.columns),
                              [&](int64_t first, int64_t last) { rows(d, first, last); });
}

}  // namespace lowrank
