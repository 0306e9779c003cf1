// The ops of analysis.h on a GPU.  diff_stats: a warp sums a block of 4,096; topk_mask: bins in shared memory, integer
// atomics, so that the order does not matter; mask_overlap: words of all masks in shared memory, a warp counts a pair.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "analysis_op.h"
#include "vector.cuh"

namespace lowrank {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, MOST_BLOCKS = 1024;
static_assert(DIFF_LANES == 8 * 32 && OVERLAP_WORDS == THREADS, "a lane owns 8 elements, a thread loads a word");

using Counter = unsigned long long;

__device__ __forceinline__ int count_of(int64_t n, int64_t at) { return n - at >= 8 ? 8 : n > at ? int(n - at) : 0; }

__device__ __forceinline__ double halved(double (&x)[8]) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += __shfl_down_sync(0xffffffff, x[i], offset);
#pragma unroll
  for (int half = 4; half; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

template <class T>
__global__ void __launch_bounds__(THREADS) diff_kernel(const DiffTask t) {
  using Bits = typename T::Bits;
  const int64_t index = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (index * DIFF_BLOCK >= t.n) return;
  const int lane = threadIdx.x % 32;
  double squares[8] = {}, olds[8] = {};
  unsigned flags = 0, most = 0;  // 128 elements do not fill a byte
#pragma unroll 2
  for (int row = 0; row < DIFF_BLOCK; row += DIFF_LANES) {
    const int64_t at = index * DIFF_BLOCK + row + 8 * lane;
    const int count = count_of(t.n, at);
    const Vector<Bits> before = read_some(static_cast<const Bits*>(t.before) + at, count);
    const Vector<Bits> after = read_some(static_cast<const Bits*>(t.after) + at, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Diff diff = difference<T>(before.of[i], after.of[i], t.tol, t.rel, t.ulp);
      flags += diff.flags;
      most = max(most, bit_cast<unsigned>(diff.d));
      squares[i] = add_square(squares[i], diff.d), olds[i] = add_square(olds[i], diff.old);
    }
  }
  unsigned counts[DIFF_COUNTS];
#pragma unroll
  for (int i = 0; i < DIFF_COUNTS; ++i) counts[i] = __reduce_add_sync(0xffffffff, flags >> 8 * i & 0xff);
  most = __reduce_max_sync(0xffffffff, most);
  const double square = halved(squares), old = halved(olds);
  if (lane == 0) {
    for (int i = 0; i < DIFF_COUNTS; ++i) t.counts[DIFF_COUNTS * index + i] = counts[i];
    double* const sums = t.sums + DIFF_SUMS * index;
    sums[0] = bit_cast<float>(most), sums[1] = square, sums[2] = old;
  }
}

template <class T>
__device__ __forceinline__ Vector<uint32_t> score_keys(const SelectTask& t, int64_t at, int count) {
  using Bits = typename T::Bits;
  const Vector<Bits> after = read_some(static_cast<const Bits*>(t.after) + at, count);
  Vector<uint32_t> keys;
  if (t.before) {
    const Vector<Bits> before = read_some(static_cast<const Bits*>(t.before) + at, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) keys.of[i] = score_key<T, true>(before.of[i], after.of[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) keys.of[i] = score_key<T, false>(0, after.of[i]);
  }
  return keys;
}

// The bin of an element, -1 if it is not counted.
__device__ __forceinline__ int bin_of(uint32_t key, int64_t at, const SelectTask& t) {
  if (t.tied) {
    if (key != t.key) return -1;
    const uint64_t hash = hash_of(t.seed, uint64_t(t.first + at));
    return hash_is_under(hash, t) ? digit(hash, t) : -1;
  }
  return key >> t.above == t.key ? digit(key, t) : -1;
}

template <class T>
__global__ void __launch_bounds__(THREADS) histogram_kernel(const SelectTask t, Counter* const sums) {
  __shared__ unsigned bins[DIGIT_BINS + 1];
  for (int bin = threadIdx.x; bin <= DIGIT_BINS; bin += THREADS) bins[bin] = 0;
  __syncthreads();
  const int64_t stride = 8 * int64_t(gridDim.x) * THREADS;
  for (int64_t at = 8 * (int64_t(blockIdx.x) * THREADS + threadIdx.x); at < t.n; at += stride) {
    const int count = count_of(t.n, at);
    const Vector<uint32_t> keys = score_keys<T>(t, at, count);
    int run = -1;  // neighbours with one digit, most often that of 0, are one addition
    unsigned length = 0, nans = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int bin = i < count ? bin_of(keys.of[i], at + i, t) : -1;
      nans += i < count && keys.of[i] > INFINITE;
      if (bin != run) {
        if (run >= 0) atomicAdd(&bins[run], length);
        run = bin, length = 0;
      }
      ++length;
    }
    if (run >= 0) atomicAdd(&bins[run], length);
    if (nans) atomicAdd(&bins[NAN_BIN], nans);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin <= DIGIT_BINS; bin += THREADS)
    if (bins[bin]) atomicAdd(&sums[bin], Counter(bins[bin]));
}

template <class T>
__global__ void __launch_bounds__(THREADS) emit_kernel(const SelectTask t, uint8_t* const bytes) {
  const int64_t group = int64_t(blockIdx.x) * THREADS + threadIdx.x, at = 8 * group;
  if (at >= t.n) return;
  const int count = count_of(t.n, at);
  const Vector<uint32_t> keys = score_keys<T>(t, at, count);
  unsigned byte = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) byte |= unsigned(is_taken(keys.of[i], uint64_t(t.first + at + i), t)) << i;
  bytes[group] = byte;
}

__global__ void __launch_bounds__(THREADS) overlap_kernel(const __grid_constant__ OverlapTask t) {
  __shared__ uint32_t words[OVERLAP_MASKS][OVERLAP_WORDS];
  __shared__ unsigned counts[OVERLAP_MASKS * OVERLAP_MASKS];
  const int pairs = t.count * t.count, lane = threadIdx.x % 32;
  for (int pair = threadIdx.x; pair < pairs; pair += THREADS) counts[pair] = 0;
  for (int64_t at = int64_t(blockIdx.x) * OVERLAP_WORDS; at < t.words; at += int64_t(gridDim.x) * OVERLAP_WORDS) {
    __syncthreads();
    for (int i = 0; i < t.count; ++i)
      words[i][threadIdx.x] = at + threadIdx.x < t.words ? t.mask[i][at + threadIdx.x] : 0;
    __syncthreads();
    for (int pair = threadIdx.x / 32; pair < pairs; pair += WARPS) {
      const int i = pair / t.count, j = pair % t.count;
      if (i > j) continue;
      unsigned sum = 0;
      for (int w = lane; w < OVERLAP_WORDS; w += 32) sum += __popc(words[i][w] & words[j][w]);
      sum = __reduce_add_sync(0xffffffff, sum);
      if (lane == 0) counts[pair] += sum;  // always the same warp
    }
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += THREADS)
    if (counts[pair]) atomicAdd(reinterpret_cast<Counter*>(t.counts) + pair, Counter(counts[pair]));
}

unsigned blocks_for(int64_t n, int64_t per_block) {
  const int64_t blocks = tiles_of(n, per_block);
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "analysis: too many elements for one launch");
  return unsigned(blocks);
}

