"""torch.ops.lowrank.expert_linear, its gradient, and the public function over them.

    y_s = W_e x_s + bias_e + Σ_j scaling_j B_je A_je drop_j(x_s)          e the expert of row s, over the adapters j

Rows are sorted by expert.  Nothing of the size of the weight stack is formed, forward or backward, unless the weight trains:
PEFT's layer over expert parameters forms W + BA of all experts twice a forward and keeps it.  Saved for backward: x, S =
drop(x) Aᵀ, and one bit per element of each dropout mask.

Files: experts_eager.py; tests/ops/test_experts.py; bench experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _stats, bits
from . import dropout
from ._boundary import autocast_dtype, is_plain, no_autocast
from ._debug import may_look
from .experts_eager import SMALL, Groups, bias_rows, expand_, outer, padded, rows, shrink, sums, thin, thin_A
from .linear import Adapter
from .node import AGAIN, DIFFERENTIABLE, FORWARD_MODE, again, followed, has_tangent, must_follow, to_save
from .validation import check_tensor, is_finite, shape_of

_lib = torch.library.Library("lowrank", "FRAGMENT")
# seeds: int64, one of each p that is not 0.  numbers: int64 [S], by which the rows of masks are drawn, or their places.
_lib.define(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] As, Tensor[] Bs, float[] scalings, float[] ps, Tensor ends,"
    " Tensor? seeds, Tensor? numbers, bool full, bool grad, ScalarType thin_dtype) -> (Tensor, Tensor[], Tensor[])"
)
# needs: x, weight, bias, then a flag per A and per B
_lib.define(
    "expert_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor[] As, Tensor[] Bs, Tensor[] Ss, Tensor[] keeps,"
    " float[] scalings, float[] ps, Tensor ends, bool full, ScalarType thin_dtype, bool[] needs) -> Tensor[]"
)


def experts_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    numbers: Tensor | None = None,
) -> Tensor:
    """:func:`lowrank.lora_linear` of rows that are sorted by expert, each with its expert's weight and factors.

    Args:
        x: [S, K], fp16, bf16, fp32 or fp64.
        weight: [E, N, K] in x's dtype, in any strides: a stack stored [E, K, N] is its ``transpose(1, 2)``.  Frozen or trained.
        lora_A, lora_B: [E, r, K] and [E, N, r] in any strides and float dtype, by the rule of :func:`lowrank.lora_linear`; or
            a list of each, of adapters with ranks of their own.  PEFT's parameters are ``A.view(E, r, K)`` and
            ``B.view(N, r, E).permute(2, 0, 1)``.
        scaling: a finite float, or one per adapter.
        offsets: int32 [E], where each expert's rows end, as ``torch.nn.functional.grouped_mm`` takes them.  Rows behind the
            last are of no expert: zeros, without gradients.  Checked on a CPU and under :func:`lowrank.debug_checks`; on a
            GPU values that decrease or are too large are cut to what fits.
        bias: [E, N].
        dropout_p: probability in [0, 1] of zeroing an element of the adapters' x; pass 0 in evaluation.
        numbers: int64 [S], each row's own number (token times choices and the choice): its dropout mask follows from it and
            not from where sorting puts it; below S.  Without it, a row's place.

    Returns: [S, N] in x's dtype.  Under autocast, which grouped_mm has none of, all is computed in the weight's dtype.

    Derivatives of every order, as :func:`lowrank.lora_linear`'s.

    Raises: ValueError or TypeError that names the argument, what came and what was expected.
    """
    adapters = _adapters(lora_A, lora_B, scaling, dropout_p)
    check(x, weight, bias, adapters, offsets, numbers)
    full, offsets = False, offsets.contiguous()
    if numbers is not None and may_look(numbers) and numbers.numel():
        low, high = (int(t) for t in numbers.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"numbers: expected 0 to {x.shape[0] - 1}, got {low} to {high}")
    if may_look(offsets):
        full = _check_values(offsets, x.shape[0])
    else:
        offsets = torch.cummax(offsets.clamp(0, x.shape[0]), 0)[0]
    return expert_linear(x, weight, bias, adapters, Groups(offsets, x.shape[0], full), numbers)


def expert_linear(
    x, weight, bias, adapters: tuple[Adapter, ...], groups: Groups, numbers: Tensor | None = None
) -> Tensor:
    """:func:`experts_linear` of what is checked."""
    reason = followed()
    if reason is AGAIN:
        return again(expert_linear, x, weight, bias, adapters, groups, numbers)
    out_dtype, x = x.dtype, x.to(weight.dtype)
    thin_dtype = thin_dtype_of(x, weight, adapters)
    As, Bs = [a.A for a in adapters], [a.B for a in adapters]
    scalings, ps = [float(a.scaling) for a in adapters], [dropout.drawable(a.dropout_p) for a in adapters]
    tensors = (weight, bias, *As, *Bs)
    if reason is not None and is_traced((x, *tensors)):
        reason = None
    if reason is not None and (reason is not FORWARD_MODE or has_tangent((x, *tensors))):
        _stats.op_fell_back(reason)
        return formula(x, weight, bias, As, Bs, scalings, ps, [], groups, thin_dtype).to(out_dtype)
    seeds = dropout.draw_seeds(sum(p > 0 for p in ps), x.device) if any(ps) else None
    spec = _Spec(tuple(scalings), tuple(ps), thin_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        y = _ExpertLinear.apply(spec, groups, numbers, seeds, to_save(x, False), *tensors)
    else:
        y = _forward(
            x, weight, bias, As, Bs, scalings, ps, groups.ends, seeds, numbers, groups.full, False, thin_dtype
        )[0]
    return y.to(out_dtype)


def is_traced(tensors) -> bool:
    """Whether torch.jit.trace or torch.onnx.export writes down a call without gradients."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch._C._is_tracing() and torch._C._functorch.peek_interpreter_stack() is None and not grad


