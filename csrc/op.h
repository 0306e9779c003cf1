// From tensors to the pointers and dtypes that kernels take.  Python has checked them with better messages; these checks keep a
// direct call of an op from reading or writing past an end.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "dtype.h"

namespace lowrank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp64: whether the op takes that, too.
inline Dtype dtype_of(const Tensor& t, const char* op, bool fp64 = false) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Dtype::fp32;
  if (type == ScalarType::BFloat16) return Dtype::bf16;
  if (type == ScalarType::Half) return Dtype::fp16;
  STD_TORCH_CHECK(fp64 && type == ScalarType::Double, op, ": expected fp16, bf16", fp64 ? ", fp32 or fp64" : " or fp32");
  return Dtype::fp64;
}

// The data of a contiguous tensor of that type, with numel elements (any number where that is below 0), on the device of `like`.
// name: what the error calls it, in one part or more.
template <class T = void, class... Name>
T* data_of(const Tensor& t, ScalarType type, int64_t numel, const Tensor& like, const Name&... name) {
  if (numel < 0) numel = t.numel();
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel && t.is_contiguous() && t.device() == like.device(), name...,
                  ": expected ", numel, " contiguous elements in ", type, " on the others' device, got ", t.numel(), " in ",
                  t.scalar_type());
  return static_cast<T*>(t.data_ptr());
}

}  // namespace lowrank
