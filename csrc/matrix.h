// Matrices as ATen's GEMMs take them: views, fresh memory, products.  What a CPU runs beside a kernel, on torch's stable ABI.
#pragma once

#ifdef LOWRANK_ATEN  // any device's; the stable ABI has a CPU's alone
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace lowrank {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// t's memory from its element `offset` on, as [rows, columns].
inline Tensor view(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                   int64_t offset = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) { return view(t, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

inline Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  return first == 0 && count == t.size(0) ? t : view(t, count, t.size(1), t.stride(0), t.stride(1), first * t.stride(0));
}

inline Tensor columns_of(const Tensor& t, int64_t first, int64_t count) {
  return first == 0 && count == t.size(1) ? t : view(t, t.size(0), count, t.stride(0), t.stride(1), first * t.stride(1));
}

// Contiguous memory on like's device that nobody has written to.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
#ifdef LOWRANK_ATEN  // where there is no memory, torch's own error
  const auto options = torch::aot_inductor::tensor_handle_to_tensor_pointer(like.get())->options().dtype(dtype);
  return Tensor(torch::aot_inductor::new_tensor_handle(at::empty(sizes, options)));
#else
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  const auto device = like.device();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &handle));
  return Tensor(handle);
#endif
}

inline void copy(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

// In t's order of dims, as Tensor.to: a GEMM's last bit depends on it.
inline Tensor cast(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  const bool turned = t.stride(0) > 0 && t.stride(0) < t.stride(1);
  Tensor out = turned ? transposed(empty(t, {t.size(1), t.size(0)}, dtype)) : empty(t, {t.size(0), t.size(1)}, dtype);
  copy(out, t);
  return out;
}

inline bool is_dense(const Tensor& t) {
  const int64_t rows = t.stride(0), columns = t.stride(1);
  return (rows == 1 || columns == 1) && rows != 0 && columns != 0;
}

inline Tensor packed(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor out = empty(t, {t.size(0), t.size(1)}, t.scalar_type());
  copy(out, t);
  return out;
}

// t [..., K] as [M, K].
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t K = t.size(t.dim() - 1);
  return t.is_contiguous() ? view(t, t.numel() / K, K, K, 1) : torch::stable::reshape(t, {-1, K});
}

// out = beta start + alpha a b
inline void addmm(const Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b, double alpha = 1.0,
                  double beta = 1.0) {
#ifdef LOWRANK_ATEN
  using torch::aot_inductor::tensor_handle_to_tensor_pointer;
  at::addmm_out(*tensor_handle_to_tensor_pointer(out.get()), *tensor_handle_to_tensor_pointer(start.get()),
                *tensor_handle_to_tensor_pointer(a.get()), *tensor_handle_to_tensor_pointer(b.get()), beta, alpha);
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), beta, alpha));
#endif
}

// out = alpha a b, rounded once
inline void mm(const Tensor& out, const Tensor& a, const Tensor& b, double alpha = 1.0) {
  if (alpha != 1.0) return addmm(out, out, a, b, alpha, 0.0);
#ifdef LOWRANK_ATEN
  using torch::aot_inductor::tensor_handle_to_tensor_pointer;
  at::mm_out(*tensor_handle_to_tensor_pointer(out.get()), *tensor_handle_to_tensor_pointer(a.get()),
             *tensor_handle_to_tensor_pointer(b.get()));
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
#endif
}

}  // namespace lowrank
