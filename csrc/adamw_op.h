// From the lists of torch.ops.lowrank.adamw, which lowrank/ops/adamw.py has checked, to the tasks of adamw.h.
#pragma once

#include <vector>

#include "adamw.h"
#include "op.h"

namespace lowrank {

using Tensors = std::vector<Tensor>;

struct AdamWCall {
  std::vector<AdamWTask> tasks;
  AdamWScalars scalars;
  Dtype p_type, g_type;
};

// The data of ``tensors[i]``, null where the list is empty or the entry has no elements.
template <class T>
T* optional_data(const Tensors& tensors, size_t i, ScalarType type, int64_t numel, const Tensor& like, const char* name) {
  const bool none = tensors.empty() || tensors[i].numel() == 0;
  return none ? nullptr : data_of<T>(tensors[i], type, numel, like, "adamw: ", name, " ", i);
}

inline AdamWCall adamw_call(const Tensors& params, const Tensors& grads, const Tensors& ms, const Tensors& vs,
                            const Tensors& masters, const Tensors& masks, const Tensors& offsets, const Tensors& changes,
                            const std::vector<int64_t>& firsts, const std::vector<int64_t>& streams,
                            const std::vector<double>& scalars, int64_t seed, int64_t step) {
  const size_t count = params.size();
  STD_TORCH_CHECK(count > 0 && grads.size() == count && ms.size() == count && vs.size() == count &&
                      firsts.size() == count && streams.size() == count && scalars.size() == 8,
                  "adamw: expected one of everything for each parameter, and 8 scalars");
  for (const Tensors* list : {&masters, &masks, &offsets, &changes})
    STD_TORCH_CHECK(list->empty() || list->size() == count, "adamw: expected an empty list or one of ", count);
  AdamWCall call{{}, {}, dtype_of(params[0], "adamw"), dtype_of(grads[0], "adamw")};
  STD_TORCH_CHECK(call.g_type == call.p_type || call.g_type == Dtype::fp32,
                  "adamw: expected gradients in the parameters' dtype or fp32");
  for (size_t i = 0; i < count; ++i) {
    const Tensor &p = params[i], &g = grads[i];
    const int64_t n = p.numel();
    STD_TORCH_CHECK(p.scalar_type() == params[0].scalar_type() && g.scalar_type() == grads[0].scalar_type() &&
                        g.numel() == n && p.is_contiguous() && g.is_contiguous() && p.device() == params[0].device() &&
                        g.device() == p.device() && firsts[i] % 8 == 0 && firsts[i] >= 0,
                    "adamw: parameter ", i, " and its gradient do not fit");
    if (n == 0) continue;
    AdamWTask t{};
    t.p = p.data_ptr(), t.g = g.data_ptr(), t.n = n, t.first = firsts[i], t.stream = streams[i];
    t.mask = optional_data<uint8_t>(masks, i, ScalarType::Int, tiles_of(n, 32), p, "mask");
    t.offsets = optional_data<int64_t>(offsets, i, ScalarType::Long, tiles_of(n, ADAMW_BLOCK) + 1, p, "offsets");
    STD_TORCH_CHECK(!t.offsets || t.mask, "adamw: offsets need a mask");
    t.changes = optional_data<uint8_t>(changes, i, ScalarType::Int, tiles_of(n, 32), p, "changes");
    t.master = optional_data<float>(masters, i, ScalarType::Float, n, p, "master");
    const int64_t state = t.offsets ? -1 : n;  // compact: as many as the mask has bits, which Python has counted
    t.m = optional_data<float>(ms, i, ScalarType::Float, state, p, "exp_avg");
    t.v = optional_data<float>(vs, i, ScalarType::Float, state, p, "exp_avg_sq");
    STD_TORCH_CHECK(ms[i].numel() == vs[i].numel() && (t.offsets || ms[i].numel() == n), "adamw: moments ", i);
    call.tasks.push_back(t);
  }
  const auto f = [&](int i) { return static_cast<float>(scalars[i]); };
  call.scalars = {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), uint32_t(seed), uint32_t(uint64_t(seed) >> 32),
                  uint32_t(step)};
  return call;
}

}  // namespace lowrank
