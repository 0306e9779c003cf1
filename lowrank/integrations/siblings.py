"""q/k/v and gate/up in one call: the first layer called computes for all, the others are handed their result.

A model's own attention code calls three layers, one after the other, with one tensor.  :class:`Siblings` lets the first call
run ``lora_projections`` over all of them: x is read once for every adapter, and backward is one node.  A sibling takes its
result only if it is called in that thread, with that very tensor, unchanged since, under the same autograd and autocast modes,
with the adapters it had; in every other case it computes alone, which is always right.  Under ``torch.compile`` (peft_layer.py)
and for inference tensors, whose changes cannot be seen, all compute alone.

What waits is dropped when a thread's next call of a patched layer, in whatever model, is none that it waits for: a forward that
failed, or that calls one of them alone, leaves nothing behind that outlives the next.
"""

import operator
import threading
import warnings
import weakref
from typing import NamedTuple

import torch
from torch import nn

from ..ops._boundary import autocast_dtype
from ..ops.linear import Projection
from ..ops.lora import lora_projections
from .peft_layer import thread

# Layers within one module that are called with one tensor, as transformers names them.  Of groups as large the first counts:
# in Bailing hybrid's MLA g_proj is called long after q_proj.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # MLA: DeepSeek and those after it
    ("q_proj", "kv_a_proj_with_mqa"),
    # the delta rule's attentions: Kimi Linear in both its codes, GLM-5, Bailing hybrid, OLMo hybrid
    (
        *("q_proj", "k_proj", "v_proj", "f_a_proj", "forget_gate.f_a_proj", "forget_gate.f_proj"),
        *("b_proj", "a_proj", "g_a_proj", "g_proj"),
    ),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen3.5
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# What such a module calls with another tensor before it has called all of them.
_BETWEEN = ("q_b_proj", "q_gate_proj", "f_b_proj", "forget_gate.f_b_proj")
# Cross-attention feeds q and k/v from two tensors.
_CROSS = ("cross", "encoder_attn", "encdec", "enc_dec")
_PATIENCE = 8  # results that nobody took beyond those taken, after which a warning says what they cost


class _Result(NamedTuple):
    """One sibling's result, and all that it was made from."""

    y: torch.Tensor
    x: weakref.ref
    modes: tuple
    state: tuple


class _Kept(threading.local):
    """What a thread's last call made for those not called yet, by their ids, and None for those that compute alone.

    It goes with the thread, and with the group.
    """

    def __init__(self):
        self.results: dict[int, _Result | None] = {}


