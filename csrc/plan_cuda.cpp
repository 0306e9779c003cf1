// torch.ops.lowrank.new_plan, launch and free_plan: a Plan through the CUDA driver, on torch's current stream.
//
// Neither CUDA's headers nor its libraries are needed to build this: the two functions it calls are looked up when the first
// plan is made, in libraries that a process with a GPU has loaded.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "plan.h"

namespace lowrank {

using LaunchKernel = int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
using CurrentStream = int(int32_t, void**);

template <class F>
F* symbol(const char* library, const char* name) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? reinterpret_cast<F*>(dlsym(handle, name)) : nullptr;
}

LaunchKernel* launch_kernel() {
  static LaunchKernel* const f = symbol<LaunchKernel>("libcuda.so.1", "cuLaunchKernel");
  return f;
}

CurrentStream* current_stream() {
  static CurrentStream* const f = symbol<CurrentStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  return f;
}

// A handle; 0 where there is nothing to launch with.
int64_t new_plan(int64_t function, const std::vector<int64_t> grid, int64_t threads, int64_t shared, int64_t device,
                 const std::vector<int64_t> kinds, const std::vector<int64_t> values) {
  if (!launch_kernel() || !current_stream()) return 0;
  STD_TORCH_CHECK(grid.size() == 3 && kinds.size() == values.size(), "new_plan: expected 3 sizes, and a value for each kind");
  auto* const plan = new Plan{};
  plan->function = reinterpret_cast<void*>(function);
  for (int i = 0; i < 3; ++i) plan->grid[i] = static_cast<unsigned>(grid[i]);
  plan->threads = static_cast<unsigned>(threads), plan->shared = static_cast<unsigned>(shared);
  plan->device = static_cast<int32_t>(device);
  for (size_t i = 0; i < kinds.size(); ++i) plan->add(kinds[i], values[i]);
  return reinterpret_cast<int64_t>(plan);
}

void launch(const Plan& plan, void* const* pointers, const double* floats) {
  std::vector<uint64_t> parameters(plan.parameters);
  for (const auto& slot : plan.pointers) parameters[slot.at] = reinterpret_cast<uint64_t>(pointers[slot.index]);
  for (const auto& slot : plan.floats) {
    const float value = static_cast<float>(floats[slot.index]);
    std::memcpy(&parameters[slot.at], &value, sizeof value);
  }
  std::vector<void*> addresses(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) addresses[i] = &parameters[i];
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream()(plan.device, &stream) == 0, "launch: no current stream on device ", plan.device);
  const int error = launch_kernel()(plan.function, plan.grid[0], plan.grid[1], plan.grid[2], plan.threads, 1, 1, plan.shared,
                                    stream, addresses.data(), nullptr);
  STD_TORCH_CHECK(error == 0, "launch: cuLaunchKernel failed with CUDA error ", error);
}

void launch_op(int64_t handle, const std::vector<torch::stable::Tensor> tensors, const std::vector<double> floats) {
  std::vector<void*> pointers;
  pointers.reserve(tensors.size());
  for (const auto& t : tensors) pointers.push_back(t.data_ptr());
  launch(*reinterpret_cast<const Plan*>(handle), pointers.data(), floats.data());
}

void free_plan(int64_t handle) { delete reinterpret_cast<const Plan*>(handle); }

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CompositeExplicitAutograd, m) {
  m.impl("new_plan", TORCH_BOX(&lowrank::new_plan));
  m.impl("launch", TORCH_BOX(&lowrank::launch_op));
  m.impl("free_plan", TORCH_BOX(&lowrank::free_plan));
}
