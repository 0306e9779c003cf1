// Eight neighbouring elements of a thread, in 16-byte accesses.
#pragma once

#include "dtype.h"

namespace lowrank {
namespace {

template <class Bits>
struct alignas(16) Vector {
  Bits of[8];
};

// 8 numbers by 16-byte loads that no store of this kernel can have changed.
template <class Bits>
__device__ __forceinline__ Vector<Bits> load_vector(const Bits* p) {
  Vector<Bits> v;
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / 16); ++i)
    reinterpret_cast<uint4*>(&v)[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
  return v;
}

// The same of memory that this kernel writes; ``count`` < 8 or an address off 16 bytes goes element by element.
template <class Bits>
__device__ __forceinline__ Vector<Bits> read_some(const Bits* p, int count) {
  Vector<Bits> v{};
  if (count == 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(v) / 16); ++i)
      reinterpret_cast<uint4*>(&v)[i] = reinterpret_cast<const uint4*>(p)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) v.of[i] = p[i];
  }
  return v;
}

template <class Bits>
__device__ __forceinline__ void write_some(Bits* p, const Vector<Bits>& v, int count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(v) / 16); ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&v)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) p[i] = v.of[i];
  }
}

template <class Bits>
__device__ __forceinline__ void store_vector(Bits* p, const Vector<Bits>& v) {
#pragma unroll
  for (int i = 0; i < int(sizeof(v) / 16); ++i)
    __stcs(reinterpret_cast<uint4*>(p) + i, reinterpret_cast<const uint4*>(&v)[i]);
}

}  // namespace
}  // namespace lowrank
