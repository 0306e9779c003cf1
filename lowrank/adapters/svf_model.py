"""SVF on a whole model: ``adapt`` with an SVFConfig, experts, mixtures, and experts put in from a file."""

import contextlib
import dataclasses
import re
from collections.abc import Container, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from .. import _stats
from .._linears import dense_weight, exact_names, has_exact_weight, target_layers, weight_checksum, weight_shape
from ..nn import SVFLinear
from ..nn.merging import ordinary, report_merge
from ..nn.svf import check_name
from ..svd import SVDFactors, svd_factors
from .factor_files import load_factors
from .svf_files import checksum, save
from .svf_layers import SavedModule, SVFConfig, saved_modules, svf_layers

Model = TypeVar("Model", bound=nn.Module)


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
        replacements = {
            name: _layer(name, layer, config, ks[name], known.get(name), name in exact)
            for name, layer in layers.items()
        }
        replacements |= {name: SavedModule(model.get_submodule(name)) for name in saved}
    except BaseException:
        for p in trained:
            p.requires_grad_(True)
        raise
    for name, new in replacements.items():
        model.set_submodule(name, new)
    model.__class__ = _with_experts(type(model))
    model.svf_config = config
    model.register_forward_hook(_stats.tell_read)
    return model


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
        if wanted and not name.startswith(tuple(f"{outer}." for outer in chosen)):
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


@contextlib.contextmanager
def expert_mix(
    model: Model, alpha: torch.Tensor | dict[str, torch.Tensor], experts: Sequence[str] | None = None
) -> Iterator[Model]:
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
    alphas = alpha if isinstance(alpha, dict) else dict.fromkeys(layers, alpha)
    if unknown := alphas.keys() - layers.keys():
        raise ValueError(f"alpha: {sorted(unknown)[0]} is no SVF layer of this model")
    for name, weights in alphas.items():
        names = layers[name].experts if experts is None else list(experts)
        if missing := [e for e in names if e not in layers[name].z]:
            raise ValueError(f"experts: no expert {missing[0]!r}; {name} has {', '.join(layers[name].z)}")
        if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
            raise TypeError(f"alpha: expected a float tensor [..., {len(names)}], got {type(weights).__name__}")
        if weights.dim() == 0 or weights.shape[-1] != len(names):
            raise ValueError(f"alpha: expected [..., {len(names)}] for {', '.join(names)}, got {list(weights.shape)}")
        if layers[name].merged:
            raise ValueError(f"model: {name} is merged; unmerge it, a mixture has no single weight")
    before = {name: layers[name]._mix for name in alphas}
    try:
        for name, weights in alphas.items():
            layers[name]._mix = weights, tuple(layers[name].experts if experts is None else experts)
        yield model
    finally:
        for name, mix in before.items():
            layers[name]._mix = mix


class _Experts:
    """What a model gains by :func:`adapt`."""

    def add_expert(self, name: str) -> None:
        """An expert at z = 1 in every layer, and a copy of what is trained as a whole, made active."""
        if holders := [where for where, layer in svf_layers(self).items() if name in layer.z]:
            raise ValueError(f"name: there is an expert {name!r} in {holders[0]} already")
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
            self.set_submodule(name, base)
        for name, saved in saved_modules(self).items():
            self.set_submodule(name, saved.modules_to_save[saved.active_expert])
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
            incompatible = super().load_state_dict(state_dict, False, assign)
            incompatible.missing_keys[:] = sorted(own - state_dict.keys())
            if strict and incompatible.missing_keys:
                raise RuntimeError(f"Missing key(s) in state_dict: {', '.join(incompatible.missing_keys)}")
            return incompatible
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce_ex__(self, protocol):
        # by the class that was adapted, which has an importable name
        make, arguments, *rest = super().__reduce_ex__(protocol)
        arguments = tuple(_plain_class(self) if argument is type(self) else argument for argument in arguments)
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


def load(model: nn.Module, path, description: dict, vectors: dict, name: str, trainable: bool) -> nn.Module:
    """Put what :func:`read` found into the model, adapting it first if need be; nothing changes if it does not fit."""
    check_name(name)
    config = SVFConfig(**description["config"])
    wanted, layers = description["layers"], svf_layers(model)
    saved = description.get("modules_to_save", [])
    marks = tuple(f"{where}.modules_to_save." for where in saved)
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
        actual = checksum(layers[layer]) if layers else weight_checksum(dense_weight(plain[layer]))
        if actual != facts["weight"] and not layers and has_exact_weight(plain[layer], facts["weight"]):
            exact.add(layer)
        elif actual != facts["weight"]:
            raise ValueError(
                f"{path}: experts of another weight: {layer} has checksum {actual[:12]}, the file {facts['weight'][:12]}"
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
    present = saved_modules(model)
    if svf_layers(model) and present.keys() != set(saved):
        odd = sorted(present.keys() ^ set(saved))
        raise ValueError(f"{path}: experts of another model: {odd[0]} is trained as a whole on one side only")
    modules, expected = dict(model.named_modules()), {}
    for name in saved:
        if name not in modules:
            raise ValueError(f"{path}: experts of another model: it has {name}, which {type(model).__name__} lacks")
        state = (present[name].original_module if name in present else modules[name]).state_dict()
        expected |= {f"{name}.modules_to_save.{e}.{key}": t.shape for e in experts for key, t in state.items()}
    if expected.keys() != whole.keys():
        odd = sorted(expected.keys() ^ whole.keys())
        raise ValueError(f"{path}: experts of another model: {odd[0]} is on one side only")
    for key, shape in expected.items():
        if whole[key].shape != shape:
            raise ValueError(
                f"{path}: experts of another model: {key} is {list(whole[key].shape)}, the model's {list(shape)}"
            )
