"""Every check of an op's arguments: ValueError or TypeError with the argument's name, what came and what was expected."""

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_projection(x, projection, autocast: bool) -> None:
    """Raise on a ``Projection`` (ops/lora.py) that does not fit x [...,K]; metadata and Python scalars only."""
    _tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K] with K >= 1, got {_shape(x)}")
    K, N = x.shape[-1], None
    if projection.weight is None and (projection.base is None or not projection.adapters):
        raise ValueError("weight: expected a tensor [N, K], or a base output with adapters to add to it; got neither")
    if projection.base is not None:
        _tensor("base", projection.base)
        N = projection.base.shape[-1]
        if projection.base.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"base: expected [..., N] with x's leading shape {_shape(x)}, got {_shape(projection.base)}"
            )
    if projection.weight is not None:
        _tensor("weight", projection.weight, x)
        if projection.weight.dim() != 2 or projection.weight.shape[1] != K:
            raise ValueError(f"weight: expected [N, {K}] for x {_shape(x)}, got {_shape(projection.weight)}")
        N = projection.weight.shape[0]
        if not autocast and projection.weight.dtype is not x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {projection.weight.dtype} (outside autocast)")
    _vector("bias", projection.bias, N, x)
    for adapter in projection.adapters:
        _check_adapter(adapter, N, K, x)


def _check_adapter(adapter, N: int, K: int, x: torch.Tensor) -> None:
    A, B, scaling, p = adapter.A, adapter.B, adapter.scaling, adapter.dropout_p
    _tensor("lora_A", A, x)
    _tensor("lora_B", B, x)
    if A.dim() != 2 or A.shape[1] != K:
        raise ValueError(f"lora_A: expected [r, {K}] for x {_shape(x)}, got {_shape(A)}")
    if A.shape[0] == 0:
        raise ValueError(f"lora_A: the rank must be at least 1, got {_shape(A)}")
    if B.dim() != 2 or B.shape != (N, A.shape[0]):
        raise ValueError(f"lora_B: expected [{N}, {A.shape[0]}] beside lora_A {_shape(A)}, got {_shape(B)}")
    _vector("lora_bias", adapter.bias, N, x)
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or scaling.is_complex():
            raise ValueError(
                f"scaling: expected a float or a 0-d tensor, got a {scaling.dtype} tensor {_shape(scaling)}"
            )
        if scaling.requires_grad:
            raise ValueError("scaling: a tensor that requires grad is not supported; it would get no gradient")
    elif not isinstance(scaling, (float, int)):
        raise TypeError(f"scaling: expected a float or a 0-d tensor, got {type(scaling).__name__}")
    elif not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not isinstance(p, (float, int)) or not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {p!r}")


def _tensor(name: str, t, x: torch.Tensor | None = None) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {t.dtype}")
    if x is not None and t.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {t.device}")


def _vector(name: str, t, N: int, x: torch.Tensor) -> None:
    if t is not None:
        _tensor(name, t, x)
        if t.shape != (N,):
            raise ValueError(f"{name}: expected [{N}], got {_shape(t)}")


def _shape(t: torch.Tensor) -> str:
    return str(list(t.shape))
