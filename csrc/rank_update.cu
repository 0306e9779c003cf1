// torch.ops.lowrank.rank_update on a GPU.  A block makes a tile of 64 x 256, a thread 8 x 8 of it; A and B diag(m) pass
// through shared memory in fp32, RANKS at a time.  Per step of r a thread does 64 FMAs on 16 loaded numbers.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "rank_update_op.h"
#include "vector.cuh"

namespace lowrank {
namespace {

constexpr int THREADS = 256, ROWS = 8, COLUMNS = 8, RANKS = 16;
constexpr int LANES = TILE_COLUMNS / COLUMNS;

// Column c of a thread.  With 16-byte accesses a thread owns 8 neighbours; where rows do not start on 16 bytes (VECTOR is
// false), every 32nd column, so that neighbouring threads still read neighbouring elements.
template <bool VECTOR>
__device__ __forceinline__ int column(int lane, int c) {
  return VECTOR ? COLUMNS * lane + c : lane + LANES * c;
}

// Where column c of a thread lies in shared memory: reading four at a time meets no bank twice.
template <bool VECTOR>
__device__ __forceinline__ int slot(int lane, int c) {
  return VECTOR ? (c / 4) * (TILE_COLUMNS / 2) + 4 * lane + c % 4 : lane + LANES * c;
}

template <class T, bool VECTOR>
__device__ __forceinline__ Vector<typename T::Bits> load_row(const RankUpdate& u, int64_t n, int64_t k0, int lane) {
  const auto* w = static_cast<const typename T::Bits*>(u.w) + n * u.K + k0;
  Vector<typename T::Bits> v{};
  if (n >= u.N) return v;
  if constexpr (VECTOR) {
    if (k0 + COLUMNS * lane < u.K) v = load_vector(w + COLUMNS * lane);
  } else {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
      if (k0 + column<VECTOR>(lane, c) < u.K) v.of[c] = w[column<VECTOR>(lane, c)];
  }
  return v;
}

template <bool VECTOR, class Storage>
__device__ __forceinline__ void stage(const RankUpdate& u, int64_t row, int64_t k0, int lane, float* to) {
  const auto* a = static_cast<const typename Storage::Bits*>(u.a) + row * u.K + k0;
  Vector<typename Storage::Bits> v{};
  if (row < u.r) {
    if constexpr (VECTOR) {
      if (k0 + COLUMNS * lane < u.K) v = load_vector(a + COLUMNS * lane);
    } else {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        if (k0 + column<VECTOR>(lane, c) < u.K) v.of[c] = a[column<VECTOR>(lane, c)];
    }
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) to[slot<VECTOR>(lane, c)] = Storage::value(v.of[c]);
}

// The block's sum of ``x``, in thread 0; the order is fixed.
__device__ double block_sum(double x, double* shared) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_down_sync(0xffffffff, x, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS / 32; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

template <class T, bool VECTOR, bool REPORT>
__global__ void __launch_bounds__(THREADS, REPORT ? 1 : 2) rank_update_kernel(const RankUpdate u, const unsigned tiles_k) {
  __shared__ alignas(16) float a[RANKS][TILE_COLUMNS];
  __shared__ alignas(16) float bm[RANKS][TILE_ROWS + 4];  // + 4: see below
  using Bits = typename T::Bits;
  const int lane = threadIdx.x % LANES, first_row = threadIdx.x / LANES * ROWS;
  const int64_t n0 = int64_t(blockIdx.x / tiles_k) * TILE_ROWS, k0 = int64_t(blockIdx.x % tiles_k) * TILE_COLUMNS;

  // W is on its way to the L2 while the sums are made; registers for it are not to be had
  if constexpr (VECTOR) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t n = n0 + first_row + i, k = k0 + COLUMNS * lane;
      if (n < u.N && k < u.K)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const Bits*>(u.w) + n * u.K + k));
    }
  }

  float delta[ROWS][COLUMNS] = {};
  for (int64_t j0 = 0; j0 < u.r; j0 += RANKS) {
    if (j0) __syncthreads();
    for (int j = threadIdx.x / LANES; j < RANKS; j += THREADS / LANES) {
      switch (u.a_type) {
        case Dtype::bf16: stage<VECTOR, Bf16>(u, j0 + j, k0, lane, a[j]); break;
        case Dtype::fp16: stage<VECTOR, Fp16>(u, j0 + j, k0, lane, a[j]); break;
        default: stage<VECTOR, Fp32>(u, j0 + j, k0, lane, a[j]);
      }
    }
    // neighbouring threads read neighbouring ranks; the 4 columns of padding spread their writes over the banks
    for (int i = threadIdx.x; i < RANKS * TILE_ROWS; i += THREADS) {
      const int64_t n = n0 + i / RANKS, j = j0 + i % RANKS;
      bm[i % RANKS][i / RANKS] = n < u.N && j < u.r ? scaled_b(u, n, j) : 0.0f;
    }
    __syncthreads();
    const int count = u.r - j0 < RANKS ? int(u.r - j0) : RANKS;
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      float x[COLUMNS], y[ROWS];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) x[c] = a[j][slot<VECTOR>(lane, c)];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) y[i] = bm[j][first_row + i];
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) delta[i][c] = add_rank(delta[i][c], y[i], x[c]);
    }
  }

  double sums[3] = {};
  constexpr int BATCH = VECTOR || !REPORT ? 8 / sizeof(Bits) : 1;  // rows whose loads are under way together
