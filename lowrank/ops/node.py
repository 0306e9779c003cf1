"""What the autograd nodes of this package share: who follows their operations, and inputs written to before backward."""

import weakref
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

_interpreter, _is_batched = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.is_legacy_batchedtensor
_is_tracing = torch._C._is_tracing

AGAIN, FORWARD_MODE = "checkpointing inside torch.func", "forward-mode differentiation"
DIFFERENTIABLE = "create_graph, or a batched or dual gradient: backward in differentiable operations"
# in a LoRA layer's __dict__
NAME = "_lowrank_name"  # what patch(model) found it as
COPY = "_lowrank_copies_input"  # True: what it saves is a copy
TORCH_MASKS = "_lowrank_torch_masks"  # True: its dropout's masks are nn.Dropout's own
CHANGED = "_lowrank_input_was_changed"  # True: a backward found its input written to


def followed() -> str | None:
    """What looks into a call beside autograd, and needs operations it knows: a reason for ``stats()``, or None.

    :data:`AGAIN`: checkpointing repeats a call here that nobody followed, as a backward inside torch.func makes it do.
    :data:`FORWARD_MODE`: it follows tensors with a tangent alone (:func:`has_tangent`).
    """
    if _interpreter() is not None:
        return AGAIN if _is_repeated() else "torch.func: vmap, grad, jvp and what is made of them"
    if forward_ad._current_level >= 0:
        return FORWARD_MODE
    return "torch.jit.trace or torch.onnx.export" if _is_tracing() else None


def again(function, *args, **kwargs):
    """``function``'s result as it was where nobody followed: torch.func forbids checkpointing what it follows itself."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        return function(*args, **kwargs)


def _is_repeated() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def has_tangent(tensors) -> bool:
    """Whether one of them (or None) has one; True under torch.compile, which does not ask."""
    return torch.compiler.is_compiling() or any(
        isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


# Dynamo, which guards on the first two by itself, runs it while it traces, inside the very transforms:
# torch.compiler.assume_constant_result, which imports Dynamo.
followed._dynamo_marked_constant = True


def must_follow(grads) -> bool:
    """Whether backward of these gradients (or None) is itself differentiated, or given a batch of gradients at once."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or _interpreter() is not None or forward_ad._current_level >= 0:
        return True
    for grad in grads:  # noqa: SIM110 (a generator costs host time in every backward)
        if grad is not None and _is_batched(grad):
            return True
    return False


def to_save(x: torch.Tensor, copy: bool) -> torch.Tensor:
    """x, or a copy of it: where one is asked for, and of what inference mode made, which cannot be saved."""
    return x.clone() if copy or (not torch.compiler.is_compiling() and x.is_inference()) else x


def remember(layers, x: torch.Tensor) -> tuple:
    """For a node that saves x: the layers it was given to and what x is now.  Weak references alone."""
    # hooks (offloading) take autograd's own look at the version away, and checkpointing computes x again
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    again = hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
    return layers, weakref.ref(x), x._version, again


def recall(ctx, remembered: tuple | None) -> tuple[torch.Tensor | None, ...]:
    """``ctx.saved_tensors``, whose first is x or None.

    Raises: RuntimeError that names the layers if x was written to since; they are PEFT's from then on.
    """
    if remembered is None:
        return ctx.saved_tensors
    layers, ref, version, again = remembered
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        x = ref()
        if x is None or x._version == version or "graph a second time" in str(error):
            raise
        raise RuntimeError(hand_over(layers)) from error
    saved_x = saved[0]
    if saved_x is not None and saved_x._version != version and (again or _is_same(ref(), saved_x)):
        raise RuntimeError(hand_over(layers))
    return saved


def _is_same(x: torch.Tensor | None, saved: torch.Tensor) -> bool:
    return x is not None and x.data_ptr() == saved.data_ptr()


def alive(layers: Iterable[weakref.ref[torch.nn.Module]]) -> list[torch.nn.Module]:
    return [layer for layer in (ref() for ref in layers) if layer is not None]


def hand_over(layers) -> str:
    layers = alive(layers)
    for layer in layers:
        layer.__dict__[CHANGED] = True
    names = [layer.__dict__.get(NAME) for layer in layers]
    known = bool(names) and all(names)
    return (
        f"{', '.join(names) if known else 'a LoRA layer'}: the input was changed in place after the layer was called, and"
        " lowrank saves the input itself for backward.  From now on PEFT's own code runs there;"
        f" patch(model, copy_inputs={names if known else True}) keeps it on lowrank, at the price of a copy of that input"
        + (" (True: of every layer's)" if known else "")
    )
