"""PEFT's LoRA layers on lowrank's op: ``patch()`` for the process, ``patch(model)`` for one model.

Only ``forward`` is replaced, on the layers' own classes or on subclasses of them; modules, parameters, state dicts,
merging, saving and every method of PEFT stay PEFT's.  A call that the op does not cover (DoRA and other variants,
``adapter_names`` batches, hooks on lora_A, ...) goes to PEFT's own forward, is counted in ``lowrank.stats()`` and warns
once per reason.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from .. import _stats
from ..ops.lora import Adapter, Projection, lora_projections
from ..ops.validation import DTYPES
from . import siblings as _siblings

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import dispatch_default
except ImportError as error:
    raise ImportError("this needs PEFT: pip install 'lowrank-kernels[peft]'") from error


def patch(model: nn.Module | None = None, *, siblings: bool = True, shared_mask: bool = False) -> nn.Module | None:
    """Run PEFT's LoRA layers on lowrank: those of ``model``, or every one of the process, made before or after.

    For one model, call it after the adapters are injected and before ``fully_shard``, ``torch.compile`` or DDP; layers
    that a later ``add_adapter`` creates need another call.  Calling it twice is harmless.  Returns ``model``.

    Args:
        siblings: for one model, let q/k/v and gate/up share their passes over x (integrations/siblings.py).
        shared_mask: let siblings share one dropout mask too: a bit per element kept instead of one each.

    Raises: TypeError if ``model`` is no module; ValueError if it holds no LoRA layer that lowrank covers.
    """
    if model is None:
        for cls in _covered():
            if cls not in _originals:
                _originals[cls] = cls.forward
                cls.forward = _fused(cls.forward)
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not swap_layers(model, siblings=siblings, shared_mask=shared_mask):
        raise ValueError("model: found no LoRA layer to patch; call this after get_peft_model")
    return model


def swap_layers(model: nn.Module, *, siblings: bool = True, shared_mask: bool = False) -> int:
    """:func:`patch` for one model, where having nothing to patch is no mistake.  Returns how many layers are patched."""
    twins = {cls: _twin(cls) for cls in _covered()}
    layers = [m for m in model.modules() if type(m) in twins or type(m) in twins.values()]
    for layer in layers:
        layer.__class__ = twins.get(type(layer), type(layer))
        layer.__dict__.pop(_GROUP, None)
    for group in _siblings.find(model, set(layers).__contains__) if siblings else ():
        together = _siblings.Siblings(group, shared_mask)
        for layer in group:
            layer.__dict__[_GROUP] = together
    return len(layers)


def unpatch(model: nn.Module | None = None) -> nn.Module | None:
    """Undo :func:`patch`, for the process or for one model.  Returns ``model``."""
    if model is None:
        for cls, forward in _originals.items():
            cls.forward = forward
        _originals.clear()
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for layer in model.modules():
        if type(layer) in _twins.values():
            layer.__class__ = type(layer).__mro__[1]
            layer.__dict__.pop(_GROUP, None)
    return model


def register(config: LoraConfig) -> LoraConfig:
    """Through PEFT's own hook for custom layers: models made with this ``config`` object get patched nn.Linear layers.

    The hook is not part of the saved configuration, so checkpoints stay plain PEFT; ``PeftModel.from_pretrained`` needs
    it again (``config=register(LoraConfig.from_pretrained(path))``).  Returns ``config``.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Linear: _make_layer})
    return config


def is_patched(layer: nn.Module) -> bool:
    """Whether calls of ``layer`` come to lowrank first."""
    return getattr(type(layer).forward, "_is_lowrank", False)


def _make_layer(target: nn.Module, adapter_name: str, **kwargs) -> nn.Module | None:
    # PEFT asks with isinstance, so quantised subclasses of nn.Linear come here too: None hands them on
    if type(target) is not nn.Linear or type(target.weight) is not nn.Parameter:
        return None
    layer = dispatch_default(target, adapter_name, **kwargs)
    if type(layer) is PeftLinear:
        layer.__class__ = _twin(PeftLinear)
    return layer


_GROUP = "_lowrank_siblings"  # in the layer's __dict__
_originals: dict[type, Callable] = {}
_twins: dict[type, type] = {}


def _covered() -> list[type]:
    classes = [PeftLinear]
    if importlib.util.find_spec("bitsandbytes") is not None:  # PEFT imports it too, at the first get_peft_model
        from peft.tuners.lora import bnb

        classes += [getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(bnb, name)]
    return classes