def thin_dtype_of(x: Tensor, weight: Tensor, adapters: Sequence[Adapter]) -> torch.dtype:
    """The thin products' dtype: the widest of the weight's and the factors'; under autocast the weight's."""
    dtype = weight.dtype
    if autocast_dtype(x) is None:
        for adapter in adapters:
            dtype = torch.promote_types(dtype, torch.promote_types(adapter.A.dtype, adapter.B.dtype))
    return dtype


class _Spec(NamedTuple):
    """Everything about a call that is not a tensor."""

    scalings: tuple[float, ...]
    ps: tuple[float, ...]
    thin_dtype: torch.dtype


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, groups, numbers, seeds, x, weight, bias, *factors):
        n = len(spec.scalings)
        y, Ss, keeps = _forward(
            x,
            weight,
            bias,
            list(factors[:n]),
            list(factors[n:]),
            spec.scalings,
            spec.ps,
            groups.ends,
            seeds,
            numbers,
            groups.full,
            True,
            spec.thin_dtype,
        )
        ctx.spec, ctx.rows, ctx.full = spec, groups.rows, groups.full
        ctx.save_for_backward(x, weight, bias, groups.ends, *factors, *Ss, *keeps)
        return y

    @staticmethod
    def backward(ctx, dy):
        spec, n = ctx.spec, len(ctx.spec.scalings)
        x, weight, bias, ends, *saved = ctx.saved_tensors
        As, Bs, Ss, keeps = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
        _, _, _, _, *needs = ctx.needs_input_grad
        if must_follow([dy]):
            _stats.op_fell_back(DIFFERENTIABLE)
            groups = Groups(ends, ctx.rows, ctx.full)
            grads = differentiated(
                lambda x, weight, bias, *factors: formula(
                    x, weight, bias, factors[:n], factors[n:], spec.scalings, spec.ps, keeps, groups, spec.thin_dtype
                ),
                (x, weight, bias, *As, *Bs),
                dy,
                needs,
            )
            return (None, None, None, None, *grads)
        rest = x, weight, As, Bs, Ss, keeps, spec.scalings, spec.ps, ends, ctx.full, spec.thin_dtype
        if is_plain(dy):
            needed = iter(backward(dy, *rest, needs))
        else:
            needed = iter(torch.ops.lowrank.expert_linear_backward.default(dy, *rest, needs))
        return (None, None, None, None, *(next(needed) if need else None for need in needs))


