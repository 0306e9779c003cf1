"""The files of SVF's experts.

A file holds what was trained, one fp32 vector per layer and expert beside the modules that are trained as a whole, and in
its metadata the config, k, the order of the directions and a checksum of each layer's weight: vectors are refused by a model
whose weights are others.  It is called ``model.safetensors`` because that is the name under which transformers' Trainer looks
for what it saved.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from .._linears import dense_weight, exact_names, weight_checksum
from .._version import __version__
from ..checkpoints import open_tensors, publish
from ..nn import SVFLinear
from .fits import PREFIX, targets, warn_of_misfits
from .lora_files import WEIGHTS
from .svf_layers import SVFConfig, saved_modules, svf_layers

FILE = "model.safetensors"
_FORMAT = "lowrank svf 1"


def save(model: nn.Module, path, expert: str | None = None) -> Path:
    """Write the experts (or one) to ``path``/model.safetensors; complete, or not there."""
    from safetensors.torch import save_file

    layers = svf_layers(model)
    if not layers:
        raise ValueError(f"model: expected SVF layers, got a {type(model).__name__} without")
    tensors, described = {}, {}
    for name, layer in layers.items():
        if expert is not None and expert not in layer.z:
            raise ValueError(f"adapter_name: no expert {expert!r}; {name} has {', '.join(layer.z)}")
        for e, p in layer.z.items():
            if expert in (None, e):
                tensors[f"{name}.z.{e}"] = p.detach().cpu().contiguous()
        described[name] = {"k": layer.k, "weight": checksum(layer)}
    saved = saved_modules(model)
    for name, module in saved.items():
        for e in module.modules_to_save if expert is None else [expert]:
            for key, t in module.tensors(e).items():
                tensors[f"{name}.modules_to_save.{e}.{key}"] = (
                    t.detach().cpu().clone(memory_format=torch.contiguous_format)
                )
    first = next(iter(layers.values()))
    config = getattr(model, "svf_config", None)
    if config is None:
        options = dict(parametrization=first.parametrization, normalize=first.normalize, mode=first.mode)
        config = SVFConfig(k=None, target_modules=list(layers), **options)
    metadata = {
        "format": "pt",
        "lowrank": json.dumps(
            {
                "format": _FORMAT,
                "version": __version__,
                "config": {key: value for key, value in dataclasses.asdict(config).items() if value is not None},
                "order": "descending singular values",
                "sign": "the entry of largest magnitude of each column of U is positive",
                "active": first.active_expert if expert is None else expert,
                "layers": described,
                "modules_to_save": list(saved),
            }
        ),
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".lowrank-") as scratch:
        save_file(tensors, Path(scratch) / FILE, metadata=metadata)
        publish(Path(scratch) / FILE, path / FILE)
    return path


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """(description, vectors) of a directory that :func:`save` wrote; None if it holds something else."""
    file = Path(path) / FILE
    if not file.is_file():
        return None
    with open_tensors(file) as opened:
        text = (opened.metadata() or {}).get("lowrank")
        description = None if text is None else json.loads(text)
        if description is None or description.get("format") != _FORMAT:
            return None
        return description, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def write_lora(model: nn.Module, path, peft, expert: str | None = None) -> None:
    """The expert (the active one) as the rank-k LoRA it is: A = Vh, B = U diag(σ (z - 1)), in PEFT's two files, fp32.

    Modules that are trained as a whole go along as PEFT's ``modules_to_save``.
    """
    from safetensors.torch import save_file

    layers, tensors = svf_layers(model), {}
    for name, layer in layers.items():
        with torch.no_grad():
            A, m, B = layer.update(expert)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A.float().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (B.float() * m).cpu().contiguous()
    saved = saved_modules(model)
    for name, module in saved.items():
        for key, t in module.tensors(expert or module.active_expert).items():
            tensors[f"{PREFIX}{name}.{key}"] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    first = next(iter(layers.values()))
    modules, parameters = targets(model, exact_names(layers), list(layers), peft)
    ends = {name: r"\.weight" if f"{name}.weight" in parameters else "" for name in layers}
    names = {f"^{exact_names([name])}{ends[name]}$": layer.k for name, layer in layers.items() if layer.k != first.k}
    config = peft.LoraConfig(
        r=first.k,
        lora_alpha=first.k,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern=names,
        alpha_pattern=names,
        modules_to_save=list(saved) or None,
        inference_mode=True,
    )
    save_file(tensors, Path(path) / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(path)
    warn_of_misfits(model, Path(path), tensors, peft)


def checksum(layer: SVFLinear) -> str:
    """Of the frozen weight, computed once."""
    if layer._quantised_checksum is not None:
        return layer._quantised_checksum
    weight = layer.base_layer.weight
    key = None if weight.is_inference() else (weight._version, weight.data_ptr())  # as what a merged layer keeps
    known = layer.__dict__.get("_checksum_key", (None, None))
    if key is None or known[0] is not weight or known[1] != key:
        layer._checksum, layer._checksum_key = weight_checksum(dense_weight(layer.base_layer)), (weight, key)
    return layer._checksum
