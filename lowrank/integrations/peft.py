"""PEFT's LoRA layers on lowrank's op: ``patch()`` for the process, ``patch(model)`` for one model.

Only ``forward`` is replaced, on the layers' own classes or on subclasses of them; modules, parameters, state dicts,
merging, saving and every method of PEFT stay PEFT's.  A call that the op does not cover (variants but DoRA,
``adapter_names`` batches, hooks on lora_A, ...) goes to PEFT's own forward, is counted in ``lowrank.stats()`` and warns
once per reason.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from .. import _stats
from ..ops.node import CHANGED, COPY, NAME, TORCH_MASKS
from . import siblings as _siblings
from .peft_layer import BASE_DROPOUT, GROUP, fused

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import ParamWrapper, dispatch_default

    from . import peft_experts
except ImportError as error:
    raise ImportError("this needs PEFT: pip install 'lowrank-kernels[peft]'") from error

Model = TypeVar("Model", bound=nn.Module)


@overload
def patch(
    model: Model,
    *,
    siblings: bool = True,
    shared_mask: bool = False,
    dora_base_dropout: bool = True,
    copy_inputs: bool | Sequence[str] = False,
    dropout_stream: str = "lowrank",
) -> Model: ...
@overload
def patch(model: None = None, *, dora_base_dropout: bool = True) -> None: ...
def patch(
    model: nn.Module | None = None,
    *,
    siblings: bool = True,
    shared_mask: bool = False,
    dora_base_dropout: bool = True,
    copy_inputs: bool | Sequence[str] = False,
    dropout_stream: str = "lowrank",
) -> nn.Module | None:
    """Run PEFT's LoRA layers on lowrank: those of ``model``, or every one of the process, made before or after.

    For one model, call it after the adapters are injected and before ``fully_shard``, ``torch.compile`` or DDP; layers
    that a later ``add_adapter`` creates need another call.  Calling it twice is harmless.  Returns ``model``.

    Args:
        siblings: for one model, let q/k/v and gate/up share their passes over x (integrations/siblings.py).
        shared_mask: let siblings share one dropout mask too: a bit per element kept instead of one each.
        dora_base_dropout: whether dropout reaches the base's term of a DoRA layer too, as in PEFT, which costs a second
            GEMM with the weight; False is one GEMM, and the same mean (:func:`lowrank.dora_linear`).
        copy_inputs: for one model, the layers whose input the model changes in place after it has called them, by name or
            by the end of it, as target_modules has them; True for all.  They save a copy for backward.  Without it the
            backward that finds such an input raises, and that layer is PEFT's own from then on.
        dropout_stream: whose dropout masks.  "lowrank": a function of a seed, drawn in the pass over x.  "torch", for one
            model: nn.Dropout's own, so that a run follows the unpatched one step by step, at the price of a pass that draws
            them, and of siblings that compute alone where there is dropout.

    Raises: TypeError if ``model`` is no module or ``copy_inputs`` no list of names; ValueError if it holds no LoRA layer that
        lowrank covers, or none of a name in ``copy_inputs``, and for another ``dropout_stream``.
    """
    _check_copy_inputs(copy_inputs)
    _check_dropout_stream(dropout_stream, shared_mask)
    if model is None and copy_inputs:
        raise ValueError("copy_inputs: expected a model beside it, got none")
    if model is None and dropout_stream == "torch":
        raise ValueError("dropout_stream='torch': expected a model beside it, got none")
    if model is None:
        for cls in _covered():
            if cls not in _originals:
                _originals[cls] = cls.forward
                cls.forward = _fused(cls, cls.forward, dora_base_dropout)
        return None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    options: dict[str, Any] = dict(
        dora_base_dropout=dora_base_dropout, copy_inputs=copy_inputs, dropout_stream=dropout_stream
    )
    if not swap_layers(model, siblings=siblings, shared_mask=shared_mask, **options):
        raise ValueError("model: found no LoRA layer to patch; call this after get_peft_model")
    return model


def swap_layers(
    model: nn.Module,
    *,
    siblings: bool = True,
    shared_mask: bool = False,
    dora_base_dropout: bool = True,
    copy_inputs: bool | Sequence[str] = False,
    dropout_stream: str = "lowrank",
) -> int:
    """:func:`patch` for one model, where having nothing to patch is no mistake.  Returns how many layers are patched."""
    _check_dropout_stream(dropout_stream, shared_mask)
    twins = {cls: _twin(cls) for cls in _covered()}
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in twins or type(module) in twins.values():
            layers.setdefault(module, []).append(name)
    copied = _copied(layers, copy_inputs)
    for layer, (name, *_) in layers.items():
        layer.__class__ = twins.get(type(layer), type(layer))
        _leave(layer)
        layer.__dict__[BASE_DROPOUT] = dora_base_dropout
        layer.__dict__[NAME] = name
        layer.__dict__[COPY] = layer in copied
        layer.__dict__[TORCH_MASKS] = dropout_stream == "torch"
        if layer in copied:
            layer.__dict__.pop(CHANGED, None)
    linears = {layer for layer in layers if not isinstance(layer, ParamWrapper)}
    for group, between in _siblings.find(model, linears.__contains__) if siblings else ():
        together = _siblings.Siblings([*group, *between], shared_mask)
        for layer in group:
            layer.__dict__[GROUP] = together
    return len(layers)


@overload
def unpatch(model: Model) -> Model: ...
@overload
def unpatch(model: None = None) -> None: ...
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
        layer.__dict__.pop(CHANGED, None)  # also from layers that patch() without a model reached
        if type(layer) in _twins.values():
            layer.__class__ = type(layer).__mro__[1]
            _leave(layer)
            for key in (BASE_DROPOUT, NAME, COPY, TORCH_MASKS):
                layer.__dict__.pop(key, None)
    return model


def _leave(layer: nn.Module) -> None:
    group = layer.__dict__.pop(GROUP, None)
    if group is not None:
        group.forget()


def register(config: LoraConfig) -> LoraConfig:
    """Through PEFT's own hook for custom layers: models made with this ``config`` object get patched nn.Linear layers.

    The hook is not part of the saved configuration, so checkpoints stay plain PEFT; ``PeftModel.from_pretrained`` needs
    it again (``config=register(LoraConfig.from_pretrained(path))``).  Returns ``config``.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Linear: _make_layer})  # type: ignore[dict-item]  # PEFT calls what it says is a class
    return config


