// torch.ops.lowrank.plain_linears and plain_linears_backward on a CPU: linear.h, on torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include "linear.h"

namespace lowrank {

using Doubles = std::vector<double>;
using Ints = std::vector<int64_t>;

Tensors plain_linears_op(const Tensor& x, const Tensors weights, const std::vector<std::optional<Tensor>> starts,
                         const Tensors factors, const Doubles scales, const Ints masks, const Ints cuts,
                         const std::optional<Tensor>& seeds, ScalarType dtype, ScalarType thin) {
  return plain_linears(x, weights, starts, factors, scales, masks, cuts, seeds, dtype, thin);
}

Tensors plain_linears_backward_op(const Tensors dys, const Tensor& x, const Tensor& S, const Tensors factors,
                                  const Tensors keeps, const Tensors weights, const Doubles scales, const Ints masks,
                                  bool need_x, ScalarType dtype, ScalarType thin) {
  return plain_linears_backward(dys, x, S, factors, keeps, weights, scales, masks, need_x, dtype, thin);
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, m) {
  m.impl("plain_linears", TORCH_BOX(&lowrank::plain_linears_op));
  m.impl("plain_linears_backward", TORCH_BOX(&lowrank::plain_linears_backward_op));
}
