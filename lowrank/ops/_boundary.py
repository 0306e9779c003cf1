"""What every op's call crosses on its way in: who looks at it, autocast, and rows."""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_interpreter, _is_tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing
_modes, _is_batched = torch._C._len_torch_dispatch_stack, torch._C._functorch.is_legacy_batchedtensor


def is_plain(t: torch.Tensor) -> bool:
    """Whether nobody looks at ops: then their bodies are called directly, which saves 35 us of boxing lists per call and
    backward (measured).  Tracing, meta and fake tensors, dispatch modes and torch.func see the op.
    """
    return not (_is_compiling() or type(t) not in TENSORS or t.is_meta or _modes() or _interpreter() is not None)


def plainly(x) -> bool:
    """Whether nobody but autograd looks into a call with x: no tracer, transform, dispatch mode or tensor subclass."""
    return (
        type(x) in TENSORS
        and not _is_compiling()
        and _interpreter() is None
        and forward_ad._current_level < 0
        and not _modes()
        and not _is_tracing()
        and not x.is_meta
    )


def all_plainly(dys) -> bool:
    """Whether all gradients are there, and nobody looks into what is made of them."""
    if (
        torch.is_grad_enabled()
        or _is_compiling()
        or _interpreter() is not None
        or forward_ad._current_level >= 0
        or _modes()
    ):
        return False
    for dy in dys:  # noqa: SIM110 (a generator costs host time in every backward)
        if type(dy) is not torch.Tensor or dy.is_meta or _is_batched(dy):
            return False
    return True


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast wants here, or None.  Like torch's own rule it leaves fp64 alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes are explicit below; the context is entered only where autocast would interfere."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.dtype is dtype else x.to(dtype)


def as_shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """y [M,N], which nobody else has, in the leading shape of x's ``shape``.  Like F.linear's result it is no view: callers may
    add to it in place, and FSDP2's hook on a unit's output survives that only where the output is no view.
    """
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))


def dense(dy: Tensor) -> Tensor:
    """A gradient with the strides a GEMM takes: ``y.sum().backward()`` hands over strides of 0."""
    return dy if 1 in dy.stride() and 0 not in dy.stride() else dy.contiguous()


def was_written(*tensors: Tensor) -> None:
    """Tell autograd, which sees nothing of what csrc/ and kernels write."""
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is nothing."""
    return b if a is None else a if b is None else a + b
