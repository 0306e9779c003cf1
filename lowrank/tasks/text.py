"""A domain of text: learnt is what its held-out sequences lose in loss."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .rows import Row, orders
from .score import row_losses
from .task import Example


class Text:
    """Rows of a text, or of examples whose wording is what shall be learnt: trained, validated and tested on apart.

    measure: "loss", nats per token of each test row.
    """

    name, constant_rate, learnt, targets, apart = "text", False, "loss", (), "loss"

    def __init__(
        self,
        source: str,
        digest: str,
        train: Sequence[Row],
        validation: Sequence[Row],
        test: Sequence[Row],
        pad_id: int,
        seed: int,
    ):
        self.source, self.digest, self.train, self.pad_id, self.seed = source, digest, train, pad_id, seed
        self._validation, self._test = validation, test

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        for indices in orders(len(self.train), size, steps, self.seed):
            yield [self.train[i] for i in indices]

    def trained(self) -> Sequence[Row]:
        return self.train

    def unseen(self) -> list[Example]:
        return [Example(row) for row in self._validation]

    def validate(self, model: nn.Module) -> float:
        return float(row_losses(model, self._validation, self.pad_id).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        return {"loss": row_losses(model, self._test, self.pad_id)}
