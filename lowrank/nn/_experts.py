"""transformers' mixture-of-experts modules: what they hold, what they compute, and that computed by lowrank.

Nothing here imports transformers: a module of its classes is there only once it was imported.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._boundary import TENSORS
from ..ops.activations import Activation
from ..ops.experts import expert_linear
from ..ops.experts_eager import route
from ..ops.experts_layer import Experts, experts_layer
from ..ops.linear import Adapter, Projection

NAME = "lowrank"  # of the experts implementation
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", NAME)  # those that read the parameters as they are
FLAGS = frozenset(("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "config"))
_has_any_global_hook = torch.nn.modules.module._has_any_global_hook
_GELUS = ("gelu", "gelu_tanh")
_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss"


def _of_class(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Asked once a class; Dynamo runs it while it traces."""
    asked = functools.cache(lambda cls, *_: function(cls))

    @functools.wraps(function)
    def ask(cls: Any) -> str | None:  # again where somebody has replaced a method since
        return asked(cls, getattr(cls, "forward", None), getattr(cls, "_apply_gate", None))

    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    factors: Mapping[str, tuple[Adapter, ...]] | None = None,
    layers: tuple[nn.Module, ...] = (),
    copy: bool = False,
) -> Tensor:
    """transformers' experts function: [T,H] of hidden_states [T,H], int [T,k] and float [T,k].

    factors: adapters by the name of the parameter that they are added to, A [E,r,in] and B [E,out,r].  layers: whose call this
    is, for errors.  copy: whether backward gets a copy of hidden_states.
    """
    factors = {} if factors is None else factors
    up, down = (_projection(module, name, factors.get(name, ())) for name in names_of(module))
    full = not module._is_expert_parallel
    act = activation_of(module)
    if act is not None and not module.has_post_expert_norm:
        return experts_layer(hidden_states, top_k_index, top_k_weights, Experts(up, down, act, full, layers, copy))
    W = stack_of(module, names_of(module)[0])
    order, place, groups = route(top_k_index, len(W), full)
    T, k = top_k_index.shape
    x = hidden_states[order // k].to(W.dtype)
    h = expert_linear(x, up.weight, up.bias, up.adapters, groups, order)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = expert_linear(h, down.weight, down.bias, down.adapters, groups, order)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    if not full:
        y = y.masked_fill(groups.behind, 0.0)
    return (y[place].view(T, k, y.shape[1]) * top_k_weights[:, :, None]).sum(1).to(hidden_states.dtype)


def names_of(module: Any) -> tuple[str, str]:
    """The names of its two stacks."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def activation_of(module: Any) -> Activation | None:
    """What it computes between its two products, where that is known: compared by identity, not by name alone."""
    gate = None if "_apply_gate" in module.__dict__ else _gate(type(module))
    if gate == "clamped":
        return Activation("clamped", True, True, float(module.alpha), float(module.limit))
    act_fn: Any = getattr(module, "act_fn", None)
    known = _function(type(act_fn))
    if known in _GELUS:  # their classes can be told to compute in Python
        function = act_fn.act
        plain = function is nn.functional.gelu or getattr(function, "func", None) is nn.functional.gelu
        known = known if plain else None
    if known is None or has_hooks(act_fn) or (module.has_gate and gate is None):
        return None
    return Activation(known, module.has_gate)  # transformers' default gate takes halves, whatever is_concatenated says


def why_not(module: Any, x: Tensor) -> str | None:
    """Why a call of ``module``, of a class behind the :func:`seam`, is not ours with adapters; None where it is."""
    if not module.__dict__.keys() >= FLAGS:
        return "experts without transformers' flags"
    if has_hooks(module) or _has_any_global_hook():
        return "hooks on the experts"
    if module.has_post_expert_norm:
        return "a norm behind the experts"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS or not _is_transformers_own(implementation):
        return f"the experts implementation {implementation!r}"
    if getattr(module, "parametrizations", None):
        return "parametrized experts"
    for name in names_of(module):
        weight = getattr(module, name)
        if type(weight) not in TENSORS or weight.dtype not in _DTYPES:
            return f"experts' weights are {type(weight).__name__} of {weight.dtype}"
        if weight.dim() != 3 or weight.shape[0] == 1:
            return f"experts' weights {list(weight.shape)}"
        if weight.device != x.device:
            return f"experts' weights on {weight.device.type}"
    return None


def stack_of(module: Any, name: str) -> Tensor:
    """[E,N,K], however it is stored."""
    weight: Tensor = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def _projection(module: Any, name: str, adapters: tuple[Adapter, ...]) -> Projection:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return Projection(stack_of(module, name), bias, adapters)


@_of_class
def seam(cls: Any) -> str | None:
    """None where a class's forward is the one that transformers' decorator made, over the interface that is ours too, else why
    not."""
    forward = cls.forward
    moe = sys.modules.get("transformers.integrations.moe")
    if moe is None or getattr(forward, "__code__", None) is not _decorated().__code__:
        return f"{cls.__name__}'s forward is its own"
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "experts_interface" not in cells:
        return "this transformers has another decorator of experts"
    if cells["experts_interface"].cell_contents is not moe.ALL_EXPERTS_FUNCTIONS:
        return f"{cls.__name__} has an interface of its own"
    return None


@_of_class
def _function(cls: Any) -> str | None:
    """The name of an activation by its class."""
    classes = sys.modules.get("transformers.activations")
    if cls is nn.SiLU or classes is None:
        return "silu" if cls is nn.SiLU else None
    by_class = {classes.SiLUActivation: "silu", classes.ReLUSquaredActivation: "relu2"}
    return (by_class | {classes.GELUActivation: "gelu", classes.GELUTanh: "gelu_tanh"}).get(cls)


@_of_class
def _gate(cls: Any) -> str | None:
    """Which of the known gates a class of experts has: transformers' default, or gpt-oss's."""
    gpt_oss, moe = sys.modules.get(_GPT_OSS), _moe()
    if gpt_oss is not None and cls._apply_gate is gpt_oss.GptOssExperts._apply_gate:
        return "clamped"
    return "default" if cls._apply_gate is moe._default_apply_gate else None


def _is_transformers_own(implementation: str | None) -> bool:
    """Whether nobody has registered another function by that name."""
    moe = _moe()
    own = {"grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}
    return implementation not in own or moe.ALL_EXPERTS_FUNCTIONS.get(implementation) is own[implementation]


_is_transformers_own._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo runs it while it traces


def _moe():
    return sys.modules["transformers.integrations.moe"]


def has_hooks(module) -> bool:
    if not isinstance(module, nn.Module):
        return False
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


@functools.cache
def _decorated():
    """A forward that transformers' decorator made: all of them share their code."""

    class Sample(nn.Module):
        def forward(self):
            pass

    return _moe().use_experts_implementation(Sample).forward
