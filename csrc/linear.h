// The plain LoRA linear of lowrank/ops/linear.py on a CPU, one call each way, in the order of lowrank/ops/thin_eager.py,
// by ATen's GEMMs.  Equal bits, forward and every gradient.
//
// Python has decided everything and checked it; here it is executed.
#pragma once

#include <algorithm>
#include <optional>

#include "dropout_op.h"
#include "matrix.h"

namespace lowrank {

using Tensors = std::vector<Tensor>;

constexpr int64_t BLOCK = 1 << 20;  // elements that are widened at a time, as ops/dropout.py's row_blocks

struct Projection {
  const Tensor *A, *B;
  double scale;
  int64_t first, rank;  // its columns of S
};

inline std::vector<Projection> projections_of(const Tensors& factors, const std::vector<double>& scales) {
  std::vector<Projection> projections;
  int64_t first = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    const Tensor &A = factors[2 * i], &B = factors[2 * i + 1];
    projections.push_back({&A, &B, scales[i], first, A.size(0)});
    first += A.size(0);
  }
  return projections;
}

// Projections that see one x: all of them, or those of one dropout mask.
struct Group {
  int64_t mask;  // or -1
  std::vector<size_t> members;
};

inline std::vector<Group> groups_of(const std::vector<int64_t>& masks) {
  std::vector<Group> groups;
  for (size_t i = 0; i < masks.size(); ++i) {
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.mask == masks[i]; });
    if (group == groups.end()) group = groups.insert(group, {masks[i], {}});
    group->members.push_back(i);
  }
  return groups;
}

inline int64_t block_of(int64_t columns) { return std::max<int64_t>(1, BLOCK / std::max<int64_t>(columns, 1)); }

// Side by side along `dim`, in dtype.
inline Tensor joined(const Tensors& parts, ScalarType dtype, int dim) {
  if (parts.size() == 1) return cast(parts[0], dtype);
  int64_t sum = 0, at = 0;
  for (const Tensor& t : parts) sum += t.size(dim);
  const int64_t other = parts[0].size(1 - dim);
  Tensor out = dim == 0 ? empty(parts[0], {sum, other}, dtype) : empty(parts[0], {other, sum}, dtype);
  for (const Tensor& t : parts) {
    copy(dim == 0 ? rows_of(out, at, t.size(0)) : columns_of(out, at, t.size(1)), t);
    at += t.size(dim);
  }
  return out;
}

// out = alpha wide thin; in 16 bits a CPU's GEMM is faster the other way round
inline void times(const Tensor& out, const Tensor& wide, const Tensor& thin, double alpha = 1.0) {
  if (wide.element_size() != 2) return mm(out, wide, thin, alpha);
  const Tensor turned = empty(wide, {thin.size(1), wide.size(0)}, wide.scalar_type());
  mm(turned, transposed(thin), transposed(wide), alpha);
  copy(out, transposed(turned));
}

// S = x Aᵀ
inline Tensor shrink(const Tensor& x, const Tensor& A) {
  const int64_t M = x.size(0);
  Tensor S = empty(x, {M, A.size(0)}, A.scalar_type());
  const Tensor At = transposed(A);
  const int64_t step = x.scalar_type() == A.scalar_type() ? M : block_of(x.size(1));
  for (int64_t m = 0; m < M; m += step) {
    const int64_t rows = std::min(step, M - m);
    times(rows_of(S, m, rows), cast(rows_of(x, m, rows), A.scalar_type()), At);
  }
  return S;
}

// The same of what the mask of that seed leaves of x; its bits go into keep.
inline Tensor shrink_dropped(const Tensor& x, const Tensor& A, int64_t seed, int64_t cut, const Tensor& keep) {
  const int64_t M = x.size(0), K = x.size(1);
  Tensor S = empty(x, {M, A.size(0)}, A.scalar_type());
  const Tensor At = transposed(A);
  const int64_t step = block_of(32 * keep.size(1));
  const Tensor kept = empty(x, {std::min(step, M), K}, A.scalar_type());
  for (int64_t m = 0; m < M; m += step) {
    const int64_t rows = std::min(step, M - m);
    const Tensor block = rows_of(kept, 0, rows);
    draw_dropout(rows_of(x, m, rows), seed, m, cut, block, rows_of(keep, m, rows));
    times(rows_of(S, m, rows), block, At);
  }
  return S;
}