def differentiated(function, inputs, dy, needs) -> list[Tensor | None]:
    """Gradients that can be differentiated again: of the same function in operations that autograd follows."""
    with torch.enable_grad():
        leaves = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        y = function(*leaves)
        asked = [t for t, need in zip(leaves, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, asked, dy, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(grads) if need else None for need in needs]


def _forward(x, *rest):
    if is_plain(x):
        return forward(x, *rest)
    return torch.ops.lowrank.expert_linear.default(x, *rest)


def forward(x, weight, bias, As, Bs, scalings, ps, ends, seeds, numbers, full, grad, thin_dtype):
    """(y, S per adapter, keep bits per adapter with dropout)."""
    with no_autocast(x.device):
        groups, seeds = Groups(ends, x.shape[0], full), [] if seeds is None else list(seeds)
        return projected(x, weight, bias, As, Bs, scalings, ps, groups, seeds, numbers, grad, thin_dtype)


def backward(dy, x, weight, As, Bs, Ss, keeps, scalings, ps, ends, full, thin_dtype, needs):
    """The gradients that ``needs`` asks for: of x, weight, bias, the As and the Bs."""
    with no_autocast(x.device):
        groups, n, keeps = Groups(ends, x.shape[0], full), len(As), list(keeps)
        need_x, need_W, need_b, *need = needs
        masked = [keeps.pop(0) if p > 0 else None for p in ps]
        scales = [s * dropout.keep_scale(p) for s, p in zip(scalings, ps, strict=True)]
        dx, dW, db, dAs, dBs = projected_backward(
            dy,
            lambda: x,
            weight,
            As,
            Bs,
            Ss,
            masked,
            scales,
            need[:n],
            need[n:],
            groups,
            thin_dtype,
            need_x,
            need_W,
            need_b,
        )
        return [grad for grad, need in zip([dx, dW, db, *dAs, *dBs], needs, strict=True) if need]


def projected(x, weight, bias, As, Bs, scalings, ps, groups: Groups, seeds, numbers, grad: bool, thin_dtype):
    """:func:`forward` of rows whose groups are known; seeds: one per adapter with dropout."""
    y = rows(x, weight, groups)
    if bias is not None and not As:
        y.add_(bias_rows(bias, y.dtype, groups))
    Ss, keeps = [], []
    for A, B, scaling, p in zip(As, Bs, scalings, ps, strict=True):
        keep = _drawn(seeds[len(keeps)], groups.rows, x.shape[1], p, numbers) if p > 0 else None
        factors = thin(A, B, scaling * dropout.keep_scale(p), thin_dtype, groups, grad)
        Ss.append(shrink(dropped(x.to(thin_dtype), keep), factors, groups))
        expand_(y, Ss[-1], factors, groups, bias if len(Ss) == 1 else None)
        keeps += [] if keep is None else [keep]
    return y, Ss, keeps


def projected_backward(
    dy, x, weight, As, Bs, Ss, masked, scales, need_A, need_B, groups: Groups, thin_dtype, need_x, need_W, need_b
):
    """(dx, dW, db, [dA], [dB]), None where not needed.  x(): the rows, asked for only where a dW or dA is.  masked: keep bits
    or None per adapter.  What is large is made last, and B is copied after its gradient."""
    n = len(As)
    db, dBs, dSs, dAs = sums(dy, groups) if need_b else None, [None] * n, [None] * n, [None] * n
    wide = dy.to(thin_dtype)
    for j, (A, B, S) in enumerate(zip(As, Bs, Ss, strict=True)):
        dBs[j] = factor_gradient(wide, S, scales[j], B, groups) if need_B[j] else None
        if need_x or need_A[j]:
            factors = thin(A, B, scales[j], thin_dtype, groups, True)
            dSs[j] = rows(wide, factors.B.mT, groups).mul_(scales[j])
            del factors
    del wide
    dW = None
    if need_W or any(need_A):
        x = x()
        dW = outer(dy, x, groups) if need_W else None
        for j, A in enumerate(As):
            dAs[j] = dropped_outer(dSs[j], x, masked[j], A.shape[1], groups, A.dtype) if need_A[j] else None
        del x
    dx = rows(dy, weight.mT, groups) if need_x else None
    for j, A in enumerate(As) if need_x else ():
        part = rows(dSs[j], thin_A(A, dSs[j], groups).mT, groups)
        dx.add_(dropped(part, masked[j]))
    return dx, dW, db, dAs, dBs


def dropped_outer(dS: Tensor, x: Tensor, keep: Tensor | None, rank: int, groups: Groups, dtype: torch.dtype) -> Tensor:
    """dA [E,r,K] in ``dtype``, of the x that the mask kept."""
    grad = outer(dS, dropped(x.to(dS.dtype), keep), groups)
    return grad[:, :rank].to(dtype).contiguous()


def factor_gradient(dy: Tensor, S: Tensor, scale: float, B: Tensor, groups: Groups) -> Tensor:
    """dB [E,N,r] in the strides and the dtype of B; what multiplies the thin side is small."""
    grad = outer(dy, S * scale, groups)[:, :, : B.shape[2]]
    if B.numel() >= SMALL and grad.is_contiguous() and B.stride() == (1, B.shape[2] * len(B), len(B)):
        flat = grad.view(len(B), -1).to(B.dtype).mT.contiguous()  # in two dimensions a transposition is blocked
        return flat.view(B.shape[1], B.shape[2], len(B)).permute(2, 0, 1)
    return torch.empty_like(B).copy_(grad)


def formula(x, weight, bias, As, Bs, scalings, ps, keeps, groups: Groups, thin_dtype) -> Tensor:
    """:func:`forward`'s y expert by expert, in operations that autograd, torch.func and forward mode follow.

    keeps: the masks of the adapters with dropout; without, torch's own dropout draws them.
    """
    with no_autocast(x.device):
        parts, end, keeps = [], 0, iter(keeps) if keeps else None
        inputs = []
        for p in ps:
            wide = x.to(thin_dtype)
            if p > 0:
                scale = dropout.keep_scale(p)
                wide = torch.nn.functional.dropout(wide, p) if keeps is None else dropped(wide, next(keeps)) * scale
            inputs.append(wide)
        for expert, first, end in groups.spans():
            y = torch.nn.functional.linear(
                x[first:end], weight[expert], None if bias is None else bias[expert].to(x.dtype)
            )
            for wide, A, B, scaling in zip(inputs, As, Bs, scalings, strict=True):
                S = wide[first:end] @ A[expert].to(thin_dtype).mT
                y = y + scaling * (S @ B[expert].to(thin_dtype).mT)
            parts.append(y.to(x.dtype))
        behind = (groups.rows - end, weight.shape[1])
        parts.append(x.new_zeros(behind) + 0 * x.sum() if not parts else x.new_zeros(behind))
        return torch.cat(parts)


def _drawn(seed: Tensor, count: int, columns: int, p: float, numbers: Tensor | None) -> Tensor:
    """Keep bits int32 [S, words]: row i's are those of the mask's row ``numbers[i]``, which is below S."""
    words = (columns + 31) // 32
    keep = torch.empty((count, words), dtype=torch.int32, device=seed.device)
    for block, mask in dropout.draw(seed, count, columns, dropout.threshold(p)):
        keep[block] = bits.pack(mask).view(-1, words)
    return keep if numbers is None else keep[numbers]


def dropped(t: Tensor, keep: Tensor | None) -> Tensor:
    """t [S,K], zero where its mask's bit is; without a mask, t."""
    if keep is None:
        return t
    mask = bits.unpack(keep.reshape(-1), (keep.shape[0], 32 * keep.shape[1]))[:, : t.shape[1]]
    return torch.where(mask, t, 0)


def _adapters(lora_A, lora_B, scaling, p) -> tuple[Adapter, ...]:
    if isinstance(lora_A, Tensor):
        lora_A, lora_B, scaling = [lora_A], [lora_B], [scaling]
    for name, given in (("lora_A", lora_A), ("lora_B", lora_B), ("scaling", scaling)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected one per adapter, got {type(given).__name__}")
        if len(given) != len(lora_A):
            raise ValueError(f"{name}: expected {len(lora_A)}, as many as lora_A, got {len(given)}")
    return tuple(Adapter(A, B, s, None, p) for A, B, s in zip(lora_A, lora_B, scaling, strict=True))


def check(x, weight, bias, adapters, offsets, numbers) -> None:
    """Raise on what does not fit x [S,K]; metadata and Python scalars only."""
    check_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [S, K], rows sorted by expert, got {shape_of(x)}")
    check_tensor("weight", weight, x)
    if weight.dim() != 3 or weight.shape[2] != x.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight: expected [E, N, {x.shape[1]}] for x {shape_of(x)}, got {shape_of(weight)}")
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype} (outside autocast)")
    E, N, K = weight.shape
    check_stack_vector("bias", bias, E, N, x)
    for adapter in adapters:
        check_factors(adapter, E, N, K, x)
        p = adapter.dropout_p
        if not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"dropout_p: expected a probability in [0, 1], got {p!r}")
    for name, given, dtype, size in (
        ("offsets", offsets, torch.int32, E),
        ("numbers", numbers, torch.int64, x.shape[0]),
    ):
        if given is None and name == "numbers":
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given.dtype is not dtype:
            raise TypeError(f"{name}: expected {dtype}, got {given.dtype}")
        if given.shape != (size,):
            raise ValueError(f"{name}: expected [{size}], got {shape_of(given)}")
        if given.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {given.device}")


