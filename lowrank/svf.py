"""SVF on a whole model: ``adapt`` with an SVFConfig, experts, mixtures, and their files.

A file holds what was trained, one fp32 vector per layer and expert beside the modules that are trained as a whole, and in
its metadata the config, k, the order of the directions and a checksum of each layer's weight: vectors are refused by a model
whose weights are others.  It is called
``model.safetensors`` because that is the name under which transformers' Trainer looks for what it saved.
"""

import contextlib
import copy
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import _stats
from ._linears import dense_weight, has_exact_weight, target_layers, weight_checksum, weight_shape
from ._version import __version__
from .factors import load_factors
from .nn import SVFLinear
from .nn.merging import ordinary, report_merge
from .nn.svf import PARAMETRIZATIONS, check_name
from .svd import SVDFactors, svd_factors

FILE = "model.safetensors"
_FORMAT = "lowrank svf 1"


@dataclass(frozen=True)
class SVFConfig:
    """What :func:`lowrank.adapt` scales, and how (Transformer², arXiv 2501.06252).

    Args:
        k: how many of each weight's largest singular values; None for all.
        target_modules: "all-linear" (the output head not included), a list of names or endings of names as PEFT matches
            them, or a regular expression that matches whole names.
        parametrization, normalize, mode, factors_dtype: :class:`lowrank.nn.SVFLinear`'s; factors_dtype by torch name.
        method: :func:`lowrank.svd_factors`'s.
        factors: a file of ``lowrank tools factors``; without one the factors are computed by ``adapt``.
        modules_to_save: endings of the names of modules that are trained as they are, a copy for each expert, and saved
            with it, as PEFT's; no linear in them is scaled.  The head of a model for classification, question answering or
            multiple choice is one of them, since it may be new; with an empty list, none is.
    """

    k: int | None = None
    target_modules: str | list[str] = "all-linear"
    parametrization: str = "free"
    normalize: str | None = None
    mode: str = "auto"
    factors_dtype: str | None = None
    method: str = "auto"
    factors: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k: expected None or an integer of at least 1, got {self.k!r}")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {self.parametrization!r}"
            )
        if self.factors_dtype is not None and not isinstance(getattr(torch, self.factors_dtype, None), torch.dtype):
            raise ValueError(f"factors_dtype: expected a torch dtype's name, got {self.factors_dtype!r}")
        if (names := self.modules_to_save) is not None:
            if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) and name for name in names):
                raise TypeError(f"modules_to_save: expected None or a list of names, got {names!r}")
            object.__setattr__(self, "modules_to_save", list(names))


