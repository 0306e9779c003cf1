// torch.ops.lowrank.rank_update on a CPU: rank_update_rows.cpp for the best instruction set there is, on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "isa.h"
#include "rank_update_op.h"

namespace lowrank {

using Rows = void(const RankUpdate&, int64_t, int64_t, float*);
LOWRANK_DECLARE_ISAS(Rows, rank_update_rows);

void rank_update(const Tensor& weight, const Tensor& A, const Tensor& m, const Tensor& B, const Tensor& out,
                 const std::optional<Tensor>& changed, const std::optional<Tensor>& stats,
                 const std::optional<Tensor>& back) {
  const RankUpdate u = rank_update_call(weight, A, m, B, out, changed, stats, back);
  Rows* const rows = LOWRANK_BEST_ISA(rank_update_rows);
  torch::stable::parallel_for(0, tiles_of(u.N, TILE_ROWS), 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[u.r * (TILE_ROWS + 512)]);
    rows(u, first, last, scratch.get());
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) { m.impl("rank_update", TORCH_BOX(&lowrank::rank_update)); }