def check_stack_vector(name: str, t, E: int, N: int, x: Tensor) -> None:
    if t is not None:
        check_tensor(name, t, x)
        if t.shape != (E, N):
            raise ValueError(f"{name}: expected [{E}, {N}], got {shape_of(t)}")


def check_factors(adapter: Adapter, E: int, N: int, K: int, x: Tensor) -> None:
    A, B = adapter.A, adapter.B
    check_tensor("lora_A", A, x)
    check_tensor("lora_B", B, x)
    if A.dim() != 3 or A.shape[0] != E or A.shape[2] != K or A.shape[1] == 0:
        raise ValueError(f"lora_A: expected [{E}, r, {K}] with r >= 1, got {shape_of(A)}")
    if B.shape != (E, N, A.shape[1]):
        raise ValueError(f"lora_B: expected [{E}, {N}, {A.shape[1]}] beside lora_A {shape_of(A)}, got {shape_of(B)}")
    if isinstance(adapter.scaling, bool) or not isinstance(adapter.scaling, (int, float)):
        raise TypeError(f"scaling: expected a float, got {type(adapter.scaling).__name__}")
    if not is_finite(adapter.scaling):
        raise ValueError(f"scaling: expected a finite float, got {adapter.scaling}")


def _check_values(offsets: Tensor, count: int) -> bool:
    """Whether the last expert's rows end with the rows.  Raises: ValueError if they decrease or pass the end."""
    ends = offsets.tolist()
    if any(a > b for a, b in zip([0, *ends], ends, strict=False)) or ends[-1] > count:
        raise ValueError(f"offsets: expected ends that do not decrease, in 0 to {count}, got {ends}")
    return ends[-1] == count