def adapt(
    model: nn.Module,
    config: SVFConfig,
    ks: dict[str, int] | None = None,
    saved: list[str] | None = None,
    exact: Container[str] = (),
) -> nn.Module:
    """Replace the model's linears by :class:`lowrank.nn.SVFLinear`, in place, and freeze everything but the experts.

    The model stays what it was and gains methods: ``save_pretrained`` (experts only), ``add_expert``, ``set_expert``,
    ``disable_adapter`` and ``merge_and_unload``.  ``ks``: k of each layer where they differ.  ``saved``: the names that
    ``config.modules_to_save`` stands for.  ``exact``: the layers with factors of :func:`dense_weight`'s exact weight.
    """
    if svf_layers(model):
        raise ValueError("model: has SVF layers already; add_expert adds to them")
    saved = _saved_names(model, config.modules_to_save) if saved is None else saved
    layers = target_layers(model, config.target_modules)
    layers = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(tuple(f"{s}." for s in saved))}
    if not layers:
        raise ValueError(
            f"target_modules: {config.target_modules!r} matches nothing outside modules_to_save ({', '.join(saved)})"
        )
    ks = ks or dict.fromkeys(layers, config.k)
    for name, layer in layers.items():
        least = min(weight_shape(layer))
        if ks[name] is not None and ks[name] > least:
            raise ValueError(f"k: {ks[name]} is more than the {least} singular values of {name}")
    known = {} if config.factors is None else load_factors(config.factors, model)
    if config.factors is not None and (missing := [name for name in layers if name not in known]):
        raise ValueError(f"factors: {config.factors} has none for {missing[0]} ({len(missing)} layers are missing)")
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        made = {
            name: _layer(name, layer, config, ks[name], known.get(name), name in exact)
            for name, layer in layers.items()
        }
        made |= {name: _Saved(model.get_submodule(name)) for name in saved}
    except BaseException:
        for p in trained:
            p.requires_grad_(True)
        raise
    for name, new in made.items():
        _put(model, name, new)
    model.__class__ = _with_experts(type(model))
    model.svf_config = config
    model.register_forward_hook(_stats.tell_read)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _layer(name: str, linear: nn.Module, config: SVFConfig, k, factors: SVDFactors | None, exact: bool) -> SVFLinear:
    weight = dense_weight(linear, exact=True) if exact else None
    if exact and factors is None:
        with ordinary():
            factors = svd_factors(weight, k, method=config.method)
    if factors is not None and k is not None:
        if factors.S.shape[0] < k:
            raise ValueError(f"k: {config.factors} has {factors.S.shape[0]} directions of {name}, {k} are asked")
        factors = SVDFactors(factors.U[:, :k], factors.S[:k], factors.Vh[:k])
    try:
        new = SVFLinear.from_linear(
            linear,
            k,
            mode=config.mode,
            parametrization=config.parametrization,
            normalize=config.normalize,
            factors=factors,
            method=config.method,
            factors_dtype=None if config.factors_dtype is None else getattr(torch, config.factors_dtype),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if exact:
        new._quantised_checksum = weight_checksum(weight)
    return new.train(linear.training)


def _saved_names(model: nn.Module, endings: list[str] | None) -> list[str]:
    """The outermost modules with such names, by PEFT's own matching, and the model's head."""
    if endings == []:
        return []
    names = [name for name, _ in model.named_modules() if name]
    if missing := [ending for ending in endings or () if not any(name.endswith(ending) for name in names)]:
        raise ValueError(f"modules_to_save: no module of {type(model).__name__} is called {missing[0]!r}")
    heads, chosen = _heads(model), []
    for name in names:  # a module comes before what is in it
        wanted = name in heads or name.endswith(tuple(endings or ()))
        if wanted and not name.startswith(tuple(f"{each}." for each in chosen)):
            chosen.append(name)
    return chosen


def _heads(model: nn.Module) -> list[str]:
    """What a model of transformers for a task with labels has beside its base model, or what PEFT takes for that."""
    if not any(re.search(_LABELLED, cls.__name__) for cls in type(model).__mro__):
        return []
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if isinstance(base, nn.Module):
        return [name for name, child in children.items() if child is not base]
    return [name for name in ("classifier", "score", "qa_outputs") if name in children]


_LABELLED = r"For(\w*Classification|QuestionAnswering|MultipleChoice)$"


class _Saved(nn.Module):
    """A module that is trained as a whole, a copy for each expert.  Names in the state dict are PEFT's."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.disabled = False
        self.training = module.training
        self.add_expert("default")

    def forward(self, *args, **kwargs):
        return self._active()(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "active_expert" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._active(), name)

    def _active(self) -> nn.Module:
        return self.original_module if self.disabled else self.modules_to_save[self.active_expert]

    def add_expert(self, name: str) -> None:
        with ordinary():
            self.modules_to_save[name] = copy.deepcopy(self.original_module)
        self.set_expert(name)

    def set_expert(self, name: str, trainable: bool = True) -> None:
        self.active_expert = name
        for expert, module in self.modules_to_save.items():
            for p in module.parameters():
                p.requires_grad_(trainable and expert == name and p.is_floating_point())

    def rename_expert(self, name: str, new: str) -> None:
        self.modules_to_save = nn.ModuleDict({new if e == name else e: m for e, m in self.modules_to_save.items()})
        self.active_expert = new if self.active_expert == name else self.active_expert

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return self.modules_to_save[name].state_dict()


def saved_modules(model: nn.Module) -> dict[str, _Saved]:
    """The modules that are trained as a whole, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Saved)}


def rename_expert(model: nn.Module, name: str, new: str) -> None:
    """Give an expert another name in every layer."""
    for layer in (svf_layers(model) | saved_modules(model)).values():
        layer.rename_expert(name, new)


