"""torch.ops.lowrank.lora_linears, its gradient, and the public functions over it.

    Y_i = x W_iᵀ + bias_i + Σ_j scaling_j (drop_j(x) A_jᵀ B_jᵀ + lora_bias_j)      over the adapters j of projection i

One call serves any number of projections of one x (q/k/v, gate/up) and any number of adapters on each.  The thin term is
written first and the big GEMM adds to it in place (``addmm_``, beta = 1): full GEMM speed, one pass over Y fewer than
adding afterwards, and less rounding error where the thin term is the smaller one, as it usually is.  Saved for backward:
x itself, S = drop(x) Aᵀ, and one bit per element of each dropout mask.

Schemas live here, so that a machine without a GPU traces every op.  Autograd is a plain Function outside the op.

Files: linear.py, lora_impl.py, thin_eager.py, kernels/thin.py; tests/ops/test_lora.py; bench lora_linear.
"""

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _stats
from . import dropout, lora_impl
from ._boundary import as_shaped, autocast_dtype, is_plain, plainly
from .linear import Adapter, Projection, beside, linears
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
from .validation import check_projection

_lib = torch.library.Library("lowrank", "FRAGMENT")
# Adapters are listed projection by projection; counts[i] says how many projection i has.  masks[j] is the index, in ps,
# seeds and keeps, of the dropout mask of adapter j, or -1.  seeds may hold the masks, drawn already (dropout.are_drawn), and
# then there are no keeps beside them.  S holds all adapters' columns.  dtype is that of the big GEMM, thin_dtype that of the
# thin products.
_lib.define(
    "lora_linears(Tensor x, Tensor?[] weights, Tensor?[] biases, Tensor?[] bases, Tensor[] As, Tensor[] Bs,"
    " Tensor?[] lora_biases, Tensor?[] scaling_tensors, float[] scalings, int[] counts, int[] masks, float[] ps,"
    " Tensor? seeds, ScalarType dtype, ScalarType thin_dtype) -> (Tensor[] ys, Tensor S, Tensor[] keeps)"
)
# A dy is None where a projection's output got no gradient, and then nothing of that projection may be needed.
# needs: x, then a flag per weight, bias, A, B and lora_bias; the gradients asked for come back in that order, in dtype
# (x, weights), in fp32 or wider (biases) or in the factor's own (A, B); autograd casts what remains.
_lib.define(
    "lora_linears_backward(Tensor?[] dys, Tensor? x, Tensor?[] weights, Tensor[] As, Tensor[] Bs,"
    " Tensor?[] scaling_tensors, Tensor? S, Tensor[] keeps, float[] scalings, int[] counts, int[] masks, float[] ps,"
    " ScalarType dtype, ScalarType thin_dtype, bool[] needs) -> Tensor[]"
)
# One projection with one adapter, whole, for Dynamo to write down instead of tracing lora_projections, which runs, checks and
# autograd node included, where the op is called: on fake tensors, in AOT autograd.  scaling_tensor, where given, stands for
# scaling.  version: torch's caches of compiled graphs hold what came of the body, their keys only how it was called.
_lib.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? lora_bias, float scaling,"
    " Tensor? scaling_tensor, float dropout_p, bool copy, str version) -> Tensor"
)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """``x @ weight.T + bias + scaling * (dropout(x) @ lora_A.T @ lora_B.T + lora_bias)`` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64.
        weight: [N, K] in x's dtype; frozen or trained.
        lora_A, lora_B: [r, K] and [N, r], any float dtype and strides.  Wider than x (fp32 over bf16) they are computed
            with in their own dtype; narrower, in x's.  Their gradients have their dtype.
        scaling: a finite float, or a 0-d tensor (read on the device; gets no gradient).
        bias, lora_bias: [N].
        dropout_p: probability in [0, 1] of zeroing an element of the adapter's x; pass 0 in evaluation.

    Returns: [..., N] in x's dtype; under autocast, in autocast's dtype.

    Derivatives of every order: under ``create_graph`` or a batch of gradients (``is_grads_batched``) backward computes the
    same formula in differentiable operations; under torch.func, forward mode and torch.jit.trace so does forward, with
    torch's own dropout.  Both are slower and counted in :func:`lowrank.stats`.

    Raises: ValueError or TypeError that names the argument, what came and what was expected.
    """
    adapter = Adapter(lora_A, lora_B, scaling, lora_bias, dropout_p)
    return lora_projections(x, (Projection(weight, bias, (adapter,)),))[0]


