"""The linear layers of a model: which they are, their weights [N,K] whatever holds them, and their checksums."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .svd import WEIGHT_DTYPES


def target_layers(model: nn.Module, target_modules: str | Iterable[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers (nn.Linear with its quantised subclasses, transformers' Conv1D) that PEFT would choose, by name.

    Args:
        target_modules: "all-linear", every one but the output embedding and what is inside adapters; a list of names or
            of endings of names after a dot; or a regular expression that matches whole names.

    Raises: ValueError if nothing matches, an entry of the list matches nothing, or a match is not a linear layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        adapted = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "base_layer"))
        chosen = [
            name
            for name, module in modules.items()
            if is_linear(module) and module is not head and not name.startswith(adapted)
        ]
        if not chosen:
            raise ValueError(f"model: {type(model).__name__} has no linear layers")
        return {name: modules[name] for name in chosen}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules: {target_modules!r} is not a regular expression: {error}") from error
        chosen = [name for name in modules if pattern.fullmatch(name)]
    else:
        targets = list(target_modules)
        if odd := [target for target in targets if not isinstance(target, str)]:
            raise TypeError(f"target_modules: expected names, got {odd[0]!r}")
        names_of = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in targets}
        if missing := [target for target, names in names_of.items() if not names]:
            raise ValueError(f"target_modules: no module of {type(model).__name__} is called {missing[0]!r}")
        matched = {name for names in names_of.values() for name in names}
        chosen = [name for name in modules if name in matched]
    if not chosen:
        raise ValueError(f"target_modules: {target_modules!r} matches no module of {type(model).__name__}")
    for name in chosen:
        if not is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"target_modules: expected linear layers, but {target_modules!r} matches the {kind} {name}"
            )
    return {name: modules[name] for name in chosen}


@torch.no_grad()
def dense_weight(module: nn.Module, *, exact: bool = False) -> torch.Tensor:
    """The weight [N,K] of a linear layer in a float dtype, without grad: dequantised by PEFT, Conv1D's transposed.

    Of a 4-bit weight of bitsandbytes the scales are taken in bfloat16, on every device: that is what is left of them once
    bitsandbytes has repacked it, at its first inference on some CPUs, so that the weight is the same before and after.
    ``exact``: the scales as they are, which lowrank 0.1 took.

    Raises: ValueError if there is no such weight, or ``exact`` is asked of one that was repacked; ImportError without PEFT
        for a quantised one.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{type(module).__name__}: has no weight tensor")
    if not has_float_weight(module):
        state = four_bit_state(module)
        if state is not None and not exact:
            return _dequantised(weight, state)
        if state is not None and _is_repacked(state):
            raise ValueError(f"{type(module).__name__}: bitsandbytes has repacked its weight: its scales are gone")
        try:
            from peft.utils.integrations import dequantize_module_weight
        except ImportError as error:
            raise ImportError("quantised weights need PEFT: pip install 'lowrank-kernels[qlora]'") from error
        weight = dequantize_module_weight(module)
    if weight.dtype not in WEIGHT_DTYPES or weight.dim() != 2:
        raise ValueError(
            f"{type(module).__name__}: expected a float weight of two dimensions or one that PEFT dequantises, got a"
            f" {type(weight).__name__} {list(weight.shape)} of {weight.dtype}"
        )
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def four_bit_state(module: nn.Module):
    """bitsandbytes' QuantState of a 4-bit weight; None for any other."""
    weight = getattr(module, "weight", None)
    if type(weight).__name__ != "Params4bit":
        return None
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def has_exact_weight(module: nn.Module, checksum: str) -> bool:
    """Whether a 4-bit layer's exact :func:`dense_weight` has this checksum: files of lowrank 0.1 say so."""
    state = four_bit_state(module)
    if state is None or _is_repacked(state):
        return False
    return weight_checksum(dense_weight(module, exact=True)) == checksum


def _is_repacked(state) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dequantised(weight: torch.Tensor, state) -> torch.Tensor:
    """[N,K] in the dtype that was quantised: each code's value times its block's scale in bf16."""
    N, K = state.shape
    packed, absmax = weight.data.contiguous().view(torch.uint8).reshape(-1), state.absmax
    if _is_repacked(
        state
    ):  # 32 bytes: 32 rows by two columns, the first 32 codes low, the others high; scales transposed
        codes = torch.stack((packed.view(-1, 32) & 15, packed.view(-1, 32) >> 4), 1)
        codes = codes.view(N // 32, K // 2, 32, 2).transpose(1, 2).reshape(-1)
        absmax = absmax.mT
    else:
        codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)[: N * K]
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.reshape(-1).bfloat16().float()
    dense = state.code.to(scales)[codes.int()].view(N, K)
    dense = dense.view(-1).mul_(scales.repeat_interleave(state.blocksize)[: N * K]).view(N, K)
    return dense.to(state.original_dtype if _is_repacked(state) else state.dtype)


def has_float_weight(module: nn.Module) -> bool:
    """Whether its weight is a plain float matrix: not quantised, whatever class the module is of."""
    weight = getattr(module, "weight", None)
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in WEIGHT_DTYPES and weight.dim() == 2


def weight_checksum(weight: torch.Tensor) -> str:
    """sha256, in hexadecimal, of a tensor's dtype, shape and elements in row-major order."""
    if weight.is_meta:
        raise ValueError("weight: expected a tensor with data, got one on the meta device")
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Weight(NamedTuple):
    """A weight that is read when its turn comes: its shape (N, K) and how to get it."""

    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]


def module_weights(layers: Mapping[str, nn.Module]) -> dict[str, Weight]:
    """The layers' :func:`dense_weight`, read one at a time: dequantised ones are not all in memory."""
    return {
        name: Weight(weight_shape(layer), lambda layer=layer: dense_weight(layer)) for name, layer in layers.items()
    }


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, quantised or not."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape[::-1])


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [K,N].  By name: importing transformers takes seconds."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def has_linear_forward(module: nn.Module) -> bool:
    """Whether calling it is F.linear of its weight and bias: no subclass or instance brings a forward of its own."""
    owner = next(c for c in type(module).__mro__ if "forward" in c.__dict__)
    plain = owner is nn.Linear or (owner.__name__, owner.__module__) == ("Conv1D", "transformers.pytorch_utils")
    return plain and "forward" not in module.__dict__


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def exact_names(names) -> str:
    """A target_modules that means these layers: PEFT finds a plain name at the end of any longer one too."""
    return "|".join(map(re.escape, names))


def is_matrix(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a module's own parameter multiplies activations: a linear layer's or router's weight, a stack of experts'."""
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    return parameter.dim() == 3 or (name == "weight" and (parameter.dim() == 2 or is_linear(module)))


def expert_stacks(model: nn.Module) -> list[str]:
    """What to give PEFT as target_parameters for the stacks [E, ...] of transformers' experts: the ends of their names."""
    ends = set()
    for name, module in model.named_modules():
        if {"is_transposed", "has_gate"} <= module.__dict__.keys():
            stacks = [p for p, t in module.named_parameters(recurse=False) if t.dim() == 3 and t.shape[0] > 1]
            ends |= {".".join([*name.split(".")[-1:], stack]) for stack in stacks}
    return sorted(ends)


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that sit inside attention."""
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    chosen = [name for name in linear if any(mark in name.lower() for mark in ("attn", "attention"))]
    if not chosen:
        raise ValueError(f"lora-attention: no linear layer of this model is named attn or attention, only {linear[:8]}")
    return chosen
