"""Every check of an op's arguments: ValueError or TypeError with the argument's name, what came and what was expected."""

import math

import torch

from .dropout import Drawn
from .node import followed

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
    elif not _is_finite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
    if not isinstance(p, Drawn) and (not isinstance(p, (float, int)) or not 0 <= p <= 1):
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {p!r}")


def check_dora(magnitude, weight, base_dropout, x: torch.Tensor) -> None:
    """Raise on what ``dora_linear`` takes beside a projection (:func:`check_projection`)."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen tensor, got one that requires grad")
    _tensor("magnitude", magnitude, x)
    _vector("magnitude", magnitude, weight.shape[0], x)
    if not isinstance(base_dropout, bool):
        raise TypeError(f"base_dropout: expected True or False, got {type(base_dropout).__name__}")


def check_svf(x, weight, factors, z, bias, mix, mode, normalize, autocast: bool) -> None:
    """Raise on arguments of ``svf_linear`` that do not fit x [...,K]; z's values are looked at on a CPU only."""
    _tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., K] with K >= 1, got {_shape(x)}")
    try:
        U, S, Vh = factors
    except (TypeError, ValueError):
        raise TypeError(f"factors: expected SVDFactors(U, S, Vh), got {type(factors).__name__}") from None
    for name, t in (("factors.U", U), ("factors.S", S), ("factors.Vh", Vh)):
        _tensor(name, t, x)
        if t.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one that requires grad; only z is trained")
    if U.dim() != 2 or Vh.dim() != 2 or S.dim() != 1 or not U.shape[1] == S.shape[0] == Vh.shape[0] >= 1:
        raise ValueError(f"factors: expected U [N,k], S [k], Vh [k,K], got {_shape(U)}, {_shape(S)}, {_shape(Vh)}")
    (N, k), K = U.shape, Vh.shape[1]
    if x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}] for factors.Vh {_shape(Vh)}, got {_shape(x)}")
    if k > min(N, K):
        raise ValueError(f"factors: k = {k} directions are more than min(N, K) = {min(N, K)}")
    if weight is not None:
        _tensor("weight", weight, x)
        if weight.shape != (N, K):
            raise ValueError(f"weight: expected [{N}, {K}] beside these factors, got {_shape(weight)}")
        if not autocast and weight.dtype is not x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype} (outside autocast)")
    _vector("bias", bias, N, x)
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
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, t in (("z", z), ("mix", mix)):
        if t is not None or name == "z":
            _tensor(name, t, x)
            if t.dtype not in (torch.float32, wide):
                raise TypeError(f"{name}: expected torch.float32 (16 bits hold six values near 0.5), got {t.dtype}")
    if mix is None:
        if z.shape != (k,):
            raise ValueError(f"z: expected [{k}] for these factors, got {_shape(z)}; experts [E, {k}] need a mix")
    else:
        if z.dim() != 2 or z.shape[1] != k or z.shape[0] == 0:
            raise ValueError(f"z: expected experts [E, {k}] beside a mix, got {_shape(z)}")
        lead = x.shape[: max(mix.dim() - 1, 0)]
        if not 1 <= mix.dim() <= x.dim() or mix.shape != (*lead, z.shape[0]):
            raise ValueError(
                f"mix: expected [..., {z.shape[0]}] with x's leading dimensions or the first of them, x {_shape(x)}, got"
                f" {_shape(mix)}"
            )
    if may_look(z):
        for name, t in (("z", z), ("mix", mix)):
            if t is not None and not bool(torch.isfinite(t.detach()).all()):
                raise ValueError(f"{name}: holds NaN or infinity")


def check_logits(base, expert, antiexpert, alpha) -> None:
    """Raise on arguments of ``combine_logits`` that do not fit base [..., V]; alpha's values are looked at on a CPU only."""
    _tensor("base", base)
    if base.dim() == 0 or base.shape[-1] == 0:
        raise ValueError(f"base: expected [..., V] with V >= 1, got {_shape(base)}")
    for name, t in (("expert", expert), ("antiexpert", antiexpert)):
        _tensor(name, t, base, "base")
        if t.dim() != base.dim() or t.shape[:-1] != base.shape[:-1] or t.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected [..., V] with base's leading dimensions {_shape(base)}, got {_shape(t)}"
            )
    check_alpha(alpha)
    if isinstance(alpha, torch.Tensor):
        _tensor("alpha", alpha, base, "base")
        rows = (*base.shape[:-1], 1)
        if alpha.dim() > len(rows) or any(have not in (1, want) for have, want in zip(alpha.shape, rows, strict=False)):
            raise ValueError(
                f"alpha: expected base's leading dimensions or the first of them, with or without a last 1, base"
                f" {_shape(base)}, got {_shape(alpha)}"
            )


def check_alpha(alpha) -> None:
    """Raise unless ``alpha`` is a finite number or a float tensor; a tensor's values are looked at on a CPU only."""
    if isinstance(alpha, torch.Tensor):
        _tensor("alpha", alpha)
        if may_look(alpha) and not bool(torch.isfinite(alpha.detach()).all()):
            raise ValueError("alpha: holds NaN or infinity")
    elif isinstance(alpha, bool) or not isinstance(alpha, (float, int)):
        raise TypeError(f"alpha: expected a number or a float tensor, got {type(alpha).__name__}")
    elif not _is_finite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")