def lora_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float | torch.Tensor],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float = 0.0,
    shared_mask: bool = False,
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linear` for projections that share x (q/k/v, gate/up): one tensor per entry of ``weights``.

    Dropout draws one mask per projection, as separate layers would; ``shared_mask=True`` draws one for all, which keeps
    one bit per element instead of one per element and projection.

    Raises: ValueError or TypeError that names the argument, what came and what was expected.
    """
    n = len(weights)
    biases = [None] * n if biases is None else biases
    for name, values in (("lora_As", lora_As), ("lora_Bs", lora_Bs), ("scalings", scalings), ("biases", biases)):
        if len(values) != n:
            raise ValueError(f"lora_linears: {name} has {len(values)} entries; weights has {n}")
    if n == 0:
        return ()
    projections = tuple(
        Projection(weight, bias, (Adapter(A, B, scaling, None, dropout_p),))
        for weight, bias, A, B, scaling in zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    )
    return lora_projections(x, projections, shared_mask=shared_mask)


def lora_projections(
    x: torch.Tensor, projections: tuple[Projection, ...], *, shared_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """Every projection of x with all its adapters, in one autograd node."""
    if plainly(x) and beside(x, projections):
        return projected(x, projections, shared_mask)
    return general(x, projections, shared_mask)


def projected(
    x: torch.Tensor, projections: tuple[Projection, ...], shared_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_projections` of an x that is :func:`linear.plainly`, with tensors :func:`linear.beside` it."""
    ys = linears(x, projections, shared_mask)
    return general(x, projections, shared_mask) if ys is None else ys


def general(
    x: torch.Tensor, projections: tuple[Projection, ...], shared_mask: bool = False
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_projections` for what is not plain (ops/linear.py)."""
    reason = followed()
    if reason is AGAIN:
        return again(lora_projections, x, projections, shared_mask=shared_mask)
    autocast = autocast_dtype(x)
    dtype = thin_dtype = autocast or x.dtype
    copy = False
    weights, biases, bases, counts = [], [], [], []
    As, Bs, lora_biases, scalings, masks, drawn = [], [], [], [], [], []
    scaling_tensors: list[torch.Tensor | None] = []
    ps: list[float] = []
    for projection in projections:
        check_projection(x, projection, autocast is not None)
        copy |= projection.copy
        weights.append(projection.weight)
        biases.append(projection.bias)
        bases.append(projection.base)
        counts.append(len(projection.adapters))
        for A, B, scaling, bias, p in projection.adapters:
            As.append(A)
            Bs.append(B)
            lora_biases.append(bias)
            if isinstance(scaling, torch.Tensor):
                scaling_tensors.append(scaling)
                scalings.append(1.0)
            else:
                scaling_tensors.append(None)
                scalings.append(scaling)
            if autocast is None and not (A.dtype is B.dtype is thin_dtype):
                thin_dtype = torch.promote_types(thin_dtype, torch.promote_types(A.dtype, B.dtype))
            if isinstance(p, dropout.Drawn):  # all with dropout are, or none
                masks.append(len(ps))
                ps.append(p.p)
                drawn.append(p.keep)
            elif (p := dropout.drawable(p)) == 0:
                masks.append(-1)
            elif shared_mask and p in ps:
                masks.append(ps.index(p))
            else:
                masks.append(len(ps))
                ps.append(p)
    tensors = (*weights, *biases, *bases, *As, *Bs, *lora_biases, *scaling_tensors)
    if reason is not None and (reason is not FORWARD_MODE or has_tangent((x, *tensors))):
        _stats.op_fell_back(reason)
        return tuple(
            lora_impl.formula(
                x,
                weights,
                biases,
                bases,
                As,
                Bs,
                lora_biases,
                scaling_tensors,
                scalings,
                counts,
                masks,
                ps,
                dtype,
                thin_dtype,
            )
        )
    seeds = torch.stack(drawn) if drawn else dropout.draw_seeds(len(ps), x.device) if ps else None
    spec = _Spec(tuple(counts), tuple(scalings), tuple(masks), tuple(ps), dtype, thin_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        x = to_save(x, copy)
        layers = [weakref.ref(projection.layer) for projection in projections if projection.layer is not None]
        ys = _LoRALinears.apply(spec, layers, x, seeds, *tensors)[: len(weights)]
    else:
        ys, _, _ = _forward(
            x,
            weights,
            biases,
            bases,
            As,
            Bs,
            lora_biases,
            scaling_tensors,
            spec.scalings,
            spec.counts,
            spec.masks,
            spec.ps,
            seeds,
            dtype,
            thin_dtype,
        )
    return tuple(as_shaped(y, x.shape) for y in ys)


def _lora_linear(x, weight, bias, A, B, lora_bias, scaling, scaling_tensor, dropout_p, copy, version):
    adapter = Adapter(A, B, scaling if scaling_tensor is None else scaling_tensor, lora_bias, dropout_p)
    return lora_projections(x, (Projection(weight, bias, (adapter,), copy=copy),))[0]


_lib.impl("lora_linear", _lora_linear, "CompositeImplicitAutograd")
traced_linear = torch.ops.lowrank.lora_linear.default


class _Spec(NamedTuple):
    """Everything about a call that is not a tensor."""

    counts: tuple[int, ...]
    scalings: tuple[float, ...]
    masks: tuple[int, ...]
    ps: tuple[float, ...]
    dtype: torch.dtype
    thin_dtype: torch.dtype

    def split(self, tensors):
        """[weights, biases, bases, As, Bs, lora_biases, scaling tensors] of a flat sequence."""
        n, a = len(self.counts), len(self.scalings)
        return lora_impl.runs(tensors, (n, n, n, a, a, a, a))


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, layers, x, seeds, *tensors):
        weights, biases, bases, As, Bs, lora_biases, scaling_tensors = spec.split(tensors)
        ys, S, keeps = _forward(
            x,
            weights,
            biases,
            bases,
            As,
            Bs,
            lora_biases,
            scaling_tensors,
            spec.scalings,
            spec.counts,
            spec.masks,
            spec.ps,
            seeds,
            spec.dtype,
            spec.thin_dtype,
        )
        keeps = seeds.unbind() if dropout.are_drawn(seeds) else keeps
        _, _, need_x, _, *needs = ctx.needs_input_grad
        n, a = len(weights), len(As)
        need_W, need_A, need_B = any(needs[:n]), any(needs[3 * n : 3 * n + a]), any(needs[3 * n + a : 3 * n + 2 * a])
        compiling, keep_x = torch.compiler.is_compiling(), need_A or need_W
        ctx.spec, ctx.x_shape = spec, x.shape
        ctx.layers, ctx.remembered = layers, remember(layers, x) if layers and keep_x else None
        # without x, S is what a second derivative reaches x through: an output, for autograd to know its graph
        ctx.linked = need_x and need_B and not keep_x and not compiling
        ctx.materialize_grads = False  # set_materialize_grads, in the form that Dynamo traces
        ctx.save_for_backward(
            x if keep_x else None,
            S if need_B else None,
            *(weights if need_x else [None] * n),
            *As,
            *Bs,
            *scaling_tensors,
            *(keeps if need_x or need_A else ()),
        )
        return (*ys, S) if ctx.linked else tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        spec, x_shape = ctx.spec, ctx.x_shape
        n, a = len(spec.counts), len(spec.scalings)
        dys, dS = dys[:n], dys[n] if ctx.linked else None
        x, S, *saved = recall(ctx, ctx.remembered)
        weights, As, Bs, scaling_tensors, keeps = lora_impl.runs(saved, (n, a, a, a, len(spec.ps)))
        _, _, need_x, _, *flags = ctx.needs_input_grad
        needs = [need_x, *flags[: 2 * n], *flags[3 * n : 3 * n + 3 * a]]
        rest = (
            x,
            weights,
            As,
            Bs,
            scaling_tensors,
            S,
            keeps,
            spec.scalings,
            spec.counts,
            spec.masks,
            spec.ps,
            spec.dtype,
            spec.thin_dtype,
        )
        live = [dy is not None for dy in dys]
        if not any(live) and dS is None:
            return (None,) * len(ctx.needs_input_grad)
        follow = must_follow(dys)
        if follow:
            _stats.op_fell_back(DIFFERENTIABLE, alive(ctx.layers))
        if follow or dS is not None:
            needed = lora_impl.differentiable(dys, dS, *rest, needs)
        else:
            if not all(live):  # what a projection that nobody used is made of gets None
                owned = [it for it, count in zip(live, spec.counts, strict=True) for _ in range(count)]
                needs = [need and it for need, it in zip(needs, [True, *live * 2, *owned * 3], strict=True)]
            needed = _backward(list(dys), *rest, needs)
        needed = iter(needed)
        dx, *grads = [next(needed) if need else None for need in needs]
        dx = None if dx is None else dx.view(x_shape)
        dbases = [
            dy.view(*x_shape[:-1], dy.shape[1]) if need and dy is not None else None
            for dy, need in zip(dys, flags[2 * n : 3 * n], strict=True)
        ]
        return None, None, dx, None, *grads[: 2 * n], *dbases, *grads[2 * n :], *[None] * a