// Y = start + scale S Bᵀ, rounded once
inline void expand(const Tensor& Y, const Tensor& S, const Tensor& B, double scale, const Tensor* start) {
  const int64_t M = Y.size(0);
  const ScalarType thin = S.scalar_type();
  const Tensor Bt = transposed(cast(B, thin));
  if (thin == Y.scalar_type()) return start ? addmm(Y, cast(*start, thin), S, Bt, scale) : mm(Y, S, Bt, scale);
  const int64_t step = block_of(Y.size(1));
  const Tensor whole = empty(Y, {std::min(step, M), Y.size(1)}, thin);
  for (int64_t m = 0; m < M; m += step) {
    const int64_t rows = std::min(step, M - m);
    const Tensor part = rows_of(whole, 0, rows), s = rows_of(S, m, rows);
    if (start) {
      addmm(part, cast(start->size(0) == M ? rows_of(*start, m, rows) : *start, thin), s, Bt, scale);
    } else {
      mm(part, s, Bt, scale);
    }
    copy(rows_of(Y, m, rows), part);
  }
}

// The ys, S of all projections, and the bits of each mask.  masks: per projection, the index of its mask in cuts and seeds, or -1.
inline Tensors plain_linears(const Tensor& input, const Tensors& weights, const std::vector<std::optional<Tensor>>& starts,
                             const Tensors& factors, const std::vector<double>& scales, const std::vector<int64_t>& masks,
                             const std::vector<int64_t>& cuts, const std::optional<Tensor>& seeds, ScalarType dtype,
                             ScalarType thin) {
  const std::vector<Projection> projections = projections_of(factors, scales);
  const std::vector<Group> groups = groups_of(masks);
  const Tensor x = cast(as_rows(input), dtype), whole_rows = cuts.empty() || x.stride(1) == 1 ? x : packed(x);
  const int64_t M = x.size(0);
  Tensors ys, keeps;
  for (size_t j = 0; j < cuts.size(); ++j) keeps.push_back(empty(x, {M, (x.size(1) + 31) / 32}, ScalarType::Int));
  std::optional<Tensor> whole;  // S
  if (groups.size() > 1) whole = empty(x, {M, projections.back().first + projections.back().rank}, thin);
  for (const Group& group : groups) {
    Tensors As;
    for (const size_t i : group.members) As.push_back(*projections[i].A);
    const Tensor A = joined(As, thin, 0);
    const int64_t j = group.mask;
    const Tensor part =
        j < 0 ? shrink(x, A)
              : shrink_dropped(whole_rows, A, static_cast<const int64_t*>(seeds->data_ptr())[j], cuts[j], keeps[j]);
    if (groups.size() == 1) {
      whole = part;
      break;
    }
    int64_t at = 0;
    for (const size_t i : group.members) {
      copy(columns_of(*whole, projections[i].first, projections[i].rank), columns_of(part, at, projections[i].rank));
      at += projections[i].rank;
    }
  }
  const Tensor S = *whole;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < input.dim(); ++i) shape.push_back(input.size(i));
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& p = projections[i];
    shape.back() = p.B->size(0);
    ys.push_back(empty(x, shape, dtype));
    const Tensor Y = view(ys.back(), M, shape.back(), shape.back(), 1);
    std::optional<Tensor> start;
    if (!starts.empty() && starts[i]) {  // a bias [N], or a base output
      start = starts[i]->dim() == 1 ? view(*starts[i], 1, shape.back(), 0, starts[i]->stride(0)) : as_rows(*starts[i]);
    }
    expand(Y, columns_of(S, p.first, p.rank), *p.B, p.scale, start ? &*start : nullptr);
    if (!weights.empty()) addmm(Y, Y, x, transposed(cast(weights[i], dtype)));
  }
  ys.push_back(S);
  ys.insert(ys.end(), keeps.begin(), keeps.end());
  return ys;
}

// (dS, dB) = scale (dY B, dYᵀ S)
inline std::pair<Tensor, Tensor> dy_pass(const Tensor& dY, const Tensor& factor, const Tensor& S, double scale) {
  const int64_t M = dY.size(0), N = dY.size(1), R = S.size(1);
  const ScalarType thin = S.scalar_type();
  const Tensor B = cast(factor, thin), dS = empty(dY, {M, R}, thin);
  Tensor dB = empty(dY, {N, R}, thin);
  if (dY.scalar_type() == thin) {
    times(dS, dY, B, scale);
    const Tensor turned = empty(dY, {R, N}, thin);
    mm(turned, transposed(S), dY, scale);
    copy(dB, transposed(turned));
  } else {
    torch::stable::zero_(dB);
    const int64_t step = block_of(N);
    for (int64_t m = 0; m < M; m += step) {
      const int64_t rows = std::min(step, M - m);
      const Tensor block = cast(rows_of(dY, m, rows), thin);
      times(rows_of(dS, m, rows), block, B, scale);
      addmm(dB, dB, transposed(block), rows_of(S, m, rows), scale);
    }
  }
  return {dS, cast(dB, factor.scalar_type())};
}

