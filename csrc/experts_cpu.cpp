// torch.ops.lowrank.grouped_rows_ and grouped_outer_: products of rows that are sorted by expert, of lowrank/ops/experts_eager.py,
// by ATen's GEMMs, an expert to a thread: torch's grouped_mm gives every expert's small GEMM to all threads, one after the other.
//
// An expert of many rows is cut into blocks, always the same, so that threads share it; an element's sum is within one block.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "matrix.h"

namespace lowrank {
namespace {

constexpr int64_t ROWS = 256, COLUMNS = 256;  // of a block of out

Tensor matrix_of(const Tensor& stack, int64_t e) {
  return view(stack, stack.size(1), stack.size(2), stack.stride(1), stack.stride(2), e * stack.stride(0));
}

struct Block {
  int64_t expert, first, count;  // rows
  int64_t column, columns;       // of out
};

// Where each expert's rows end, checked: Python has, with better messages.
std::vector<int64_t> ends_of(const Tensor& ends, int64_t experts, int64_t rows, const char* op) {
  STD_TORCH_CHECK(ends.scalar_type() == ScalarType::Int && ends.is_contiguous() && ends.numel() == experts, op,
                  ": expected int32 ends of ", experts, " experts");
  const int32_t* const data = static_cast<const int32_t*>(ends.data_ptr());
  int64_t last = 0;
  std::vector<int64_t> checked;
  for (int64_t e = 0; e < experts; ++e) {
    STD_TORCH_CHECK(data[e] >= last && data[e] <= rows, op, ": ends decrease, or pass ", rows);
    checked.push_back(last = data[e]);
  }
  return checked;
}

// work(block) for all of them, threads taking about as many rows times columns each.
template <class Work>
void for_each(const std::vector<Block>& blocks, const Work& work) {
  std::vector<int64_t> until;
  int64_t total = 0;
  for (const Block& block : blocks) until.push_back(total += std::max<int64_t>(block.count, 8) * block.columns);
  if (blocks.size() == 1) return work(blocks[0]);  // whose GEMM has the threads to itself
  torch::stable::parallel_for(0, total, 1, [&](int64_t first, int64_t last) {
    for (size_t i = 0; i < blocks.size(); ++i)
      if (until[i] > first && until[i] <= last) work(blocks[i]);
  });
}

void zero(const Tensor& rows) {
  if (rows.numel()) torch::stable::zero_(const_cast<Tensor&>(rows));
}

}  // namespace

// out [S,N] = each row of x [S,K] by its expert's matrix of stack [E,N,K], transposed; zero behind the last end
void grouped_rows_(const Tensor& x, const Tensor& stack, const Tensor& ends, const Tensor& out) {
  const int64_t S = x.size(0), E = stack.size(0), N = stack.size(1);
  STD_TORCH_CHECK(x.dim() == 2 && stack.dim() == 3 && stack.size(2) == x.size(1) && out.dim() == 2 && out.size(0) == S &&
                      out.size(1) == N && x.scalar_type() == stack.scalar_type() && out.scalar_type() == x.scalar_type(),
                  "grouped_rows_: expected x [S, K], stack [E, N, K] and out [S, N] of one dtype");
  std::vector<Block> blocks;
  int64_t begin = 0, e = 0;
  for (const int64_t end : ends_of(ends, E, S, "grouped_rows_")) {
    for (; begin < end; begin = std::min(end, begin + ROWS)) blocks.push_back({e, begin, std::min(ROWS, end - begin), 0, N});
    ++e;
  }
  zero(rows_of(out, begin, S - begin));
  for_each(blocks, [&](const Block& b) {
    mm(rows_of(out, b.first, b.count), rows_of(x, b.first, b.count), transposed(matrix_of(stack, b.expert)));
  });
}

// out [E,N,K] = the sum over each expert's rows of a [S,N] times b [S,K]
void grouped_outer_(const Tensor& a, const Tensor& b, const Tensor& ends, const Tensor& out) {
  const int64_t S = a.size(0), N = a.size(1), K = b.size(1), E = out.size(0);
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && b.size(0) == S && out.dim() == 3 && out.size(1) == N && out.size(2) == K &&
                      a.scalar_type() == b.scalar_type() && out.scalar_type() == a.scalar_type(),
                  "grouped_outer_: expected a [S, N], b [S, K] and out [E, N, K] of one dtype");
  std::vector<Block> blocks;
  int64_t begin = 0, e = 0;
  for (const int64_t end : ends_of(ends, E, S, "grouped_outer_")) {
    const int64_t step = end - begin > ROWS ? COLUMNS : K;
    for (int64_t k = 0; k < K; k += step) blocks.push_back({e, begin, end - begin, k, std::min(step, K - k)});
    begin = end;
    ++e;
  }
  for_each(blocks, [&](const Block& block) {
    const Tensor into = columns_of(matrix_of(out, block.expert), block.column, block.columns);
    if (block.count == 0) return zero(into);
    mm(into, transposed(rows_of(a, block.first, block.count)),
       columns_of(rows_of(b, block.first, block.count), block.column, block.columns));
  });
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) {
  m.impl("grouped_rows_", TORCH_BOX(&lowrank::grouped_rows_));
  m.impl("grouped_outer_", TORCH_BOX(&lowrank::grouped_outer_));
}
