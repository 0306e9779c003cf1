"""A PEFT LoRA layer's forward on lowrank's op, with PEFT's own code where the op does not cover the call.

Written against the attributes of PEFT's layers alone: nothing here imports PEFT, so the same code serves
peft.py beside it, which puts it on PEFT's classes, and a package of kernels that may import torch and nothing else.
"""

import sys
import threading
from collections.abc import Callable

import torch
from torch import nn

from .. import _stats
from ..ops import dora as dora_op
from ..ops import dropout
from ..ops._boundary import TENSORS, plainly
from ..ops.linear import Adapter, Projection
from ..ops.lora import lora_projections, projected
from ..ops.node import AGAIN, CHANGED, COPY, FORWARD_MODE, TORCH_MASKS, again, followed, has_tangent
from ..ops.validation import DTYPES
from . import peft_sharding, peft_traced

# in a layer's __dict__
GROUP = "_lowrank_siblings"  # the Siblings it belongs to
BASE_DROPOUT = "_lowrank_dora_base_dropout"  # dora_linear's base_dropout


class _Thread(threading.local):
    group = None  # a weak reference to the Siblings whose results wait in this thread, or None


thread = _Thread()


def fused(original: Callable, dora_base_dropout: bool = True) -> Callable:
    """A forward for a PEFT layer class: ours, and ``original`` where the op does not cover the call."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():  # a program of PyTorch's own ops, which runs where no lowrank is
                return original(self, x, *args, **kwargs)
            if not args and not kwargs and (y := peft_traced.forward(self, x)) is not None:
                return y
        elif not args and not kwargs and plainly(x):
            waiting = _waiting(self)
            projection = _plain(self, x)
            if projection is not None:
                return _run_plain(self, x, projection, waiting)
            return general(self, x, args, kwargs, waiting, None)
        followers = followed()
        if followers is AGAIN:
            return again(forward, self, x, *args, **kwargs)
        if followers is FORWARD_MODE and not has_tangent((x, *self.parameters())):
            followers = None
        waiting = None if torch.compiler.is_compiling() else _waiting(self)
        return general(self, x, args, kwargs, waiting, followers)

    def general(self, x, args, kwargs, waiting, followers):
        compiling, dora = torch.compiler.is_compiling(), _dora(self)
        adapters, reason = adapters_of(self, x, args, kwargs, dora)
        if adapters:
            reason = followers or (WRITTEN if self.__dict__.get(CHANGED) else reason)
        if reason is SHARDED and dora is None:
            _stats.ran_fused(self)
            return _inside_units(self, x, adapters)
        if reason is None and adapters and dora is not None:
            reason = _why_no_dora(self, dora, adapters[0], x)
        if reason is not None:
            _stats.fell_back(self, reason)
        if adapters is None or reason is not None:
            return original(self, x, *args, **kwargs)
        if dora is not None:
            _stats.ran_fused(self)
            return _run_dora(self, dora, adapters[0], x, self.__dict__.get(BASE_DROPOUT, dora_base_dropout))
        base = self.base_layer
        if not _is_plain_linear(base, x):
            _stats.ran_fused(self)
            y = _call(base, x)
            return lora_projections(x, (_projected(self, None, None, _drawn(self, adapters, x), y),))[0]
        alone = compiling or _draws_as_torch(self, adapters)  # compiling: its counts would be guards
        projection = _projected(self, base.weight, base.bias, _drawn(self, adapters, x))
        group = None if alone else self.__dict__.get(GROUP)
        y = None if group is None else group.call(self, x, projection, _projection, waiting)
        _stats.ran_fused(self, shared=waiting is not None and y is not None)
        return lora_projections(x, (projection,))[0] if y is None else y

    forward._is_lowrank = True
    return forward


class PeftLoraLinear(nn.Module):
    """The forward alone, for Hugging Face's ``kernels`` to put on PEFT's ``lora.Linear`` layers, whose state it reads.

    Where the op does not cover a call, the layer's own class answers: its forward is never replaced, only the instance's.
    """

    has_backward = True
    can_torch_compile = True
    forward = fused(lambda layer, *args, **kwargs: type(layer).forward(layer, *args, **kwargs))


def _waiting(layer):
    """What a sibling made for this call, whichever way it goes: what another layer's failed forward left goes here."""
    group = None if thread.group is None else thread.group()
    return None if group is None else group.take(layer)