_lib.impl("expert_linear", forward, "CompositeExplicitAutograd")
_lib.impl("expert_linear_backward", backward, "CompositeExplicitAutograd")


def width(A: Tensor, grad: bool, count: int, dtype: torch.dtype) -> int:
    """Columns of S: of a factor of few rows its rank, else that padded."""
    return padded(A.shape[1], dtype, A.device) if grad or count >= A.shape[0] else A.shape[1]


@torch.library.register_fake("lowrank::expert_linear", lib=_lib)
def _(x, weight, bias, As, Bs, scalings, ps, ends, seeds, numbers, full, grad, thin_dtype):
    S, K = x.shape
    Ss = [x.new_empty((S, width(A, grad, S, thin_dtype)), dtype=thin_dtype) for A in As]
    keeps = [x.new_empty((S, (K + 31) // 32), dtype=torch.int32) for p in ps if p > 0]
    return x.new_empty((S, weight.shape[1])), Ss, keeps


@torch.library.register_fake("lowrank::expert_linear_backward", lib=_lib)
def _(dy, x, weight, As, Bs, Ss, keeps, scalings, ps, ends, full, thin_dtype, needs):
    bias_dtype = torch.promote_types(x.dtype, torch.float32)
    grads = [torch.empty_like(x), x.new_empty(weight.shape), x.new_empty(weight.shape[:2], dtype=bias_dtype)]
    grads += [A.new_empty(A.shape) for A in As] + [torch.empty_like(B) for B in Bs]
    return [grad for grad, need in zip(grads, needs, strict=True) if need]
