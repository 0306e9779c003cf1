"""Whether a LoRA in PEFT's files fits a model, found out before the model is touched: PEFT itself injects the adapter into a
skeleton of the model and converts the file's names and tensors for it, and both sides are compared."""

import copy
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

PREFIX = "base_model.model."  # of every key in a PEFT file


def check_fits(base: nn.Module, path: Path, tensors: dict[str, torch.Tensor], adapter_name: str, peft):
    """Raise ValueError unless PEFT, loading ``path`` into ``base``, would fill the whole adapter with the whole file.

    Returns the PeftModel that was tried, on the meta device; None for other methods than LoRA, which are PEFT's to check.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = peft.PeftConfig.from_pretrained(path)
    if config.peft_type != peft.PeftType.LORA:
        return None
    if config.init_lora_weights == "loftq":
        config.init_lora_weights = True  # it quantises a weight, of which a skeleton has none
    config.inference_mode = True
    if mapping := getattr(base, "_checkpoint_conversion_mapping", None):
        tensors = load_peft_weights(path, device="cpu", key_mapping=mapping)
    cls = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    layers = {name for name, _ in base.named_modules()}
    loaded = {}

    def load(state, *_, **__):
        loaded.update(state)
        return nn.modules.module._IncompatibleKeys([], [])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = cls(skeleton(base), config, adapter_name, low_cpu_mem_usage=True)
        except ValueError as error:
            names = (key.removeprefix(PREFIX).rpartition(".lora_")[0].replace(".base_layer", "") for key in tensors)
            odd = next((name for name in names if name and name not in layers), None)
            why = error if odd is None else f"it has {odd}, which {type(base).__name__} lacks"
            raise ValueError(f"{path}: an adapter of another model: {why}") from error
        model.load_state_dict = load
        try:
            set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=True)
        except KeyError as error:
            raise ValueError(f"{path}: an adapter of another model: it lacks {error.args[0]}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: an adapter of another model: {error}") from error
        state = model.state_dict()
        saved = get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=False)

    def name_of(key: str) -> str:
        return key.removeprefix(PREFIX).replace(f".{adapter_name}", "")

    if odd := [key for key in loaded if key not in state]:
        layer = name_of(odd[0]).rpartition(".lora_")[0] or name_of(odd[0])
        why = "lacks" if layer not in layers else "has, but PEFT does not adapt it by the file's configuration"
        raise ValueError(f"{path}: an adapter of another model: it has {layer}, which {type(base).__name__} {why}")
    for key, t in loaded.items():
        if t.shape != state[key].shape:
            raise ValueError(f"{path}: {_misfit(name_of(key), list(t.shape), list(state[key].shape))}")
    whole = set(map(id, saved.values()))
    if absent := [key for key, t in state.items() if id(t) in whole and key not in loaded]:
        raise ValueError(
            f"{path}: an adapter of another model, or part of one: it lacks {name_of(absent[0])} and"
            f" {len(absent) - 1} more that its configuration asks for in {type(base).__name__}"
        )
    return model


def check_same(model: nn.Module, tried: nn.Module, path: Path, adapter_name: str) -> None:
    """Raise ValueError if ``model``'s adapter, which is to be overwritten, would not run as the file's configuration says.

    PEFT takes the tensors alone: ranks, alphas and variants stay what the model has.
    """
    from peft.tuners.lora import LoraLayer

    modules = dict(model.named_modules())
    for name, tried_layer in tried.named_modules():
        if not isinstance(tried_layer, LoraLayer) or adapter_name not in tried_layer.scaling:
            continue
        layer, where = modules.get(name), name.removeprefix(PREFIX)
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.scaling:
            raise ValueError(f"adapter_name: the model's {adapter_name!r} has no {where}, {path} has")
        for what, own, in_file in (
            ("a rank of", layer.r[adapter_name], tried_layer.r[adapter_name]),
            ("a scaling of", float(layer.scaling[adapter_name]), float(tried_layer.scaling[adapter_name])),
            ("a variant", type(layer.lora_variant.get(adapter_name)), type(tried_layer.lora_variant.get(adapter_name))),
        ):
            if own != in_file:
                raise ValueError(
                    f"adapter_name: {where} of the model's {adapter_name!r} has {what} {own}, {path} {in_file}"
                )


def _misfit(key: str, shape: list[int], expected: list[int]) -> str:
    layer, _, factor = key.rpartition(".lora_")
    rank = {"A.weight": 0, "B.weight": 1}.get(factor)
    if rank is None or len(shape) != 2 or len(expected) != 2:
        return f"an adapter of another model: {key} is {shape}, the model's is {expected}"
    if shape[1 - rank] == expected[1 - rank]:
        return f"{key} has rank {shape[rank]}, adapter_config.json says {expected[rank]}"
    side = "out_features" if rank else "in_features"
    return f"an adapter of another model: {key} is {shape}, {layer} has {side}={expected[1 - rank]}"


def warn_of_misfits(model: nn.Module, path: Path, tensors: dict[str, torch.Tensor], peft) -> None:
    """Warn where PEFT would not load all of what was just written: PEFT drops what it does not find without a word."""
    try:
        check_fits(model, path, tensors, "default", peft)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        warnings.warn(f"PEFT does not load all of this into a {type(model).__name__}: {why}", stacklevel=4)


def targets(model: nn.Module, pattern: str, names: list[str], peft) -> tuple[str | list[str], list[str]]:
    """(target_modules, target_parameters) with which PEFT adapts the linear layers ``names``, which ``pattern`` matches.

    Of a model whose experts transformers 5 stacks, PEFT takes the last parts of names for those of transformers 4: it widens a
    pattern to every layer, and gate_proj of a dense layer or a shared expert it takes for the experts'.  There the layers have
    their whole names, and those that PEFT takes for experts are targeted by their weight.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # another PEFT than the one that does so
        return pattern, []

    def converted(chosen):
        config = peft.LoraConfig(target_modules=chosen)
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of what it fuses
            return None
        return config.target_modules

    if converted(pattern) == pattern:
        return pattern, []
    modules = [name for name in names if converted([name]) == {name}]
    return modules, [f"{name}.weight" for name in names if name not in modules]


