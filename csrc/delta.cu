// torch.ops.lowrank.delta on a GPU.  A thread owns a block of the delta; where every element is read (map, fingerprint), 8 of
// them.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "delta_op.h"
#include "vector.cuh"

namespace lowrank {
namespace {

constexpr int GROUPS = DELTA_BLOCK / 8;  // threads per block of the delta, at 8 elements each
static_assert(GROUPS % 32 == 0, "whole warps reduce");

template <class Bits, DeltaPass PASS>
__global__ void __launch_bounds__(GROUPS) delta_blocks(const Delta d) {
  const int64_t block = int64_t(blockIdx.x) * GROUPS + threadIdx.x;
  if (block >= d.blocks) return;
  if constexpr (PASS == DeltaPass::size) d.heads[block] = delta_size<Bits>(d, block);
  if constexpr (PASS == DeltaPass::encode) delta_encode<Bits>(d, block);
  if constexpr (PASS == DeltaPass::check) d.found[block] = !delta_fits(d, block);
  if constexpr (PASS == DeltaPass::apply) delta_apply<Bits>(d, block);
  if constexpr (PASS == DeltaPass::mark) delta_mark(d, block);
}

template <class Bits>
__global__ void __launch_bounds__(GROUPS) delta_map(const Delta d) {
  const int64_t group = int64_t(blockIdx.x) * GROUPS + threadIdx.x, at = 8 * group;
  if (at >= tiles_of(d.n, 32) * 32) return;  // to the end of the last word
  const int count = d.n - at < 8 ? int(d.n - at) : 8;
  const Vector<Bits> old = read_some(static_cast<const Bits*>(d.old) + at, count);
  const Vector<Bits> data = read_some(static_cast<const Bits*>(d.data) + at, count);
  d.changed[group] = changed_bits(old.of, data.of, count);
}

template <class Bits>
__global__ void __launch_bounds__(GROUPS) delta_fingerprint(const Delta d) {
  __shared__ unsigned long long total;
  const int64_t group = int64_t(blockIdx.x) * GROUPS + threadIdx.x, at = 8 * group;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long sum = 0;
  if (at < d.n) {
    const int count = d.n - at < 8 ? int(d.n - at) : 8;
    const Vector<Bits> data = read_some(static_cast<const Bits*>(d.data) + at, count);
    const unsigned skipped = d.changed ? d.changed[group] : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count && !(skipped >> i & 1)) sum += delta_hash(at + i, data.of[i]);
  }
  for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
  __syncthreads();
  if (threadIdx.x == 0) d.found[blockIdx.x] = int64_t(total);
}

template <class Bits>
void launch(const Delta& d, DeltaPass pass, cudaStream_t stream) {
  const auto whole = unsigned(tiles_of(d.blocks, GROUPS)), parts = unsigned(d.blocks);
  switch (pass) {
    case DeltaPass::map: delta_map<Bits><<<parts, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::size: delta_blocks<Bits, DeltaPass::size><<<whole, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::encode: delta_blocks<Bits, DeltaPass::encode><<<whole, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::check: delta_blocks<uint16_t, DeltaPass::check><<<whole, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::apply: delta_blocks<Bits, DeltaPass::apply><<<whole, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::mark: delta_blocks<uint16_t, DeltaPass::mark><<<whole, GROUPS, 0, stream>>>(d); break;
    case DeltaPass::fingerprint: delta_fingerprint<Bits><<<parts, GROUPS, 0, stream>>>(d);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void delta(int64_t pass, int64_t numel, const MaybeTensor data, const MaybeTensor old, const MaybeTensor changed,
           const MaybeTensor heads, const MaybeTensor index, const MaybeTensor values, const MaybeTensor starts,
           const MaybeTensor found) {
  const DeltaCall call = delta_call(pass, numel, data, old, changed, heads, index, values, starts, found);
  if (numel == 0) return;
  STD_TORCH_CHECK(call.d.blocks < (int64_t(1) << 31), "delta: too many elements");
  const int32_t device = (heads ? heads : data)->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto s = static_cast<cudaStream_t>(stream);
  call.wide ? launch<uint32_t>(call.d, call.pass, s) : launch<uint16_t>(call.d, call.pass, s);
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, m) { m.impl("delta", TORCH_BOX(&lowrank::delta)); }
