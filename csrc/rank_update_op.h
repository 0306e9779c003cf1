// From the tensors of torch.ops.lowrank.rank_update, which lowrank/ops/_rank_update.py has checked, to the numbers of
// rank_update.h.
#pragma once

#include <optional>

#include "op.h"
#include "rank_update.h"

namespace lowrank {

inline RankUpdate rank_update_call(const Tensor& weight, const Tensor& A, const Tensor& m, const Tensor& B, const Tensor& out,
                                   const std::optional<Tensor>& changed, const std::optional<Tensor>& stats,
                                   const std::optional<Tensor>& back) {
  STD_TORCH_CHECK(weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 && m.dim() == 1 && out.dim() == 2,
                  "rank_update: expected weight [N, K], A [r, K], m [r] or [1], B [N, r] and out [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1), r = A.size(0);
  STD_TORCH_CHECK(A.size(1) == K && B.size(0) == N && B.size(1) == r && out.size(0) == N && out.size(1) == K &&
                      (m.size(0) == r || m.size(0) == 1),
                  "rank_update: shapes do not fit weight [", N, ", ", K, "] and A [", r, ", ", A.size(1), "]");
  STD_TORCH_CHECK(!back || stats, "rank_update: back needs stats");
  const int64_t tiles = tiles_of(N, TILE_ROWS) * tiles_of(K, TILE_COLUMNS);
  const ScalarType type = weight.scalar_type();
  RankUpdate u{};
  u.w = data_of(weight, type, N * K, weight, "rank_update: weight");
  u.a = data_of(A, A.scalar_type(), r * K, weight, "rank_update: A");
  u.b = data_of(B, B.scalar_type(), N * r, weight, "rank_update: B");
  u.m = data_of<float>(m, ScalarType::Float, m.size(0), weight, "rank_update: m");
  u.out = data_of(out, type, N * K, weight, "rank_update: out");
  if (back) u.back = data_of(*back, type, N * K, weight, "rank_update: back");
  if (changed) u.changed = data_of<uint8_t>(*changed, ScalarType::Int, tiles_of(N * K, 32), weight, "rank_update: changed");
  if (stats) u.stats = data_of<double>(*stats, ScalarType::Double, 3 * tiles, weight, "rank_update: stats");
  u.N = N, u.K = K, u.r = r, u.m_stride = m.size(0) == 1 ? 0 : 1;
  u.w_type = dtype_of(weight, "rank_update"), u.a_type = dtype_of(A, "rank_update"), u.b_type = dtype_of(B, "rank_update");
  return u;
}

}  // namespace lowrank
