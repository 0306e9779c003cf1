"""A vocabulary head and its products, a few rows at a time: logits in fp32, and the gradients of what made them.

GEMMs give fp32 from 16-bit operands (mixed.py), which the logits' gradient meets in their dtype.  On a CPU without such GEMMs
blocks of the head are widened, one at a time, and that gradient is fp32; for LoRA's factors and the bias it is on every CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import mixed
from ._choice import backend
from .mixed import add_product, mm

BLOCK_BYTES = 1 << 24  # of a head that is widened, in fp32 at a time
CHUNK_BYTES = 1 << 28
PASS_BYTES = 1 << 24  # of logits that PyTorch's passes run over while they are in cache
# how an op takes a head.  inv_temperature: fp32 [T], or None.  numbers: LoRA's scaling, 1 / temperature, logit_scale, softcap
SCHEMA = (
    "Tensor {0}hidden, Tensor {0}weight, Tensor? {0}bias, Tensor? {0}A, Tensor? {0}B, Tensor? {0}inv_temperature,"
    " float[] {0}numbers"
)


class Head(NamedTuple):
    """z = capped((hidden weightᵀ + bias + scaling (hidden Aᵀ) Bᵀ) logit_scale) / temperature; see :func:`linear_logprob`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None


def as_arguments(head: Head) -> tuple[list[Tensor | None], list[float]]:
    """The six tensors of SCHEMA, hidden as the user gave it, and its numbers."""
    A, B, scaling = head.lora or (None, None, 1.0)
    inverse, temperature = None, head.temperature
    if isinstance(temperature, Tensor):
        acc_dtype = torch.float64 if head.hidden.dtype is torch.float64 else torch.float32
        inverse = temperature.detach().to(acc_dtype).reciprocal().expand(head.hidden.shape[:-1]).reshape(-1)
        temperature = 1.0
    numbers = [float(scaling), 1.0 / temperature, float(head.logit_scale), float(head.softcap or 0.0)]
    return [head.hidden, head.weight, head.bias, A, B, inverse], numbers


