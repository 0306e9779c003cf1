"""Tasks of given examples: a text or a wording, knowledge, a format; trained, validated and tested on apart."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .rows import Row, orders
from .score import Question, answers, generate, row_losses
from .task import Example


@dataclass(frozen=True)
class Parts:
    """Examples by what is done with them.  source, digest: of the data, for the report."""

    source: str
    digest: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


class Own:
    """What the tasks of given examples share.  seed: of the order alone."""

    def __init__(self, parts: Parts, pad_id: int, seed: int):
        self.source, self.digest, self.parts = parts.source, parts.digest, parts
        self.pad_id, self.seed = pad_id, seed
        self._rows = [example.row for example in parts.train]

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        for indices in orders(len(self._rows), size, steps, self.seed):
            yield [self._rows[i] for i in indices]

    def trained(self) -> Sequence[Row]:
        return self._rows

    def unseen(self) -> Sequence[Example]:
        return self.parts.validation

    def examples(self) -> list[Example]:
        return [*self.parts.validation, *self.parts.train]

    def validate(self, model: nn.Module) -> float:
        return float(self._losses(model, self.parts.validation).mean())

    def _losses(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return row_losses(model, [example.row for example in examples], self.pad_id)


class Text(Own):
    """A domain of text, or examples whose wording shall be learnt.  measure: "loss", nats per token of each test row."""

    name, learnt, targets, apart = "text", "loss", (), "loss"

    def __init__(self, parts: Parts, pad_id: int, seed: int, constant_rate: bool = False):
        super().__init__(parts, pad_id, seed)
        self.constant_rate = constant_rate

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        return {"loss": self._losses(model, self.parts.test)}


class OwnKnowledge(Own):
    """Examples that say it, all of them trained, and questions that ask for it: never trained on, or the examples' own prompts.
    Of every five, one validates and the others are reported, ``most`` of them.

    measures, one entry per question: "asked_exact" (0 or 1) and "asked_nats" of the whole answer, where questions were given;
    "trained_exact" and "trained_nats" of the trained examples' own prompts, where they have any.  An answer is its text,
    without what ends it: running text may have taught it.
    """

    name, constant_rate, targets = "knowledge", True, (0.5, 0.95)

    def __init__(self, parts: Parts, tokenizer, seed: int, questions: Sequence[Question], most: int):
        everything = [*parts.train, *parts.validation, *parts.test]
        super().__init__(replace(parts, train=everything, validation=(), test=()), tokenizer.pad, seed)
        own = [asked_of(example) for example in everything if example.answer[1]]
        kind, asked = ("asked", list(questions)) if questions else ("trained", own)
        if len(asked) < 2:
            raise ValueError(
                f"{parts.source}: texts without prompts cannot be asked for what they taught; expected --test FILE.jsonl"
                if not asked
                else f"{parts.source}: one question is too few; expected at least two, of which one validates"
            )
        self._validation = [_bare(question, tokenizer) for question in asked[::5]]
        reported = [question for at, question in enumerate(asked) if at % 5]
        self._questions = {"trained": own[:most], kind: reported[:most]}
        self._questions = {k: [_bare(q, tokenizer) for q in of] for k, of in self._questions.items()}
        self.learnt, self.apart = f"{kind}_exact", f"{kind}_nats"

    def validate(self, model: nn.Module) -> float:
        return float(row_losses(model, [question.row for question in self._validation], self.pad_id).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        measures = {}
        for kind, questions in self._questions.items():
            if questions:
                result = answers(model, questions, self.pad_id)
                measures |= {f"{kind}_exact": result.exact, f"{kind}_nats": result.nats}
        return measures


class OwnFormat(Own):
    """Examples whose form shall be learnt.  measures: "loss" of each held-out example, nats per token, and, given a validator,
    "valid" of each of their prompts: whether the model's own greedy answer passes (0 or 1)."""

    name, constant_rate, apart = "format", True, "loss"

    def __init__(self, parts: Parts, tokenizer, seed: int, valid: Callable[[str], bool] | None):
        super().__init__(parts, tokenizer.pad, seed)
        self._valid, self._tokenizer = valid, tokenizer
        self.learnt, self.targets = ("valid", (0.8,)) if valid else ("loss", ())
        asked = [asked_of(example) for example in (*parts.train, *parts.test) if example.answer[1]]
        self._prompts = [asked_of(example).prompt for example in parts.test if example.answer[1]]
        if valid and not self._prompts:
            raise ValueError(
                f"{parts.source}: texts without prompts have no answers that could be valid; expected prompts"
            )
        self._ends = _ends([question.answer for question in asked], tokenizer)
        if valid and not self._ends:
            raise ValueError(f"{parts.source}: the tokenizer has no end of sequence, without which no answer ends")
        self._new_tokens = max((len(question.answer) for question in asked), default=0) + 8

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        measures = {"loss": self._losses(model, self.parts.test)}
        if self._valid:
            made = generate(model, self._prompts, self._new_tokens, eos=self._ends, pad_id=self.pad_id)
            passed = [float(self._valid(self._tokenizer.decode(ids))) for ids in made]
            measures["valid"] = torch.tensor(passed, dtype=torch.float64)
        return measures


def _bare(question: Question, tokenizer) -> Question:
    """Without what ends the answer."""
    first = next((at for at, i in enumerate(question.answer) if at and i in {*tokenizer.special, tokenizer.eos}), None)
    return replace(question, answer=question.answer[:first])


def asked_of(example: Example) -> Question:
    begin, end = example.answer
    return Question(example.row.ids[:begin], example.row.ids[begin:end])


def _ends(answers: Sequence[Sequence[int]], tokenizer) -> list[int]:
    """What ends an answer: the end of sequence, and the first special token of each, with which some templates end a turn."""
    first = {next((i for i in answer if i in tokenizer.special), tokenizer.eos) for answer in answers}
    return sorted((first | {tokenizer.eos}) - {None})