class Siblings:
    """The layers of one group and what the last call in each thread made for those not called yet.

    Those called in between are among ``layers`` too, so that their calls are waited for, but have no group: they compute alone.
    """

    def __init__(self, layers: list[nn.Module], shared_mask: bool):
        self.layers, self.shared_mask = layers, shared_mask
        self._kept, self._ref = _Kept(), weakref.ref(self)
        self._used, self._wasted = 0, 0  # results handed over, and results nobody took

    def take(self, layer: nn.Module) -> _Result | None:
        """What waits in this thread for ``layer``.  If it is not waited for, all the rest is dropped."""
        results, key = self._kept.results, id(layer)
        if key in results:
            return results.pop(key)
        if results:
            self._drop()
        return None

    def forget(self) -> None:
        """Drop what waits, in every thread."""
        self._kept = _Kept()

    def call(
        self, layer: nn.Module, x: torch.Tensor, projection: Projection, projection_of, waiting: _Result | None
    ) -> torch.Tensor | None:
        """``layer``'s result, or None if it is to compute alone.

        ``projection_of(sibling, x)``: what a sibling would compute for x, or None if it cannot take part.
        ``waiting``: what :meth:`take` had for this call.
        """
        if waiting is None:
            return self._lead(layer, x, projection, projection_of)
        if waiting.x() is x and waiting.modes == _modes(x) and _same(waiting.state, _state(projection)):
            self._used += 1
            return waiting.y
        self._waste(1)
        return None

    def _lead(self, layer, x, projection, projection_of):
        if x.is_inference() or layer not in self.layers or _state(projection) is None:  # nn.DataParallel's replica
            return None
        if self._kept.results:
            self._drop()
        group, members = [projection], {}
        for sibling in self.layers:
            if sibling is not layer:
                its_projection = projection_of(sibling, x)
                state = members[id(sibling)] = None if its_projection is None else _state(its_projection)
                if state is not None:
                    group.append(its_projection)
        if len(group) == 1:
            return None
        ref, modes = weakref.ref(x), _modes(x)
        y, *rest = lora_projections(x, tuple(group), shared_mask=self.shared_mask)
        for key, state in members.items():
            if state is not None:
                members[key] = _Result(rest.pop(0), ref, modes, state)
        self._kept.results = members
        thread.group = self._ref
        return y

    def _drop(self):
        self._waste(sum(result is not None for result in self._kept.results.values()))
        self._kept.results, thread.group = {}, None

    def _waste(self, results: int) -> None:
        # It only warns: a group that changed its mind between a forward and its recomputation would break checkpointing.
        self._wasted += results
        if self._wasted > self._used + _PATIENCE:
            warnings.warn(
                "lowrank computes q/k/v or gate/up together here, but they are not called with one tensor:"
                " patch(model, siblings=False) saves that work",
                stacklevel=5,
            )


def find(model: nn.Module, is_member) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    """(a group of ``model``, the layers called in between) for each: :data:`NAMES` within one module for which ``is_member``
    holds.  A layer is in one group: the one of which most are there, or the first of those.
    """
    layers = {path: module for path, module in model.named_modules(remove_duplicate=False) if is_member(module)}
    groups, grouped = [], set()
    for path, module in model.named_modules():
        if any(word in path.lower() for word in _CROSS) or getattr(module, "is_cross_attention", False):
            continue
        prefix = f"{path}." if path else ""
        *present, between = (
            [layers[prefix + n] for n in names if prefix + n in layers] for names in (*NAMES, _BETWEEN)
        )
        for group in sorted(present, key=len, reverse=True):
            group = [layer for layer in dict.fromkeys(group) if layer not in grouped]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                groups.append((group, between))
                grouped.update(group)
    return groups


def _modes(x: torch.Tensor) -> tuple:
    """Everything beside its arguments that a call's result depends on."""
    kind = "cpu" if x.is_cpu else x.device.type
    stream = torch.cuda.current_stream(x.device).cuda_stream if kind == "cuda" else None
    if kind == "cpu":
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    else:  # devices that know no autocast
        autocast = autocast_dtype(x)
    at = x.data_ptr() if type(x) is torch.Tensor else None  # x.data = ... is no new version
    return x._version, at, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, stream


def _state(projection: Projection) -> tuple[list, list, list] | None:
    """(its tensors, its numbers, what changes where a tensor is written to, replaced by ``.data``, or frozen); None if a write
    could not be seen.
    """
    weight, bias, adapters, _, _, _ = projection
    tensors, numbers, versions = [weight], [len(adapters)], []
    if bias is not None:
        tensors.append(bias)
    for A, B, scaling, lora_bias, p in adapters:
        tensors += A, B
        if lora_bias is not None:
            tensors.append(lora_bias)
        (tensors if isinstance(scaling, torch.Tensor) else numbers).append(scaling)
        numbers.append(p)
    for t in tensors:
        if t.is_inference():
            return None
        versions += t._version, t.data_ptr(), t.requires_grad
    return tensors, numbers, versions


def _same(before: tuple, now: tuple | None) -> bool:
    return (
        now is not None
        and len(before[0]) == len(now[0])
        and all(map(operator.is_, before[0], now[0]))
        and before[1:] == now[1:]
    )
