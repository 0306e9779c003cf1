"""What of a model belongs to SVF's experts: its SVF layers, the modules that are trained as a whole, and the config of both."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..nn import SVFLinear
from ..nn.merging import ordinary
from ..nn.svf import PARAMETRIZATIONS


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

    def __post_init__(self) -> None:
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


class SavedModule(nn.Module):
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


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The modules that are trained as a whole, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SavedModule)}


def rename_expert(model: nn.Module, name: str, new: str) -> None:
    """Give an expert another name in every layer."""
    for layer in (svf_layers(model) | saved_modules(model)).values():
        layer.rename_expert(name, new)


def svf_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """The SVF layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFLinear)}
