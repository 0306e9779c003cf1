// linear.h as an autograd node of C++, which torch's stable ABI has none of, called without a dispatcher, which takes longer than
// a small call's arithmetic.  Built for the torch and the Python that are installed, and loaded beside no others (setup.py,
// lowrank/_native.py); lowrank/ops/linear.py has the same node in Python, and takes it where this one is not there or saved
// tensors go through hooks.
//
// Who looks into backward (create_graph, torch.func, batches of gradients, compiled autograd), or gives it no gradient for some
// output, is answered by Python: torch.ops.lowrank.plain_linears_rest.
#define LOWRANK_ATEN
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstring>

#include "linear.h"

namespace lowrank {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

static Tensor stable(const at::Tensor& t) { return Tensor(torch::aot_inductor::new_tensor_handle(at::Tensor(t))); }

static const at::Tensor& plain(const Tensor& t) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(t.get());
}

static Tensors stable(at::TensorList tensors) {
  Tensors handles;
  handles.reserve(tensors.size());
  for (const at::Tensor& t : tensors) handles.push_back(stable(t));
  return handles;
}

// Everything about a call but x and the factors.  numbers: the scalings and then the ps.  layers: ids, for errors and stats().
struct Call {
  variable_list weights;
  std::vector<std::optional<at::Tensor>> starts;
  std::vector<double> scales, numbers;
  std::vector<int64_t> masks, cuts, layers;
  std::optional<at::Tensor> seeds;
  bool recomputed;  // by checkpointing
  at::ScalarType dtype, thin;
};

// Whether t is its own memory and no more: not sparse, no wrapper, nothing lazy.
static bool is_ordinary(const at::Tensor& t) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  const DispatchKeySet beside =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | DispatchKeySet({DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  const DispatchKeySet keys = t.key_set() - beside;
  return keys == DispatchKeySet(DispatchKey::CPU) || keys == DispatchKeySet(DispatchKey::CUDA);
}

// Whether all gradients are there, and nobody looks into what is made of them.
static bool is_plain(const variable_list& dys) {
  if (at::GradMode::is_enabled() || c10::impl::dispatch_mode_enabled() ||
      c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
    return false;
  }
  return std::all_of(dys.begin(), dys.end(), [](const at::Tensor& dy) { return dy.defined() && is_ordinary(dy); });
}

// The ys, S and the bits.
static Tensors forward_of(const at::Tensor& x, at::TensorList factors, const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<std::optional<Tensor>> starts;
  for (const std::optional<at::Tensor>& t : call.starts) {
    starts.push_back(t ? std::optional<Tensor>(stable(*t)) : std::nullopt);
  }
  return plain_linears(stable(x), stable(call.weights), starts, stable(factors), call.scales, call.masks, call.cuts,
                       call.seeds ? std::optional<Tensor>(stable(*call.seeds)) : std::nullopt, call.dtype,
                       call.thin);
}

struct PlainLinears : torch::autograd::Function<PlainLinears> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& base,
                               at::TensorList factors, const Call& call) {
    const Tensors outputs = forward_of(x, factors, call);
    const size_t n = call.scales.size();
    variable_list ys, saved{x, plain(outputs[n])};  // in the order of the other forms', as checkpointing may recompute by them
    for (size_t i = 0; i < n; ++i) ys.push_back(plain(outputs[i]));
    if (x.requires_grad()) saved.insert(saved.end(), call.weights.begin(), call.weights.end());
    for (const size_t of : {0, 1}) {
      for (size_t i = 0; i < n; ++i) saved.push_back(factors[2 * i + of]);
    }
    for (size_t i = n + 1; i < outputs.size(); ++i) saved.push_back(plain(outputs[i]));
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    // x's version is asked for as long as the node holds x: not once a backward has let go of it, nor where it is recomputed.
    // Apart, and not in a list, whose items compiled autograd takes for constants.
    ctx->saved_data["x"] = reinterpret_cast<int64_t>(x.unsafeGetTensorImpl());
    ctx->saved_data["version"] = int64_t(x._version());
    std::vector<int64_t> rest{x.requires_grad(),      base && base->requires_grad(), int64_t(call.dtype),
                              int64_t(call.thin), int64_t(call.cuts.size()),     call.recomputed};
    rest.insert(rest.end(), call.masks.begin(), call.masks.end());
    rest.insert(rest.end(), call.layers.begin(), call.layers.end());
    ctx->saved_data["rest"] = std::move(rest);
    std::vector<double> all = call.scales;  // and what Python needs beside them
    all.insert(all.end(), call.numbers.begin(), call.numbers.end());
    ctx->saved_data["numbers"] = std::move(all);
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const std::vector<int64_t> rest = ctx->saved_data["rest"].toIntVector();
    const std::vector<double> all = ctx->saved_data["numbers"].toDoubleVector();
    const bool need_x = rest[0], need_base = rest[1], recomputed = rest[5];
    const auto dtype = at::ScalarType(rest[2]), thin = at::ScalarType(rest[3]);
    const size_t n = dys.size(), cuts = rest[4];
    const std::vector<double> scales(all.begin(), all.begin() + n), numbers(all.begin() + n, all.end());
    const std::vector<int64_t> masks(rest.begin() + 6, rest.begin() + 6 + n), layers(rest.begin() + 6 + n, rest.end());
    const bool named = !layers.empty();
    const int64_t version = ctx->saved_data["version"].toInt();
    static const auto refuse =
        c10::Dispatcher::singleton().findSchemaOrThrow("lowrank::input_was_changed", "").typed<void(c10::ArrayRef<int64_t>)>();
    variable_list saved;
    try {
      saved = ctx->get_saved_variables();
    } catch (const c10::Error& error) {
      const bool held = !std::strstr(error.what_without_backtrace(), torch::autograd::ERR_BACKWARD_TWICE);
      const auto* x = reinterpret_cast<const at::TensorImpl*>(ctx->saved_data["x"].toInt());
      if (held && named && !recomputed && x->version_counter().current_version() != version) refuse.call(layers);
      throw;
    }
    if (named && recomputed && saved[0]._version() != version) refuse.call(layers);
    const at::TensorList tensors(saved);
    const size_t weight_count = tensors.size() - 2 - 2 * n - cuts;
    const at::TensorList weights = tensors.slice(2, weight_count), keeps = tensors.slice(2 + weight_count + 2 * n);
    variable_list factors;
    for (size_t i = 0; i < n; ++i) {
      factors.push_back(saved[2 + weight_count + i]);
      factors.push_back(saved[2 + weight_count + n + i]);
    }
    variable_list grads(2 + 2 * n + 1);  // x, base, A and B of each, and the call
    if (is_plain(dys)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      Tensors needed = plain_linears_backward(stable(dys), stable(saved[0]), stable(saved[1]), stable(factors), stable(keeps),
                                              stable(weights), scales, masks, need_x, dtype, thin);
      size_t next = 0;
      if (need_x) grads[0] = plain(needed[next++]);
      for (size_t i = 0; i < 2 * n; ++i) grads[2 + i] = plain(needed[next++]);
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
        variable_list needed =
            rest_of.call(some, saved[0], saved[1], factors, keeps, weights, numbers, masks, need_x, dtype, thin, layers);
        size_t next = 0;
        if (need_x) grads[0] = needed[next++];
        for (size_t i = 0; i < n; ++i) {
          if (!dys[i].defined()) continue;
          grads[2 + 2 * i] = needed[next++];
          grads[2 + 2 * i + 1] = needed[next++];
        }
      }
    }
    if (need_base) grads[1] = dys[0];
    return grads;
  }
};