// dA = dSᵀ drop(x), and dX = drop(dS A) where there is a dX, added to what is there if asked for (behind a mask alone)
inline Tensor x_pass(const Tensor& x, const Tensor& dS, const Tensor& A, const Tensor* keep, const Tensor* dX, bool add) {
  const int64_t M = x.size(0), K = x.size(1);
  const ScalarType thin = dS.scalar_type();
  const Tensor dA = empty(x, {A.size(0), K}, thin), dSt = transposed(dS);
  const bool same = x.scalar_type() == thin && !keep;
  const int64_t step = same ? K : 32 * block_of(32 * M), width = std::min(step, K);
  const Tensor kept = keep ? empty(x, {M, width}, thin) : dA, part = dX && !same ? empty(x, {M, width}, thin) : dA;
  for (int64_t k = 0; k < K; k += step) {
    const int64_t columns = std::min(step, K - k);
    const Tensor bits = keep ? columns_of(*keep, k / 32, (columns + 31) / 32) : dA;
    Tensor block = columns_of(x, k, columns);
    if (keep) {
      const Tensor dropped = view(kept, M, columns, columns, 1);
      apply_dropout(block, bits, dropped, false);
      block = dropped;
    }
    mm(columns_of(dA, k, columns), dSt, cast(block, thin));
    if (!dX) continue;
    const Tensor product = same ? *dX : view(part, M, columns, columns, 1);
    mm(product, dS, columns_of(A, k, columns));
    if (keep) {
      apply_dropout(product, bits, columns_of(*dX, k, columns), add);
    } else if (!same) {
      copy(columns_of(*dX, k, columns), product);
    }
  }
  return dA;
}

// dX if it is needed, and dA and dB of each projection.
inline Tensors plain_linears_backward(const Tensors& dys, const Tensor& input, const Tensor& S, const Tensors& factors,
                                      const Tensors& keeps, const Tensors& weights, const std::vector<double>& scales,
                                      const std::vector<int64_t>& masks, bool need_x, ScalarType dtype, ScalarType thin) {
  const std::vector<Projection> projections = projections_of(factors, scales);
  const std::vector<Group> groups = groups_of(masks);
  Tensor x = cast(as_rows(input), dtype);
  if (!keeps.empty() && x.stride(1) != 1) x = packed(x);
  const size_t n = projections.size();
  Tensors rows, dSs, dBs, dAs(n, S), grads;
  for (size_t i = 0; i < n; ++i) {
    const Projection& p = projections[i];
    rows.push_back(as_rows(dys[i]));
    if (!is_dense(rows[i])) rows[i] = packed(rows[i]);
    auto [dS, dB] = dy_pass(rows[i], *p.B, columns_of(S, p.first, p.rank), p.scale);
    dSs.push_back(dS), dBs.push_back(dB);
  }
  std::optional<Tensor> dX;
  if (need_x) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < input.dim(); ++i) shape.push_back(input.size(i));
    grads.push_back(empty(x, shape, dtype));
    dX = view(grads[0], x.size(0), x.size(1), x.size(1), 1);
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    Tensors As, parts;
    for (const size_t i : groups[g].members) As.push_back(*projections[i].A), parts.push_back(dSs[i]);
    const Tensor* const keep = groups[g].mask < 0 ? nullptr : &keeps[groups[g].mask];
    const Tensor dA = x_pass(x, joined(parts, thin, 1), joined(As, thin, 0), keep, dX ? &*dX : nullptr, g > 0);
    int64_t at = 0;
    for (const size_t i : groups[g].members) {
      const int64_t rank = projections[i].rank;
      Tensor own = rows_of(dA, at, rank);
      dAs[i] = cast(own, projections[i].A->scalar_type());
      if (As.size() > 1 && projections[i].A->scalar_type() == thin) {  // a view of all members', which an op may not return
        dAs[i] = empty(own, {rank, x.size(1)}, thin);
        copy(dAs[i], own);
      }
      at += rank;
    }
  }
  for (size_t i = 0; i < n; ++i) {
    if (dX && !weights.empty()) {
      const Tensor W = cast(weights[i], dtype);
      if (x.size(0) < 4 && dtype == ScalarType::Float && x.is_cpu()) {  // as eager.add_product_
        const Tensor product = empty(x, {x.size(0), x.size(1)}, dtype);
        mm(product, rows[i], W);
        float* const sum = static_cast<float*>(dX->data_ptr());
        for (int64_t k = 0; k < dX->numel(); ++k) sum[k] += static_cast<const float*>(product.data_ptr())[k];
      } else {
        addmm(*dX, *dX, rows[i], W);
      }
    }
    grads.push_back(dAs[i]), grads.push_back(dBs[i]);
  }
  return grads;
}

}  // namespace lowrank