def _forward(x: torch.Tensor, *rest):
    if is_plain(x):
        return lora_impl.forward(x, *rest)
    return torch.ops.lowrank.lora_linears.default(x, *rest)


def _backward(dys: list[torch.Tensor | None], *rest):
    some = dys[0] if dys[0] is not None else next(dy for dy in dys if dy is not None)
    run = lora_impl.backward if is_plain(some) else torch.ops.lowrank.lora_linears_backward.default
    return run(dys, *rest)


_lib.impl("lora_linears", lora_impl.forward, "CompositeExplicitAutograd")
_lib.impl("lora_linears_backward", lora_impl.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::lora_linears", lib=_lib)
def _(
    x,
    weights,
    biases,
    bases,
    As,
    Bs,
    lora_biases,
    scaling_tensors,
    scalings,
    counts,
    masks,
    ps,
    seeds,
    dtype,
    thin_dtype,
):
    M, K = math.prod(x.shape[:-1]), x.shape[-1]  # Size.numel() would make a dynamic batch static
    ys = [
        x.new_empty((M, weight.shape[0]), dtype=dtype) if base is None else base.new_empty((M, base.shape[-1]))
        for weight, base in zip(weights, bases, strict=True)
    ]
    S = x.new_empty((M, sum(A.shape[0] for A in As)), dtype=thin_dtype)
    keeps = [] if dropout.are_drawn(seeds) else [x.new_empty((M, (K + 31) // 32), dtype=torch.int32) for _ in ps]
    return ys, S, keeps


@torch.library.register_fake("lowrank::lora_linears_backward", lib=_lib)
def _(dys, x, weights, As, Bs, scaling_tensors, S, keeps, scalings, counts, masks, ps, dtype, thin_dtype, needs):
    K = next(t for t in (x, *As, *weights) if t is not None).shape[-1]
    acc_dtype = torch.promote_types(thin_dtype, torch.float32)
    owners = [dy for dy, count in zip(dys, counts, strict=True) for _ in range(count)]
    some = next(dy for dy in dys if dy is not None)
    grads = [some.new_empty((some.shape[0], K), dtype=dtype)]
    grads += [None if dy is None else dy.new_empty((dy.shape[1], K)) for dy in dys]
    grads += [None if dy is None else dy.new_empty(dy.shape[1], dtype=acc_dtype) for dy in dys]
    grads += [factor.new_empty(factor.shape) for factor in (*As, *Bs)]
    grads += [None if dy is None else dy.new_empty(dy.shape[1], dtype=acc_dtype) for dy in owners]
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
