// torch.ops.lowrank.dropout_draw_ and dropout_apply_ on a CPU: dropout_rows.cpp for the best instruction set there is.
#include <torch/csrc/stable/library.h>

#include "dropout_op.h"

namespace lowrank {

void dropout_draw_(const Tensor& in, const Tensor& seed, int64_t first_row, int64_t cut, const Tensor& out, const Tensor& keep) {
  draw_dropout(in, *static_cast<const int64_t*>(seed.data_ptr()), first_row, cut, out, keep);
}

void dropout_apply_(const Tensor& in, const Tensor& keep, const Tensor& out, bool add) { apply_dropout(in, keep, out, add); }

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) {
  m.impl("dropout_draw_", TORCH_BOX(&lowrank::dropout_draw_));
  m.impl("dropout_apply_", TORCH_BOX(&lowrank::dropout_apply_));
}
