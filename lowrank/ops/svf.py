"""torch.ops.lowrank.svf_linear, its gradient, and the public function over it.

    y = x Wᵀ + bias + ((x Aᵀ) ∘ m) Bᵀ        A = Vh [k,K] and B = U [N,k] frozen, m one number per direction

Nothing of W's size is computed for z: dz = σ ∘ Σ_t (x Aᵀ) ∘ (dY B), so only S = x Aᵀ [M,k] is saved.  Everything between
z and m (σ, the identity at z = 1, normalisation, the mixing of experts) is k numbers per expert, in fp32, left to PyTorch's
own autograd.  Transformer² (Sun, Cetin, Tang 2025, arXiv 2501.06252).

Schemas live here, so that a machine without a GPU traces every op.  Autograd is a plain Function outside the op.

Files: svf_impl.py, svf_eager.py, svf_large_k.py, kernels/svf.py; tests/ops/test_svf.py; bench svf_linear.
"""

import math
from typing import NamedTuple

import torch

from .. import _stats
from ..svd import SVDFactors
from . import svf_impl
from ._boundary import as_shaped, autocast_dtype, is_plain
from .materialize import materialize
from .node import AGAIN, DIFFERENTIABLE, FORWARD_MODE, again, followed, has_tangent, must_follow
from .validation import check_svf

_lib = torch.library.Library("lowrank", "FRAGMENT")
# scales is m [k], or [E,k] with mix [M,E] and m_t = mix_t @ scales.  dtype is that of the big GEMM, thin_dtype that of the
# thin products.  base: a finished base output that stands in for x Wᵀ.
_lib.define(
    "svf_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor scales, Tensor? mix,"
    " ScalarType dtype, ScalarType thin_dtype) -> (Tensor y, Tensor S)"
)
# needs: x, weight, bias, scales, mix; the gradients asked for come back in that order.
_lib.define(
    "svf_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor scales, Tensor? mix, Tensor? S,"
    " ScalarType dtype, ScalarType thin_dtype, bool[] needs) -> Tensor[]"
)
MODES = ("auto", "merged", "activation", "delta")
SINGULAR = 1e-6  # |Σσz| below this share of Σσ is refused


def svf_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    factors: SVDFactors,
    z: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    mode: str = "auto",
    normalize: str | None = None,
) -> torch.Tensor:
    """``x @ W'.T + bias`` with W' = W + U diag(σ (z - 1)) Vᵀ: singular values scaled by z (arXiv 2501.06252).

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64.
        weight: [N, K] in x's dtype; or None, and the factors stand for it: W' = U diag(σ z) Vᵀ.
        factors: U [N,k], S [k], Vh [k,K] of :func:`lowrank.svd_factors`, frozen; U and Vh in any float dtype.  Wider than
            x (fp32 over bf16) they are computed with in their own; narrower, in x's.
        z: fp32 [k], or experts [E,k] (fp64 over fp64).
        bias: [N].
        mix: weights of the experts, [E] for all rows, [B,E] for each sequence of x [B,T,K], or [...,E] for each row of
            x: row t sees Σ_e mix_te z_e.
        mode: "delta" adds U diag(σ(z - 1)) Vᵀ on top of W: exactly W at z = 1.  "activation" computes with the factors in
            place of W (all min(N,K) of them, or weight=None).  "merged" materialises W' in this call (no mix).  "auto":
            :func:`cheapest`.  All are the same function of their arguments, up to rounding and the factors' own error.
        normalize: None, or "nuclear": z is rescaled by Σσ / Σσz over the given directions (Transformer²'s factor).

    Gradients for x, z, mix, weight and bias; derivatives of every order, as :func:`lora_linear`'s.

    Returns: [..., N] in x's dtype; under autocast, in autocast's.

    Raises: ValueError or TypeError that names the argument, what came and what was expected.  On a CPU, NaN in z and a Σσz
        near zero under "nuclear" raise too; on a GPU, where reading them would wait for the device, they propagate.
    """
    check_svf(x, weight, factors, z, bias, mix, mode, normalize, autocast_dtype(x) is not None)
    (N, k), K = factors.U.shape, factors.Vh.shape[1]
    if mode == "auto":
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, z, mix))
        rows = math.prod(x.shape[:-1])
        mode = cheapest(N, K, k, rows, weight=weight is not None, mixed=mix is not None, training=training)
    absolute = weight is None or mode == "activation"
    if x.dtype is torch.float64:
        z = z.double()
    scales, mix = column_scales(factors.S, z, mix, normalize, absolute, x.shape)
    weight = None if mode == "activation" else weight
    return svf_projection(x, weight, bias, None, factors.Vh, factors.U, scales, mix, merged=mode == "merged")