def _twin(cls: type) -> type:
    """The subclass of a PEFT layer class whose forward is ours.  It keeps the name, which reprs and checks rely on."""
    if cls not in _twins:
        forward = _fused(_originals.get(cls, cls.forward))
        twin = type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__, "__reduce_ex__": _reduce})
        _twins[cls] = twin
    return _twins[cls]


def _reduce(layer: nn.Module, protocol: int):
    """Pickle and deepcopy by PEFT's class, which has an importable name; the copy is patched again, without siblings."""
    state = {name: value for name, value in layer.__dict__.items() if name != _GROUP}
    return _rebuild, (type(layer).__mro__[1],), state


def _rebuild(cls: type) -> nn.Module:
    return object.__new__(_twin(cls))


def _fused(original: Callable) -> Callable:
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapters, reason = _adapters(self, x, args, kwargs)
        if reason is not None:
            _stats.fell_back(self, reason)
        if adapters is None:
            return original(self, x, *args, **kwargs)
        base = self.base_layer
        if not _is_plain_linear(base, x):
            _stats.ran_fused(self)
            return lora_projections(x, (Projection(None, None, adapters, base=base(x)),))[0]
        projection = Projection(base.weight, base.bias, adapters)
        group = self.__dict__.get(_GROUP)
        y, taken = None, 0 if group is None else group.taken
        if group is not None:
            y = group.call(self, x, projection, _projection)
        _stats.ran_fused(self, shared=group is not None and group.taken > taken)
        return lora_projections(x, (projection,))[0] if y is None else y

    forward._is_lowrank = True
    return forward


def _projection(layer, x) -> Projection | None:
    """What a sibling's call with x alone would compute, if the op covers all of it."""
    adapters, _ = _adapters(layer, x, (), {})
    base = layer.base_layer
    if not adapters or not _is_plain_linear(base, x) or base.weight.dim() != 2:  # 1-D: FSDP has not gathered it yet
        return None
    return Projection(base.weight, base.bias, adapters)


def _adapters(layer, x, args, kwargs) -> tuple[tuple[Adapter, ...] | None, str | None]:
    """(the active adapters, None) if the op covers this call, (None, why not) if it does not.

    (None, None): nothing but the base layer is to run, and PEFT's forward does just that.
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
    if torch.nn.modules.module._has_any_global_hook():
        return None, "global module hooks"
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        return None, f"x of {getattr(x, 'dtype', type(x).__name__)}"
    adapters = []
    for name in names:
        if name in layer.lora_variant:
            return None, f"the LoRA variant {type(layer.lora_variant[name]).__name__}"
        A, B, drop, scaling = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
        for what, module, cls in (
            ("lora_A", A, (nn.Linear,)),
            ("lora_B", B, (nn.Linear,)),
            ("lora_dropout", drop, _DROPOUTS),
        ):
            if type(module) not in cls:
                return None, f"{what} is a {type(module).__name__}"
            if _has_hooks(module):
                return None, f"hooks on {what}"
        for what, weight in (("lora_A", A.weight), ("lora_B", B.weight)):
            if not _is_plain(weight, x.device):
                return None, f"{what}'s weight is a {type(weight).__name__} of {weight.dtype} on {weight.device.type}"
        if not isinstance(scaling, (float, int)) and not (isinstance(scaling, torch.Tensor) and scaling.dim() == 0):
            return None, f"scaling is a {type(scaling).__name__}"
        casting = getattr(layer, "cast_input_dtype_enabled", True) or torch.is_autocast_enabled(x.device.type)
        if not casting and x.dtype is not A.weight.dtype:
            return None, "cast_input_dtype_enabled=False with adapters of another dtype"
        p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        adapters.append(Adapter(A.weight, B.weight, scaling, B.bias, p))
    return tuple(adapters), None


_DROPOUTS = (nn.Identity, nn.Dropout)


def _is_plain_linear(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether calling ``base`` is no more than F.linear, so that the op may do it."""
    return (
        type(base) is nn.Linear
        and not _has_hooks(base)
        and _is_plain(base.weight, x.device)
        and (base.bias is None or _is_plain(base.bias, x.device))
        and (base.weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type))
    )


def _is_plain(weight: torch.Tensor, device: torch.device) -> bool:
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.device == device and weight.dtype in DTYPES


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # accelerate's offloading replaces it
    )