def _check_copy_inputs(copy_inputs) -> None:
    names = () if isinstance(copy_inputs, bool) else copy_inputs
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"copy_inputs: expected True, False or a list of layer names, got {copy_inputs!r}")


def _check_dropout_stream(dropout_stream, shared_mask: bool) -> None:
    if dropout_stream not in ("lowrank", "torch"):
        raise ValueError(f"dropout_stream: expected 'lowrank' or 'torch', got {dropout_stream!r}")
    if dropout_stream == "torch" and shared_mask:
        raise ValueError(
            "shared_mask: expected False beside dropout_stream='torch', whose layers draw a mask each, got True"
        )


def _copied(layers: dict[nn.Module, list[str]], copy_inputs: bool | Sequence[str]) -> set[nn.Module]:
    """The layers that ``copy_inputs`` names."""
    _check_copy_inputs(copy_inputs)
    if isinstance(copy_inputs, bool):
        return set(layers) if copy_inputs else set()
    matches = {
        wanted: [m for m, names in layers.items() if any(n == wanted or n.endswith(f".{wanted}") for n in names)]
        for wanted in copy_inputs
    }
    if layers and (missing := [wanted for wanted, matched in matches.items() if not matched]):
        raise ValueError(f"copy_inputs: no LoRA layer {missing[0]!r}; there is {next(iter(layers.values()))[0]!r}")
    return {layer for matched in matches.values() for layer in matched}


def is_patched(layer: nn.Module) -> bool:
    """Whether calls of ``layer`` come to lowrank first."""
    return _stats.is_ours(layer)


def _make_layer(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    # PEFT asks with isinstance, so quantised subclasses of nn.Linear come here too: None hands them on
    if type(target) is not nn.Linear or type(target.weight) is not nn.Parameter:
        return None
    layer = dispatch_default(target, adapter_name, **kwargs)
    if type(layer) is PeftLinear:
        layer.__class__ = _twin(PeftLinear)  # type: ignore[assignment]  # of which it is a subclass
    return layer


_originals: dict[type[nn.Module], Callable[..., Any]] = {}
_twins: dict[type[nn.Module], type[nn.Module]] = {}


def _fused(cls: type[nn.Module], original: Callable[..., Any], dora_base_dropout: bool = True) -> Callable[..., Any]:
    return peft_experts.fused(original) if cls is ParamWrapper else fused(original, dora_base_dropout)


def _covered() -> list[type[nn.Module]]:
    classes: list[type[nn.Module]] = [PeftLinear, ParamWrapper]
    if importlib.util.find_spec("bitsandbytes") is not None:  # PEFT imports it too, at the first get_peft_model
        from peft.tuners.lora import bnb

        classes += [getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(bnb, name)]
    return classes


def _twin(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a PEFT layer class whose forward is ours.  It keeps the name, which reprs and checks rely on."""
    if cls not in _twins:
        forward = _fused(cls, _originals.get(cls, cls.forward))
        twin = type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__, "__reduce_ex__": _reduce})
        _twins[cls] = twin
    return _twins[cls]


def _reduce(layer: nn.Module, protocol: int):
    """Pickle and deepcopy by PEFT's class, which has an importable name; the copy is patched again, without siblings."""
    state = {name: value for name, value in layer.__dict__.items() if name != GROUP}
    return _rebuild, (type(layer).__mro__[1],), state


def _rebuild(cls: type) -> nn.Module:
    return object.__new__(_twin(cls))