def svf_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """The SVF layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFLinear)}


@contextlib.contextmanager
def expert_mix(model: nn.Module, alpha, experts: list[str] | None = None):
    """Inside, every row sees its own mixture: z = Σ_e alpha_e z_e, all rows in one batch and W untouched.

    Modules that are trained as a whole (``modules_to_save``) are not mixed: the active expert's run.

    Args:
        alpha: [E] for everything, [B,E] per sequence, [B,T,E] per token; or a dict of those by layer name, where layers it
            does not name use the active expert.  It may require grad.
        experts: names, in alpha's order; by default all, in the order they were added.

    Raises: ValueError or TypeError on what does not fit the model; in forward, if alpha's rows are not the batch's.
    """
    layers = svf_layers(model)
    if not layers:
        raise ValueError("model: has no SVF layers; adapt it with an SVFConfig")
    given = alpha if isinstance(alpha, dict) else dict.fromkeys(layers, alpha)
    if unknown := given.keys() - layers.keys():
        raise ValueError(f"alpha: {sorted(unknown)[0]} is no SVF layer of this model")
    for name, weights in given.items():
        names = layers[name].experts if experts is None else list(experts)
        if missing := [e for e in names if e not in layers[name].z]:
            raise ValueError(f"experts: no expert {missing[0]!r}; {name} has {', '.join(layers[name].z)}")
        if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
            raise TypeError(f"alpha: expected a float tensor [..., {len(names)}], got {type(weights).__name__}")
        if weights.dim() == 0 or weights.shape[-1] != len(names):
            raise ValueError(f"alpha: expected [..., {len(names)}] for {', '.join(names)}, got {list(weights.shape)}")
        if layers[name].merged:
            raise ValueError(f"model: {name} is merged; unmerge it, a mixture has no single weight")
    before = {name: layers[name]._mix for name in given}
    try:
        for name, weights in given.items():
            layers[name]._mix = weights, tuple(layers[name].experts if experts is None else experts)
        yield model
    finally:
        for name, mix in before.items():
            layers[name]._mix = mix


class _Experts:
    """What a model gains by :func:`adapt`."""

    def add_expert(self, name: str) -> None:
        """An expert at z = 1 in every layer, and a copy of what is trained as a whole, made active."""
        if taken := [where for where, layer in svf_layers(self).items() if name in layer.z]:
            raise ValueError(f"name: there is an expert {name!r} in {taken[0]} already")
        for layer in (svf_layers(self) | saved_modules(self)).values():
            layer.add_expert(name)

    def set_expert(self, name: str) -> None:
        """Switch every layer to this expert, and let it alone train."""
        layers = svf_layers(self)
        if missing := [where for where, layer in layers.items() if name not in layer.z]:
            raise ValueError(f"name: no expert {name!r} in {missing[0]}, which has {', '.join(layers[missing[0]].z)}")
        for layer in (layers | saved_modules(self)).values():
            layer.set_expert(name)

    @property
    def active_expert(self) -> str:
        """The expert that runs and trains."""
        return next(iter(svf_layers(self).values())).active_expert

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside, the model is the one that was adapted."""
        layers = list(svf_layers(self).values())
        before = [(layer.disabled, layer._merged_weight) for layer in layers]
        saved = [(module, module.disabled) for module in saved_modules(self).values()]
        try:
            for module, _ in saved:
                module.disabled = True
            for layer in layers:
                layer.disabled, layer._merged_weight = True, None
            yield self
        finally:
            for layer, (disabled, merged) in zip(layers, before, strict=True):
                layer.disabled, layer._merged_weight = disabled, merged
            for module, disabled in saved:
                module.disabled = disabled

    @ordinary()
    def merge_and_unload(self) -> nn.Module:
        """The model with plain linears again, holding W' of the active expert: W itself is overwritten.

        All or nothing: nothing has changed when ValueError is raised, for a quantised layer, a z that is not finite, or,
        under :func:`lowrank.strict`, an update that rounding takes away.  One merged weight at a time is there beside its
        layer's; a call that runs out of memory may be repeated, and goes on where it was.
        """
        layers, reports = svf_layers(self), []
        for name, layer in layers.items():
            try:
                layer._refuse_merge()
                if _stats.is_strict():
                    report_merge(layer._merge()[1], layer.base_layer.weight.dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for name, layer in layers.items():
            merged, report = layer._merge()
            reports.append((report, merged.dtype))
            base, layer._cache = layer.base_layer, None  # which keeps the weight it was made from
            base.weight = nn.Parameter(layer._as_stored(merged).contiguous(), requires_grad=False)
            _put(self, name, base)
        for name, saved in saved_modules(self).items():
            _put(self, name, saved.modules_to_save[saved.active_expert])
        self.__class__ = _plain_class(self)
        del self.svf_config
        for key in [key for key, hook in self._forward_hooks.items() if hook is _stats.tell_read]:
            del self._forward_hooks[key]
        for report, dtype in reports:
            report_merge(report, dtype)
        return self

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, **_) -> None:
        """Write the experts alone (:func:`lowrank.save_adapter`), a few kilobytes; the base model is not saved."""
        if is_main_process:
            save(self, save_directory)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """nn.Module's; a dict of experts alone is complete."""
        own = {f"{name}.z.{e}" for name, layer in svf_layers(self).items() for e in layer.z}
        for name, saved in saved_modules(self).items():
            own |= {f"{name}.modules_to_save.{key}" for key in saved.modules_to_save.state_dict()}
        if state_dict and state_dict.keys() <= own:
            found = super().load_state_dict(state_dict, False, assign)
            found.missing_keys[:] = sorted(own - state_dict.keys())
            if strict and found.missing_keys:
                raise RuntimeError(f"Missing key(s) in state_dict: {', '.join(found.missing_keys)}")
            return found
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce_ex__(self, protocol):
        # by the class that was adapted, which has an importable name
        make, arguments, *rest = super().__reduce_ex__(protocol)
        arguments = tuple(_plain_class(self) if each is type(self) else each for each in arguments)
        return _rebuild, (make, arguments), *rest