def cheapest(
    N: int,
    K: int,
    k: int,
    rows: int,
    *,
    weight: bool = True,
    mixed: bool = False,
    training: bool = True,
    cached: bool = False,
) -> str:
    """The mode with the fewest FLOPs for ``rows`` rows between two changes of z; ties go to the earlier of the table.

        delta        2 NK + 2 k(N+K) per row forward, as many backward; the only one below k = min(N, K)
        activation   2 k(N+K) per row forward, as many backward
        merged       2 NK per row and 2 NKk once; backward per row 2 k(N+2K) + 2 NK.  Never under a mix
        merged, cached by SVFLinear: 2 NK forward and 4 NK backward per row, 4 NKk once per step

    ``weight``: whether W is there beside the factors (it is not where it is quantised; then "delta" means onto its output,
    and asking with ``weight=False`` is asking for the factors alone).
    """
    if weight and k < min(N, K):
        return "delta"
    thin = 2 * k * (N + K)
    costs = {"activation": thin * rows, "merged": 2 * N * K * rows + 2 * N * K * k}
    if training:
        costs["activation"] += thin * rows
        costs["merged"] += (4 * N * K * rows + 2 * N * K * k) if cached else (thin + 2 * K * k + 2 * N * K) * rows
    if mixed:
        del costs["merged"]
    return min(costs, key=costs.__getitem__)