def chunks(T: int, V: int, chunk_bytes: int, per_logit: int):
    """Slices of rows whose logits take no more than ``chunk_bytes``; at least one row."""
    rows = max(1, chunk_bytes // (per_logit * V))
    return (slice(first, min(first + rows, T)) for first in range(0, T, rows))


def cached(z: Tensor):
    """Slices of a chunk's rows, a few at a time, so that passes over them find them in cache."""
    rows = max(2, PASS_BYTES // (z.shape[1] * z.element_size()))
    return (slice(first, min(first + rows, len(z))) for first in range(0, len(z), rows))


def scales_of(scales: tuple, at: slice) -> tuple:
    """Those rows' of :meth:`Products.scales`."""
    inv_t, *rest = scales
    return inv_t[at] if isinstance(inv_t, Tensor) else inv_t, *rest


def in_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels take logits of ``dtype``."""
    return dtype is torch.float32 and backend(device)[0] == "triton"


class Products:
    """What one call multiplies: hidden rows with the head and its LoRA, and the logits' gradient with both again."""

    def __init__(self, hidden, weight, bias, A, B, inv_t, numbers, dtype, batch_invariant: bool):
        self.dtype, self.acc_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.hidden, self.weight, self.bias = hidden, weight.to(dtype), bias
        self.A, self.B = (None if t is None else t.to(self.acc_dtype) for t in (A, B))
        self.inv_t, (self.scaling, self.inv_temperature, self.logit_scale, self.softcap) = inv_t, numbers
        self.batch_invariant = batch_invariant
        self.mixed = mixed.takes(hidden.device, dtype)
        self.dz_dtype = dtype if hidden.device.type == "cuda" else self.acc_dtype

    def rows(self, at: slice) -> Tensor:
        return self.hidden[at].to(self.dtype)

    def scales(self, at: slice) -> tuple:
        """What turns logits into y, for the row passes: 1 / temperature as a float or [C], logit_scale, softcap (0: none)."""
        return self.inv_temperature if self.inv_t is None else self.inv_t[at], self.logit_scale, self.softcap

    def logits(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """z [C, V] in fp32, before scales; and scaling h Aᵀ [C, r]."""
        C, alone = h.shape[0], self.batch_invariant
        if alone and in_kernels(h.device, self.acc_dtype):
            from ..kernels.logits import logits

            t = None if self.A is None else logits(h, self.A).mul_(self.scaling)
            return logits(h, self.weight, self.bias, t, self.B), t
        z = h.new_empty((C, self.weight.shape[0]), dtype=self.acc_dtype)
        t = None if self.A is None else h.new_empty((C, self.A.shape[0]), dtype=self.acc_dtype)
        # copies of rows, because BLAS may sum otherwise from another alignment
        parts = [(slice(i, i + 1), h[i : i + 1].clone()) for i in range(C)] if alone else [(slice(0, C), h)]
        started = self.bias is not None or t is not None
        for at, part in parts:
            if t is not None:
                t[at] = one = self.scaling * mm(part, self.A.mT, self.acc_dtype)
                if alone:  # into memory of its own, for the same reason
                    z[at] = one @ self.B.mT
                else:
                    torch.mm(one, self.B.mT, out=z)
            if self.bias is not None:
                z[at] = self.bias if t is None else z[at] + self.bias
        alone = alone and not (self.mixed and h.device.type == "cpu")  # whose rows do not know of each other
        for block, W in self._blocks():
            if not alone:
                add_product(z[:, block], h, W.mT, started)
                continue
            for at, part in parts:
                product = mm(part, W.mT, self.acc_dtype)
                z[at, block] = z[at, block] + product if started else product
        return z, t

    def times_weight(self, dz: Tensor, start: Tensor | None) -> Tensor:
        """dz W + start, fp32 [C, H]; start is overwritten."""
        out = dz.new_empty((dz.shape[0], self.weight.shape[1]), dtype=self.acc_dtype) if start is None else start
        for i, (block, W) in enumerate(self._blocks()):
            add_product(out, dz[:, block], W, start is not None or i > 0)
        return out

    def _blocks(self):
        """(slice of the vocabulary, those rows of the head in a dtype the GEMMs take)."""
        V, H = self.weight.shape
        rows = V
        if self.weight.dtype is not self.acc_dtype and not self.mixed:
            rows = max(1, BLOCK_BYTES // (H * self.acc_dtype.itemsize))
        for first in range(0, V, rows):
            at = slice(first, min(first + rows, V))
            yield at, self.weight[at] if self.mixed else self.weight[at].to(self.acc_dtype)


class Gradients:
    """Of hidden, weight, bias, A and B: those that are needed, summed over chunks in fp32.  Each row of dh is written once."""

    def __init__(self, products: Products, like: tuple[Tensor | None, ...], needs: list[bool]):
        self.products, self.like, self.needs = products, like, needs
        hidden, *head = like
        self.dh = hidden.new_empty(hidden.shape) if needs[0] else None
        self.dW, self.db, self.dA, self.dB = (
            t.new_zeros(t.shape, dtype=products.acc_dtype) if need else None
            for t, need in zip(head, needs[1:], strict=True)
        )

    def add(self, at: slice, h: Tensor, t: Tensor | None, dz: Tensor) -> None:
        """One chunk's: rows h [C, H], t = scaling h Aᵀ, and the gradient dz [C, V] of its logits."""
        products = self.products
        acc_dtype, A, u = products.acc_dtype, products.A, None
        if self.dA is not None or (self.dh is not None and A is not None):
            u = products.scaling * mm(dz, products.B, acc_dtype)
        if self.dA is not None:
            self.dA += mm(u.mT, h, acc_dtype)
        if self.db is not None:
            self.db += dz.sum(0, dtype=acc_dtype)
        if self.dB is not None:
            self.dB += mm(dz.mT, t, acc_dtype)
        if products.mixed:
            dz = dz.to(products.dtype)
        if self.dh is not None:
            self.dh[at] = products.times_weight(dz, None if u is None else mm(u, A, acc_dtype))
        if self.dW is not None:
            add_product(self.dW, dz.mT, h, True)

    def as_list(self) -> list[Tensor]:
        """In their tensors' dtypes."""
        grads = self.dh, self.dW, self.db, self.dA, self.dB
        return [g.to(t.dtype) for g, t, need in zip(grads, self.like, self.needs, strict=True) if need]
