"""The plain LoRA linear: projections of one x with one adapter each, as one autograd node.

    Y_i = x W_iᵀ + bias_i + scaling_i drop_i(x) A_iᵀ B_iᵀ

What people run is plain: frozen weights under trained factors, in one dtype or fp32 over 16 bits, with or without dropout,
bias and autocast, over a weight or over the output of a module (:func:`linears` says what is).  Everything else is
ops/lora.py's general form, which gives the same bits where both can answer.

One call has four forms, of the same bits: through kernels/thin.py; through ops/thin_eager.py; eager's operations without its
functions (linear_eager.py); and those in one call of csrc/linear.h, under this node or under that of csrc/node.cpp.

Files: linear_eager.py, thin_eager.py, kernels/thin.py, csrc/linear.h, csrc/node.cpp; tests/ops/test_linear.py; bench small.
"""

import weakref
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, _stats
from . import dropout, linear_eager, lora_impl, thin_eager
from ._boundary import TENSORS, all_plainly, as_shaped, dense, rows_of
from ._choice import choice
from ._dispatch import outlasts_host
from .lora_impl import add_base, may_overflow, thin_products
from .node import DIFFERENTIABLE, alive, hand_over, must_follow, recall, remember

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_NUMBERS = frozenset((float, int))
_INFINITY = float("inf")
_hooks = torch._C._autograd._top_saved_tensors_default_hooks

_lib = torch.library.Library("lowrank", "FRAGMENT")
# On a CPU alone.  weights: none, or one per projection.  starts: biases or a base output, or none at all.  factors: A and B of
# each projection.  masks: per projection, the index of its dropout mask in cuts and seeds, or -1.  Outputs: the ys, S, and the
# bits of each mask.
_lib.define(
    "plain_linears(Tensor x, Tensor[] weights, Tensor?[] starts, Tensor[] factors, float[] scales, int[] masks, int[] cuts,"
    " Tensor? seeds, ScalarType dtype, ScalarType thin_dtype) -> Tensor[]"
)
# Outputs: dx if it is needed, and dA and dB of each projection.
_lib.define(
    "plain_linears_backward(Tensor[] dys, Tensor x, Tensor S, Tensor[] factors, Tensor[] keeps, Tensor[] weights,"
    " float[] scales, int[] masks, bool need_x, ScalarType dtype, ScalarType thin_dtype) -> Tensor[]"
)
# What csrc/node.cpp's backward asks.  numbers: the scalings and then the ps.  layers: the ids of those whose call it is.
_lib.define(
    "plain_linears_rest(Tensor?[] dys, Tensor x, Tensor S, Tensor[] factors, Tensor[] keeps, Tensor[] weights,"
    " float[] numbers, int[] masks, bool need_x, ScalarType dtype, ScalarType thin_dtype, int[] layers) -> Tensor[]"
)
_lib.define("input_was_changed(int[] layers) -> ()")
_in_one_call, _in_one_call_backward = (
    torch.ops.lowrank.plain_linears.default,
    torch.ops.lowrank.plain_linears_backward.default,
)


