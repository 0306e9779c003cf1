"""Every public function, and every public method of a public class, says the types of all it takes and of what it gives.

Whether they are the right ones is mypy's to say (``make lint``).
"""

import importlib
import inspect
import types
import typing

import pytest

import lowrank

MODULES = [
    "lowrank",
    "lowrank.analysis",
    "lowrank.adapters",
    "lowrank.adapters.factor_files",
    "lowrank.bits",
    "lowrank.delta",
    "lowrank.integrations.peft",
    "lowrank.integrations.transformers",
    "lowrank.integrations.trl",
    "lowrank.nn",
    "lowrank.ops",
    "lowrank.ops.materialize",
    "lowrank.optim",
    "lowrank.svd",
    "lowrank.testing",
]
INTERPRETER = {"__init__", "__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__", "__contains__"}


def public(module: types.ModuleType) -> dict[str, object]:
    """What it offers: its ``__all__``, or what was made in it and has no underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            n for n, it in vars(module).items() if n[0] != "_" and getattr(it, "__module__", "") == module.__name__
        ]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names}


def functions(name: str, value: object) -> dict[str, object]:
    """The function itself; of a class, those that were written in it."""
    if inspect.isfunction(value):
        return {name: value}
    found = {}
    if inspect.isclass(value) and value.__module__.startswith("lowrank"):
        for key, method in vars(value).items():
            method = getattr(method, "fget", getattr(method, "__func__", method))
            written = inspect.isfunction(method) and not method.__code__.co_filename.startswith("<")
            if written and (not key.startswith("_") or key in INTERPRETER):
                found[f"{name}.{key}"] = method
    return found


def missing(function: object) -> list[str]:
    """The names of what ``function`` says nothing of."""
    import peft
    import torch.distributed
    import transformers
    from transformers.generation.utils import GenerateOutput

    # imported for type checkers alone
    names = {name: getattr(peft, name) for name in ("LoraConfig", "PeftModel")}
    names |= {"ProcessGroup": torch.distributed.ProcessGroup, "GenerateOutput": GenerateOutput}
    names |= {"LinearCrossEntropyOptions": getattr(torch.nn, "LinearCrossEntropyOptions", object)}
    for name in ("PreTrainedModel", "TrainerControl", "TrainerState", "TrainingArguments"):
        names[name] = getattr(transformers, name)
    hints = typing.get_type_hints(function, localns=names)
    parameters = [
        name for name in inspect.signature(function).parameters if name not in ("self", "cls") and name[0] != "_"
    ]
    returned = [] if function.__name__ == "__init__" else ["return"]
    return [name for name in (*parameters, *returned) if name not in hints]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_says_its_types(name):
    pytest.importorskip("peft")
    if name.endswith(".trl"):
        pytest.importorskip("trl")
    offered = public(importlib.import_module(name))
    said = {key: missing(f) for one, value in offered.items() for key, f in functions(one, value).items()}
    assert said
    assert {key: names for key, names in said.items() if names} == {}


def test_finds_what_is_missing():
    def function(x, y: int) -> None: ...

    class Layer:
        __module__ = "lowrank.nn"

        def forward(self, x: int): ...

        @property
        def scaling(self): ...

    assert missing(function) == ["x"]
    assert {key: missing(f) for key, f in functions("Layer", Layer).items()} == {
        "Layer.forward": ["return"],
        "Layer.scaling": ["return"],
    }


def test_stats_is_what_its_type_says():
    assert lowrank.stats().keys() == typing.get_type_hints(lowrank._stats.Stats).keys()
