"""q/k/v and gate/up in one call: the first layer called computes for all, the others are handed their result.

A model's own attention code calls three layers, one after the other, with one tensor.  :class:`Siblings` lets the first call
run ``lora_projections`` over all of them: x is read once for every adapter, and backward is one node.  A sibling takes its
result only if it is called in that thread, with that very tensor, unchanged since, under the same autograd and autocast modes,
with the adapters it had; in every other case it computes alone, which is always right.  Under ``torch.compile`` (layers.py)
and for inference tensors, whose changes cannot be seen, all compute alone.

What waits is dropped when a thread's next call of a patched layer, in whatever model, is none that it waits for: a forward that
failed, or that calls one of them alone, leaves nothing behind that outlives the next.
"""

import threading
import warnings
import weakref
from typing import NamedTuple

import torch
from torch import nn

from ..layers import thread
from ..ops.lora import Projection, autocast_dtype, lora_projections

# Children of one module that are called with one tensor, as transformers names them.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Cross-attention feeds q and k/v from two tensors.
_CROSS = ("cross", "encoder_attn", "encdec", "enc_dec")
_PATIENCE = 8  # results that nobody took beyond those taken, after which a warning says what they cost


class _Made(NamedTuple):
    """One sibling's result, and all that it was made from."""

    y: torch.Tensor
    x: weakref.ref
    modes: tuple
    projection: Projection
    versions: tuple


class _Kept(threading.local):
    """What a thread's last call made for those not called yet, by their ids, and None for those that compute alone.

    It goes with the thread, and with the group.
    """

    def __init__(self):
        self.made: dict[int, _Made | None] = {}


class Siblings:
    """The layers of one group and what the last call in each thread made for those not called yet."""

    def __init__(self, layers: list[nn.Module], shared_mask: bool):
        self.layers, self.shared_mask = layers, shared_mask
        self._kept, self._ref = _Kept(), weakref.ref(self)
        self.taken, self._wasted = 0, 0  # results handed over, and results nobody took

    def take(self, layer: nn.Module) -> _Made | None:
        """What waits in this thread for ``layer``.  If it is not waited for, all the rest is dropped."""
        made, key = self._kept.made, id(layer)
        if key in made:
            return made.pop(key)
        self._drop()
        return None

    def forget(self) -> None:
        """Drop what waits, in every thread."""
        self._kept = _Kept()

    def call(
        self, layer: nn.Module, x: torch.Tensor, projection: Projection, projection_of, made: _Made | None
    ) -> torch.Tensor | None:
        """``layer``'s result, or None if it is to compute alone.

        ``projection_of(sibling, x)``: what a sibling would compute for x, or None if it cannot take part.  ``made``: what
        :meth:`take` had for this call.
        """
        if made is None:
            return self._lead(layer, x, projection, projection_of)
        if (
            made.x() is x
            and made.modes == _modes(x)
            and _same(made.projection, projection)
            and made.versions == _versions(projection)
        ):
            self.taken += 1
            return made.y
        self._waste(1)
        return None

    def _lead(self, layer, x, projection, projection_of):
        if x.is_inference() or not any(layer is each for each in self.layers):  # nn.DataParallel's replica
            return None
        if _versions(projection) is None:
            return None
        self._drop()
        group, members = [projection], {}
        for sibling in self.layers:
            if sibling is not layer:
                other = projection_of(sibling, x)
                versions = None if other is None else _versions(other)
                members[id(sibling)] = None if versions is None else (other, versions)
                if versions is not None:
                    group.append(other)
        if len(group) == 1:
            return None
        ref, modes = weakref.ref(x), _modes(x)
        y, *rest = lora_projections(x, tuple(group), shared_mask=self.shared_mask)
        rest = iter(rest)
        self._kept.made = {
            key: None if member is None else _Made(next(rest), ref, modes, *member) for key, member in members.items()
        }
        thread.group = self._ref
        return y

    def _drop(self):
        self._waste(sum(made is not None for made in self._kept.made.values()))
        self._kept.made, thread.group = {}, None

    def _waste(self, results: int) -> None:
        # It only warns: a group that changed its mind between a forward and its recomputation would break checkpointing.
        self._wasted += results
        if self._wasted > self.taken + _PATIENCE:
            warnings.warn(
                "lowrank computes q/k/v or gate/up together here, but they are not called with one tensor:"
                " patch(model, siblings=False) saves that work",
                stacklevel=5,
            )


def find(model: nn.Module, is_member) -> list[list[nn.Module]]:
    """The groups of ``model``: children of one module with :data:`NAMES`, for which ``is_member`` holds."""
    groups = []
    for path, module in model.named_modules():
        if any(word in path.lower() for word in _CROSS) or getattr(module, "is_cross_attention", False):
            continue
        children = dict(module.named_children())
        for names in NAMES:
            group = [children[name] for name in names if name in children and is_member(children[name])]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                groups.append(group)
    return groups


def _modes(x: torch.Tensor) -> tuple:
    """Everything beside its arguments that a call's result depends on."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    at = x.data_ptr() if type(x) is torch.Tensor else None  # x.data = ... is no new version
    return x._version, at, x.requires_grad, grad, inference, autocast_dtype(x), stream


def _tensors(projection: Projection):
    yield projection.weight
    yield projection.bias
    for adapter in projection.adapters:
        yield from (adapter.A, adapter.B, adapter.bias, adapter.scaling)


def _versions(projection: Projection) -> tuple | None:
    """What changes where a tensor is written to, replaced by ``.data``, or frozen; None if a write could not be seen."""
    found = []
    for t in _tensors(projection):
        if isinstance(t, torch.Tensor):
            if t.is_inference():
                return None
            found.append((t._version, t.data_ptr(), t.requires_grad))
    return tuple(found)


def _same(made: Projection, now: Projection) -> bool:
    if len(made.adapters) != len(now.adapters):
        return False
    tensors = all(
        a is b or (not isinstance(a, torch.Tensor) and a == b)
        for a, b in zip(_tensors(made), _tensors(now), strict=True)
    )
    return tensors and all(a.dropout_p == b.dropout_p for a, b in zip(made.adapters, now.adapters, strict=True))
