// From the tensors of torch.ops.lowrank.rank_update to the numbers of rank_update.h.  Python has checked them with better
// messages (lowrank/ops/materialize.py); these checks keep a direct call of the op from reading past an end.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "rank_update.h"

namespace lowrank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "rank_update: expected fp16, bf16 or fp32");
  return type == ScalarType::Float ? Dtype::fp32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp16;
}

inline RankUpdate arguments(const Tensor& weight, const Tensor& A, const Tensor& m, const Tensor& B, const Tensor& out,
                            const std::optional<Tensor>& changed, const std::optional<Tensor>& stats,
                            const std::optional<Tensor>& back) {
  STD_TORCH_CHECK(weight.dim() == 2 && A.dim() == 2 && B.dim() == 2 && m.dim() == 1 && out.dim() == 2,
                  "rank_update: expected weight [N, K], A [r, K], m [r] or [1], B [N, r] and out [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1), r = A.size(0);
  STD_TORCH_CHECK(A.size(1) == K && B.size(0) == N && B.size(1) == r && out.size(0) == N && out.size(1) == K &&
                      (m.size(0) == r || m.size(0) == 1),
                  "rank_update: shapes do not fit weight [", N, ", ", K, "] and A [", r, ", ", A.size(1), "]");
  STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float, "rank_update: m must be fp32");
  STD_TORCH_CHECK(out.scalar_type() == weight.scalar_type(), "rank_update: out must have weight's dtype");
  const int64_t tiles = tiles_of(N, TILE_ROWS) * tiles_of(K, TILE_COLUMNS);
  STD_TORCH_CHECK(!changed || (changed->scalar_type() == ScalarType::Int && changed->numel() == tiles_of(N * K, 32)),
                  "rank_update: changed must hold ", tiles_of(N * K, 32), " int32 words");
  STD_TORCH_CHECK(!stats || (stats->scalar_type() == ScalarType::Double && stats->numel() == 3 * tiles),
                  "rank_update: stats must be float64 [", tiles, ", 3]");
  STD_TORCH_CHECK(!back || (stats && back->scalar_type() == weight.scalar_type() && back->numel() == N * K),
                  "rank_update: back must be like weight, beside stats");
  for (const Tensor* t :
       {&weight, &A, &m, &B, &out, changed ? &*changed : &out, stats ? &*stats : &out, back ? &*back : &out}) {
    STD_TORCH_CHECK(t->is_contiguous(), "rank_update: every tensor must be contiguous");
    STD_TORCH_CHECK(t->device() == weight.device(), "rank_update: every tensor must be on weight's device");
  }
  return {weight.data_ptr(),
          A.data_ptr(),
          B.data_ptr(),
          static_cast<const float*>(m.data_ptr()),
          out.data_ptr(),
          back ? back->data_ptr() : nullptr,
          changed ? static_cast<uint8_t*>(changed->data_ptr()) : nullptr,
          stats ? static_cast<double*>(stats->data_ptr()) : nullptr,
          N,
          K,
          r,
          m.size(0) == 1 ? 0 : 1,
          dtype_of(weight),
          dtype_of(A),
          dtype_of(B)};
}

}  // namespace lowrank
