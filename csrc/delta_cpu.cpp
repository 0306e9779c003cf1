// torch.ops.lowrank.delta on a CPU: delta_rows.cpp for the best instruction set there is, on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "delta_op.h"
#include "isa.h"

namespace lowrank {

using DeltaRows = void(const Delta&, DeltaPass, bool, int64_t, int64_t);
LOWRANK_DECLARE_ISAS(DeltaRows, delta_rows);

void delta(int64_t pass, int64_t numel, const MaybeTensor data, const MaybeTensor old, const MaybeTensor changed,
           const MaybeTensor heads, const MaybeTensor index, const MaybeTensor values, const MaybeTensor starts,
           const MaybeTensor found) {
  const DeltaCall call = delta_call(pass, numel, data, old, changed, heads, index, values, starts, found);
  DeltaRows* const rows = LOWRANK_BEST_ISA(delta_rows);
  torch::stable::parallel_for(0, call.d.blocks, 64, [&](int64_t first, int64_t last) {
    rows(call.d, call.pass, call.wide, first, last);
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) { m.impl("delta", TORCH_BOX(&lowrank::delta)); }