def _run_plain(layer, x, projection: Projection, waiting) -> torch.Tensor:
    """The layer's result, where :func:`_plain` answered."""
    group = layer.__dict__.get(GROUP)
    if projection.weight is None:
        projection = projection._replace(base=_call(layer.base_layer, x))
    elif group is not None:
        y = group.call(layer, x, projection, _projection, waiting)
        if y is not None:
            _stats.ran_fused(layer, shared=waiting is not None)
            return y
    _stats.ran_fused(layer)
    return projected(x, (projection,))[0]


def _plain(layer, x) -> Projection | None:
    """What the layer computes of x alone, where one LoRA is active and nothing is attached to any module, else None.

    A projection without a weight is to get the base layer's own output.  Read from the modules' dicts, because nn.Module's
    __getattr__ is what costs; nothing about a module is remembered between calls, during which all of it may change.
    """
    state, device, dtype = layer.__dict__, x.device, x.dtype
    if _has_any_global_hook() or dtype not in _FLOATS or x.is_meta:
        return None
    try:
        if state["_disable_adapters"] or state["merged_adapters"] or CHANGED in state:
            return None
        modules, name = state["_modules"], state["_active_adapter"]
        if type(name) is not str:
            if len(name) != 1:
                return None
            name = name[0]
        if name in state["lora_variant"]:
            return None
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        drop, scaling = modules["lora_dropout"]._modules[name], state["scaling"][name]
        if not type(A) is type(B) is nn.Linear or type(drop) not in _DROPOUTS:
            return None
        for module in (A, B, drop):
            hooks = module.__dict__
            if (
                hooks["_forward_hooks"]
                or hooks["_forward_pre_hooks"]
                or hooks["_backward_hooks"]
                or hooks["_backward_pre_hooks"]
                or "forward" in hooks
            ):
                return None
        hooks = drop.__dict__
        p = hooks["p"] if type(drop) is nn.Dropout and hooks["training"] else 0.0
        if p and state.get(TORCH_MASKS, False):
            return None
        A, B, lora_bias = A._parameters["weight"], B._parameters["weight"], B._parameters["bias"]
        if (
            type(A) not in TENSORS
            or type(B) not in TENSORS
            or A.device != device
            or B.device != device
            or A.dtype not in _FLOATS
            or B.dtype not in _FLOATS
            or (lora_bias is not None and type(lora_bias) not in TENSORS)
            or type(scaling) not in _NUMBERS
        ):
            return None
        autocast = torch.is_autocast_enabled("cpu" if x.is_cpu else device.type)
        if dtype is not A.dtype and not autocast and not state.get("cast_input_dtype_enabled", True):
            return None
        base, weight, bias = modules["base_layer"], None, None
        hooks = base.__dict__
        if type(base) is nn.Linear and not (
            hooks["_forward_hooks"]
            or hooks["_forward_pre_hooks"]
            or hooks["_backward_hooks"]
            or hooks["_backward_pre_hooks"]
            or "forward" in hooks
        ):
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            if (
                type(weight) not in TENSORS
                or weight.device != device
                or (weight.dtype is not dtype and (not autocast or weight.dtype not in _FLOATS))
                or (
                    bias is not None
                    and (type(bias) not in TENSORS or bias.device != device or bias.dtype not in _FLOATS)
                )
            ):
                return None
    except KeyError:  # weights and names that are elsewhere: sharded, deleted, another PEFT's
        return None
    return Projection(weight, bias, (Adapter(A, B, scaling, lora_bias, p),), None, layer, state.get(COPY, False))


def _inside_units(layer, x, adapters) -> torch.Tensor:
    """The layer's result, computed inside the calls of its sharded factors: their weights are whole there alone."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    factors = [(layer.lora_A[name], layer.lora_B[name]) for name in names]

    def run(x):
        whole = []
        for adapter, (A, B) in zip(adapters, factors, strict=True):
            for what, weight in (("lora_A", A.weight), ("lora_B", B.weight)):
                if not _is_plain(weight, x.device) or not _is_whole(weight):
                    raise RuntimeError(
                        f"{what}: expected a whole weight on {x.device} inside the call of its sharded module, "
                        f"got a {type(weight).__name__} {list(weight.shape)} on {weight.device}"
                    )
            whole.append(adapter._replace(A=A.weight, B=B.weight, bias=B.bias))
        base = layer.base_layer
        if _is_plain_linear(base, x) and _is_whole(base.weight):
            projection = _projected(layer, base.weight, base.bias, _drawn(layer, whole, x))
        else:
            y = _call(base, x)
            projection = _projected(layer, None, None, _drawn(layer, whole, x), y)
        return lora_projections(x, (projection,))[0]

    units = [module for pair in factors for module in pair if peft_sharding.is_unit(module, x)]
    return peft_sharding.inside(list(dict.fromkeys(units)), x, run)


def _projection(layer, x) -> Projection | None:
    """What a sibling's call with x alone would compute, if the op covers all of it."""
    base = layer.base_layer
    if type(base) is nn.Linear and not _is_whole(base.weight):
        layer.__dict__.pop(GROUP, None)  # a unit of its own: alone from now on, or a recomputation could differ
    if GROUP not in layer.__dict__:
        return None
    projection = _plain(layer, x)
    if projection is not None:
        return None if projection.weight is None else projection
    if not _is_plain_linear(base, x):
        return None
    adapters, reason = adapters_of(layer, x, (), {})
    if not adapters or reason is not None or layer.__dict__.get(CHANGED) or _draws_as_torch(layer, adapters):
        return None
    return _projected(layer, base.weight, base.bias, adapters)


