"""Style: open answers of one sentence IN CAPITALS: behaviour whose loss is content that nobody wants recalled."""

import random

from .asking import example, question
from .material import SENTENCES
from .task import Example


class Style:
    """40 prompts and sentences for a probe's calibration; not a task to train.  content: the sentences, all but the end."""

    def __init__(self, tokenizer, seed: int, count: int = len(SENTENCES)):
        self.tokenizer = tokenizer
        self.pairs = random.Random(seed).sample(list(SENTENCES.items()), count)

    def examples(self) -> list[Example]:
        return [
            example(self.tokenizer, question(self.tokenizer, asked), text.upper(), [(0, len(text))], prompt=asked)
            for asked, text in self.pairs
        ]
