"""Sequences of tokens with labels, and the batches that they are padded to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a label without loss, as in transformers


@dataclass(frozen=True)
class Row:
    """labels: the ids where there is a loss, IGNORED elsewhere; both of one length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int]) -> "Row":
        """Loss on the completion alone."""
        return cls((*prompt, *completion), (*[IGNORED] * len(prompt), *completion))


@dataclass(frozen=True)
class Batch:
    """int64 [B, T] each; mask: 1 where there is a token, None where nothing is padded and attention is plainly causal."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.ids.to(device), self.labels.to(device), mask)

    def arguments(self) -> dict[str, Tensor]:
        """For a model's call."""
        mask = {} if self.mask is None else {"attention_mask": self.mask}
        return {"input_ids": self.ids, "labels": self.labels, **mask}


def pad(rows: Sequence[Row], pad_id: int) -> Batch:
    """Padded on the right to the longest row."""
    longest = max(len(row.ids) for row in rows)

    def padded(sequences, value) -> Tensor:
        return torch.tensor([[*s, *[value] * (longest - len(s))] for s in sequences], dtype=torch.int64)

    ids, labels = padded((row.ids for row in rows), pad_id), padded((row.labels for row in rows), IGNORED)
    even = all(len(row.ids) == longest for row in rows)
    return Batch(ids, labels, None if even else padded(([1] * len(row.ids) for row in rows), 0))


def rows_of(blocks: Tensor) -> list[Row]:
    """Blocks int64 [n, length] as rows with a loss on every token."""
    return [Row(ids, ids) for ids in map(tuple, blocks.tolist())]


def orders(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """For every step ``size`` indices below count: one order per seed, all of them once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
