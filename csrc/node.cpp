// torch.ops.lowrank.plain_linears_node: linear.h as an autograd node of C++, which torch's stable ABI has none of.  Built for the
// torch that is installed, and loaded beside no other (setup.py, lowrank/_native.py); lowrank/ops/linear.py has the same node
// in Python, and takes it where this one is not there or saved tensors go through hooks.
//
// Who looks into backward (create_graph, torch.func, batches of gradients, compiled autograd), or gives it no gradient for some
// output, is answered by Python: torch.ops.lowrank.plain_linears_rest.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include "linear.h"

namespace lowrank {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

static Tensor stable(const at::Tensor& t) { return Tensor(torch::aot_inductor::new_tensor_handle(at::Tensor(t))); }

static const at::Tensor& plain(const Tensor& t) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get());
}

static Tensors stable(at::TensorList tensors) {
  Tensors found;
  found.reserve(tensors.size());
  for (const at::Tensor& t : tensors) found.push_back(stable(t));
  return found;
}

// Everything about a call that is not a tensor.
struct Call {
  at::TensorList weights;
  const c10::List<std::optional<at::Tensor>>& starts;
  c10::ArrayRef<double> scales, numbers;
  c10::ArrayRef<int64_t> masks, cuts, layers;
  const std::optional<at::Tensor>& seeds;
  at::ScalarType dtype, thin;
};

