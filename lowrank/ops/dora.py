"""torch.ops.lowrank.dora_norm and dora_linear, its gradient, and the public function over them.

    y = bias + g ∘ (x Wᵀ + scaling drop(x) Aᵀ Bᵀ),    g = magnitude / ‖W + scaling B A‖ by rows

DoRA (Liu et al. 2024, arXiv 2402.09353): the norm is a constant for the gradient (its section 4.3), which makes y a LoRA
linear over B' = scaling g ∘ B with a gain on the base's output.  What lies between the magnitude and those two is N and N r
numbers in fp32, left to PyTorch's own autograd.  The norm is one read of W, without an N x K temporary, and one more by torch's
own norm, which PEFT starts the magnitudes from: where B is 0 ours is that, bit for bit, g is 1 and y the base's output.  Saved
for backward: x itself, S, the base's output v (PEFT keeps two of its size), and one bit per element of a dropout mask.

Schemas live here, so that a machine without a GPU traces every op.  Autograd is a plain Function outside the op.

Files: dora_impl.py, dora_eager.py, kernels/dora.py; tests/ops/test_dora.py; bench dora_linear.
"""

import math
import weakref
from typing import NamedTuple

import torch

from .. import _stats
from . import dora_impl, dropout
from ._boundary import as_shaped, autocast_dtype, is_plain
from .linear import Adapter, Projection
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
from .validation import check_dora, check_projection

_lib = torch.library.Library("lowrank", "FRAGMENT")
_lib.define("dora_norm(Tensor weight, Tensor A, Tensor B, ScalarType? start=None) -> Tensor")
# B and gain in fp32 or wider, with every scale; twice: drop(x) under the gain and x Wᵀ beside it.  dtype: the big GEMM's.
# seed may be the mask, drawn already (dropout.are_drawn), and then keeps is empty.
_lib.define(
    "dora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor gain, float p, Tensor? seed, bool twice,"
    " ScalarType dtype) -> (Tensor y, Tensor S, Tensor v, Tensor[] keeps)"
)
# needs: x, bias, A, B, gain; the gradients asked for come back in that order.  bias: what is part of v.
_lib.define(
    "dora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor gain, Tensor? S, Tensor? v,"
    " Tensor[] keeps, bool twice, ScalarType dtype, bool[] needs, Tensor? bias=None) -> Tensor[]"
)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    base_dropout: bool = True,
) -> torch.Tensor:
    """``bias + g * (x @ weight.T + scaling * dropout(x) @ lora_A.T @ lora_B.T)``, ``g = magnitude / ‖weight + scaling lora_B
    lora_A‖`` by rows, a constant for the gradient but for its magnitude (DoRA, arXiv 2402.09353).

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64.
        weight: [N, K] in x's dtype, frozen.
        lora_A, lora_B, magnitude: [r, K], [N, r] and [N], any float dtype.
        scaling: a finite float, or a 0-d tensor (read on the device; gets no gradient).
        bias: [N].
        dropout_p: probability in [0, 1] of zeroing an element of x; pass 0 in evaluation.
        base_dropout: what dropout means.  True is PEFT's (and the paper's code's) ``bias + x @ weight.T + (g - 1) *
            dropout(x) @ weight.T + ...``, two GEMMs with the weight; False keeps dropout out of the base's term, one GEMM.
            Both have the same mean over masks.

    Thin products, norm and gains are computed in fp32 or wider, under autocast too.  The norm has a constant factor for each
    row of ``weight``, 1 but for the rounding of ``lora_A``'s dtype: where ``lora_B`` is 0 it is ``torch.linalg.norm(weight.to(
    lora_A.dtype), dim=1)`` bit for bit, and with that magnitude the result is ``F.linear(x, weight, bias)``.

    Returns: [..., N] in x's dtype; under autocast, in autocast's.  Derivatives of every order, as :func:`lora_linear`'s.

    Raises: ValueError or TypeError that names the argument, what came and what was expected.
    """
    return of_layer(
        None, x, weight, lora_A, lora_B, magnitude, scaling, bias, dropout_p=dropout_p, base_dropout=base_dropout
    )


