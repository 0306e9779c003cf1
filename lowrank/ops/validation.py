"""Checks of a linear's arguments: ValueError or TypeError with the argument's name, what came and what was expected.

Those of vocabulary heads are in _head_checks.py.
"""

import math

import torch

from ._debug import may_look
from .dropout import Drawn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_projection(x, projection, autocast: bool) -> None:
    """Raise on a ``Projection`` (ops/lora.py) that does not fit x [...,K]; metadata and Python scalars only."""
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K] with K >= 1, got {shape_of(x)}")
    K, N = x.shape[-1], None
    if projection.weight is None and (projection.base is None or not projection.adapters):
        raise ValueError("weight: expected a tensor [N, K], or a base output with adapters to add to it; got neither")
    if projection.base is not None:
        check_tensor("base", projection.base)
        N = projection.base.shape[-1]
        if projection.base.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"base: expected [..., N] with x's leading shape {shape_of(x)}, got {shape_of(projection.base)}"
            )
    if projection.weight is not None:
        check_tensor("weight", projection.weight, x)
        if projection.weight.dim() != 2 or projection.weight.shape[1] != K:
            raise ValueError(f"weight: expected [N, {K}] for x {shape_of(x)}, got {shape_of(projection.weight)}")
        N = projection.weight.shape[0]
        if not autocast and projection.weight.dtype is not x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {projection.weight.dtype} (outside autocast)")
    check_vector("bias", projection.bias, N, x)
    for adapter in projection.adapters:
        _check_adapter(adapter, N, K, x)


def _check_adapter(adapter, N: int, K: int, x: torch.Tensor) -> None:
    A, B, scaling, p = adapter.A, adapter.B, adapter.scaling, adapter.dropout_p
    check_tensor("lora_A", A, x)
    check_tensor("lora_B", B, x)
    if A.dim() != 2 or A.shape[1] != K:
        raise ValueError(f"lora_A: expected [r, {K}] for x {shape_of(x)}, got {shape_of(A)}")
    if A.shape[0] == 0:
        raise ValueError(f"lora_A: the rank must be at least 1, got {shape_of(A)}")
    if B.dim() != 2 or B.shape != (N, A.shape[0]):
        raise ValueError(f"lora_B: expected [{N}, {A.shape[0]}] beside lora_A {shape_of(A)}, got {shape_of(B)}")
    check_vector("lora_bias", adapter.bias, N, x)
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or scaling.is_complex():
            raise ValueError(
                f"scaling: expected a float or a 0-d tensor, got a {scaling.dtype} tensor {shape_of(scaling)}"
            )
        if scaling.requires_grad:
            raise ValueError("scaling: a tensor that requires grad is not supported; it would get no gradient")
    elif not isinstance(scaling, (float, int)):
        raise TypeError(f"scaling: expected a float or a 0-d tensor, got {type(scaling).__name__}")
    elif not is_finite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not isinstance(p, Drawn) and (not isinstance(p, (float, int)) or not 0 <= p <= 1):
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {p!r}")


