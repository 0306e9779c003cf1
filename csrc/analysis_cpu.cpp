// The ops of analysis.h on a CPU: analysis_rows.cpp for the best instruction set there is, on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>

#include "analysis_op.h"
#include "isa.h"

namespace lowrank {

using Tables = uint32_t (*)[DIGIT_BINS + 1];
using DiffRows = void(const DiffTask&, Dtype, int64_t, int64_t);
using HistogramRows = void(const SelectTask&, Dtype, int64_t, int64_t, Tables);
using EmitRows = void(const SelectTask&, Dtype, int64_t, int64_t, uint8_t*);
using OverlapRows = void(const OverlapTask&, int64_t, int64_t, int64_t*);
LOWRANK_DECLARE_ISAS(DiffRows, diff_rows);
LOWRANK_DECLARE_ISAS(HistogramRows, histogram_rows);
LOWRANK_DECLARE_ISAS(EmitRows, emit_rows);
LOWRANK_DECLARE_ISAS(OverlapRows, overlap_rows);

void diff_stats(const Tensor& before, const Tensor& after, double tol, double rel, int64_t ulp, const Tensor& counts,
                const Tensor& sums) {
  const DiffTask t = diff_task(before, after, tol, rel, ulp, counts, sums);
  const Dtype type = dtype_of(after, "analysis");
  DiffRows* const rows = LOWRANK_BEST_ISA(diff_rows);
  torch::stable::parallel_for(0, tiles_of(t.n, DIFF_BLOCK), 8, [&](int64_t first, int64_t last) { rows(t, type, first, last); });
}

void topk_histogram(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t above,
                    int64_t shift, bool tied, int64_t seed, int64_t first, const Tensor& counts) {
  const SelectTask t = select_task(after, before, key, hash, above, shift, tied, seed, first);
  const Dtype type = dtype_of(after, "analysis");
  auto* const sums = data_of<int64_t>(counts, ScalarType::Long, DIGIT_BINS + 1, after, "analysis: counts");
  HistogramRows* const rows = LOWRANK_BEST_ISA(histogram_rows);
  std::mutex adding;
  torch::stable::parallel_for(0, tiles_of(t.n, SELECT_BLOCK), 64, [&](int64_t begin, int64_t end) {
    constexpr int64_t AT_ONCE = int64_t(1) << 20;  // blocks whose counts fit 32 bits
    const std::unique_ptr<uint32_t[][DIGIT_BINS + 1]> tables(new uint32_t[4][DIGIT_BINS + 1]);
    for (; begin < end; begin += AT_ONCE) {
      memset(tables.get(), 0, 4 * sizeof(*tables.get()));
      rows(t, type, begin, end - begin < AT_ONCE ? end : begin + AT_ONCE, tables.get());
      const std::lock_guard<std::mutex> lock(adding);
      for (int i = 0; i < 4; ++i)
        for (int bin = 0; bin <= DIGIT_BINS; ++bin) sums[bin] += tables[i][bin];
    }
  });
}

void topk_emit(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t seed, int64_t first,
               const Tensor& words) {
  const SelectTask t = select_task(after, before, key, hash, 1, 0, true, seed, first);
  const Dtype type = dtype_of(after, "analysis");
  auto* const bytes = data_of<uint8_t>(words, ScalarType::Int, tiles_of(t.n, 32), after, "analysis: words");
  EmitRows* const rows = LOWRANK_BEST_ISA(emit_rows);
  torch::stable::parallel_for(0, tiles_of(t.n, SELECT_BLOCK), 64,
                              [&](int64_t begin, int64_t end) { rows(t, type, begin, end, bytes); });
}

void mask_overlap(const std::vector<Tensor> masks, const Tensor& counts) {
  const OverlapTask t = overlap_task(masks, counts);
  OverlapRows* const rows = LOWRANK_BEST_ISA(overlap_rows);
  std::mutex adding;
  torch::stable::parallel_for(0, tiles_of(t.words, OVERLAP_WORDS), 64, [&](int64_t first, int64_t last) {
    int64_t sums[OVERLAP_MASKS * OVERLAP_MASKS] = {};
    rows(t, first, last, sums);
    const std::lock_guard<std::mutex> lock(adding);
    for (int i = 0; i < t.count * t.count; ++i) t.counts[i] += sums[i];
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) {
  m.impl("diff_stats", TORCH_BOX(&lowrank::diff_stats));
  m.impl("topk_histogram", TORCH_BOX(&lowrank::topk_histogram));
  m.impl("topk_emit", TORCH_BOX(&lowrank::topk_emit));
  m.impl("mask_overlap", TORCH_BOX(&lowrank::mask_overlap));
}