static variable_list run(const at::Tensor& x, const Call& call, at::TensorList factors) {
  if (at::GradMode::is_enabled()) {
    std::optional<at::Tensor> base;
    if (call.weights.empty()) base = call.starts[0];
    return PlainLinears::apply(x, std::as_const(base), factors, call);
  }
  Tensors outputs = forward_of(x, factors, call);
  variable_list ys;
  for (size_t i = 0; i < call.scales.size(); ++i) ys.push_back(plain(outputs[i]));
  return ys;
}

// What Python hands over: lists, whose items are what ops/linear.py has made sure of.
template <class T, class Convert>
static std::vector<T> listed(PyObject* list, const Convert& convert) {
  std::vector<T> items;
  items.reserve(PyList_GET_SIZE(list));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) items.push_back(convert(PyList_GET_ITEM(list, i)));
  return items;
}

// linears(x, weights, starts, factors, scales, numbers, masks, cuts, seeds, dtype, thin_dtype, layers, recomputed) -> tuple of ys,
// or None where a tensor is not ordinary
static PyObject* linears(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 13, "linears: expected 13 arguments, got ", count);
  const auto tensor = [](PyObject* t) { return THPVariable_Unpack(t); };
  const auto optional = [](PyObject* t) { return t == Py_None ? std::nullopt : std::optional(THPVariable_Unpack(t)); };
  const auto number = [](PyObject* t) { return PyFloat_AsDouble(t); };
  const auto integer = [](PyObject* t) { return int64_t(PyLong_AsLongLong(t)); };
  const auto address = [](PyObject* t) { return reinterpret_cast<int64_t>(t); };
  const at::Tensor& x = THPVariable_Unpack(arguments[0]);
  const auto factors = listed<at::Tensor>(arguments[3], tensor);
  const Call call{listed<at::Tensor>(arguments[1], tensor),
                  listed<std::optional<at::Tensor>>(arguments[2], optional),
                  listed<double>(arguments[4], number),
                  listed<double>(arguments[5], number),
                  listed<int64_t>(arguments[6], integer),
                  listed<int64_t>(arguments[7], integer),
                  listed<int64_t>(arguments[11], address),
                  optional(arguments[8]),
                  arguments[12] == Py_True,
                  reinterpret_cast<THPDtype*>(arguments[9])->scalar_type,
                  reinterpret_cast<THPDtype*>(arguments[10])->scalar_type};
  if (PyErr_Occurred()) throw python_error();  // of a number that is too large
  const auto ordinary = [](const std::optional<at::Tensor>& t) { return !t || is_ordinary(*t); };
  if (!is_ordinary(x) || !std::all_of(call.weights.begin(), call.weights.end(), is_ordinary) ||
      !std::all_of(call.starts.begin(), call.starts.end(), ordinary) || !std::all_of(factors.begin(), factors.end(), is_ordinary)) {
    Py_RETURN_NONE;
  }
  variable_list ys;
  {
    const pybind11::gil_scoped_release released;
    ys = run(x, call, factors);
  }
  PyObject* const tuple = PyTuple_New(ys.size());
  for (size_t i = 0; i < ys.size(); ++i) PyTuple_SET_ITEM(tuple, i, THPVariable_Wrap(std::move(ys[i])));
  return tuple;
  END_HANDLE_TH_ERRORS
}

}  // namespace lowrank

static PyMethodDef functions[] = {
    {"linears", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&lowrank::linears)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C_node", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_node() { return PyModule_Create(&definition); }
