"""PEFT's LoRA over expert parameters (``target_parameters``) on lowrank's experts function.

PEFT wraps one parameter a layer, one wrapper in the other, and every one forms W + BA of all experts.  The outermost wrapper
collects the chain here and calls the experts function itself, with PEFT's own factors: A expert-slowest, B expert-fastest.
Nothing is stashed on a module, and ``config._experts_implementation`` is not touched.
"""

from collections.abc import Callable

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .. import _stats
from ..nn import _experts as experts
from ..ops._boundary import TENSORS
from ..ops.linear import Adapter
from ..ops.node import CHANGED, COPY
from ..ops.validation import DTYPES, is_finite

WRITTEN = "its input was changed in place after a call"


def fused(original: Callable) -> Callable:
    """A forward for PEFT's layer over a parameter: ours, and ``original`` where lowrank does not cover the call."""

    def forward(self, x, *args, **kwargs):
        chain = [self]
        while isinstance(chain[-1].base_layer, ParamWrapper):
            chain.append(chain[-1].base_layer)
        base = chain[-1].base_layer
        if any(wrapper.disable_adapters for wrapper in chain) or torch.compiler.is_exporting():
            return original(self, x, *args, **kwargs)
        factors, reason = _factors(chain, base, x, args, kwargs)
        if factors is None:  # merged, or none of its adapters is active
            return original(self, x, *args, **kwargs)
        if reason is not None:
            _stats.fell_back(self, reason)
            return original(self, x, *args, **kwargs)
        known = () if torch.compiler.is_compiling() else (self,)  # which layer it is would be a guard
        for wrapper in chain:  # before it runs: a checkpoint's recomputation ends inside
            _stats.ran_fused(wrapper)
        return experts.experts_forward(
            base, x, *args, factors=factors, layers=known, copy=self.__dict__.get(COPY, False)
        )

    forward._is_lowrank = True
    return forward


def _factors(chain, base: nn.Module, x, args, kwargs) -> tuple[dict[str, tuple[Adapter, ...]] | None, str | None]:
    """(adapters by parameter, why PEFT is to answer instead); (None, None) where none is to be added."""
    factors: dict[str, tuple[Adapter, ...]] = {}
    for wrapper in chain:
        names = [] if wrapper.merged else [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if names:
            factors[wrapper.parameter_name] = tuple(_adapter(wrapper, name) for name in names)
    if not factors:
        return None, None
    return factors, _why_not(chain, base, x, args, kwargs, factors)


def _adapter(wrapper, name: str) -> Adapter:
    """A [E,r,in] and B [E,out,r], views of PEFT's parameters [E r, in] and [out, r E]."""
    A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    if A.dim() == 2 and B.dim() == 2 and E and A.shape[0] % E == 0 and B.shape[1] % E == 0:
        A, B = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
    return Adapter(A, B, wrapper.scaling[name])


def _why_not(chain, base: nn.Module, x, args, kwargs, factors) -> str | None:
    reason = experts.seam(type(base))
    if reason is not None:
        return reason
    if kwargs or len(args) != 2 or not all(isinstance(t, torch.Tensor) for t in (x, *args)):
        return "experts called with other arguments than hidden states, indices and weights"
    if chain[0].__dict__.get(CHANGED):
        return WRITTEN
    if getattr(chain[-1], "_param_ndim", 3) != 3 or not factors.keys() <= set(experts.PARAMETERS):
        return f"LoRA on {', '.join(sorted(factors))} of {type(base).__name__}"
    reason = experts.why_not(base, x)
    if reason is not None:
        return reason
    if x.dim() != 2 or args[0].dim() != 2 or args[0].shape != args[1].shape:
        return f"hidden states {list(x.shape)} and indices {list(args[0].shape)}"
    if args[0].dtype not in (torch.int32, torch.int64) or not args[1].dtype.is_floating_point:
        return f"indices of {args[0].dtype} and weights of {args[1].dtype}"
    scalings = [adapter.scaling for adapters in factors.values() for adapter in adapters]
    if not all(isinstance(scaling, (float, int)) and is_finite(scaling) for scaling in scalings):
        return "a scaling that is no finite number"
    if any(experts.has_hooks(wrapper) for wrapper in chain[1:]):
        return "hooks on a layer inside"
    for wrapper in chain:
        if wrapper.lora_variant:
            return "a variant of LoRA on expert parameters"
        for name in wrapper.active_adapters:
            if name not in wrapper.lora_A:
                continue
            for module in (wrapper.lora_A[name], wrapper.lora_B[name]):
                weight = module.weight
                if type(module) is not nn.Linear or module.bias is not None or experts.has_hooks(module):
                    return f"{type(module).__name__} with hooks or a bias for a factor"
                if type(weight) not in TENSORS or weight.dtype not in DTYPES or weight.device != x.device:
                    return f"factors that are {type(weight).__name__} of {weight.dtype} on {weight.device.type}"
    return None
