"""Knowledge and format in the user's own examples: their questions, their validator."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .rows import Row, orders
from .score import Question, answers, generate, row_losses
from .task import Example


class OwnKnowledge:
    """Examples that say it, and questions that ask for it: of a file that is never trained on, or the examples' own prompts.

    measures, one entry per question: "asked_exact" (0 or 1) and "asked_nats" of the whole answer, where questions were given;
    "trained_exact" and "trained_nats" of the trained examples' own prompts, where they have any.
    """

    name, constant_rate, targets = "knowledge", True, (0.5, 0.95)

    def __init__(
        self,
        source: str,
        digest: str,
        train: Sequence[Example],
        validation: Sequence[Example],
        questions: Sequence[Question],
        pad_id: int,
        seed: int,
        most: int,
    ):
        self.source, self.digest, self.pad_id, self.seed = source, digest, pad_id, seed
        self._rows, self._unseen = [example.row for example in train], validation
        self._validation = [example.row for example in validation]
        asked = [asked_of(example) for example in train if example.answer[1]]
        self._questions = {"asked": list(questions), "trained": asked[:most]}
        kind = "asked" if questions else "trained"
        if not self._questions[kind]:
            raise ValueError(
                f"{source}: texts without prompts cannot be asked for what they taught; expected --test FILE.jsonl"
            )
        self.learnt, self.apart = f"{kind}_exact", f"{kind}_nats"

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        for indices in orders(len(self._rows), size, steps, self.seed):
            yield [self._rows[i] for i in indices]

    def trained(self) -> list[Row]:
        return self._rows

    def unseen(self) -> Sequence[Example]:
        return self._unseen

    def validate(self, model: nn.Module) -> float:
        return float(row_losses(model, self._validation, self.pad_id).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        measures = {}
        for kind, questions in self._questions.items():
            if questions:
                result = answers(model, questions, self.pad_id)
                measures |= {f"{kind}_exact": result.exact, f"{kind}_nats": result.nats}
        return measures


class OwnFormat:
    """Examples whose form shall be learnt.  measures: "loss" of each held-out example, nats per token, and, given a validator,
    "valid" of each of their prompts: whether the model's own greedy answer passes (0 or 1)."""

    name, constant_rate = "format", True

    def __init__(
        self,
        source: str,
        digest: str,
        train: Sequence[Example],
        validation: Sequence[Example],
        test: Sequence[Example],
        valid: Callable[[str], bool] | None,
        tokenizer,
        seed: int,
    ):
        self.source, self.digest, self.seed, self.pad_id = source, digest, seed, tokenizer.pad
        self._rows, self._unseen = [example.row for example in train], validation
        self._validation = [example.row for example in validation]
        self._test, self._valid, self._tokenizer = test, valid, tokenizer
        self.learnt, self.apart = ("valid" if valid else "loss"), "loss"
        self.targets = (0.8,) if valid else ()
        self._asked = [asked_of(example).prompt for example in test if example.answer[1]]
        if valid and not self._asked:
            raise ValueError(f"{source}: texts without prompts have no answers that could be valid; expected prompts")
        self._ends = _ends([asked_of(example).answer for example in train if example.answer[1]], tokenizer)
        self._new_tokens = max((len(asked_of(example).answer) for example in (*train, *test)), default=0) + 8

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        for indices in orders(len(self._rows), size, steps, self.seed):
            yield [self._rows[i] for i in indices]

    def trained(self) -> list[Row]:
        return self._rows

    def unseen(self) -> Sequence[Example]:
        return self._unseen

    def validate(self, model: nn.Module) -> float:
        return float(row_losses(model, self._validation, self.pad_id).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        measures = {"loss": row_losses(model, [example.row for example in self._test], self.pad_id)}
        if self._valid:
            made = generate(model, self._asked, self._new_tokens, eos=self._ends, pad_id=self.pad_id)
            passed = [float(self._valid(self._tokenizer.decode(ids))) for ids in made]
            measures["valid"] = torch.tensor(passed, dtype=torch.float64)
        return measures


def asked_of(example: Example) -> Question:
    begin, end = example.answer
    return Question(example.row.ids[:begin], example.row.ids[begin:end])


def _ends(answers: Sequence[Sequence[int]], tokenizer) -> list[int]:
    """What ends an answer: the end of sequence, and the first special token of each, with which some templates end a turn."""
    first = {next((i for i in answer if i in tokenizer.special), tokenizer.eos) for answer in answers}
    return sorted((first | {tokenizer.eos}) - {None})