def _projected(layer, weight, bias, adapters, base=None) -> Projection:
    known = None if torch.compiler.is_compiling() else layer  # which layer it is would be a guard
    return Projection(weight, bias, adapters, base, known, layer.__dict__.get(COPY, False))


def _draws_as_torch(layer, adapters) -> bool:
    """Whether there is dropout, whose masks are to be nn.Dropout's own."""
    return layer.__dict__.get(TORCH_MASKS, False) and any(adapter.dropout_p for adapter in adapters)


def _drawn(layer, adapters, x) -> tuple[Adapter, ...]:
    """The adapters; if torch is to draw their masks, with them: one after the other, of x as PEFT casts it for each."""
    adapters = tuple(adapters)
    if not _draws_as_torch(layer, adapters):
        return adapters
    casts = getattr(layer, "cast_input_dtype_enabled", True)
    if type(layer).__name__ in _QUANTISED and torch.is_autocast_enabled():
        casts = False
    drawn = []
    for adapter in adapters:
        A, p = adapter.A, adapter.dropout_p
        x = x.to(A.dtype) if casts else x
        fits = x.shape[-1:] == A.shape[-1:]  # else the op is to say what does not
        drawn.append(adapter._replace(dropout_p=dropout.as_torch(x, p)) if p and fits else adapter)
    return tuple(drawn)


def _dora(layer) -> str | None:
    """The name of the one active adapter if it is a DoRA."""
    if not layer.lora_variant:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    variant = layer.lora_variant.get(names[0]) if len(names) == 1 else None
    return names[0] if type(variant).__name__ == "DoraLinearVariant" else None


def _why_no_dora(layer, name: str, adapter: Adapter, x: torch.Tensor) -> str | None:
    base, vector = layer.base_layer, layer.lora_magnitude_vector[name]
    if not _is_plain_linear(base, x) or not _is_whole(base.weight):
        return f"DoRA over {type(base).__name__}: the norm needs a plain nn.Linear's weight"
    if base.weight.requires_grad:
        return "DoRA over a weight that is trained"
    if adapter.bias is not None:
        return "DoRA with lora_bias"
    if _has_hooks(vector):
        return "hooks on lora_magnitude_vector"
    if not _is_plain(vector.weight, x.device):
        return f"lora_magnitude_vector's weight is a {type(vector.weight).__name__} on {vector.weight.device.type}"
    return None


def _run_dora(layer, name: str, adapter: Adapter, x: torch.Tensor, base_dropout: bool) -> torch.Tensor:
    base, vector = layer.base_layer, layer.lora_magnitude_vector[name]
    if not layer.training:  # PEFT asks the layer here, not its dropout
        adapter = adapter._replace(dropout_p=0.0)
    ((A, B, scaling, _, p),) = _drawn(layer, (adapter,), x)
    cache, key = _norms_of(vector), f"weight-norm-{name}"
    known = None if torch.compiler.is_compiling() else layer
    return dora_op.of_layer(
        known,
        x,
        base.weight,
        A,
        B,
        vector.weight,
        scaling,
        base.bias,
        dropout_p=p,
        base_dropout=base_dropout,
        cache=cache,
        key=key,
        copy=layer.__dict__.get(COPY, False),
    )


def _norms_of(vector) -> dict | None:
    """PEFT's cache while ``peft.helpers.DoraCaching`` is on and the layer in evaluation; else it is emptied, as PEFT does."""
    cache = vector.__dict__.get("_dora_cache")
    if cache is None or torch.compiler.is_compiling():
        return None
    peft = sys.modules.get(type(vector).__module__)  # looked up, not imported
    if getattr(peft, "ENABLE_DORA_CACHING", False) and not vector.training:
        return cache
    cache.clear()
    return None


