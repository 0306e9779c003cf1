"""SVFLinear's mode "merged": one W' for every call of a layer, and one projection of its dW onto z for every backward.

Two autograd nodes, which meet in a tensor [N, K] without memory that stands for W' in the graph:

    _Handle         p [k] → handle [N, K]; one for all calls with one W'     backward: dW → dz, through _Sums
    _MergedLinear   x, W', bias, handle → y; one for each call               backward: dx, db, and dW as handle's gradient

The engine adds up what the calls give for the handle, so that dW is whole when it comes to _Handle.backward.

Invariant: what z's gradient and _Sums hold for an expert is together the gradient of all backwards that asked for z, each dW
in one of the two.  A backward projects with the z of its forward, what it finds in _Sums included.  This rests on five things
that no signature shows:

- _Handle.backward reads nothing but what its forward copied or referred to (p's numbers as they were, the factors), and writes
  nothing but ``layer._sums`` and ``layer._cache``: one handle serves any number of graphs, kept and checkpointed ones included.
- The layer keeps the handle, in ``layer._cache``; the handle knows the layer by a weak reference.
- The handle's node has the highest sequence number, so that the engine runs it as soon as dW is whole and before the layer
  below makes its own.
- _MergedLinear asks the engine whether this backward goes on to the handle; dW is made only then.
- _Handle.backward drops ``layer._cache``: a step follows, and ``.data`` may be written without a version.

Where it ends:

- A PyTorch without ``_set_sequence_nr``: a handle, and a projection, for each call.  Without ``_will_engine_execute_node``:
  dW is made wherever forward saw that z trains.  Slower, the same gradients.
- create_graph, and batches of gradients: projected at once, past _Sums, in a block of :func:`defer_projection` too.  If z was
  written to since the forward, the differentiable backward raises RuntimeError; the ordinary one takes the z of the forward.
- A block that is left by an exception drops what it added.  What a block has left waits for the next backward that asks for
  z: without one it never reaches z.grad, and ``zero_grad`` does not reach it.  Moving or casting the layer drops it.
- A write to ``.data`` that neither changes the memory's address nor follows a backward is not seen: W' is the old one.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .. import _stats
from ..ops._boundary import no_autocast
from ..ops.dropout import row_blocks
from ..ops.node import DIFFERENTIABLE, must_follow


class Composed(NamedTuple):
    """W' of one expert."""

    sources: tuple[torch.Tensor, ...]  # z's parameter, the base's weight, U, S, Vh
    key: tuple | None  # their versions and memory
    weight: torch.Tensor
    handle: list[torch.Tensor]  # none, or one


def merged_linear(layer, x: torch.Tensor, composed: Composed) -> torch.Tensor:
    """x W'ᵀ + bias; the layer's z gets its gradient if it trains."""
    handle = None
    p = composed.sources[0]
    if p.requires_grad and torch.is_grad_enabled():
        handle = composed.handle[0] if composed.handle else _Handle.apply(p, layer)
        if not composed.handle and (set_number := getattr(handle.grad_fn, "_set_sequence_nr", None)) is not None:
            set_number(2**62)
            composed.handle.append(handle)
    return _MergedLinear.apply(x, composed.weight, layer.bias, handle)


@contextlib.contextmanager
def defer_projection(model: nn.Module) -> Iterator[None]:
    """Layers of ``model`` in mode "merged" only add up dW in here; the first backward after it projects the whole onto z.

    For all micro-batches of a step but the last, as DDP's ``no_sync``.  A backward in here leaves zeros in z's gradient; one
    that does not ask for z's adds nothing.  What was added up is dropped if the block is left by an exception, and it is no
    part of z.grad: ``zero_grad`` does not reach it.
    """
    sums = [s for module in model.modules() if isinstance(s := module.__dict__.get("_sums"), _Sums)]
    blocks = [layer_sums.open() for layer_sums in sums]
    kept = False
    try:
        yield
        kept = True
    finally:
        for layer_sums, block in zip(sums, blocks, strict=True):
            layer_sums.close(block, kept)


