// torch.ops.lowrank.rank_update on a CPU: rank_update_rows.cpp for the best instruction set there is, on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "rank_update_op.h"

namespace lowrank {

using Rows = void(const RankUpdate&, int64_t, int64_t, float*);
Rows rank_update_rows_baseline;
#ifdef __x86_64__
Rows rank_update_rows_avx2, rank_update_rows_avx512;
#endif

// LOWRANK_ISA=baseline|avx2|avx512 asks for one; the bits are the same.
static Rows* best_rows() {
  const char* asked = std::getenv("LOWRANK_ISA");
  const std::string isa = asked ? asked : "";
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (isa.empty() || isa == "avx512")) return rank_update_rows_avx512;
  if (avx2 && (isa.empty() || isa == "avx2")) return rank_update_rows_avx2;
#endif
  STD_TORCH_CHECK(isa.empty() || isa == "baseline", "LOWRANK_ISA='", isa, "': this CPU or this build does not have it");
  return rank_update_rows_baseline;
}

void rank_update(const Tensor& weight, const Tensor& A, const Tensor& m, const Tensor& B, const Tensor& out,
                 const std::optional<Tensor>& changed, const std::optional<Tensor>& stats) {
  const RankUpdate u = arguments(weight, A, m, B, out, changed, stats);
  Rows* const rows = best_rows();
  torch::stable::parallel_for(0, tiles_of(u.N, TILE_ROWS), 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[u.r * (TILE_ROWS + 512)]);
    rows(u, first, last, scratch.get());
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) { m.impl("rank_update", TORCH_BOX(&lowrank::rank_update)); }
