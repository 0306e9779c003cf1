"""Forgetting: what a model loses while it learns: general text, things it had right, and the variety of its answers' shapes."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .asking import continuations, question
from .material import ITEMS, OPEN
from .rows import rows_of
from .score import Question, answers, generate, row_losses

LEAST_KNOWN = 20  # items: below, a share of them says nothing
LEAST_ENTROPY = 0.3  # nats: below, there is no variety to lose

# The first that is found names the format.
FORMATS = {
    "json": r"\A(```json)?\s*[\[{]",
    "code": r"^```|^(def|class|import|from|print)\b",
    "list": r"^\s*([-*•]|\d+[.)])\s",
    "heading": r"^(#+ |\*\*)",
    "question": r"\A[^.!?:\n]*\?",
    "plain": r"",
}


class Forgetting:
    """general: int64 [sequences, length], text that ``base`` knows.  items: four-way questions that it has right (chance 15 of
    60); known: their number.  samples: of the diversity, a multiple of the 16 prompts; 0 leaves it out.  Of
    both, what is longer than the base's positions is left out.

    nothing_to_forget: fewer than 20 known items.  before: the base's diversity, None where it cannot be asked for (positions,
    or a chat template that refuses a question alone).  diverse: it is at least 0.3 nats.
    """

    def __init__(self, tokenizer, general: Tensor, base: nn.Module, samples: int = 256, new_tokens: int = 24):
        self.tokenizer, self.general = tokenizer, rows_of(general)
        self.rounds, self.new_tokens = samples // len(OPEN), new_tokens
        try:
            self.prompts = [question(tokenizer, text) for text in OPEN]
        except ValueError:
            self.prompts = []
        asked = [continuations(tokenizer, prompt, options) for prompt, *options in ITEMS]
        room = getattr(getattr(base, "config", None), "max_position_embeddings", None) or math.inf
        items = [[Question(ids, option) for option in options] for ids, options in asked]
        self.items = [item for item in items if all(len(one.prompt) + len(one.answer) <= room for one in item)]
        if max(map(len, self.prompts), default=room) + new_tokens > room:
            samples = 0
        right = self._right(base).tolist()
        self.items = [item for item, known in zip(self.items, right, strict=True) if known]
        self.known = len(self.items)
        self.nothing_to_forget = self.known < LEAST_KNOWN
        self.before = self.diversity(base, 0) if samples else None
        self.diverse = self.before is not None and self.before[0] >= LEAST_ENTROPY

    def _right(self, model: nn.Module) -> Tensor:
        """fp64 [items]: 1 where the whole of the first option is likelier than each other's."""
        if not self.items:
            return torch.zeros(0, dtype=torch.float64)
        nats = answers(model, [option for item in self.items for option in item], self.tokenizer.pad).nats.view(-1, 4)
        return (nats[:, :1] < nats[:, 1:]).all(1).double()

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """general: fp64 [sequences], nats per token; items: fp64 [known], 1 where still right, absent if nothing_to_forget."""
        losses = {"general": row_losses(model, self.general, self.tokenizer.pad)}
        return losses if self.nothing_to_forget else {**losses, "items": self._right(model)}

    def diversity(self, model: nn.Module, seed: int) -> tuple[float, float]:
        """(entropy of the formats in nats, its standard error) of answers at temperature 1 to prompts that no task trains."""
        made = generate(
            model,
            self.prompts * self.rounds,
            self.new_tokens,
            eos=self.tokenizer.eos,
            pad_id=self.tokenizer.pad,
            temperature=1.0,
            seed=seed,
        )
        formats, each = [format_of(self.tokenizer.decode(ids)) for ids in made], len(self.prompts)
        return entropy([formats[at : at + each] for at in range(0, len(formats), each)])


def format_of(text: str) -> str:
    return next(name for name, rule in FORMATS.items() if re.search(rule, text.strip(), re.MULTILINE))


def entropy(rounds: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(nats, standard error) over rounds of equally many samples, each round one of every prompt.

    The plug-in entropy of all samples, less its bias, by the jackknife over rounds: prompts are fixed, what is drawn is rounds.
    """
    total, n = Counter(label for part in rounds for label in part), len(rounds)
    whole = _plug_in(total)
    without = [_plug_in(total - Counter(part)) for part in rounds]
    mean = sum(without) / n
    return n * whole - (n - 1) * mean, math.sqrt((n - 1) / n * sum((one - mean) ** 2 for one in without))


def _plug_in(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values() if count)