#pragma unroll
  for (int i0 = 0; i0 < ROWS; i0 += BATCH) {
    Vector<Bits> w[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) w[i] = load_row<T, VECTOR>(u, n0 + first_row + i0 + i, k0, lane);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const float* row = delta[i0 + i];
      const int64_t n = n0 + first_row + i0 + i, at = n * u.K + k0;
      Bits* out = static_cast<Bits*>(u.out) + at;
      Vector<Bits> v;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) v.of[c] = add_to_weight<T>(w[i].of[c], row[c]);
      Vector<Bits> back = v;
      if constexpr (REPORT) {
        if (u.back) {
#pragma unroll
          for (int c = 0; c < COLUMNS; ++c) back.of[c] = add_to_weight<T>(v.of[c], -row[c]);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
          if (n < u.N && k0 + column<VECTOR>(lane, c) < u.K)
            sums[0] += asked(row[c]), sums[1] += done<T>(row[c], w[i].of[c], v.of[c]), sums[2] += w[i].of[c] != v.of[c];
      }
      if constexpr (VECTOR) {
        if (n < u.N && k0 + COLUMNS * lane < u.K) {
          store_vector(out + COLUMNS * lane, v);
          if (REPORT && u.back) store_vector(static_cast<Bits*>(u.back) + at + COLUMNS * lane, back);
          if (u.changed) u.changed[at / 8 + lane] = changed_bits(w[i].of, back.of, COLUMNS);
        }
      } else {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
          if (n < u.N && k0 + column<VECTOR>(lane, c) < u.K) {
            out[column<VECTOR>(lane, c)] = v.of[c];
            if (REPORT && u.back) static_cast<Bits*>(u.back)[at + column<VECTOR>(lane, c)] = back.of[c];
          }
      }
    }
  }
  if constexpr (REPORT) {
    double* shared = reinterpret_cast<double*>(a);
    __syncthreads();
    for (int i = 0; i < 3; ++i) {
      const double sum = block_sum(sums[i], shared);
      if (threadIdx.x == 0) u.stats[3 * int64_t(blockIdx.x) + i] = sum;
    }
  }
}

// The map where rows do not start on its bytes: a second pass.
template <class Bits>
__global__ void changed_kernel(const RankUpdate u) {
  const int64_t e = 8 * (int64_t(blockIdx.x) * THREADS + threadIdx.x), end = u.N * u.K;
  if (e < end)
    u.changed[e / 8] = changed_bits(static_cast<const Bits*>(u.w) + e,
                                    static_cast<const Bits*>(u.back ? u.back : u.out) + e, end - e);
}

template <class T>
void launch(const RankUpdate& u, cudaStream_t stream) {
  const int64_t tiles_k = tiles_of(u.K, TILE_COLUMNS), tiles = tiles_of(u.N, TILE_ROWS) * tiles_k;
  const uintptr_t addresses = uintptr_t(u.w) | uintptr_t(u.out) | uintptr_t(u.a) | uintptr_t(u.back);
  const bool vector = u.K % COLUMNS == 0 && addresses % 16 == 0;
  STD_TORCH_CHECK(tiles < (int64_t(1) << 31), "rank_update: too many tiles for one launch");
  const auto kernel = vector ? (u.stats ? rank_update_kernel<T, true, true> : rank_update_kernel<T, true, false>)
                             : (u.stats ? rank_update_kernel<T, false, true> : rank_update_kernel<T, false, false>);
  kernel<<<tiles, THREADS, 0, stream>>>(u, unsigned(tiles_k));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (u.changed && !vector) {
    const int64_t blocks = tiles_of(tiles_of(u.N * u.K, 8), THREADS);
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "rank_update: too many elements for one launch");
    changed_kernel<typename T::Bits><<<blocks, THREADS, 0, stream>>>(u);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

void rank_update(const Tensor& weight, const Tensor& A, const Tensor& m, const Tensor& B, const Tensor& out,
                 const std::optional<Tensor>& changed, const std::optional<Tensor>& stats,
                 const std::optional<Tensor>& back) {
  const RankUpdate u = rank_update_call(weight, A, m, B, out, changed, stats, back);
  if (u.N == 0 || u.K == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(weight.get_device_index(), &stream));
  switch (u.w_type) {
    case Dtype::bf16: return launch<Bf16>(u, static_cast<cudaStream_t>(stream));
    case Dtype::fp16: return launch<Fp16>(u, static_cast<cudaStream_t>(stream));
    default: return launch<Fp32>(u, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace lowrank

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, m) { m.impl("rank_update", TORCH_BOX(&lowrank::rank_update)); }
