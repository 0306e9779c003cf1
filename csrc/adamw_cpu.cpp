// torch.ops.lowrank.adamw on a CPU: adamw_rows.cpp for the best instruction set there is, all parameters on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "adamw_op.h"
#include "isa.h"

namespace lowrank {

using AdamWRows = void(const AdamWTask&, const AdamWScalars&, Dtype, Dtype, bool, int64_t, int64_t);
LOWRANK_DECLARE_ISAS(AdamWRows, adamw_rows);

void adamw(const Tensors params, const Tensors grads, const Tensors ms, const Tensors vs, const Tensors masters,
           const Tensors masks, const Tensors offsets, const Tensors changes, const std::vector<int64_t> firsts,
           const std::vector<int64_t> streams, const std::vector<double> scalars, int64_t seed, int64_t step,
           bool stochastic) {
  const AdamWCall call = adamw_call(params, grads, ms, vs, masters, masks, offsets, changes, firsts, streams, scalars, seed, step);
  AdamWRows* const rows = LOWRANK_BEST_ISA(adamw_rows);
  std::vector<int64_t> ends;  // blocks up to and with each task
  for (const AdamWTask& t : call.tasks) ends.push_back((ends.empty() ? 0 : ends.back()) + tiles_of(t.n, ADAMW_BLOCK));
  if (ends.empty()) return;
  torch::stable::parallel_for(0, ends.back(), 16, [&](int64_t first, int64_t last) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    while (first < last) {
      const int64_t begin = i ? ends[i - 1] : 0, end = std::min(last, ends[i]);
      rows(call.tasks[i], call.scalars, call.p_type, call.g_type, stochastic, first - begin, end - begin);
      first = end, ++i;
    }
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) { m.impl("adamw", TORCH_BOX(&lowrank::adamw)); }
