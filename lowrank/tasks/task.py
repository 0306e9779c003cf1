"""What every task is: rows to train on, a validation that picks rates, and measures of what was learnt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .rows import Row


@dataclass(frozen=True)
class Example:
    """One example: a text, or a prompt and its completion.

    row: what trains; its first ``prefix`` ids are what the tokenizer puts before every text.
    prompt, completion: as text; prompt is "" of a plain text.
    content: one bool per id, whether it belongs to what the example is about and not to its form; empty where nobody said.
    line: of the file it came from, from 1; 0 of a generated one.
    answer: where the (last) completion stands in row.ids, [begin, end); (0, 0) of what cannot be asked.
    """

    row: Row
    prefix: int = 0
    prompt: str = ""
    completion: str = ""
    content: tuple[bool, ...] = ()
    line: int = 0
    answer: tuple[int, int] = (0, 0)


class Task(Protocol):
    """One thing to teach, drawn from a seed.  Measures are fp64 [items], the same items in the same order at every call.

    name: "text" | "knowledge" | "format".  source, digest: of the data, for the report.
    constant_rate: after warm-up; else a cosine.
    learnt: the measure that targets are of and the figure shows; "loss" falls, all others rise.
    targets: of the mean of ``learnt``; empty of "loss", where they are shares of the largest gain.
    apart: the measure, in nats, that calls two methods apart.
    """

    name: str
    source: str
    digest: str
    constant_rate: bool
    learnt: str
    targets: tuple[float, ...]
    apart: str

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]: ...

    def trained(self) -> Sequence[Row]:
        """Rows of what is trained."""

    def unseen(self) -> Sequence[Example]:
        """Of the same kind, and never trained on."""

    def examples(self) -> Sequence[Example]:
        """To show in a context before anything trains: what is trained, or of its kind."""

    def validate(self, model: nn.Module) -> float:
        """Mean nats per token of what is neither trained nor reported."""

    def measure(self, model: nn.Module) -> dict[str, Tensor]: ...