def column_scales(S, z, mix, normalize, absolute: bool, shape) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(m [k], None), or (scales [E,k], mix [M,E]) with m_t = mix_t @ scales, in z's dtype.

    m = σ z if ``absolute``, else σ (z - 1), which is exactly 0 at z = 1.  A mix of that is Σ_e a_te σ(z_e - 1) +
    (Σ_e a_te - 1) σ: one more row of scales, no difference of large numbers.  "nuclear" divides z by its mean under the
    weights σ, which leaves σ (z - mean) / mean: under a mix Σ_e a_te σ(z_e - mean_e) with a = mix / Σ_e mix_e mean_e.
    ``shape``: x's; a mix for fewer of its dimensions is repeated over the others.
    """
    S = S.to(z.dtype)
    nuclear = normalize is not None
    # the same sum twice, so that their ratio is exactly 1 at z = 1
    mean = (S * z).sum(-1) / (S * torch.ones_like(z)).sum(-1) if nuclear else None
    if mix is None:
        if mean is not None:
            _check_mean(mean, "z")
            return S * z / mean if absolute else S * ((z - mean) / mean), None
        return S * z if absolute else S * (z - 1), None
    mix = mix.to(z.dtype)
    if mean is not None:
        total = mix @ mean
        _check_mean(total, "mix and z")
        mix = mix / total.unsqueeze(-1)
        z, constant = z - mean.unsqueeze(-1), torch.ones_like(mix[..., :1]) if absolute else None
    elif absolute:
        constant = None
    else:
        z, constant = z - 1, mix.sum(-1, keepdim=True) - 1
    scales = S * z
    if constant is not None:
        scales, mix = torch.cat((scales, S.unsqueeze(0))), torch.cat((mix, constant), -1)
    E = mix.shape[-1]
    repeated = mix.reshape(*mix.shape[:-1], *[1] * (len(shape) - mix.dim()), E).expand(*shape[:-1], E)
    return scales, repeated.reshape(-1, E)


def _check_mean(mean: torch.Tensor, what: str) -> None:
    if mean.device.type == "cpu" and is_plain(mean) and mean.numel():
        least = float(mean.detach().abs().min())
        if not least > SINGULAR:
            raise ValueError(f"normalize: 'nuclear' divides by Σσz, which {what} bring to {least:.3g} of Σσ")


def svf_projection(x, weight, bias, base, A, B, scales, mix, *, merged: bool = False) -> torch.Tensor:
    """The general form over finished ``scales`` and ``mix``; ``base``: what is added to in place of x Wᵀ."""
    reason = followed()
    if reason is AGAIN:
        return again(svf_projection, x, weight, bias, base, A, B, scales, mix, merged=merged)
    autocast = autocast_dtype(x)
    dtype = thin_dtype = autocast or x.dtype
    if autocast is None:
        thin_dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
    tensors = (x, weight, bias, base, A, B, scales, mix)
    if reason is not None and (reason is not FORWARD_MODE or has_tangent(tensors)):
        _stats.op_fell_back(reason)
        return svf_impl.formula(*tensors, dtype, thin_dtype)
    spec = _Spec(dtype, thin_dtype, merged)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _SVFLinear.apply(spec, *tensors)
        y = y[0] if isinstance(y, tuple) else y
    else:
        y, _ = _forward(spec, *tensors)
    return as_shaped(y, x.shape)


class _Spec(NamedTuple):
    dtype: torch.dtype
    thin_dtype: torch.dtype
    merged: bool


class _SVFLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, weight, bias, base, A, B, scales, mix):
        y, S = _forward(spec, x, weight, bias, base, A, B, scales, mix)
        _, need_x, need_W, _, _, _, _, *dots = ctx.needs_input_grad
        ctx.spec, ctx.x_shape = spec, x.shape
        keep_x = need_W or (spec.merged and any(dots))
        # without x, S is what a second derivative reaches x through: an output, for autograd to know its graph
        linked = need_x and any(dots) and not keep_x and not torch.compiler.is_compiling()
        ctx.save_for_backward(
            x if keep_x else None, weight if need_x else None, A, B, scales, mix, S if any(dots) else None
        )
        if linked:
            ctx.set_materialize_grads(False)
            return y, S
        return y

    @staticmethod
    def backward(ctx, dy, dS=None):
        spec, x_shape = ctx.spec, ctx.x_shape
        _, need_x, need_W, need_b, need_base, _, _, need_scales, need_mix = ctx.needs_input_grad
        needs = [need_x, need_W, need_b, need_scales, need_mix]
        arguments = (*ctx.saved_tensors, spec.dtype, spec.thin_dtype, needs)
        if follow := must_follow((dy, dS)):
            _stats.op_fell_back(DIFFERENTIABLE)
        if follow or dy is None or dS is not None:
            grads = iter(svf_impl.differentiable(dy, dS, *arguments))
        else:
            run = svf_impl.backward if is_plain(dy) else torch.ops.lowrank.svf_linear_backward.default
            grads = iter(run(dy, *arguments))
        dx, dW, db, dscales, dmix = (next(grads) if need else None for need in needs)
        dx = None if dx is None else dx.view(x_shape)
        dbase = dy.view(*x_shape[:-1], dy.shape[1]) if need_base and dy is not None else None
        return None, dx, dW, db, dbase, None, None, dscales, dmix


def _forward(spec, x, weight, bias, base, A, B, scales, mix):
    """(y [M,N], S [M,k] or None)."""
    if spec.merged:
        W = x.new_zeros(B.shape[0], A.shape[1], dtype=spec.dtype) if weight is None else weight
        W = materialize(W.detach(), A, scales.detach(), B)
        y = torch.nn.functional.linear(x, W, bias)
        return y.view(-1, y.shape[-1]), None
    run = svf_impl.forward if is_plain(x) else torch.ops.lowrank.svf_linear.default
    return run(x, weight, bias, base, A, B, scales, mix, spec.dtype, spec.thin_dtype)


_lib.impl("svf_linear", svf_impl.forward, "CompositeExplicitAutograd")
_lib.impl("svf_linear_backward", svf_impl.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank::svf_linear", lib=_lib)
def _(x, weight, bias, base, A, B, scales, mix, dtype, thin_dtype):
    M = math.prod(x.shape[:-1])  # Size.numel() would make a dynamic batch static
    y = x.new_empty((M, B.shape[0]), dtype=dtype if base is None else base.dtype)
    return y, x.new_empty((M, A.shape[0]), dtype=thin_dtype)


@torch.library.register_fake("lowrank::svf_linear_backward", lib=_lib)
def _(dy, x, weight, A, B, scales, mix, S, dtype, thin_dtype, needs):
    M, N = dy.shape
    grads = (
        dy.new_empty((M, A.shape[1]), dtype=dtype),
        dy.new_empty((N, A.shape[1])),
        dy.new_empty(N, dtype=torch.promote_types(dy.dtype, torch.float32)),
        torch.empty_like(scales),
        None if mix is None else torch.empty_like(mix),
    )
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
