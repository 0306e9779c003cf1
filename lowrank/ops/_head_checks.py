"""Checks of a vocabulary head's arguments, and of logits: as validation.py's."""

import torch

from ._debug import may_look
from .validation import check_tensor, check_vector, is_finite, shape_of


def check_logits(base, expert, antiexpert, alpha) -> None:
    """Raise on arguments of ``combine_logits`` that do not fit base [..., V]; alpha's values are looked at on a CPU only."""
    check_tensor("base", base)
    if base.dim() == 0 or base.shape[-1] == 0:
        raise ValueError(f"base: expected [..., V] with V >= 1, got {shape_of(base)}")
    for name, t in (("expert", expert), ("antiexpert", antiexpert)):
        check_tensor(name, t, base, "base")
        if t.dim() != base.dim() or t.shape[:-1] != base.shape[:-1] or t.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected [..., V] with base's leading dimensions {shape_of(base)}, got {shape_of(t)}"
            )
    check_alpha(alpha)
    if isinstance(alpha, torch.Tensor):
        check_tensor("alpha", alpha, base, "base")
        rows = (*base.shape[:-1], 1)
        if alpha.dim() > len(rows) or any(have not in (1, want) for have, want in zip(alpha.shape, rows, strict=False)):
            raise ValueError(
                f"alpha: expected base's leading dimensions or the first of them, with or without a last 1, base"
                f" {shape_of(base)}, got {shape_of(alpha)}"
            )


def check_alpha(alpha) -> None:
    """Raise unless ``alpha`` is a finite number or a float tensor; a tensor's values are looked at on a CPU only."""
    if isinstance(alpha, torch.Tensor):
        check_tensor("alpha", alpha)
        if may_look(alpha) and not bool(torch.isfinite(alpha.detach()).all()):
            raise ValueError("alpha: holds NaN or infinity")
    elif isinstance(alpha, bool) or not isinstance(alpha, (float, int)):
        raise TypeError(f"alpha: expected a number or a float tensor, got {type(alpha).__name__}")
    elif not is_finite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")


def check_head(head, autocast: bool, prefix: str = "") -> None:
    """Raise on a ``Head`` (ops/head.py) whose parts do not fit its hidden [...,H]; ``prefix`` before their names."""
    hidden, weight, bias, lora, temperature, logit_scale, softcap = head
    check_tensor(f"{prefix}hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: expected [..., H] with H >= 1, got {shape_of(hidden)}")
    H, lead = hidden.shape[-1], hidden.shape[:-1]
    check_tensor(f"{prefix}weight", weight, hidden)
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: expected [V, {H}] for hidden {shape_of(hidden)}, got {shape_of(weight)}")
    if not autocast and weight.dtype is not hidden.dtype:
        raise TypeError(
            f"{prefix}weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype} (outside autocast)"
        )
    V = weight.shape[0]
    check_vector(f"{prefix}bias", bias, V, hidden)
    if lora is not None:
        _check_lora(lora, V, H, hidden, f"{prefix}lora")
    _positive(f"{prefix}softcap", 1.0 if softcap is None else softcap)
    _number(f"{prefix}logit_scale", logit_scale)
    if not isinstance(temperature, torch.Tensor):
        return _positive(f"{prefix}temperature", temperature)
    check_tensor(f"{prefix}temperature", temperature, hidden)
    if temperature.shape not in (lead, ()) or temperature.requires_grad:
        raise ValueError(
            f"{prefix}temperature: expected a number or a tensor {list(lead)} without grad, got {shape_of(temperature)}"
        )
    if may_look(temperature) and not bool((temperature > 0).all()):
        raise ValueError(f"{prefix}temperature: expected positive numbers, got {float(temperature.min())}")


def check_heads(policy, base, kind: type, autocast: bool) -> None:
    """Raise on two ``Head``s (``kind``) whose distributions cannot be compared token by token."""
    for name, head in (("policy", policy), ("base", base)):
        if not isinstance(head, kind):
            raise TypeError(f"{name}: expected a lowrank.Head, got {type(head).__name__}")
        check_head(head, autocast, f"{name}.")
    for what, expected, got in (
        ("hidden: expected policy's leading shape", policy.hidden.shape[:-1], base.hidden.shape[:-1]),
        ("weight: expected policy's vocabulary", policy.weight.shape[:1], base.weight.shape[:1]),
        ("hidden: expected policy's dtype and device", *([h.hidden.dtype, h.hidden.device] for h in (policy, base))),
    ):
        if got != expected:
            raise ValueError(f"base.{what} {list(expected)}, got {list(got)}")


def check_logprob(targets, hidden, V: int, ignore_index, chunk_bytes) -> None:
    """Raise on targets that are not one class in [0, V) or ``ignore_index`` for each row of hidden [...,H]."""
    if not isinstance(targets, torch.Tensor) or targets.dtype is not torch.int64:
        raise TypeError(f"targets: expected an int64 tensor, got {getattr(targets, 'dtype', type(targets).__name__)}")
    if targets.shape != hidden.shape[:-1] or targets.device != hidden.device:
        raise ValueError(
            f"targets: expected {list(hidden.shape[:-1])} on {hidden.device} for hidden {shape_of(hidden)}, got"
            f" {shape_of(targets)} on {targets.device}"
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


def _check_lora(lora, V: int, H: int, hidden, name: str) -> None:
    try:
        A, B, scaling = lora
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected (A, B, scaling), got {type(lora).__name__}") from None
    check_tensor(f"{name}[0]", A, hidden)
    check_tensor(f"{name}[1]", B, hidden)
    if A.dim() != 2 or A.shape[1] != H or A.shape[0] == 0:
        raise ValueError(f"{name}[0]: expected A [r, {H}], r >= 1, got {shape_of(A)}")
    if B.shape != (V, A.shape[0]):
        raise ValueError(f"{name}[1]: expected B [{V}, {A.shape[0]}] beside A {shape_of(A)}, got {shape_of(B)}")
    _number(f"{name}[2]", scaling)


def _positive(name: str, value) -> None:
    _number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