def check_head(head, autocast: bool, prefix: str = "") -> None:
    """Raise on a ``Head`` (ops/head.py) whose parts do not fit its hidden [...,H]; ``prefix`` before their names."""
    hidden, weight, bias, lora, temperature, logit_scale, softcap = head
    _tensor(f"{prefix}hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: expected [..., H] with H >= 1, got {_shape(hidden)}")
    H, lead = hidden.shape[-1], hidden.shape[:-1]
    _tensor(f"{prefix}weight", weight, hidden)
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: expected [V, {H}] for hidden {_shape(hidden)}, got {_shape(weight)}")
    if not autocast and weight.dtype is not hidden.dtype:
        raise TypeError(
            f"{prefix}weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype} (outside autocast)"
        )
    V = weight.shape[0]
    _vector(f"{prefix}bias", bias, V, hidden)
    if lora is not None:
        _check_lora(lora, V, H, hidden, f"{prefix}lora")
    _positive(f"{prefix}softcap", 1.0 if softcap is None else softcap)
    _number(f"{prefix}logit_scale", logit_scale)
    if not isinstance(temperature, torch.Tensor):
        return _positive(f"{prefix}temperature", temperature)
    _tensor(f"{prefix}temperature", temperature, hidden)
    if temperature.shape not in (lead, ()) or temperature.requires_grad:
        raise ValueError(
            f"{prefix}temperature: expected a number or a tensor {list(lead)} without grad, got {_shape(temperature)}"
        )
    if may_look(temperature) and not bool((temperature > 0).all()):
        raise ValueError(f"{prefix}temperature: expected positive numbers, got {float(temperature.min())}")


def check_heads(policy, base, kind: type, autocast: bool) -> None:
    """Raise on two ``Head``s (``kind``) whose distributions cannot be compared token by token."""
    for name, head in (("policy", policy), ("base", base)):
        if not isinstance(head, kind):
            raise TypeError(f"{name}: expected a lowrank.Head, got {type(head).__name__}")
        check_head(head, autocast, f"{name}.")
    for what, mine, other in (
        ("hidden: expected policy's leading shape", policy.hidden.shape[:-1], base.hidden.shape[:-1]),
        ("weight: expected policy's vocabulary", policy.weight.shape[:1], base.weight.shape[:1]),
        ("hidden: expected policy's dtype and device", *([h.hidden.dtype, h.hidden.device] for h in (policy, base))),
    ):
        if mine != other:
            raise ValueError(f"base.{what} {list(mine)}, got {list(other)}")


def _check_lora(lora, V: int, H: int, hidden, name: str) -> None:
    try:
        A, B, scaling = lora
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected (A, B, scaling), got {type(lora).__name__}") from None
    _tensor(f"{name}[0]", A, hidden)
    _tensor(f"{name}[1]", B, hidden)
    if A.dim() != 2 or A.shape[1] != H or A.shape[0] == 0:
        raise ValueError(f"{name}[0]: expected A [r, {H}], r >= 1, got {_shape(A)}")
    if B.shape != (V, A.shape[0]):
        raise ValueError(f"{name}[1]: expected B [{V}, {A.shape[0]}] beside A {_shape(A)}, got {_shape(B)}")
    _number(f"{name}[2]", scaling)


def check_logprob(targets, hidden, V: int, ignore_index, chunk_bytes) -> None:
    """Raise on targets that are not one class in [0, V) or ``ignore_index`` for each row of hidden [...,H]."""
    if not isinstance(targets, torch.Tensor) or targets.dtype is not torch.int64:
        raise TypeError(f"targets: expected an int64 tensor, got {getattr(targets, 'dtype', type(targets).__name__)}")
    if targets.shape != hidden.shape[:-1] or targets.device != hidden.device:
        raise ValueError(
            f"targets: expected {list(hidden.shape[:-1])} on {hidden.device} for hidden {_shape(hidden)}, got"
            f" {_shape(targets)} on {targets.device}"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    check_chunk_bytes(chunk_bytes)
    if targets.numel() and may_look(targets):
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"targets: expected 0 <= target < {V} or {ignore_index}, got {int(targets[tuple(at)])} at {at}"
            )


def check_chunk_bytes(chunk_bytes) -> None:
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a positive integer, got {chunk_bytes!r}")


class debug_checks:
    """Check values on a GPU too, which waits for the device at every call: targets, temperatures, z.

    A switch, and a context manager that puts it back, like :class:`lowrank.strict`.
    """

    enabled = False

    def __init__(self, enabled: bool = True):
        self.before, debug_checks.enabled = debug_checks.enabled, enabled

    def __enter__(self) -> "debug_checks":
        return self

    def __exit__(self, *exc) -> None:
        debug_checks.enabled = self.before


def may_look(t: torch.Tensor) -> bool:
    """Whether a check may read the values of ``t``: on a CPU, or under :class:`debug_checks`; never while traced or batched."""
    if torch.compiler.is_compiling() or followed() is not None or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return t.device.type == "cpu" or (debug_checks.enabled and not t.is_meta)


def _positive(name: str, value) -> None:
    _number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not _is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _is_finite(value: float) -> bool:
    return -math.inf < value < math.inf  # traceable, as math.isfinite is not


def _tensor(name: str, t, x: torch.Tensor | None = None, beside: str = "x") -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {t.dtype}")
    if x is not None and t.device != x.device:
        raise ValueError(f"{name}: expected {beside}'s device {x.device}, got {t.device}")


def _vector(name: str, t, N: int, x: torch.Tensor) -> None:
    if t is not None:
        _tensor(name, t, x)
        if t.shape != (N,):
            raise ValueError(f"{name}: expected [{N}], got {_shape(t)}")


def _shape(t: torch.Tensor) -> str:
    return str(list(t.shape))