class Adapter(NamedTuple):
    """One adapter on one projection: A [r,K], B [N,r], bias [N] or None, scaling a float or a 0-d tensor."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout_p: float | dropout.Drawn = 0.0


class Projection(NamedTuple):
    """What is added to the thin terms: weight [N,K] with bias [N], or a finished base output [...,N] (quantised layers).

    layer: whose call this is, for stats() and errors.  copy: whether backward gets a copy of x, which others may write to.
    """

    weight: Tensor | None
    bias: Tensor | None
    adapters: tuple[Adapter, ...]
    base: Tensor | None = None
    layer: torch.nn.Module | None = None
    copy: bool = False


class _Call(NamedTuple):
    """Everything about a call that is not a tensor, the same in forward and backward."""

    dtype: torch.dtype  # of the big GEMM
    thin_dtype: torch.dtype  # of the thin products
    masks: list[int]  # per projection: its dropout mask in ps, or -1
    ps: list[float]
    cuts: list[int]  # of 65536, as dropout.threshold has them
    scalings: list[float]
    scales: list[float]  # scalings over what dropout keeps
    native: bool  # in one call of csrc/linear.h
    short: bool  # without masks and without a base that goes first, in PyTorch


def beside(x: Tensor, projections: tuple[Projection, ...]) -> bool:
    """Whether the projections' tensors are no subclasses and on x's device."""
    device = x.device
    for weight, bias, adapters, base, _, _ in projections:
        tensors = [weight, bias, base]
        for A, B, _, lora_bias, _ in adapters:
            tensors += A, B, lora_bias
        for t in tensors:
            if t is not None and (type(t) not in TENSORS or t.device != device):
                return False
    return True


def linears(x: Tensor, projections: tuple[Projection, ...], shared_mask: bool = False) -> tuple[Tensor, ...] | None:
    """One [..., N] per projection, or None where ops/lora.py is to answer, or to say what does not fit.

    x: :func:`_boundary.plainly`, and its projections' tensors :func:`beside` it.
    """
    dtype, device, shape = x.dtype, x.device, x.shape
    if dtype not in _FLOATS or len(shape) == 0 or x.numel() == 0:
        return None
    kind = "cpu" if x.is_cpu else device.type
    K, x_dtype, grad, copy = shape[-1], dtype, torch.is_grad_enabled(), False
    autocast = torch.is_autocast_enabled(kind) and dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
    factor_dtype, factors, masks, ps, cuts, scalings, scales = None, [], [], [], [], [], []
    weights, starts, layers, started, outputs = [], [], [], False, 0
    for weight, bias, adapters, base, layer, copied in projections:
        if len(adapters) != 1:
            return None
        A, B, scaling, lora_bias, p = adapters[0]
        if weight is not None:
            if (
                len(size := weight.shape) != 2
                or size[1] != K
                or (weight.dtype is not x_dtype and (not autocast or weight.dtype not in _FLOATS))
                or (grad and weight.requires_grad)
                or base is not None
            ):
                return None
            N = size[0]
            weights.append(weight)
            starts.append(bias)
            if bias is not None:
                started = True
                if bias.shape != size[:1] or bias.dtype not in _FLOATS or (grad and bias.requires_grad):
                    return None
        elif (
            type(base) not in TENSORS
            or base.dtype is not dtype
            or (size := base.shape)[:-1] != shape[:-1]
            or len(projections) > 1
            or bias is not None
        ):
            return None
        else:
            N, started = size[-1], True
            starts.append(base)
        if (
            len(size := A.shape) != 2
            or size[1] != K
            or size[0] == 0
            or N == 0
            or B.shape != (N, size[0])
            or (A_dtype := A.dtype) is not B.dtype
            or (factor_dtype is not None and A_dtype is not factor_dtype)
            or A_dtype not in _FLOATS
            or lora_bias is not None
            or type(scaling) not in _NUMBERS
            or not -_INFINITY < scaling < _INFINITY
            or (grad and not (A.requires_grad and B.requires_grad))
        ):
            return None
        factor_dtype = A_dtype
        outputs += N
        factors += A, B
        scalings.append(scaling)
        copy |= copied
        if layer is not None:
            layers.append(layer)
        if p == 0:
            masks.append(-1)
            scales.append(scaling)
            continue
        if type(p) not in _NUMBERS or not 0 < p <= 1 or (cut := dropout.threshold(p)) == 0:
            return None
        p = dropout.drawable(p)
        if shared_mask and p in ps:
            masks.append(ps.index(p))
        else:
            masks.append(len(ps))
            ps.append(p)
            cuts.append(cut)
        scales.append(scaling * dropout.keep_scale(p))
    thin_dtype = dtype if autocast or factor_dtype is dtype else torch.promote_types(dtype, factor_dtype)
    how = choice(device)
    in_torch = how.backend == "eager"
    if not in_torch and not how.forced and not ps and factor_dtype is dtype is x_dtype is not torch.float64:
        in_torch = not outlasts_host(x.numel() // K, K, outputs, dtype.itemsize)
    base_last = dtype is not torch.float16 or not may_overflow(dtype, thin_dtype, started)
    native = in_torch and how.native and base_last and (not ps or -1 not in masks)
    short = in_torch and base_last and not ps
    call = _Call(dtype, thin_dtype, masks, ps, cuts, scalings, scales, native, short)
    if not started:
        starts = []
    seeds = dropout.draw_seeds(len(ps), device) if ps else None
    if grad:
        x = x.clone() if copy or x.is_inference() else _unwrap_if_dead(x)
    if native and how.node:
        hooks = _hooks(True) if grad else None
        recomputed = hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
        if hooks is None or recomputed:
            ys = _native.node().linears(
                x,
                weights,
                starts,
                factors,
                scales,
                scalings + ps,
                masks,
                cuts,
                seeds,
                dtype,
                thin_dtype,
                layers,
                recomputed,
            )
            if ys is not None:  # as where a tensor is sparse, or a wrapper that torch.func left behind
                return ys
    if native and (not x.is_cpu or any(t.layout is not torch.strided for t in (x, *weights))):
        call = call._replace(native=False)  # the one call outside a node of C++ is a CPU's
    if not grad:
        return _forward(call, weights, starts, seeds, x, factors)[0]
    return _apply(call, layers, weights, starts, seeds, x, projections[0].base, *map(_unwrap_if_dead, factors))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, layers, weights, starts, seeds, x, base, *factors):
        ys, S, keeps = _forward(call, weights, starts, seeds, x, factors)
        ctx.call, ctx.x_shape, ctx.layers = call, x.shape, list(map(weakref.ref, layers))
        ctx.remembered = remember(ctx.layers, x) if layers else None
        ctx.materialize_grads = False
        # in the order of the general form's, which a recomputation under torch.func or in forward mode may take instead
        ctx.save_for_backward(
            x, S, *(weights if ctx.needs_input_grad[5] else ()), *factors[::2], *factors[1::2], *keeps
        )
        return ys

    @staticmethod
    def backward(ctx, *dys):
        call, n = ctx.call, len(dys)
        x, S, *saved = recall(ctx, ctx.remembered)
        needs = ctx.needs_input_grad
        cut = len(saved) - 2 * n - len(call.ps)
        weights, As, Bs, keeps = saved[:cut], saved[cut : cut + n], saved[cut + n : cut + 2 * n], saved[cut + 2 * n :]
        factors = list(chain.from_iterable(zip(As, Bs, strict=True)))
        rest = call, dys, x, S, factors, keeps, weights, needs[5]
        grads = _backward(*rest) if all_plainly(dys) else _backward_of_some(*rest, ctx.layers)
        return None, None, None, None, None, grads[0], dys[0] if needs[6] else None, *grads[1:]


# Function.apply() does no more than this and _unwrap_if_dead where no transform is on, in two frames an argument.
_apply, _unwrap_if_dead = super(torch.autograd.Function, _Linears).apply, torch._C._functorch.unwrap_if_dead


def _forward(call, weights, starts, seeds, x, factors):
    """(ys, S of all adapters, keep bits per mask)."""
    dtype, thin_dtype, masks, _, cuts, _, scales, native, _ = call
    if native:
        outputs = _in_one_call(x, weights, starts, factors, scales, masks, cuts, seeds, dtype, thin_dtype)
        n = len(scales)
        return tuple(outputs[:n]), outputs[n], outputs[n + 1 :]
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _forward(call, weights, starts, seeds, x, factors)
    shape, As, Bs, n = x.shape, factors[::2], factors[1::2], len(scales)
    if call.short and (thin_dtype is dtype or linear_eager.is_small(x, Bs)):
        return linear_eager.forward(call, weights, starts, x, As, Bs)
    x = rows_of(x, dtype)
    thin = _thin(x, weights or [None] * n, starts if not weights else [None] * n, As, Bs, call)
    S, keeps = thin.shrink(x, As, thin_dtype, masks, cuts, seeds)
    ys, first = [], 0
    for i, (B, scale) in enumerate(zip(Bs, scales, strict=True)):
        part, first = S[:, first : first + B.shape[1]], first + B.shape[1]
        start, weight = starts[i] if starts else None, weights[i].to(dtype) if weights else None
        if weight is None:
            start = start.reshape(x.shape[0], start.shape[-1])
        elif may_overflow(dtype, thin_dtype, start is not None):
            start, weight = torch.nn.functional.linear(x, weight, None if start is None else start.to(dtype)), None
        y = thin.expand(part, [B], [scale], [None], start, dtype)
        ys.append(as_shaped(y if weight is None else y.addmm_(x, weight.mT), shape))
    return tuple(ys), S, keeps


def _backward(call, dys, x, S, factors, keeps, weights, need_x):
    """[dx or None, dA, dB of the first adapter, of the second, ...]."""
    dtype, thin_dtype, masks, _, _, _, scales, native, _ = call
    if native:
        grads = _in_one_call_backward(dys, x, S, factors, keeps, weights, scales, masks, need_x, dtype, thin_dtype)
        return grads if need_x else [None, *grads]
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _backward(call, dys, x, S, factors, keeps, weights, need_x)
    if call.short and (thin_dtype is dtype or linear_eager.is_small(x, factors[1::2])):
        return linear_eager.backward(call, dys, x, S, factors[::2], factors[1::2], weights, need_x)
    shape, As, Bs, x = x.shape, factors[::2], factors[1::2], rows_of(x, dtype)
    dys = [dense(rows_of(dy, dy.dtype)) for dy in dys]
    thin = _thin(x, [None] * len(dys), dys, As, Bs, call)
    dSs, dBs, first = [], [], 0
    for dy, B, scale in zip(dys, Bs, scales, strict=True):
        part, first = S[:, first : first + B.shape[1]], first + B.shape[1]
        (dS,), (dB,) = thin.dy_pass(dy, [B], [scale], [None], part, [True], True, thin_dtype)
        dSs.append(dS)
        dBs.append(dB)
    dX = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    base_first = need_x and may_overflow(dtype, thin_dtype)
    started = base_first and add_base(dX, dys, weights or [None], False)
    dAs = thin.x_pass(x, dSs, As, [True] * len(As), dX, masks, keeps, add=started)
    if need_x and not base_first and weights:
        add_base(dX, dys, weights, True)
    return [None if dX is None else dX.view(shape), *chain.from_iterable(zip(dAs, dBs, strict=True))]


def _thin(x, weights, bases_or_dys, As, Bs, call):
    if choice(x.device).backend == "eager":
        return thin_eager
    return thin_products(x, weights, bases_or_dys, As, Bs, call.thin_dtype, bool(call.ps))


def _backward_of_some(call, dys, x, S, factors, keeps, weights, need_x, layers):
    """:func:`_backward` where some dys are None, or somebody looks into it: the general form's."""
    n, shape = len(dys), x.shape
    dtype, thin_dtype, masks, ps, _, scalings, *_ = call
    live, follow = [dy is not None for dy in dys], must_follow(dys)
    if not any(live):
        return [None] * (1 + 2 * n)
    if follow:
        _stats.op_fell_back(DIFFERENTIABLE, alive(layers))
    dys = [None if dy is None else rows_of(dy, dy.dtype) for dy in dys]
    needs = [need_x, *[False] * 2 * n, *live, *live, *[False] * n]
    rest = (
        x,
        weights or [None] * n,
        factors[::2],
        factors[1::2],
        [None] * n,
        S,
        keeps,
        scalings,
        [1] * n,
        masks,
        ps,
        dtype,
        thin_dtype,
        needs,
    )
    if follow:
        grads = lora_impl.differentiable(dys, None, *rest)
    else:
        grads = torch.ops.lowrank.lora_linears_backward.default(dys, *rest)
    grads = iter(grads)
    dX = next(grads).view(shape) if need_x else None
    dAs, dBs = ([next(grads) if it else None for it in live] for _ in "AB")
    return [dX, *chain.from_iterable(zip(dAs, dBs, strict=True))]


def _rest(dys, x, S, factors, keeps, weights, numbers, masks, need_x, dtype, thin_dtype, layers):
    n = len(dys)
    call = _Call(dtype, thin_dtype, masks, numbers[n:], [], numbers[:n], [], True, False)
    layers = [weakref.ref(layer) for layer in map(_stats.layer_of, layers) if layer is not None]
    grads = _backward_of_some(call, dys, x, S, factors, keeps, weights, need_x, layers)
    return [grad for grad in grads if grad is not None]


def _was_changed(layers):
    raise RuntimeError(hand_over([weakref.ref(layer) for layer in map(_stats.layer_of, layers) if layer is not None]))


for _key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatched"):  # a batch is seen by the operations in it
    _lib.impl("plain_linears_rest", _rest, _key)
_lib.impl("input_was_changed", _was_changed, "CompositeExplicitAutograd")