_LEFT_OUT = {  # hooks, offloading, sharding, a replaced forward: nothing that says what the model consists of
    "forward",
    "_hf_hook",
    "_old_forward",
    "hf_device_map",
    "_hf_tp_plan",
    "_hf_device_mesh",
    "_device_mesh",
    "_tp_size",
}


def skeleton(model: nn.Module) -> nn.Module:
    """The model as it is without adapters: modules of the same classes and names with parameters on the meta device.

    PEFT may inject into it; the model shares nothing with it that PEFT writes to.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from ..nn import LoRALinear, SVFLinear

    known: dict[int, object] = {}  # what is tied or shared in the model is so in the skeleton

    def once(original, make):
        if original is None:
            return None
        if id(original) not in known:
            known[id(original)] = make(original)
        return known[id(original)]

    def tensor(t):
        empty = torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta")
        return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty

    def module(m):
        if isinstance(m, BaseTunerLayer):
            return once(m.get_base_layer(), module)
        if isinstance(m, (LoRALinear, SVFLinear)):
            return once(m.base_layer, module)
        if isinstance(m, AuxiliaryTrainingWrapper):
            return once(m.original_module, module)
        if isinstance(m, torch.jit.ScriptModule):
            return m
        if isinstance(m, nn.Linear) and not m.weight.is_floating_point():  # packed by a quantiser: not its own shape
            return nn.Linear(m.in_features, m.out_features, m.bias is not None, device="meta")
        new = object.__new__(type(m))
        for key, value in m.__dict__.items():
            if key in _LEFT_OUT:
                continue
            if key == "_modules":
                value = {name: once(child, module) for name, child in value.items()}
            elif key == "_parameters" or key == "_buffers":
                value = {name: once(t, tensor) for name, t in value.items()}
            elif key == "config":
                value = once(value, copy.copy)  # PEFT writes the number of replicated layers there
            elif isinstance(value, OrderedDict) and "_hooks" in key:
                value = OrderedDict()
            elif type(value) in (dict, list, set):
                value = value.copy()
            new.__dict__[key] = value
        return new

    return once(model, module)
