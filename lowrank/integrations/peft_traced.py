"""What a compiler traces of a PEFT LoRA layer's plain call: the checks that it guards on, and one op.

Dynamo pays for every instruction, for every function that it inlines, and for every entry of a ``__dict__`` that is read.
So one function says here, of one adapter on ``nn.Linear``s, what peft_layer.py says in many of any call; the rest is for it.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .._stats import _FUSED, _traced
from .._version import __version__
from ..ops.lora import traced_linear
from ..ops.node import CHANGED, COPY, TORCH_MASKS, followed
from ..ops.validation import DTYPES

# an attribute of a module is one more thing to trace
_Linear, _Dropout, _Parameter = nn.Linear, nn.Dropout, nn.Parameter
_DROPOUTS = (nn.Identity, nn.Dropout)


def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """``layer(x)`` as one op, or None where its adapters, hooks, dtypes or classes are not the plain ones."""
    name, base = layer.active_adapter, layer.base_layer
    if not isinstance(name, str):
        if len(name) != 1:
            return None
        name = name[0]
    A = layer.lora_A._modules.get(name)
    if A is None or layer.lora_variant or layer.disable_adapters or layer.merged_adapters:
        return None
    if followed() or _has_any_global_hook() or getattr(layer, CHANGED, False):
        return None
    B, drop, scaling = layer.lora_B._modules[name], layer.lora_dropout._modules[name], layer.scaling[name]
    if not (type(A) is type(B) is type(base) is _Linear and type(drop) in _DROPOUTS):
        return None
    for module in (base, A, B, drop):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return None
    W, bias, A, B, lora_bias = base.weight, base.bias, A.weight, B.weight, B.bias
    if not (type(W) is type(A) is type(B) is _Parameter and (bias is None or type(bias) is _Parameter)):
        return None
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        return None
    if not (x.dtype is W.dtype is A.dtype is B.dtype):  # PEFT or autocast casts
        if W.dtype not in DTYPES or A.dtype not in DTYPES or B.dtype not in DTYPES:
            return None
        if not torch.is_autocast_enabled(x.device.type) and not (
            x.dtype is W.dtype and (x.dtype is A.dtype or getattr(layer, "cast_input_dtype_enabled", True))
        ):
            return None
    scaling_tensor = None
    if not isinstance(scaling, (float, int)):
        if not isinstance(scaling, torch.Tensor) or scaling.dim() != 0:
            return None
        scaling_tensor, scaling = scaling, 1.0
    p = drop.p if type(drop) is _Dropout and drop.training else 0.0
    if p and getattr(layer, TORCH_MASKS, False):
        return None
    _traced(_FUSED)
    copy = getattr(layer, COPY, False)
    return traced_linear(x, W, bias, A, B, lora_bias, scaling, scaling_tensor, p, copy, __version__)
