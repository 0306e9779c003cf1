"""Format: short answers that the model knows, in a shape that it does not: {"answer": "Paris", "words": 1}.

A model that was not taught it gives no valid answer: chance is 0.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .asking import example, question
from .material import JSON_ASKED, JSON_TRAINED, JSON_VALIDATED
from .rows import Row, orders
from .score import generate, row_losses, token_losses
from .task import Example


class Format:
    """``count`` of 60 pairs (opposites and capitals) to train on, others of both kinds to validate, 32 questions of other
    kinds.  Rows: a question, by the chat template where there is one, and its JSON with an end of sequence.

    Measures: valid [32], whether a greedy answer is the JSON object and nothing more; right [24], of the questions with a known
    answer, 1 where it stands in a valid answer, 0 where not, NaN where the answer is not valid: torch.nanmean is the accuracy
    inside the valid ones, NaN of none; loss [24], nats per token of the known answers as JSON.

    Raises ValueError where a row is too long.
    """

    name, constant_rate, learnt, targets, apart = "format", True, "valid", (0.8,), "loss"

    def __init__(self, tokenizer, length: int, seed: int, count: int = 60):
        if tokenizer.eos is None:
            raise ValueError("format: the tokenizer has no end of sequence, without which no answer ends")
        self.tokenizer, self.seed = tokenizer, seed
        pairs = random.Random(seed).sample(JSON_TRAINED, count)
        self.source = f"{count} answers as JSON, seed {seed}"
        self.digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:12]
        self._trained = [_example(tokenizer, *pair) for pair in pairs]
        self._unseen = [_example(tokenizer, *pair) for pair in JSON_VALIDATED]
        self.prompts = [question(tokenizer, asked) for asked in JSON_ASKED]
        self.known = [_example(tokenizer, asked, right[0]).row for asked, right in JSON_ASKED.items() if right]
        self.new_tokens = 2 * max(sum(label >= 0 for label in one.row.labels) for one in self._trained)
        longest = max(len(row.ids) for row in (*(one.row for one in (*self._trained, *self._unseen)), *self.known))
        if longest > length:
            raise ValueError(
                f"format: a question and its answer have up to {longest} tokens, more than the length of {length}"
            )

    def examples(self) -> list[Example]:
        """What is trained; content: the answers."""
        return self._trained

    def trained(self) -> list[Row]:
        return [one.row for one in self._trained]

    def unseen(self) -> list[Example]:
        return self._unseen

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        for indices in orders(len(self._trained), size, steps, self.seed):
            yield [self._trained[i].row for i in indices]

    def validate(self, model: nn.Module) -> float:
        return float(torch.cat(token_losses(model, [one.row for one in self._unseen], self.tokenizer.pad)).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        eos, pad = self.tokenizer.eos, self.tokenizer.pad
        made = generate(model, self.prompts, self.new_tokens, eos=eos, pad_id=pad)
        given = [answer_of(self.tokenizer.decode(ids)) for ids in made]
        right = [_right(answer, known) for answer, known in zip(given, JSON_ASKED.values(), strict=True) if known]
        return {
            "valid": torch.tensor([float(answer is not None) for answer in given], dtype=torch.float64),
            "right": torch.tensor(right, dtype=torch.float64),
            "loss": row_losses(model, self.known, pad),
        }


def answer_of(text: str) -> str | None:
    """The answer in exactly one object of "answer" (text) and "words" (a whole number, which is not counted); else None."""
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except ValueError:
        return None
    if not isinstance(pairs, tuple) or sorted(name for name, _ in pairs) != ["answer", "words"]:
        return None
    found = dict(pairs)
    return found["answer"] if isinstance(found["answer"], str) and type(found["words"]) is int else None


def _right(answer: str | None, known: tuple[str, ...]) -> float:
    """One of the known ones as a whole word, in any case; NaN of no answer."""
    words = re.findall(r"\w+", (answer or "").casefold())
    return float("nan") if answer is None else float(any(word.casefold() in words for word in known))


def _example(tokenizer, asked: str, answer: str) -> Example:
    text = json.dumps({"answer": answer, "words": len(answer.split())})
    begin = text.index(answer + '"')
    return example(tokenizer, question(tokenizer, asked), text, [(begin, begin + len(answer))], prompt=asked)
