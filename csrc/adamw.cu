// torch.ops.lowrank.adamw on a GPU: a thread steps 8 elements, a launch up to 40 parameters, described in its arguments.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "adamw_op.h"
#include "vector.cuh"

namespace lowrank {
namespace {

constexpr int THREADS = 256, TASKS = 40;

struct Batch {
  AdamWTask task[TASKS];
  uint32_t end[TASKS];  // thread blocks up to and with each task
  AdamWScalars scalars;
};
static_assert(sizeof(Batch) <= 4096, "the arguments of a launch");

template <class T, class G, bool STOCHASTIC, bool MASKED>
__global__ void __launch_bounds__(THREADS) adamw_kernel(const __grid_constant__ Batch batch) {
  using Bits = typename T::Bits;
  int index = 0;
  while (blockIdx.x >= batch.end[index]) ++index;
  const AdamWTask& t = batch.task[index];
  const int64_t group = int64_t(blockIdx.x - (index ? batch.end[index - 1] : 0)) * THREADS + threadIdx.x, at = 8 * group;
  if (at >= t.n) return;
  const int count = t.n - at < 8 ? int(t.n - at) : 8;
  const unsigned mask = MASKED && t.mask ? t.mask[group] : 0xff;
  if (MASKED && mask == 0) return;  // nothing of it is read

  Bits* const stored = static_cast<Bits*>(t.p) + at;
  const Vector<Bits> old = read_some(stored, count);
  const Vector<typename G::Bits> g = read_some(static_cast<const typename G::Bits*>(t.g) + at, count);
  const bool compact = MASKED && t.offsets;
  Vector<float> m{}, v{}, p;
  float *m_at = t.m + at, *v_at = t.v + at;
  if (compact) {
    const int64_t block = at / ADAMW_BLOCK;
    const int64_t offset = t.offsets[block] + count_bits(t.mask + block * (ADAMW_BLOCK / 8), int(group % (ADAMW_BLOCK / 8)));
    m_at = t.m + offset, v_at = t.v + offset;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (mask >> i & 1 && i < count) {
        const int j = __popc(mask & ((1u << i) - 1));
        m.of[i] = m_at[j], v.of[i] = v_at[j];
      }
  } else {
    m = read_some(m_at, count), v = read_some(v_at, count);
  }
  if (t.master) {
    p = read_some(t.master + at, count);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) p.of[i] = T::value(old.of[i]);
  }
  Random random{};
  if constexpr (STOCHASTIC) random = random_of(uint64_t(t.first + at) / 8, t.stream, batch.scalars);

  Vector<Bits> fresh = old;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x = t.master ? start_of<T>(p.of[i], old.of[i]) : p.of[i], mi = m.of[i], vi = v.of[i];
    adamw_element(x, G::value(g.of[i]), mi, vi, batch.scalars);
    if (mask >> i & 1) {
      p.of[i] = x, m.of[i] = mi, v.of[i] = vi;
      fresh.of[i] = STOCHASTIC ? round_stochastically<T>(x, random.of(i)) : T::round(x);
    }
  }
  write_some(stored, fresh, count);
  if (t.master) write_some(t.master + at, p, count);
  if (compact) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (mask >> i & 1 && i < count) {
        const int j = __popc(mask & ((1u << i) - 1));
        m_at[j] = m.of[i], v_at[j] = v.of[i];
      }
  } else {
    write_some(m_at, m, count), write_some(v_at, v, count);
  }
  if (t.changes) {
    const uint8_t differs = changed_bits(old.of, fresh.of, count);
    if (differs) t.changes[group] |= differs;
  }
}

template <class T, class G, bool STOCHASTIC>
void launch(const Batch& batch, uint32_t blocks, bool masked, cudaStream_t stream) {
  const auto kernel = masked ? adamw_kernel<T, G, STOCHASTIC, true> : adamw_kernel<T, G, STOCHASTIC, false>;
  kernel<<<blocks, THREADS, 0, stream>>>(batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch(const Batch& batch, uint32_t blocks, bool masked, Dtype g, bool stochastic, cudaStream_t stream) {
  if (g == Dtype::fp32)
    stochastic ? launch<T, Fp32, true>(batch, blocks, masked, stream) : launch<T, Fp32, false>(batch, blocks, masked, stream);
  else
    stochastic ? launch<T, T, true>(batch, blocks, masked, stream) : launch<T, T, false>(batch, blocks, masked, stream);
}

}  // namespace

void adamw(const Tensors params, const Tensors grads, const Tensors ms, const Tensors vs, const Tensors masters,
           const Tensors masks, const Tensors offsets, const Tensors changes, const std::vector<int64_t> firsts,
           const std::vector<int64_t> streams, const std::vector<double> scalars, int64_t seed, int64_t step,
           bool stochastic) {
  const AdamWCall call = adamw_call(params, grads, ms, vs, masters, masks, offsets, changes, firsts, streams, scalars, seed, step);
  if (call.tasks.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(params[0].get_device_index(), &stream));
  for (size_t next = 0; next < call.tasks.size();) {
    Batch batch{};
    batch.scalars = call.scalars;
    int64_t blocks = 0;
    int filled = 0;
    bool masked = false;
    for (; filled < TASKS && next < call.tasks.size(); ++filled, ++next) {
      const AdamWTask& t = call.tasks[next];
      const int64_t more = tiles_of(t.n, 8 * THREADS);
      STD_TORCH_CHECK(more < (int64_t(1) << 31), "adamw: too many elements in one parameter");
      if (filled && blocks + more >= (int64_t(1) << 31)) break;
      blocks += more, masked |= t.mask != nullptr;
      batch.task[filled] = t, batch.end[filled] = uint32_t(blocks);
    }
    const auto s = static_cast<cudaStream_t>(stream);
    switch (call.p_type) {
      case Dtype::bf16: launch<Bf16>(batch, blocks, masked, call.g_type, stochastic, s); break;
      case Dtype::fp16: launch<Fp16>(batch, blocks, masked, call.g_type, stochastic, s); break;
      default: launch<Fp32, Fp32, false>(batch, blocks, masked, s);
    }
  }
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, m) { m.impl("adamw", TORCH_BOX(&lowrank::adamw)); }