// Whether all gradients are there, and nobody looks into what is made of them.
static bool is_plain(const variable_list& dys) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  if (at::GradMode::is_enabled() || c10::impl::dispatch_mode_enabled() ||
      c10::impl::tls_local_dispatch_key_set().included_.has(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
    return false;
  }
  const DispatchKeySet beside =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | DispatchKeySet({DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  for (const at::Tensor& dy : dys) {
    if (!dy.defined() || dy.key_set() - beside != DispatchKeySet(DispatchKey::CPU)) return false;
  }
  return true;
}

struct PlainLinears : torch::autograd::Function<PlainLinears> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& base,
                               at::TensorList factors, const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::vector<std::optional<Tensor>> starts;
    for (const std::optional<at::Tensor>& t : call.starts) {
      starts.push_back(t ? std::optional<Tensor>(stable(*t)) : std::nullopt);
    }
    const std::vector<double> scales = call.scales.vec();
    const std::vector<int64_t> masks = call.masks.vec();
    const Tensors made =
        plain_linears(stable(x), stable(call.weights), starts, stable(factors), scales, masks, call.cuts.vec(),
                      call.seeds ? std::optional<Tensor>(stable(*call.seeds)) : std::nullopt, call.dtype, call.thin);
    const size_t n = scales.size();
    variable_list ys, saved{x, plain(made[n])};
    for (size_t i = 0; i < n; ++i) ys.push_back(plain(made[i]));
    saved.insert(saved.end(), factors.begin(), factors.end());
    for (size_t i = n + 1; i < made.size(); ++i) saved.push_back(plain(made[i]));
    if (x.requires_grad()) saved.insert(saved.end(), call.weights.begin(), call.weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    // x is alive as long as the node holds it, and so where its version is asked for
    std::vector<int64_t> rest{reinterpret_cast<int64_t>(x.unsafeGetTensorImpl()), int64_t(x._version()), x.requires_grad(),
                              base && base->requires_grad(), int64_t(call.dtype), int64_t(call.thin),
                              int64_t(call.cuts.size())};
    rest.insert(rest.end(), masks.begin(), masks.end());
    rest.insert(rest.end(), call.layers.begin(), call.layers.end());
    ctx->saved_data["rest"] = std::move(rest);
    std::vector<double> all = scales;  // and what Python needs beside them
    all.insert(all.end(), call.numbers.begin(), call.numbers.end());
    ctx->saved_data["numbers"] = std::move(all);
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const std::vector<int64_t> rest = ctx->saved_data["rest"].toIntVector();
    const std::vector<double> all = ctx->saved_data["numbers"].toDoubleVector();
    const bool need_x = rest[2], need_base = rest[3];
    const auto dtype = at::ScalarType(rest[4]), thin = at::ScalarType(rest[5]);
    const size_t n = dys.size(), cuts = rest[6];
    const std::vector<double> scales(all.begin(), all.begin() + n), numbers(all.begin() + n, all.end());
    const std::vector<int64_t> masks(rest.begin() + 7, rest.begin() + 7 + n), layers(rest.begin() + 7 + n, rest.end());
    variable_list saved;
    try {
      saved = ctx->get_saved_variables();
    } catch (const c10::Error&) {
      if (const auto* x = reinterpret_cast<const at::TensorImpl*>(rest[0]); x->version_counter().current_version() != rest[1]) {
        static const auto raise = c10::Dispatcher::singleton().findSchemaOrThrow("lowrank::input_was_changed", "").typed<void(c10::ArrayRef<int64_t>)>();
        raise.call(layers);
      }
      throw;
    }
    const at::TensorList tensors(saved), factors = tensors.slice(2, 2 * n), keeps = tensors.slice(2 + 2 * n, cuts),
                         weights = tensors.slice(2 + 2 * n + cuts);
    variable_list grads(2 + 2 * n + 1);  // x, base, A and B of each, and the call
    if (is_plain(dys)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      Tensors made = plain_linears_backward(stable(dys), stable(saved[0]), stable(saved[1]), stable(factors), stable(keeps),
                                            stable(weights), scales, masks, need_x, dtype, thin);
      size_t next = 0;
      if (need_x) grads[0] = plain(made[next++]);
      for (size_t i = 0; i < 2 * n; ++i) grads[2 + i] = plain(made[next++]);
    } else {
      static const auto rest_of = c10::Dispatcher::singleton().findSchemaOrThrow("lowrank::plain_linears_rest", "").typed<variable_list(
          const c10::List<std::optional<at::Tensor>>&, const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList, at::TensorList, c10::ArrayRef<double>, c10::ArrayRef<int64_t>, bool, at::ScalarType, at::ScalarType, c10::ArrayRef<int64_t>)>();
      c10::List<std::optional<at::Tensor>> some;
      bool any = false;
      for (const at::Tensor& dy : dys) {
        some.push_back(dy.defined() ? std::optional<at::Tensor>(dy) : std::nullopt);
        any |= dy.defined();
      }
      if (any) {
        variable_list made =
            rest_of.call(some, saved[0], saved[1], factors, keeps, weights, numbers, masks, need_x, dtype, thin, layers);
        size_t next = 0;
        if (need_x) grads[0] = made[next++];
        for (size_t i = 0; i < n; ++i) {
          if (!dys[i].defined()) continue;
          grads[2 + 2 * i] = made[next++];
          grads[2 + 2 * i + 1] = made[next++];
        }
      }
    }
    if (need_base) grads[1] = dys[0];
    return grads;
  }
};

variable_list plain_linears_node(const at::Tensor& x, at::TensorList weights,
                                 const c10::List<std::optional<at::Tensor>>& starts, at::TensorList factors,
                                 c10::ArrayRef<double> scales, c10::ArrayRef<double> numbers, c10::ArrayRef<int64_t> masks,
                                 c10::ArrayRef<int64_t> cuts, const std::optional<at::Tensor>& seeds, at::ScalarType dtype,
                                 at::ScalarType thin, c10::ArrayRef<int64_t> layers) {
  const Call call{weights, starts, scales, numbers, masks, cuts, layers, seeds, dtype, thin};
  std::optional<at::Tensor> base;
  if (weights.empty()) base = starts.get(0);
  return PlainLinears::apply(x, std::as_const(base), factors, call);
}

}  // namespace lowrank

TORCH_LIBRARY_IMPL(lowrank, CompositeImplicitAutograd, m) { m.impl("plain_linears_node", &lowrank::plain_linears_node); }
