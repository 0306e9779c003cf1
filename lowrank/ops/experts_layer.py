"""torch.ops.lowrank.experts_layer: a mixture's experts with their adapters, whole, in one autograd node.

    X = x[token] · S1 = X A1ᵀ · G = X W1ᵀ + b1 + s S1 B1ᵀ · h = act(G) · S2 = h A2ᵀ · out_t = Σ w (h W2ᵀ + b2 + s S2 B2ᵀ)

over the choices of each token t, sorted by expert.  Saved for backward: x, G, S1, S2, the order and the routing weights w: not
X, not h, which are made again, and not Z = h W2ᵀ + ..., which no gradient needs.  With dout gathered by row and H0 = dout W2,

    dw = <H0, h> + s <dout B2, S2> + <dout, b2>        dh = w (H0 + s (dout B2) A2)

Files: experts*.py, activations.py, kernels/experts.py; tests/ops/test_experts_layer.py; bench experts.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _stats
from . import activations, dropout, experts, experts_kernels
from ._boundary import is_plain, no_autocast
from .activations import Activation
from .experts import check_factors, check_stack_vector, differentiated, factor_gradient, is_traced, thin_dtype_of
from .experts_eager import Groups, Routing, outer, route, rows, sums, thin, thin_A
from .linear import Projection
from .lora_impl import runs
from .node import (
    AGAIN,
    DIFFERENTIABLE,
    FORWARD_MODE,
    again,
    alive,
    followed,
    has_tangent,
    must_follow,
    recall,
    remember,
    to_save,
)
from .validation import check_tensor, shape_of

_lib = torch.library.Library("lowrank", "FRAGMENT")
# Adapters of the first projection come first; first says how many it has.  act: an Activation's name; numbers: its alpha and
# limit.  Outputs: out, G, order, place, ends, the Ss and the masks' bits.
_lib.define(
    "experts_layer(Tensor x, Tensor index, Tensor weights, Tensor W1, Tensor? b1, Tensor W2, Tensor? b2, Tensor[] As,"
    " Tensor[] Bs, int first, float[] scalings, float[] ps, Tensor? seeds, bool full, bool grad, str act, bool gated,"
    " bool interleaved, float[] numbers, ScalarType thin_dtype, bool kernels)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])"
)
# needs: x, weights, W1, b1, W2, b2, then a flag per A and per B
_lib.define(
    "experts_layer_backward(Tensor dout, Tensor x, Tensor weights, Tensor W1, Tensor? b1, Tensor W2, Tensor? b2,"
    " Tensor[] As, Tensor[] Bs, Tensor G, Tensor order, Tensor place, Tensor ends, Tensor[] Ss, Tensor[] keeps, int first,"
    " float[] scalings, float[] ps,"
    " bool full, str act, bool gated, bool interleaved, float[] numbers, ScalarType thin_dtype, bool kernels, bool[] needs)"
    " -> Tensor[]"
)


class Experts(NamedTuple):
    """up: weight [E,2I,H] (or [E,I,H] without a gate), bias and adapters; down: [E,H,I]; act between them.

    full: every id of an index is below E; else those from E on are of experts elsewhere, and give nothing.  layers: whose call
    this is, for errors.
    """

    up: Projection
    down: Projection
    act: Activation
    full: bool = True
    layers: tuple[torch.nn.Module, ...] = ()
    copy: bool = False  # whether backward gets a copy of x, which others may write to


def experts_layer(x: Tensor, index: Tensor, weights: Tensor, layer: Experts) -> Tensor:
    """[T,H] in x's dtype: of x [T,H] with ids ``index`` int [T,k] of experts and their ``weights`` [T,k].

    Gradients for x, weights, the stacks, their biases and the adapters'.  Raises: ValueError or TypeError on what does not fit.
    """
    reason = followed()
    if reason is AGAIN:
        return again(experts_layer, x, index, weights, layer)
    check(x, index, weights, layer)
    (up, down), act, out_dtype = (layer.up, layer.down), layer.act, x.dtype
    x = x.to(up.weight.dtype)
    adapters = (*up.adapters, *down.adapters)
    thin_dtype = thin_dtype_of(x, up.weight, adapters)
    ps = tuple(dropout.drawable(a.dropout_p) for a in adapters)
    scalings = tuple(float(a.scaling) for a in adapters)
    spec = _Spec(len(up.adapters), scalings, ps, layer.full, act, thin_dtype, False)
    tensors = (up.weight, up.bias, down.weight, down.bias, *(a.A for a in adapters), *(a.B for a in adapters))
    if reason is not None and is_traced((x, weights, *tensors)):
        reason = None  # by its operations, in which the routing is a tensor
    if reason is not None and (reason is not FORWARD_MODE or has_tangent((x, weights, *tensors))):
        _stats.op_fell_back(reason)
        return formula(spec, route(index, len(up.weight), layer.full), [], x, weights, *tensors).to(out_dtype)
    if (
        not torch.compiler.is_compiling() and not torch._C._is_tracing()
    ):  # which write down the op, or torch's operations
        spec = spec._replace(kernels=experts_kernels.takes(x, index, layer, ps, thin_dtype))
    seeds = dropout.draw_seeds(sum(p > 0 for p in ps), x.device) if any(ps) else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, *tensors)):
        layers, weights = [weakref.ref(module) for module in layer.layers], weights.clone()  # others may write to them
        return _ExpertsLayer.apply(spec, layers, index, seeds, to_save(x, layer.copy), weights, *tensors).to(out_dtype)
    return _forward(spec, index, seeds, False, x, weights, *tensors)[0].to(out_dtype)


class _Spec(NamedTuple):
    """Everything about a call that is not a tensor."""

    first: int  # adapters of the first projection
    scalings: tuple[float, ...]
    ps: tuple[float, ...]
    full: bool
    act: Activation
    thin_dtype: torch.dtype
    kernels: bool  # experts_kernels.py

    @property
    def of_act(self) -> tuple:
        return self.act.name, self.act.gated, self.act.interleaved, [self.act.alpha, self.act.limit]


class _ExpertsLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, layers, index, seeds, x, weights, *tensors):
        out, G, order, place, ends, Ss, keeps = _forward(spec, index, seeds, True, x, weights, *tensors)
        ctx.spec, ctx.layers = spec, layers
        ctx.remembered = remember(layers, x) if layers else None
        ctx.save_for_backward(x, weights, *tensors, G, order, place, ends, *Ss, *keeps)
        return out

    @staticmethod
    def backward(ctx, dout):
        spec, n = ctx.spec, len(ctx.spec.scalings)
        x, weights, W1, b1, W2, b2, *saved = recall(ctx, ctx.remembered)
        As, Bs, (G, order, place, ends), Ss, keeps = runs(saved, (n, n, 4, n, len(saved) - 3 * n - 4))
        _, _, _, _, *needs = ctx.needs_input_grad
        if must_follow([dout]):
            _stats.op_fell_back(DIFFERENTIABLE, alive(ctx.layers))
            routing = Routing(order, place, Groups(ends, len(order), spec.full))
            inputs = (x, weights, W1, b1, W2, b2, *As, *Bs)
            grads = differentiated(lambda *ts: formula(spec, routing, keeps, *ts), inputs, dout, needs)
            return (None, None, None, None, *grads)
        run = backward if is_plain(dout) else torch.ops.lowrank.experts_layer_backward.default
        saved = (x, weights, W1, b1, W2, b2, As, Bs, G, order, place, ends, Ss, keeps)
        needed = iter(
            run(
                dout,
                *saved,
                spec.first,
                list(spec.scalings),
                list(spec.ps),
                spec.full,
                *spec.of_act,
                spec.thin_dtype,
                spec.kernels,
                needs,
            )
        )
        return (None, None, None, None, *(next(needed) if need else None for need in needs))


def _forward(spec: _Spec, index, seeds, grad, x, weights, W1, b1, W2, b2, *factors):
    n = len(spec.scalings)
    run = forward if is_plain(x) else torch.ops.lowrank.experts_layer.default
    factors = list(factors[:n]), list(factors[n:]), spec.first, list(spec.scalings), list(spec.ps)
    return run(
        x, index, weights, W1, b1, W2, b2, *factors, seeds, spec.full, grad, *spec.of_act, spec.thin_dtype, spec.kernels
    )


def forward(
    x, index, weights, W1, b1, W2, b2, As, Bs, first, scalings, ps, seeds, full, grad, act, gated, interleaved, numbers,
    thin_dtype, kernels,
):  # fmt: skip
    with no_autocast(x.device):
        act = Activation(act, gated, interleaved, *numbers)
        if kernels:
            call = x, index, weights, W1, b1, W2, b2, As, Bs, first, scalings, full, act, thin_dtype
            return experts_kernels.forward(*call)
        order, place, groups = route(index, len(W1), full)
        seeds = [] if seeds is None else list(seeds)
        cut = sum(p > 0 for p in ps[:first])
        X = x[order // index.shape[1]]
        mine, rest = (As[:first], Bs[:first], scalings[:first], ps[:first]), (grad, thin_dtype)
        G, S1, keep1 = experts.projected(X, W1, b1, *mine, groups, seeds[:cut], order, *rest)
        del X
        h = activations.forward(G, act)
        mine = As[first:], Bs[first:], scalings[first:], ps[first:]
        Z, S2, keep2 = experts.projected(h, W2, b2, *mine, groups, seeds[cut:], order, *rest)
        return combine(Z, weights, place), G, order, place, groups.ends, [*S1, *S2], [*keep1, *keep2]


def combine(Z: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    """[T,H] in Z's dtype: the sum of each token's rows of Z [T·k,H], times their weights [T,k], rounded once."""
    T, k = weights.shape
    Z = Z[place].view(T, k, Z.shape[1])
    dtype = torch.promote_types(Z.dtype, weights.dtype)
    return torch.bmm(weights.to(dtype)[:, None], Z.to(dtype))[:, 0].to(Z.dtype)


def backward(
    dout, x, weights, W1, b1, W2, b2, As, Bs, G, order, place, ends, Ss, keeps, first, scalings, ps, full, act, gated,
    interleaved, numbers, thin_dtype, kernels, needs,
):  # fmt: skip
    """The gradients that ``needs`` asks for: of x, weights, W1, b1, W2, b2, the As and the Bs."""
    with no_autocast(dout.device):
        act, groups, n = Activation(act, gated, interleaved, *numbers), Groups(ends, len(order), full), len(As)
        if kernels:
            call = dout, x, weights, W1, b1, W2, b2, As, Bs, G, order, place, ends, Ss, first, scalings, full, act
            return experts_kernels.backward(*call, thin_dtype, needs)
        need_x, need_w, need_W1, need_b1, need_W2, need_b2, *need = needs
        need_A, need_B = need[:n], need[n:]
        token, keeps = order // weights.shape[1], list(keeps)
        masked = [keeps.pop(0) if p > 0 else None for p in ps]
        scales = [s * dropout.keep_scale(p) for s, p in zip(scalings, ps, strict=True)]
        needs_G = need_x or need_W1 or need_b1 or any(need_A[:first]) or any(need_B[:first])
        dA, dB = [None] * n, [None] * n

        # the second product: by row, times w only where what it multiplies is small
        w = weights.reshape(-1)[order][:, None].to(torch.promote_types(thin_dtype, torch.float32))
        dO = dout.contiguous()[token]
        wide = dO.to(thin_dtype)
        h = activations.forward(G, act)
        dh = rows(dO, W2.mT, groups) if needs_G or need_w else None
        dw = (dh * h).sum(1, dtype=w.dtype) if need_w else None
        if needs_G:
            dh.mul_(w)
        for j in range(first, n):
            if need_B[j]:
                dB[j] = factor_gradient(wide, (Ss[j] * w).to(thin_dtype), scales[j], Bs[j], groups)
            if not (needs_G or need_w or need_A[j]):
                continue
            factors = thin(As[j], Bs[j], scales[j], thin_dtype, groups, True)
            dS = rows(wide, factors.B.mT, groups).mul_(factors.scale)
            del factors
            if need_w:
                dw.add_((dS * Ss[j]).sum(1, dtype=w.dtype))
            dS.mul_(w)
            if need_A[j]:
                dA[j] = experts.dropped_outer(dS, h, masked[j], As[j].shape[1], groups, As[j].dtype)
            if needs_G:
                dh.add_(experts.dropped(rows(dS, thin_A(As[j], dS, groups).mT, groups), masked[j]))
        if need_w and b2 is not None:
            dw.add_((dO * b2[groups.experts]).sum(1, dtype=w.dtype))
        if need_w:
            dw = groups.clear(dw[:, None])[place].view(weights.shape).to(weights.dtype)
        weighted = dO * w.to(dO.dtype) if need_W2 or need_b2 else None
        dW2 = outer(weighted, h, groups) if need_W2 else None
        db2 = sums(weighted, groups) if need_b2 else None
        del dO, wide, h, weighted

        dx = dW1 = db1 = None
        if needs_G:
            dG = activations.backward(G, dh, act)
            del dh
            mine = [factor[:first] for factor in (As, Bs, Ss, masked, scales, need_A, need_B)]
            dX, dW1, db1, dA[:first], dB[:first] = experts.projected_backward(
                dG, lambda: x[token], W1, *mine, groups, thin_dtype, need_x, need_W1, need_b1
            )
            del dG
            dx = dX[place].view(*weights.shape, x.shape[1]).sum(1) if need_x else None
        given = [dx, dw, dW1, db1, dW2, db2, *dA, *dB]
        return [grad for grad, need in zip(given, needs, strict=True) if need]


def formula(spec: _Spec, routing: Routing, keeps, x, weights, W1, b1, W2, b2, *factors) -> Tensor:
    """:func:`forward`'s out in operations that autograd and torch.func follow."""
    n, first, groups = len(spec.scalings), spec.first, routing.groups
    As, Bs = factors[:n], factors[n:]
    k, cut = weights.shape[1], sum(p > 0 for p in spec.ps[:first])
    up = As[:first], Bs[:first], spec.scalings[:first], spec.ps[:first], keeps[:cut]
    down = As[first:], Bs[first:], spec.scalings[first:], spec.ps[first:], keeps[cut:]
    G = experts.formula(x[routing.order // k], W1, b1, *up, groups, spec.thin_dtype)
    Z = experts.formula(activations.differentiable(G, spec.act), W2, b2, *down, groups, spec.thin_dtype)
    out = (Z[routing.place].view(len(x), k, Z.shape[1]) * weights[:, :, None]).sum(1)
    return out.to(x.dtype)


def check(x, index, weights, layer: Experts) -> None:
    """Raise on what does not fit x [T,H]; metadata alone."""
    up, down, act = layer.up, layer.down, layer.act
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, H], got {shape_of(x)}")
    for name, given in (("index", index), ("weights", weights)):
        if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != len(x):
            raise ValueError(
                f"{name}: expected [{len(x)}, k], got {shape_of(given) if isinstance(given, Tensor) else given}"
            )
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index: expected torch.int32 or torch.int64, got {index.dtype}")
    if weights.shape != index.shape or not weights.dtype.is_floating_point:
        raise ValueError(f"weights: expected floats {shape_of(index)}, got {weights.dtype} {shape_of(weights)}")
    for name, projection in (("up", up), ("down", down)):
        check_tensor(f"{name} weight", projection.weight, x)
        if projection.weight.dim() != 3 or 0 in projection.weight.shape:
            raise ValueError(f"{name} weight: expected [E, N, K], got {shape_of(projection.weight)}")
    if up.weight.dtype is not down.weight.dtype:
        raise TypeError(f"down weight: expected the first's dtype {up.weight.dtype}, got {down.weight.dtype}")
    E, N, H = up.weight.shape
    if x.shape[1] != H or down.weight.shape != (E, H, act.width(N)) or (act.gated and N % 2):
        raise ValueError(
            f"weights: expected [E, N, {x.shape[1]}] and [E, {x.shape[1]}, {'N / 2' if act.gated else 'N'}] for x"
            f" {shape_of(x)}, got {shape_of(up.weight)} and {shape_of(down.weight)}"
        )
    for projection in (up, down):
        E, N, K = projection.weight.shape
        check_stack_vector("bias", projection.bias, E, N, x)
        for adapter in projection.adapters:
            check_factors(adapter, E, N, K, x)


_lib.impl("experts_layer", forward, "CompositeExplicitAutograd")
_lib.impl("experts_layer_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::experts_layer", lib=_lib)
def _(
    x, index, weights, W1, b1, W2, b2, As, Bs, first, scalings, ps, seeds, full, grad, act, gated, interleaved, numbers,
    thin_dtype, kernels,
):  # fmt: skip
    S = index.shape[0] * index.shape[1]
    G = x.new_empty((S, W1.shape[1]))
    order = x.new_empty(S, dtype=torch.int64)
    Ss = [x.new_empty((S, experts.width(A, grad or kernels, S, thin_dtype)), dtype=thin_dtype) for A in As]
    keeps = [x.new_empty((S, (A.shape[2] + 31) // 32), dtype=torch.int32) for A, p in zip(As, ps, strict=True) if p > 0]
    ends = x.new_empty(W1.shape[0], dtype=torch.int32)
    return x.new_empty((len(x), W2.shape[1])), G, order, torch.empty_like(order), ends, Ss, keeps


@torch.library.register_fake("lowrank::experts_layer_backward", lib=_lib)
def _(
    dout, x, weights, W1, b1, W2, b2, As, Bs, G, order, place, ends, Ss, keeps, first, scalings, ps, full, act, gated,
    interleaved, numbers, thin_dtype, kernels, needs,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    grads = [x.new_empty(x.shape), weights.new_empty(weights.shape)]
    for W in (W1, W2):
        grads += [W.new_empty(W.shape), W.new_empty(W.shape[:2], dtype=wide)]
    grads += [A.new_empty(A.shape) for A in As] + [torch.empty_like(B) for B in Bs]
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
