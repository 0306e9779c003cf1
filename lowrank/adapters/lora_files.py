"""LoRA in PEFT's two files: of a PeftModel, of a model with LoRALinear layers, and as a plain LoRA of the original weights."""

import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from .._linears import exact_names
from ..checkpoints import read_tensors
from ..nn import LoRALinear
from .fits import PREFIX, targets, warn_of_misfits

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def import_peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'lowrank-kernels[peft]'") from error
    return peft


def read(file: Path) -> dict[str, torch.Tensor]:
    if file.name == PICKLED:
        with open(file, "rb") as opened:
            try:
                tensors = torch.load(opened, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever half a pickle or another file's bytes lead to
                why = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise ValueError(f"{file}: no whole file of tensors alone: {why}") from error
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise ValueError(f"{file}: expected a dict of tensors")
        return tensors
    return read_tensors(file)


def _pattern(config: dict, pattern: str, name: str, default):
    """The value for the layer ``name`` of a configuration's rank_pattern or alpha_pattern, by PEFT's own matching."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(pattern) or {}
    return patterns.get(get_pattern_key(patterns.keys(), name), default)


def _lora_linears(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def changes_base(config) -> bool:
    """Whether PEFT's start of this adapter leaves W - s B_0 A_0 in the base, or for LoftQ and KaSA something else."""
    init = getattr(config, "init_lora_weights", None)
    init = init.lower() if isinstance(init, str) else ""
    return init.startswith(("pissa", "corda")) or init in ("olora", "lora_ga") or _loses_base(config)


def _loses_base(config) -> bool:
    return config.init_lora_weights == "loftq" or getattr(config, "kasa_config", None) is not None


def make_plain(model, path: Path, peft) -> None:
    """Rewrite PEFT's files of a start that changed the base as a LoRA of twice the rank on the model's original weights."""
    configs = model.peft_config
    if odd := [name for name, config in configs.items() if config.peft_type != peft.PeftType.LORA]:
        raise ValueError(f"format: 'lora' of {odd[0]!r}, which is {configs[odd[0]].peft_type.value} and no LoRA")
    owner, initial = model.__dict__.get("_lowrank_initial", (None, None))
    changing = [name for name, config in configs.items() if changes_base(config)]
    if not changing and owner is None:
        return
    if len(configs) > 1 or (owner is not None and all(config is not owner for config in configs.values())):
        raise ValueError(
            f"format: 'lora' of {', '.join(configs)}: one start changed the base of every adapter this model has or had,"
            " and a plain LoRA holds one alone"
        )
    ((name, config),) = configs.items()
    if _loses_base(config):
        raise ValueError(
            f"format: 'lora' of init_lora_weights={config.init_lora_weights!r}, whose base is no W - s B A"
        )
    if owner is None:
        raise ValueError(
            f"format: 'lora' needs the factors that init_lora_weights={config.init_lora_weights!r} started from, which"
            " lowrank.adapt keeps; this model was made or loaded otherwise"
        )
    from safetensors.torch import save_file

    base = model.get_base_model()
    _check_starts(base, name, config)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    file = next(path.rglob(WEIGHTS))
    written, tensors = read(file), {}
    resized = any(key.endswith(".base_layer.weight") for key in written) and _is_resized(model, config)
    for key, t in written.items():
        if key.endswith(".base_layer.weight"):
            layer = key.removesuffix(".base_layer.weight")
            frozen = parameters.get(key.removeprefix(PREFIX))
            if not resized and frozen is not None and not frozen.requires_grad:
                continue  # what the model is loaded with has it
            if (A := initial.get(f"{layer}.lora_A.weight")) is not None:
                module = base.get_submodule(layer.removeprefix(PREFIX))
                change = module.scaling[name] * initial[f"{layer}.lora_B.weight"].float() @ A.float()
                t = (t.float() + (change.mT if module.fan_in_fan_out else change).to(t.device)).to(t.dtype)
        elif (dim := rank_dim(key)) is not None:
            t = _beside(key, t, initial[key])
            rank = 2 * base.get_submodule(key.removeprefix(PREFIX).rpartition(".lora_")[0]).r[name]
            if t.shape[dim] < rank:  # a start of fewer directions than were asked for
                t = torch.cat((t, t.new_zeros([rank - n if d == dim else n for d, n in enumerate(t.shape)])), dim)
        tensors[key] = t
    save_file({key: t.contiguous() for key, t in tensors.items()}, file, metadata={"format": "pt"})
    plain = json.loads((file.parent / CONFIG).read_text())
    grow = math.sqrt(2) if config.use_rslora else 2
    plain |= {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None}
    plain["r"], plain["lora_alpha"] = 2 * plain["r"], grow * plain["lora_alpha"]
    plain["rank_pattern"] = {name: 2 * r for name, r in (plain["rank_pattern"] or {}).items()}
    plain["alpha_pattern"] = {name: grow * alpha for name, alpha in (plain["alpha_pattern"] or {}).items()}
    (file.parent / CONFIG).write_text(json.dumps(plain, indent=2))


def _check_starts(base: nn.Module, name: str, config) -> None:
    """Raise ValueError for a layer whose trained function is no LoRA of what the layer was before PEFT's start."""
    from peft.tuners.lora import LoraLayer

    holders = {}
    for where, p in base.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(where)
    for where, layer in base.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.r:
            continue
        variant, why = layer.lora_variant.get(name), None
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            why = f"it is a {type(variant).__name__}"
        elif name in layer.lora_A and type(layer.get_base_layer()).__name__ not in _NO_STARTS:
            weight = layer.get_base_layer().weight
            if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
                why = f"its weight is a {type(weight).__name__} of {weight.dtype}, quantised anew after the start"
            elif len(holders[id(weight)]) > 1:
                why = f"its weight is shared: {', '.join(holders[id(weight)])}"
            elif layer.fan_in_fan_out and config.init_lora_weights.lower() == "olora":
                why = "OLoRA takes a Conv1D's factors from its transpose"
        if why is not None:
            raise ValueError(f"format: 'lora' of init_lora_weights={config.init_lora_weights!r}: {where}: {why}")


_NO_STARTS = ("Conv1d", "Conv2d", "Conv3d")  # PEFT starts them at B = 0


def _is_resized(model, config) -> bool:
    """Whether the vocabulary is another than that of the model's checkpoint, for which PEFT saves whole embeddings."""
    from peft.utils.other import check_file_exists_on_hf_hub

    source, size = config.base_model_name_or_path, getattr(getattr(model, "config", None), "vocab_size", None)
    if not source or not size:
        return False
    if not (Path(source) / "config.json").is_file() and not check_file_exists_on_hf_hub(source, "config.json"):
        return False
    return type(model.config).from_pretrained(source).vocab_size != size


def check_unmerged(model, path: Path) -> None:
    """Raise ValueError if PEFT wrote a base's weight or bias, as it does of embeddings, with an adapter merged into it."""
    merged = {f"{PREFIX}{name}" for name, module in model.get_base_model().named_modules() if _is_merged(module)}
    for file in path.rglob(WEIGHTS):
        for key in read(file) if merged else ():
            layer, _, what = key.rpartition(".base_layer.")
            if what in ("weight", "bias") and layer in merged:
                raise ValueError(f"model: {key} would be saved with an adapter merged into it: unmerge_adapter() first")


def _is_merged(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and bool(getattr(module, "merged", False))


def rank_dim(key: str) -> int | None:
    """Which dimension of this tensor of a PEFT file is the rank; None if it is no factor."""
    for dim, ends in enumerate(((".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B"))):
        if key.endswith(ends):
            return dim
    return None


def _beside(key: str, t: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """The factor with what it started from beside it, a B's negated; other tensors as they are."""
    dim = rank_dim(key)
    if dim is None:
        return t
    dtype = torch.promote_types(t.dtype, initial.dtype)  # a rounded factor no longer cancels what is in the base
    return torch.cat((t.to(dtype), (-initial if dim else initial).to(t.device, dtype)), dim)


def write_lora_linears(model: nn.Module, path: Path, peft, plain: bool) -> None:
    layers = _lora_linears(model)
    if not layers:
        raise ValueError(f"model: expected a PeftModel or a model with LoRALinear layers, got {type(model).__name__}")
    from safetensors.torch import save_file

    first = next(iter(layers.values()))
    if len({(layer.use_rslora, layer.lora_B["default"].bias is not None) for layer in layers.values()}) > 1:
        raise ValueError(
            "model: PEFT's files hold one use_rslora and one lora_bias for all layers; these layers differ"
        )
    if not plain and len({layer.init for layer in layers.values()}) > 1:
        raise ValueError("model: PEFT's files hold one init for all layers, these differ; format='lora' writes any")
    doubled = {name: plain and layer.init != "default" for name, layer in layers.items()}
    grow = math.sqrt(2) if first.use_rslora else 2
    ranks = {name: layer.r * (2 if doubled[name] else 1) for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha * (grow if doubled[name] else 1) for name, layer in layers.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    modules, parameters = targets(model, exact_names(layers), list(layers), peft)
    keys = {name: re.escape(f"{name}.weight" if f"{name}.weight" in parameters else name) for name in layers}
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0 if parameters else first.lora_dropout,  # PEFT has none on a weight
        use_rslora=first.use_rslora,
        lora_bias=first.lora_B["default"].bias is not None,
        init_lora_weights=True if plain or first.init == "default" else first.init,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern={f"^{keys[name]}": own for name, own in ranks.items() if own != r},
        alpha_pattern={f"^{keys[name]}": own for name, own in alphas.items() if own != alpha},
        inference_mode=True,
    )
    tensors = {}
    for name, layer in layers.items():
        for factor, initial in (("lora_A", layer._initial_A), ("lora_B", layer._initial_B)):
            for kind, parameter in getattr(layer, factor)["default"].named_parameters():
                key, t = f"{PREFIX}{name}.{factor}.{kind}", parameter.detach()
                if doubled[name]:  # what the base lacks is in the scaling that it was taken with
                    t = _beside(key, t, initial * (layer._initial_scaling / layer.scaling if factor == "lora_B" else 1))
                tensors[key] = t.contiguous()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(path)
    warn_of_misfits(model, path, tensors, peft)


@torch.no_grad()
def load_lora_linears(model: nn.Module, path: Path, tensors: dict[str, torch.Tensor]) -> nn.Module:
    layers = _lora_linears(model)
    wanted = {
        f"{PREFIX}{name}.{factor}.{kind}": parameter
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
        for kind, parameter in getattr(layer, factor)["default"].named_parameters()
    }
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())
        raise ValueError(f"{path}: an adapter of another model: {len(odd)} tensors on one side only, such as {odd[0]}")
    for key, parameter in wanted.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(f"{path}: {key} is {list(tensors[key].shape)}, the model's is {list(parameter.shape)}")
    config = json.loads((path / CONFIG).read_text())
    init = config.get("init_lora_weights", True)
    init = init if init in ("pissa", "olora") else "default"
    if odd := [name for name, layer in layers.items() if layer.init != init]:
        raise ValueError(
            f"{path}: trained from init={init!r}, which changes the base; {odd[0]} has {layers[odd[0]].init!r}"
        )
    rslora = config.get("use_rslora", False)
    alphas = {name: _pattern(config, "alpha_pattern", name, config["lora_alpha"]) for name in layers}
    for name, layer in layers.items() if init == "olora" else ():
        scaling = alphas[name] / (math.sqrt(layer.r) if rslora else layer.r)
        if not math.isclose(scaling, layer._initial_scaling):
            raise ValueError(
                f"{path}: trained on a base without {scaling:g} B A of OLoRA's start, {name} is without"
                f" {layer._initial_scaling:g} B A: make it with lora_alpha={alphas[name]:g}, use_rslora={rslora}"
            )
    for name, layer in layers.items():
        layer.lora_alpha, layer.use_rslora = alphas[name], rslora
        layer.unmerge()
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])
    return model
