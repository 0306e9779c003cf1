"""LoRA factors that are sharded by themselves: FSDP2's ``fully_shard(lora_A)``, the leaves that FSDP1 wraps, ZeRO-3.

Such a factor's weight is whole only inside a call of its module, and what gathers it, frees it again and reduces its
gradient are the framework's hooks around that call.  So the op runs inside the calls of all of them, one in the other, with
their own forwards out of the way: the hooks are the framework's, called by torch, on the x and the y that they are for.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn

from ..ops._boundary import autocast_dtype

_FRAMEWORKS = ("torch.distributed.fsdp.", "deepspeed.")


def is_unit(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether ``module`` is an nn.Linear in such hooks and no others, and what they cast leaves x and the result whole.

    ZeRO-3 has hooks on every module: for it, the adapter's dropout is asked about as well.
    """
    if torch.compiler.is_compiling():
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    dtype = autocast_dtype(x) or x.dtype
    linear, cast = module, None  # to what x is cast on its way in
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        at = getattr(type(module), "_orig_cls_mro_index", None)  # private, as its state is: without them, PEFT's code
        if at is None or type(module).__mro__[at] is not nn.Linear:
            return False
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        if policy is None or policy.output_dtype not in (None, dtype):
            return False
        cast = policy.param_dtype if policy.cast_forward_inputs else None
    elif fsdp is not None and type(module) is fsdp.FullyShardedDataParallel:
        linear, policy = module.module, module.mixed_precision
        if type(linear) is not nn.Linear or _hooks(linear):
            return False
        cast = policy.param_dtype if policy.cast_forward_inputs else None
    elif "ds_id" not in module.__dict__ or type(module) not in (nn.Linear, nn.Identity, nn.Dropout):
        return False
    return (
        "forward" not in linear.__dict__
        and all(getattr(hook, "__module__", "").startswith(_FRAMEWORKS) for hook in _hooks(module))
        and (cast is None or torch.promote_types(cast, dtype) is cast)
    )


def inside(units: list[nn.Module], x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``run(x)`` inside a call of every unit: their weights are whole in there, and x and the result carry their hooks."""
    if not units:
        return run(x)
    unit, rest = units[0], units[1:]
    linear = getattr(unit, "_fsdp_wrapped_module", unit)
    linear.forward = lambda gathered: inside(rest, gathered.to(x.dtype), run)
    try:
        return unit(x)
    finally:
        del linear.forward


def _hooks(module: nn.Module) -> list[Callable]:
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for table in tables for hook in table.values()]
