"""What the autograd nodes of this package share: who follows their operations beside autograd."""

import torch
from torch.autograd import forward_ad

_interpreter, _is_batched = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_legacy_batchedtensor
_is_tracing = torch._C._is_tracing

DIFFERENTIABLE = "create_graph, or a batched or dual gradient: backward in differentiable operations"


def followed() -> str | None:
    """What looks into a call beside autograd, and needs operations it knows: a reason for ``stats()``, or None."""
    if torch.compiler.is_compiling():
        return None
    if _interpreter() is not None:
        return "torch.func: vmap, grad, jvp and what is made of them"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.jit.trace or torch.onnx.export" if _is_tracing() else None


def must_follow(grads) -> bool:
    """Whether backward of these gradients (or None) is itself differentiated, or given a batch of gradients at once."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or _interpreter() is not None
        or forward_ad._current_level >= 0
        or any(grad is not None and _is_batched(grad) for grad in grads)
    )


def to_save(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of what inference mode made, which cannot be saved."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def alive(layers) -> list:
    return [layer for layer in (ref() for ref in layers) if layer is not None]
