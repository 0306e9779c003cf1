"""Which calls ran on lowrank, which fell back to the host library's own code, and why."""

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import TypedDict

import torch
from torch import nn

_FUSED, _SHARED = "", "\0shared"  # no reasons
_all: Counter[str] = Counter()
# by id, while the layer lives: a WeakKeyDictionary costs two more frames a call
_by_layer: dict[int, tuple[weakref.ref[nn.Module], Counter[str]]] = {}
_warned: set[str] = set()
_strict = False


class FallbackError(RuntimeError):
    """A layer could not take lowrank's path while :func:`strict` was on."""


class strict:
    """Raise :class:`FallbackError` instead of falling back.  A switch, and a context manager that puts it back::

    lowrank.strict()  # from here on
    with lowrank.strict():  # in here
    lowrank.strict(False)  # fall back again
    """

    def __init__(self, enabled: bool = True):
        global _strict
        self.before, _strict = _strict, enabled

    def __enter__(self) -> "strict":
        return self

    def __exit__(self, *exc: object) -> None:
        global _strict
        _strict = self.before


class Stats(TypedDict):
    """What :func:`stats` counts."""

    fused: int
    shared: int
    fallback: dict[str, int]
    untouched: dict[str, int]


def is_strict() -> bool:
    return _strict


def stats(model: nn.Module | None = None) -> Stats:
    """``{"fused": calls, "shared": calls, "fallback": {reason: calls}, "untouched": {class: layers}}`` since the start.

    ``shared``: of the fused calls, those that a sibling (q/k/v, gate/up) had computed already.

    With a ``model``, of its layers alone, and ``untouched`` counts its adapter layers that lowrank never sees: classes it
    does not cover (embeddings, convolutions, GPTQ, ...), covered ones that were not patched, and
    SVF layers that the model has not called since it read their weight.
    Code under ``torch.compile`` is counted when it is traced, not when it runs, and in ``stats()`` alone: which layer it was
    would be a guard on that layer, and so a recompilation for each of those that share a graph.
    """
    if model is None:
        counts, untouched = _all, {}
    else:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        counts = sum((_counts(layer) for layer in model.modules() if id(layer) in _by_layer), Counter())
        untouched = _untouched(model)
    fallback = {reason: n for reason, n in sorted(counts.items()) if reason not in (_FUSED, _SHARED)}
    return {"fused": counts[_FUSED], "shared": counts[_SHARED], "fallback": fallback, "untouched": untouched}


def reset() -> None:
    """As in a new process: nothing counted, nothing warned of."""
    _all.clear()
    _by_layer.clear()
    _warned.clear()


def ran_fused(layer: nn.Module, shared: bool = False) -> None:
    """Count one call of ``layer`` that took lowrank's path, ``shared`` if a sibling had computed it."""
    if torch.compiler.is_compiling():
        _traced(_FUSED)
        return
    counts = _counts(layer)
    _all[_FUSED] += 1
    counts[_FUSED] += 1
    if shared:
        _all[_SHARED] += 1
        counts[_SHARED] += 1


def fell_back(layer: nn.Module, reason: str, library: str = "PEFT") -> None:
    """Count one call of ``layer`` that did not, warn once per reason, or raise under :class:`strict`."""
    if _strict:
        raise FallbackError(f"{type(layer).__name__} cannot run on lowrank: {reason}")
    text = f"lowrank falls back to {library}'s own code for some layers: {reason}"
    if torch.compiler.is_compiling():
        _traced(reason, text)
        return
    _count(layer, reason)
    _warn(reason, text)


def op_fell_back(reason: str, layers: Sequence[nn.Module] = ()) -> None:
    """Count one call of an op that PyTorch ran where a kernel should have; like :func:`fell_back` otherwise.

    ``layers``: whose call it was, if that is known.
    """
    if _strict:
        raise FallbackError(f"no kernel for this call: {reason}")
    if not layers:
        _all[reason] += 1
    for layer in layers:
        _count(layer, reason)
    _warn(reason, f"lowrank runs some calls in PyTorch instead of its kernels: {reason}")


# In the __dict__ of a layer: the forward of an adapted model in which it was last called; and, where its weight was read in
# a later one, whether that was told.
CALLED, READ = "_lowrank_called", "_lowrank_read"
_read: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()  # those of which it was not
_forwards = 0
_CALL = nn.Module._call_impl.__code__


def was_read(layer: nn.Module, frame: FrameType | None) -> None:
    """Note that ``frame`` reads the layer's weight, if a module's forward is running: it may be instead of calling it."""
    if READ in layer.__dict__ or layer.__dict__.get(CALLED) == _forwards:
        return
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    if frame is not None:
        layer.__dict__[READ], _read[id(layer)] = False, layer


def was_called(layer: nn.Module) -> None:
    """Note a call; that the weight was read for it, for its dtype, for instance, is forgotten."""
    layer.__dict__[CALLED] = _forwards
    if READ in layer.__dict__:
        layer.__dict__.pop(READ, None)
        _read.pop(id(layer), None)


def tell_read(model: nn.Module, *_: object) -> None:
    """A forward hook: warn of the layers of ``model`` whose weight it read and which it did not call."""
    global _forwards
    if torch.compiler.is_compiling():
        return
    _forwards += 1
    waiting = {id(layer) for ref in _read.valuerefs() if (layer := ref()) is not None}
    uncalled = {name: m for name, m in model.named_modules() if id(m) in waiting} if waiting else {}
    for layer in uncalled.values():
        layer.__dict__[READ] = True
        _read.pop(id(layer), None)
    if uncalled:
        names = ", ".join(list(uncalled)[:3]) + (", ..." if len(uncalled) > 3 else "")
        warnings.warn(
            f"{type(model).__name__} reads the weight of adapted layers instead of calling them, and their adapters do"
            f" nothing there: {names} ({len(uncalled)} in all)",
            stacklevel=2,
        )


def _traced(reason: str, text: str | None = None) -> None:
    _all[reason] += 1
    if text is not None:
        _warn(reason, text)


# Dynamo runs it while it traces and leaves it out of the graph: torch.compiler.assume_constant_result, which imports Dynamo.
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no attribute of functions


def _warn(reason: str, text: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(text, stacklevel=5)


def _count(layer: nn.Module, reason: str) -> None:
    _all[reason] += 1
    _counts(layer)[reason] += 1


def layer_of(key: int) -> nn.Module | None:
    """The counted layer with that id, while it lives."""
    return _by_layer[key][0]() if key in _by_layer else None


def _counts(layer: nn.Module) -> Counter[str]:
    key = id(layer)
    entry = _by_layer.get(key)
    if entry is None or entry[0]() is not layer:

        def forget(ref):
            if key in _by_layer and _by_layer[key][0] is ref:
                del _by_layer[key]

        entry = _by_layer[key] = weakref.ref(layer, forget), Counter()
    return entry[1]


def _untouched(model: nn.Module) -> dict[str, int]:
    # looked up, not imported: without PEFT there are none, and this file is also part of a package that may not name it
    peft = sys.modules.get("peft.tuners.tuners_utils")
    layers = (
        [] if peft is None else [m for m in model.modules() if isinstance(m, peft.BaseTunerLayer) and not is_ours(m)]
    )
    layers += [m for m in model.modules() if READ in m.__dict__]
    return dict(Counter(".".join([type(m).__module__.split(".")[-2], type(m).__name__]) for m in layers))


def is_ours(layer: nn.Module) -> bool:
    """Whether calls of ``layer`` come to lowrank first: by its class, or by a forward of its own, which goes before."""
    return getattr(layer.forward, "_is_lowrank", False)