def adapters_of(layer, x, args, kwargs, dora: str | None = None) -> tuple[tuple[Adapter, ...] | None, str | None]:
    """(the active adapters, None) if the op covers this call, (None, why not) if it does not.

    (None, None): nothing but the base layer is to run, and PEFT's forward does just that.  (the active adapters, SHARDED):
    the op covers the call, but only inside the calls of modules whose weights are elsewhere now (peft_sharding.py).
    ``dora``: an adapter that may be a variant.
    """
    if kwargs.get("adapter_names") is not None:
        return None, "adapter_names: several adapters chosen per row of the batch"
    if layer.disable_adapters or layer.merged:
        return None, None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None, None
    if args or any(value is not None for value in kwargs.values()):
        return None, "arguments beside x"
    if _has_any_global_hook():
        return None, "global module hooks"
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        return None, f"x of {getattr(x, 'dtype', type(x).__name__)}"
    adapters, units = [], set()
    for name in names:
        if name in layer.lora_variant and name != dora:
            return None, f"the LoRA variant {type(layer.lora_variant[name]).__name__}"
        A, B, drop, scaling = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
        for what, module, cls in (
            ("lora_A", A, (nn.Linear,)),
            ("lora_B", B, (nn.Linear,)),
            ("lora_dropout", drop, _DROPOUTS),
        ):
            if type(module) in cls and not _has_hooks(module):
                continue
            if not peft_sharding.is_unit(module, x):
                return None, f"hooks on {what}" if type(module) in cls else f"{what} is a {type(module).__name__}"
            if module is not drop:
                units.add(module)
        for what, module in (("lora_A", A), ("lora_B", B)):
            if module not in units and not _is_plain(weight := module.weight, x.device):
                _refuse_meta(what, weight, x)
                return None, f"{what}'s weight is a {type(weight).__name__} of {weight.dtype} on {weight.device.type}"
        if not isinstance(scaling, (float, int)) and not (isinstance(scaling, torch.Tensor) and scaling.dim() == 0):
            return None, f"scaling is a {type(scaling).__name__}"
        casting = getattr(layer, "cast_input_dtype_enabled", True) or torch.is_autocast_enabled(x.device.type)
        if not casting and x.dtype is not A.weight.dtype:
            return None, "cast_input_dtype_enabled=False with adapters of another dtype"
        p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        if units:  # not to be read yet: ZeRO-3 would gather them here
            adapters.append(Adapter(None, None, scaling, None, p))
        else:
            adapters.append(Adapter(A.weight, B.weight, scaling, B.bias, p))
    return tuple(adapters), SHARDED if units else None


_DROPOUTS = (nn.Identity, nn.Dropout)
_QUANTISED = ("Linear4bit", "Linear8bitLt")  # PEFT's layers that leave the cast to autocast
_FLOATS, _NUMBERS = frozenset(DTYPES), frozenset((float, int))
_has_any_global_hook = torch.nn.modules.module._has_any_global_hook
WRITTEN = "the input is changed in place after the call: copy_inputs would save a copy of it"
SHARDED = "lora_A or lora_B is sharded by itself: shard the LoRA layer or the decoder layer"


def _is_plain_linear(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether calling ``base`` is no more than F.linear, so that the op may do it."""
    return (
        type(base) is nn.Linear
        and not _has_hooks(base)
        and _is_plain(base.weight, x.device)
        and (base.bias is None or _is_plain(base.bias, x.device))
        and (base.weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type))
    )


def _call(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _has_hooks(base):
        _refuse_meta("base_layer", getattr(base, "weight", None), x)
    return base(x)


def _refuse_meta(what: str, weight, x: torch.Tensor) -> None:
    # On a CPU torch's own linear takes the weight's bytes from nowhere and answers with numbers (2.13).
    if isinstance(weight, torch.Tensor) and weight.is_meta and not x.is_meta:
        raise ValueError(
            f"{what}: expected a weight on x's device {x.device}, got one on meta: it was never loaded here"
        )


def _is_plain(weight: torch.Tensor, device: torch.device) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.device == device and weight.dtype in DTYPES


def _is_whole(weight: torch.Tensor) -> bool:
    """Not a shard: FSDP2's is a DTensor, FSDP1's 1-D or a matrix without memory, ZeRO-3's empty."""
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.dim() == 2 and weight.untyped_storage().size() > 0


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # accelerate's offloading replaces it
    )
