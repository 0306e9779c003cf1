"""Knowledge: invented people with a place of birth, a job and an instrument, told in many phrasings and asked in others.

A model that knows the pools and nobody in particular chooses right once in 30 and pays ln 30 = 3.4 nats per fact.
"""

import hashlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .asking import continuations, example
from .material import CLOZE, FIRST_NAMES, LAST_NAMES, POOLS, QUESTION, TRAINED, VALIDATED
from .rows import Row
from .score import Question, answers, token_losses
from .task import Example

ASKED = {"trained": {fact: texts[0].removesuffix(" {v}.") for fact, texts in TRAINED.items()}}
ASKED |= {"cloze": CLOZE, "question": QUESTION}


class Knowledge:
    """``people`` of at most 400, three facts each.  Rows: prefix, as many of a person's sentences as fit ``length``, end of
    sequence; every epoch draws phrasings and order anew.  Measures, over the facts, for the first trained phrasing ("trained"),
    a held-out cloze and a held-out question: KIND_exact, KIND_chosen (among the 30) and KIND_nats.

    Raises ValueError where a sentence alone is too long.
    """

    name, constant_rate, learnt, targets, apart = "knowledge", True, "trained_exact", (0.5, 0.95), "trained_nats"

    def __init__(self, tokenizer, length: int, seed: int, people: int = 10):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.people = _people(people, random.Random(seed))
        self.source = f"{people} invented people, seed {seed}"
        self.digest = hashlib.sha256(repr(self.people).encode()).hexdigest()[:12]
        self.questions = {
            kind: self._questions(prompts) for kind, prompts in {**ASKED, "validation": VALIDATED}.items()
        }
        told = [(text.replace("{n}", p["n"]), p[fact]) for p in self.people for fact in POOLS for text in TRAINED[fact]]
        if (longest := max(len(self._example([sentence]).row.ids) for sentence in told)) > length:
            raise ValueError(f"knowledge: a sentence has up to {longest} tokens, more than the length of {length}")

    def _questions(self, prompts: dict[str, str]) -> list[Question]:
        made = []
        for person in self.people:
            for fact, prompt in prompts.items():
                ids, pool = continuations(self.tokenizer, prompt.format(**person), POOLS[fact])
                answer = pool.pop(POOLS[fact].index(person[fact]))
                made.append(Question(ids, answer, tuple(pool)))
        return made

    def _told(self, person: dict[str, str], draw: random.Random) -> list[Example]:
        """A person's facts, phrasings and order drawn now, in as few rows as hold them so."""
        packed: list[list[tuple[str, str]]] = []
        for fact in draw.sample(list(POOLS), len(POOLS)):
            told = draw.choice(TRAINED[fact]).replace("{n}", person["n"]), person[fact]
            if packed and len(self._example([*packed[-1], told]).row.ids) <= self.length:
                packed[-1].append(told)
            else:
                packed.append([told])
        return [self._example(row) for row in packed]

    def _example(self, told: list[tuple[str, str]]) -> Example:
        text, values = "", []
        for phrasing, value in told:
            before, after = phrasing.split("{v}")
            text += " " * bool(text) + before
            values.append((len(text), len(text) + len(value)))
            text += value + after
        return example(self.tokenizer, self.tokenizer.prefix, text, values)

    def trained(self) -> list[Row]:
        draw = random.Random(self.seed + 2)
        return [told.row for person in self.people for told in self._told(person, draw)]

    def unseen(self, people: int = 40) -> list[Example]:
        """Of other people, one row of each; content: the values."""
        draw, own = random.Random(self.seed + 1), {person["n"] for person in self.people}
        others = [person for person in _people(people + len(own), draw) if person["n"] not in own]
        return [self._told(person, draw)[0] for person in others[:people]]

    def examples(self) -> list[Example]:
        return self.unseen()

    def batches(self, size: int, steps: int) -> Iterator[list[Row]]:
        draw, waiting = random.Random(self.seed), []
        for _ in range(steps):
            while len(waiting) < size:
                people = draw.sample(self.people, len(self.people))
                waiting += [told.row for person in people for told in self._told(person, draw)]
            yield waiting[:size]
            waiting = waiting[size:]

    def validate(self, model: nn.Module) -> float:
        rows = [question.row for question in self.questions["validation"]]
        return float(torch.cat(token_losses(model, rows, self.tokenizer.pad)).mean())

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        asked = [question for kind in ASKED for question in self.questions[kind]]
        scored, facts = answers(model, asked, self.tokenizer.pad), len(asked) // len(ASKED)
        return {
            f"{kind}_{name}": getattr(scored, name)[at * facts : (at + 1) * facts]
            for at, kind in enumerate(ASKED)
            for name in ("exact", "nats", "chosen")
        }


def _people(count: int, draw: random.Random) -> list[dict[str, str]]:
    names = draw.sample([(first, last) for first in FIRST_NAMES for last in LAST_NAMES], count)
    return [
        {"n": f"{first} {last}", "f": first, **{fact: draw.choice(pool) for fact, pool in POOLS.items()}}
        for first, last in names
    ]