class _Handle(torch.autograd.Function):
    """p [k] -> a tensor [N, K] without memory that stands for W' in the graph: its gradient, which the engine adds up over
    all calls of the layer, is dW.  Nothing is saved through autograd.
    """

    @staticmethod
    def forward(ctx, p, layer):
        ctx.set_materialize_grads(False)
        ctx.p, ctx.start, ctx.expert = p, p.detach().clone(), layer.active_expert
        ctx.version = None if p.is_inference() else p._version
        ctx.factors, ctx.options = (layer.U, layer.S, layer.Vh), (layer.parametrization, layer.normalize)
        ctx.layer, ctx.sums = weakref.ref(layer), layer._sums  # the layer keeps the handle
        acc_dtype = torch.promote_types(layer.base_layer.weight.dtype, torch.float32)
        return p.new_zeros((), dtype=acc_dtype).expand(layer.out_features, layer.in_features)

    @staticmethod
    def backward(ctx, dW):
        if dW is None:
            return None, None
        p = ctx.start
        if _is_formal(dW):  # differentiable, or several gradients at once: projected here and now
            if torch.is_grad_enabled():
                if ctx.version is not None and ctx.p._version != ctx.version:
                    raise RuntimeError(
                        "z was changed in place between this layer's forward and a differentiable backward"
                    )
                p = ctx.p
        else:
            dW = ctx.sums.collect(ctx.expert, dW)
            if dW is None:
                return torch.zeros_like(p), None
        layer = ctx.layer()
        if layer is not None:
            layer._cache = None  # a step follows, and .data may be written without a version
        (U, S, Vh), (parametrization, normalize) = ctx.factors, ctx.options
        with no_autocast(dW.device):
            V, dm = Vh.to(dW.dtype).mT, 0
            for rows in row_blocks(dW.shape[0], dW.shape[1], dW.device):
                dm = dm + (U[rows].to(dW.dtype) * (dW[rows] @ V)).sum(0)
            z, S = z_of(p, parametrization), S.to(p.dtype)
            dz = S * dm.to(p.dtype)  # type: ignore[attr-defined]  # a sum over blocks, of which there is one at least
            if normalize is not None:  # m = σ z / mean - σ
                mean = (S * z).sum() / S.sum()
                dz = (dz - S / S.sum() * (dz * z).sum() / mean) / mean
            if parametrization != "free":
                dz = dz * (z if parametrization == "exp" else z * (1 - z / 2))
        return dz, None


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, handle):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None if handle is None else x, weight)
        ctx.handle = handle  # not saved: hooks on saved tensors would give it memory
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        (x, weight), handle = ctx.saved_tensors, ctx.handle
        need_x, _, need_b, need_handle = ctx.needs_input_grad
        acc_dtype, formal = torch.promote_types(dy.dtype, torch.float32), _is_formal(dy)
        dx = db = dW = None
        if formal:
            _stats.op_fell_back(DIFFERENTIABLE)
        with no_autocast(dy.device):
            if need_x:
                W = weight.to(dy.dtype)
                graph = handle is not None and torch.is_grad_enabled()
                dx = _MergedLinear.apply(dy, W.mT, None, handle.mT) if graph else dy @ W
            rows = dy.reshape(-1, dy.shape[-1])
            if need_b:
                db = rows.sum(0, dtype=acc_dtype)
            if need_handle and _is_asked_for(handle.grad_fn):  # need_handle is forward's answer
                x = x.reshape(-1, x.shape[-1]).to(dy.dtype)
                dW = rows.to(acc_dtype).mT @ x.to(acc_dtype) if formal else _outer(rows, x, acc_dtype)
        return dx, None, db, dW


class _Sums:
    """A layer's dW by expert, of the open blocks of :func:`defer_projection` (innermost last) and of those that are over.

    Shared by all threads: a GPU's backward runs in autograd's.  A copy of the layer starts with none.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.blocks: list[dict[str, torch.Tensor]] = []
        self.over: dict[str, torch.Tensor] = {}

    def __reduce__(self):
        return _Sums, ()

    def open(self) -> dict[str, torch.Tensor]:
        block: dict[str, torch.Tensor] = {}
        with self.lock:
            self.blocks.append(block)
        return block

    def close(self, block: dict, keep: bool) -> None:
        with self.lock:
            at = next(i for i, candidate in enumerate(self.blocks) if candidate is block)
            del self.blocks[at]
            into = self.blocks[at - 1] if at else self.over
            for expert, dW in block.items() if keep else ():
                self._add(into, expert, dW)

    def collect(self, expert: str, dW: torch.Tensor) -> torch.Tensor | None:
        """None inside a block, which takes dW; else dW and what the blocks that are over have left."""
        with self.lock:
            self._add(self.blocks[-1] if self.blocks else self.over, expert, dW)
            return None if self.blocks else self.over.pop(expert)

    def rename(self, expert: str, new: str) -> None:
        with self.lock:
            for sums in (*self.blocks, self.over):
                if expert in sums:
                    sums[new] = sums.pop(expert)

    def clear(self) -> None:
        with self.lock:
            for sums in (*self.blocks, self.over):
                sums.clear()

    @staticmethod
    def _add(into: dict, expert: str, dW: torch.Tensor) -> None:
        into[expert] = into[expert].add_(dW.to(into[expert].device)) if expert in into else dW


# whether the backward that is running goes on to a node
_is_asked_for = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


def _is_formal(dy: torch.Tensor) -> bool:
    """Whether backward is to be differentiable (create_graph), or dy is a batch of gradients."""
    return must_follow((dy,))


def _outer(dy: torch.Tensor, x: torch.Tensor, acc_dtype: torch.dtype) -> torch.Tensor:
    """dYᵀ x [N, K], summed in ``acc_dtype``, without a wide copy of either."""
    if dy.dtype is acc_dtype:
        return dy.mT @ x
    if dy.is_cuda:
        return torch.mm(dy.mT, x, out_dtype=acc_dtype)
    total = dy.new_zeros((dy.shape[1], x.shape[1]), dtype=acc_dtype)
    for rows in row_blocks(dy.shape[0], dy.shape[1], dy.device):
        total.addmm_(dy[rows].to(acc_dtype).mT, x[rows].to(acc_dtype))
    return total


def z_of(p: torch.Tensor, parametrization: str) -> torch.Tensor:
    """z of what is trained, p."""
    if parametrization == "sigmoid":
        return 2 * torch.sigmoid(p)
    return torch.exp(p) if parametrization == "exp" else p