def _rebuild(make, arguments: tuple) -> nn.Module:
    model = make(*arguments)
    model.__class__ = _with_experts(type(model))
    return model


def _plain_class(model: nn.Module) -> type:
    return next(cls for cls in type(model).__mro__ if _Experts in cls.__bases__).__bases__[1]


_classes: dict[type, type] = {}


def _with_experts(cls: type) -> type:
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _classes[cls] = type(cls.__name__, (_Experts, cls), names)
    return _classes[cls]


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
        described[name] = {"k": layer.k, "weight": _checksum(layer)}
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
        "lowrank": json.dumps({
            "format": _FORMAT,
            "version": __version__,
            "config": {key: value for key, value in dataclasses.asdict(config).items() if value is not None},
            "order": "descending singular values",
            "sign": "the entry of largest magnitude of each column of U is positive",
            "active": first.active_expert if expert is None else expert,
            "layers": described,
            "modules_to_save": list(saved),
        }),
    }  # fmt: skip
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".lowrank-") as scratch:
        save_file(tensors, Path(scratch) / FILE, metadata=metadata)
        os.replace(Path(scratch) / FILE, path / FILE)
    return path


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """(description, vectors) of a directory that :func:`save` wrote; None if it holds something else."""
    from safetensors import SafetensorError, safe_open

    file = Path(path) / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("lowrank")
            description = None if text is None else json.loads(text)
            if description is None or description.get("format") != _FORMAT:
                return None
            return description, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({file.stat().st_size} bytes): {error}") from error


def load(model: nn.Module, path, description: dict, vectors: dict, name: str, trainable: bool) -> nn.Module:
    """Put what :func:`read` found into the model, adapting it first if need be; nothing changes if it does not fit."""
    from ._linears import exact_names

    check_name(name)
    config = SVFConfig(**description["config"])
    wanted, layers = description["layers"], svf_layers(model)
    saved = description.get("modules_to_save", [])
    marks = tuple(f"{each}.modules_to_save." for each in saved)
    whole = {key: vectors.pop(key) for key in list(vectors) if key.startswith(marks)}
    experts = sorted({key.rpartition(".z.")[2] for key in vectors}, key=lambda e: (e != description["active"], e))
    expected = {f"{layer}.z.{e}" for layer in wanted for e in experts}
    if vectors.keys() != expected:
        odd = sorted(expected ^ vectors.keys())
        raise ValueError(f"{path}: damaged: {len(odd)} vectors missing or unknown, such as {odd[0]}")
    plain = layers or target_layers(model, exact_names(wanted))
    if plain.keys() != wanted.keys():
        odd = sorted(plain.keys() ^ wanted.keys())
        raise ValueError(f"{path}: experts of another model: {odd[0]} is on one side only")
    _check_saved(model, path, saved, experts, whole)
    exact = set()
    for layer, facts in wanted.items():
        for e in experts:
            if vectors[f"{layer}.z.{e}"].shape != (facts["k"],):
                raise ValueError(f"{path}: {layer}.z.{e} is {list(vectors[f'{layer}.z.{e}'].shape)}, k is {facts['k']}")
        if layers and (layers[layer].k, layers[layer].parametrization, layers[layer].normalize) != (
            facts["k"],
            config.parametrization,
            config.normalize,
        ):
            raise ValueError(
                f"{path}: {layer} has k={facts['k']}, {config.parametrization}, normalize={config.normalize}; the"
                f" model's has k={layers[layer].k}, {layers[layer].parametrization}, {layers[layer].normalize}"
            )
        found = _checksum(layers[layer]) if layers else weight_checksum(dense_weight(plain[layer]))
        if found != facts["weight"] and not layers and has_exact_weight(plain[layer], facts["weight"]):
            exact.add(layer)
        elif found != facts["weight"]:
            raise ValueError(
                f"{path}: experts of another weight: {layer} has checksum {found[:12]}, the file {facts['weight'][:12]}"
                " (another model, or the same in another dtype)"
            )
    if not layers:
        ks = {layer: facts["k"] for layer, facts in wanted.items()}
        model = adapt(model, dataclasses.replace(config, target_modules=exact_names(wanted)), ks, saved, exact)
        model.svf_config, layers = config, svf_layers(model)
        for layer in layers.values():
            del layer.z["default"]
        for module in saved_modules(model).values():
            del module.modules_to_save["default"]
    alone = len(experts) == 1
    for e in experts:
        for layer, module in layers.items():
            target = name if alone else e
            if target in module.z:
                with torch.no_grad():
                    module.z[target].copy_(vectors[f"{layer}.z.{e}"])
            else:
                with ordinary():
                    module.z[target] = nn.Parameter(vectors[f"{layer}.z.{e}"].to(module.S.device, copy=True))
        for where, module in saved_modules(model).items():
            if target not in module.modules_to_save:
                module.add_expert(target)
            mark = f"{where}.modules_to_save.{e}."
            module.modules_to_save[target].load_state_dict(
                {key.removeprefix(mark): t for key, t in whole.items() if key.startswith(mark)}
            )
    active = name if alone or name in experts else experts[0]
    for module in layers.values():
        module.set_expert(active)
        module.z[active].requires_grad_(trainable)
    for module in saved_modules(model).values():
        module.set_expert(active, trainable)
    return model