def of_layer(
    layer,
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    scaling,
    bias,
    *,
    dropout_p,
    base_dropout,
    cache: dict | None = None,
    key=None,
    copy=False,
) -> torch.Tensor:
    """:func:`dora_linear` as a call of ``layer``, for stats() and errors.

    cache, key: where the norm is, or is left for the next call.  copy: backward gets a copy of x.
    """
    reason = followed()
    if reason is AGAIN:
        return again(
            of_layer,
            layer,
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            scaling,
            bias,
            dropout_p=dropout_p,
            base_dropout=base_dropout,
            cache=cache,
            key=key,
            copy=copy,
        )
    autocast = autocast_dtype(x)
    adapter = Adapter(lora_A, lora_B, scaling, None, dropout_p)
    check_projection(x, Projection(weight, bias, (adapter,)), autocast is not None)
    check_dora(magnitude, weight, base_dropout, x)
    dtype = autocast or x.dtype
    acc_dtype = torch.promote_types(torch.promote_types(dtype, torch.float32), lora_B.dtype)

    if reason is FORWARD_MODE and not has_tangent((x, weight, lora_A, lora_B, magnitude, scaling, bias)):
        reason = None
    if isinstance(scaling, torch.Tensor):
        away = scaling.device != x.device and is_plain(x)  # on a CPU, then: reading it waits for nothing
        scaling = float(scaling) if away else scaling.to(device=x.device, dtype=acc_dtype)
    norm = None if cache is None else cache.get(key)
    if norm is None or norm.device != x.device or norm.is_inference():
        with torch.no_grad() if cache is None else torch.inference_mode(False), torch.no_grad():
            if reason is None:
                norm = _norm(weight, lora_A, lora_B.to(acc_dtype) * scaling, lora_A.dtype)
            else:
                norm = dora_impl.norm_formula(
                    weight.detach(), lora_A.detach(), lora_B.detach().to(acc_dtype) * scaling, lora_A.dtype
                )
        if cache is not None:
            cache[key] = norm
    g = magnitude.to(acc_dtype) / norm
    drawn = dropout_p if isinstance(dropout_p, dropout.Drawn) else None
    dropout_p = dropout.drawable(dropout_p) if drawn is None else drawn.p
    twice, kept = base_dropout and dropout_p > 0, dropout.keep_scale(dropout_p)
    B = lora_B * (g * (scaling * kept)).unsqueeze(1)
    gain = (g - 1) * kept if twice else g
    if reason is not None:
        _stats.op_fell_back(reason)
        return dora_impl.formula(x, weight, bias, lora_A, B, gain, dropout_p, twice, dtype)
    seed = dropout.draw_seeds(1, x.device) if dropout_p and drawn is None else None
    if drawn is not None:
        seed = drawn.keep.unsqueeze(0)
    spec = _Spec(dropout_p, twice, dtype)
    tensors = (x, weight, bias, lora_A, B, gain)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        x = to_save(x, copy)
        layers = [] if layer is None else [weakref.ref(layer)]
        y = _DoRALinear.apply(spec, layers, seed, x, *tensors[1:])
    else:
        y = _forward(spec, seed, *tensors)[0]
    return as_shaped(y, x.shape)


class _Spec(NamedTuple):
    p: float
    twice: bool
    dtype: torch.dtype


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, layers, seed, x, weight, bias, A, B, gain):
        y, S, v, keeps = _forward(spec, seed, x, weight, bias, A, B, gain)
        keeps = seed.unbind() if dropout.are_drawn(seed) else keeps
        _, _, _, need_x, _, _, need_A, need_B, need_gain = ctx.needs_input_grad
        keep_x = need_A or (need_x and (need_B or need_gain))  # beside a frozen A for second derivatives alone
        ctx.spec, ctx.x_shape = spec, x.shape
        ctx.layers, ctx.remembered = layers, remember(layers, x) if layers and keep_x else None
        ctx.save_for_backward(
            x if keep_x else None,
            weight if need_x else None,
            A,
            B,
            gain,
            S if need_B else None,
            v if need_gain else None,
            bias if need_gain and not spec.twice else None,
            *(keeps if need_x or need_A else ()),
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        spec, x_shape = ctx.spec, ctx.x_shape
        x, weight, A, B, gain, S, v, bias, *keeps = recall(ctx, ctx.remembered)
        _, _, _, need_x, _, need_b, need_A, need_B, need_gain = ctx.needs_input_grad
        needs = [need_x, need_b, need_A, need_B, need_gain]
        run = dora_impl.backward if is_plain(dy) else torch.ops.lowrank.dora_linear_backward.default
        if must_follow((dy,)):
            _stats.op_fell_back(DIFFERENTIABLE, alive(ctx.layers))
            run = dora_impl.differentiable
        grads = iter(run(dy, x, weight, A, B, gain, S, v, keeps, spec.twice, spec.dtype, needs, bias))
        dx, db, dA, dB, dgain = (next(grads) if need else None for need in needs)
        return None, None, None, None if dx is None else dx.view(x_shape), None, db, dA, dB, dgain


def _forward(spec, seed, x, weight, bias, A, B, gain):
    run = dora_impl.forward if is_plain(x) else torch.ops.lowrank.dora_linear.default
    return run(x, weight, bias, A, B, gain, spec.p, seed, spec.twice, spec.dtype)


def _norm(weight, A, B, start):
    return (dora_impl.norm if is_plain(weight) else torch.ops.lowrank.dora_norm.default)(weight, A, B, start)


_lib.impl("dora_norm", dora_impl.norm, "CompositeExplicitAutograd")
_lib.impl("dora_linear", dora_impl.forward, "CompositeExplicitAutograd")
_lib.impl("dora_linear_backward", dora_impl.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::dora_norm", lib=_lib)
def _(weight, A, B, start=None):
    return B.new_empty(weight.shape[0])


@torch.library.register_fake("lowrank::dora_linear", lib=_lib)
def _(x, weight, bias, A, B, gain, p, seed, twice, dtype):
    M, K = math.prod(x.shape[:-1]), x.shape[-1]  # Size.numel() would make a dynamic batch static
    y, v = (x.new_empty((M, weight.shape[0]), dtype=dtype) for _ in range(2))
    drawn = seed is None or dropout.are_drawn(seed)
    words = [] if drawn else [x.new_empty((M, (K + 31) // 32), dtype=torch.int32)]
    return y, x.new_empty((M, A.shape[0]), dtype=B.dtype), v, words


@torch.library.register_fake("lowrank::dora_linear_backward", lib=_lib)
def _(dy, x, weight, A, B, gain, S, v, keeps, twice, dtype, needs, bias=None):
    dx = dy.new_empty((dy.shape[0], A.shape[1]), dtype=dtype)
    grads = dx, torch.empty_like(gain), A.new_empty(A.shape), B.new_empty(B.shape), torch.empty_like(gain)
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