unsigned some_blocks(int64_t n, int64_t per_block) {
  const int64_t blocks = tiles_of(n, per_block);
  return unsigned(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS);
}

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

using torch::stable::accelerator::DeviceGuard;

void diff_stats(const Tensor& before, const Tensor& after, double tol, double rel, int64_t ulp, const Tensor& counts,
                const Tensor& sums) {
  const DiffTask t = diff_task(before, after, tol, rel, ulp, counts, sums);
  const Dtype type = dtype_of(after, "analysis");
  if (t.n == 0) return;
  const DeviceGuard guard(after.get_device_index());
  const auto kernel = type == Dtype::bf16 ? diff_kernel<Bf16> : type == Dtype::fp16 ? diff_kernel<Fp16> : diff_kernel<Fp32>;
  kernel<<<blocks_for(t.n, int64_t(WARPS) * DIFF_BLOCK), THREADS, 0, stream_of(after)>>>(t);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void topk_histogram(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t above,
                    int64_t shift, bool tied, int64_t seed, int64_t first, const Tensor& counts) {
  const SelectTask t = select_task(after, before, key, hash, above, shift, tied, seed, first);
  const Dtype type = dtype_of(after, "analysis");
  auto* const sums = data_of<Counter>(counts, ScalarType::Long, DIGIT_BINS + 1, after, "analysis: counts");
  if (t.n == 0) return;
  const DeviceGuard guard(after.get_device_index());
  const auto kernel =
      type == Dtype::bf16 ? histogram_kernel<Bf16> : type == Dtype::fp16 ? histogram_kernel<Fp16> : histogram_kernel<Fp32>;
  kernel<<<some_blocks(t.n, 8 * THREADS), THREADS, 0, stream_of(after)>>>(t, sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void topk_emit(const Tensor& after, const std::optional<Tensor>& before, int64_t key, int64_t hash, int64_t seed, int64_t first,
               const Tensor& words) {
  const SelectTask t = select_task(after, before, key, hash, 1, 0, true, seed, first);
  const Dtype type = dtype_of(after, "analysis");
  auto* const bytes = data_of<uint8_t>(words, ScalarType::Int, tiles_of(t.n, 32), after, "analysis: words");
  if (t.n == 0) return;
  const DeviceGuard guard(after.get_device_index());
  const auto kernel = type == Dtype::bf16 ? emit_kernel<Bf16> : type == Dtype::fp16 ? emit_kernel<Fp16> : emit_kernel<Fp32>;
  kernel<<<blocks_for(t.n, 8 * THREADS), THREADS, 0, stream_of(after)>>>(t, bytes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void mask_overlap(const std::vector<Tensor> masks, const Tensor& counts) {
  const OverlapTask t = overlap_task(masks, counts);
  if (t.words == 0) return;
  const DeviceGuard guard(counts.get_device_index());
  overlap_kernel<<<some_blocks(t.words, OVERLAP_WORDS), THREADS, 0, stream_of(counts)>>>(t);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, m) {
  m.impl("diff_stats", TORCH_BOX(&lowrank::diff_stats));
  m.impl("topk_histogram", TORCH_BOX(&lowrank::topk_histogram));
  m.impl("topk_emit", TORCH_BOX(&lowrank::topk_emit));
  m.impl("mask_overlap", TORCH_BOX(&lowrank::mask_overlap));
}