def check_dora(magnitude, weight, base_dropout, x: torch.Tensor) -> None:
    """Raise on what ``dora_linear`` takes beside a projection (:func:`check_projection`)."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen tensor, got one that requires grad")
    check_tensor("magnitude", magnitude, x)
    check_vector("magnitude", magnitude, weight.shape[0], x)
    if not isinstance(base_dropout, bool):
        raise TypeError(f"base_dropout: expected True or False, got {type(base_dropout).__name__}")


def check_svf(x, weight, factors, z, bias, mix, mode, normalize, autocast: bool) -> None:
    """Raise on arguments of ``svf_linear`` that do not fit x [...,K]; z's values are looked at on a CPU only."""
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K] with K >= 1, got {shape_of(x)}")
    try:
        U, S, Vh = factors
    except (TypeError, ValueError):
        raise TypeError(f"factors: expected SVDFactors(U, S, Vh), got {type(factors).__name__}") from None
    for name, t in (("factors.U", U), ("factors.S", S), ("factors.Vh", Vh)):
        check_tensor(name, t, x)
        if t.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one that requires grad; only z is trained")
    if U.dim() != 2 or Vh.dim() != 2 or S.dim() != 1 or not U.shape[1] == S.shape[0] == Vh.shape[0] >= 1:
        raise ValueError(
            f"factors: expected U [N,k], S [k], Vh [k,K], got {shape_of(U)}, {shape_of(S)}, {shape_of(Vh)}"
        )
    (N, k), K = U.shape, Vh.shape[1]
    if x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}] for factors.Vh {shape_of(Vh)}, got {shape_of(x)}")
    if k > min(N, K):
        raise ValueError(f"factors: k = {k} directions are more than min(N, K) = {min(N, K)}")
    if weight is not None:
        check_tensor("weight", weight, x)
        if weight.shape != (N, K):
            raise ValueError(f"weight: expected [{N}, {K}] beside these factors, got {shape_of(weight)}")
        if not autocast and weight.dtype is not x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype} (outside autocast)")
    check_vector("bias", bias, N, x)
    _check_z(z, k, mix, x)
    if mode not in ("auto", "merged", "activation", "delta"):
        raise ValueError(f"mode: expected 'auto', 'merged', 'activation' or 'delta', got {mode!r}")
    if mode == "delta" and weight is None:
        raise ValueError(
            "mode: 'delta' adds to W; with weight=None the factors stand for it ('activation' or 'merged')"
        )
    if mode == "activation" and weight is not None and k < min(N, K):
        raise ValueError(f"mode: 'activation' would lose what {k} of {min(N, K)} directions do not hold; use 'delta'")
    if mode == "merged" and mix is not None:
        raise ValueError("mode: 'merged' is one weight for all rows, which a mix has not; use 'delta' or 'activation'")
    if normalize not in (None, "nuclear"):
        raise ValueError(f"normalize: expected None or 'nuclear', got {normalize!r}")


def _check_z(z, k: int, mix, x: torch.Tensor) -> None:
    acc_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, t in (("z", z), ("mix", mix)):
        if t is not None or name == "z":
            check_tensor(name, t, x)
            if t.dtype not in (torch.float32, acc_dtype):
                raise TypeError(f"{name}: expected torch.float32 (16 bits hold six values near 0.5), got {t.dtype}")
    if mix is None:
        if z.shape != (k,):
            raise ValueError(f"z: expected [{k}] for these factors, got {shape_of(z)}; experts [E, {k}] need a mix")
    else:
        if z.dim() != 2 or z.shape[1] != k or z.shape[0] == 0:
            raise ValueError(f"z: expected experts [E, {k}] beside a mix, got {shape_of(z)}")
        lead = x.shape[: max(mix.dim() - 1, 0)]
        if not 1 <= mix.dim() <= x.dim() or mix.shape != (*lead, z.shape[0]):
            raise ValueError(
                f"mix: expected [..., {z.shape[0]}] with x's leading dimensions or the first of them, x {shape_of(x)}, got"
                f" {shape_of(mix)}"
            )
    if may_look(z):
        for name, t in (("z", z), ("mix", mix)):
            if t is not None and not bool(torch.isfinite(t.detach()).all()):
                raise ValueError(f"{name}: holds NaN or infinity")


def is_finite(value: float) -> bool:
    return -math.inf < value < math.inf  # traceable, as math.isfinite is not


def check_tensor(name: str, t, x: torch.Tensor | None = None, beside: str = "x") -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {t.dtype}")
    if x is not None and t.device != x.device:
        raise ValueError(f"{name}: expected {beside}'s device {x.device}, got {t.device}")


def check_vector(name: str, t, N: int, x: torch.Tensor) -> None:
    if t is not None:
        check_tensor(name, t, x)
        if t.shape != (N,):
            raise ValueError(f"{name}: expected [{N}], got {shape_of(t)}")


def shape_of(t: torch.Tensor) -> str:
    return str(list(t.shape))