def _check_saved(model: nn.Module, path, saved: list[str], experts: list[str], whole: dict) -> None:
    """Raise ValueError unless the modules that the file holds as a whole are the model's."""
    found = saved_modules(model)
    if svf_layers(model) and found.keys() != set(saved):
        odd = sorted(found.keys() ^ set(saved))
        raise ValueError(f"{path}: experts of another model: {odd[0]} is trained as a whole on one side only")
    modules, expected = dict(model.named_modules()), {}
    for name in saved:
        if name not in modules:
            raise ValueError(f"{path}: experts of another model: it has {name}, which {type(model).__name__} lacks")
        state = (found[name].original_module if name in found else modules[name]).state_dict()
        expected |= {f"{name}.modules_to_save.{e}.{key}": t.shape for e in experts for key, t in state.items()}
    if expected.keys() != whole.keys():
        odd = sorted(expected.keys() ^ whole.keys())
        raise ValueError(f"{path}: experts of another model: {odd[0]} is on one side only")
    for key, shape in expected.items():
        if whole[key].shape != shape:
            raise ValueError(
                f"{path}: experts of another model: {key} is {list(whole[key].shape)}, the model's {list(shape)}"
            )


def write_lora(model: nn.Module, path, peft, expert: str | None = None) -> None:
    """The expert (the active one) as the rank-k LoRA it is: A = Vh, B = U diag(σ (z - 1)), in PEFT's two files, fp32.

    Modules that are trained as a whole go along as PEFT's ``modules_to_save``.
    """
    from safetensors.torch import save_file

    from ._fits import targets, warn_of_misfits
    from ._linears import exact_names
    from .adapters import WEIGHTS

    layers, tensors = svf_layers(model), {}
    for name, layer in layers.items():
        with torch.no_grad():
            A, m, B = layer.update(expert)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.float().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = (B.float() * m).cpu().contiguous()
    saved = saved_modules(model)
    for name, module in saved.items():
        for key, t in module.tensors(expert or module.active_expert).items():
            tensors[f"base_model.model.{name}.{key}"] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
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


def _checksum(layer: SVFLinear) -> str:
    """Of the frozen weight, computed once."""
    if layer._quantised_checksum is not None:
        return layer._quantised_checksum
    weight = layer.base_layer.weight
    key = None if weight.is_inference() else (weight._version, weight.data_ptr())  # as what a merged layer keeps
    known = layer.__dict__.get("_checksum_key", (None, None))
    if key is None or known[0] is not weight or known[1] != key:
        layer._checksum, layer._checksum_key = weight_checksum(dense_weight(layer.base_layer)), (weight, key)
    return layer._checksum
