"""What examples in the context already give: behaviour or content, from forward passes alone.

    L_0        mean nats per completion token of an example alone
    L_k        after k other examples of the same data
    L_self     after other examples and the example itself, as many together as in the longest context
    elicited   L_0 - L_k: what examples of the form give
    specific   L_k - L_self: what only the example itself gives
    share      elicited / (L_0 - L_self)

A high share is behaviour, which a model has and only has to be shown.  A low share alone is no knowledge: a style over open
content looks the same.  So three generated sets calibrate each run, and ``finding`` says what may be concluded.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tasks.format import Format
from ..tasks.knowledge import Knowledge
from ..tasks.rows import IGNORED, Row
from ..tasks.score import token_losses
from ..tasks.style import Style
from ..tasks.task import Example

CONTEXTS = (1, 3, 7)  # other examples
DRAWS = 3  # contexts of each example
TIMES = 1 + sum(k + 1 for k in (*CONTEXTS, max(CONTEXTS)))  # an example's tokens, in one draw of all its contexts
EXAMPLES = 40
LEAST = 24  # examples: fewer carry no verdict
FOLLOWS = 0.5  # share of the generated format: a model below it does not follow examples
RESAMPLES = 2000
YOURS = "yours: "  # before the name of a task of given examples
SETS = {"format": "JSON answers", "facts": "invented people", "style": "answers in capitals"}  # generated


@dataclass(frozen=True)
class Elicited:
    """Sums over an example's tokens and draws, fp64 [examples] by condition: 0, 1, 3, ..., "self".

    tokens: fp64 [examples], of each draw.  content: the same sums over what the examples are about, and their tokens, where
    that is known.
    """

    name: str
    nats: dict[int | str, Tensor]
    tokens: Tensor
    content: "Elicited | None" = None

    @property
    def most(self) -> int:
        """Examples in the longest context."""
        return max(k for k in self.nats if k != "self")

    def loss(self, condition: int | str, chosen: Tensor | None = None) -> Tensor:
        """Nats per token; of resampled examples int64 [resamples, examples], one each."""
        nats, tokens = self.nats[condition], self.tokens
        if chosen is not None:
            return nats[chosen].sum(1) / tokens[chosen].sum(1)
        return nats.sum() / tokens.sum()

    def figures(self, chosen: Tensor | None = None) -> dict[str, Tensor]:
        alone, shown, itself = (self.loss(condition, chosen) for condition in (0, self.most, "self"))
        gain = alone - itself
        return {"elicited": alone - shown, "specific": shown - itself, "gain": gain, "share": (alone - shown) / gain}

    def summary(self) -> dict:
        """Figures with 95 % intervals, by a bootstrap over examples."""
        generator = torch.Generator().manual_seed(0)
        n = len(self.tokens)
        chosen = torch.randint(n, (RESAMPLES, n), generator=generator)
        drawn = self.figures(chosen)
        low_high = torch.tensor([0.025, 0.975], dtype=torch.float64)
        return {
            "examples": n,
            "tokens": int(self.tokens.sum()),
            "most": self.most,
            "loss": {str(condition): float(self.loss(condition)) for condition in self.nats},
            **{name: float(value) for name, value in self.figures().items()},
            "intervals": {name: drawn[name].quantile(low_high).tolist() for name in drawn},
            "content": self.content and self.content.summary(),
        }


def longest_context(examples: Sequence[Example], room: int) -> int:
    """How many of CONTEXTS' examples and one more fit into ``room`` tokens, whichever are drawn; 0 where none does."""
    lengths = sorted((len(example.row.ids) for example in examples), reverse=True)
    fitting = [k for k in CONTEXTS if k < len(lengths) and sum(lengths[: k + 1]) <= room]
    return max(fitting, default=0)


def elicit(
    name: str,
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    room: int,
    *,
    most: int = max(CONTEXTS),
    draws: int = DRAWS,
    seed: int = 0,
    batch: int = 16,
) -> Elicited:
    """``room``: positions of the model.  most: other examples in the longest context, if so many fit.

    Raises: ValueError where not even one other example fits before another.
    """
    most = min(most, longest_context(examples, room))
    if not most:
        longest = max(len(example.row.ids) for example in examples)
        raise ValueError(
            f"{name}: two examples of up to {longest} tokens do not fit into the {room} positions of the model"
        )
    contexts = [k for k in CONTEXTS if k <= most]
    rows: dict[int | str, list[Row]] = {0: [_after((), example) for example in examples]}
    rows |= {k: [] for k in (*contexts, "self")}
    draw = random.Random(seed)
    for at, example in enumerate(examples):
        for _ in range(draws):
            others = [examples[i] for i in draw.sample([i for i in range(len(examples)) if i != at], most)]
            for k in contexts:
                rows[k].append(_after(others[:k], example))
            itself = others[: most - 1]
            itself.insert(draw.randrange(most), example)
            rows["self"].append(_after(itself, example))
    labelled = [_content(example) for example in examples]
    known = any(mask.any() for mask in labelled)
    nats, inside = {}, {}
    for condition, of_condition in rows.items():
        losses = _by_length(model, of_condition, pad_id, batch)
        times = 1 if condition == 0 else draws
        own = [torch.stack(losses[i : i + times]).mean(0) for i in range(0, len(losses), times)]
        nats[condition] = torch.stack([loss.sum() for loss in own])
        inside[condition] = torch.stack([loss[mask].sum() for loss, mask in zip(own, labelled, strict=True)])
    tokens = torch.tensor([len(mask) for mask in labelled], dtype=torch.float64)
    within = torch.tensor([float(mask.sum()) for mask in labelled], dtype=torch.float64)
    content = Elicited(f"{name}: content", inside, within) if known else None
    return Elicited(name, nats, tokens, content)


def _after(others: Sequence[Example], example: Example) -> Row:
    """The example behind others; only its own labels count.  A loss is of the same tokens in every context: of a text's first
    token there is none, with nothing before it."""
    before = [i for other in others for i in other.row.ids[other.prefix :]]
    prefix, own = example.row.ids[: example.prefix], example.row.ids[example.prefix :]
    labels = list(example.row.labels[example.prefix :])
    if not example.prefix and labels[0] != IGNORED:
        labels[0] = IGNORED
    return Row((*prefix, *before, *own), (*[IGNORED] * (len(prefix) + len(before)), *labels))


def _content(example: Example) -> Tensor:
    """bool [labels that have a loss]: which of them are content."""
    first = max(1, example.prefix)
    labels = example.row.labels[first:]
    content = example.content[first:] or (False,) * len(labels)
    return torch.tensor([c for c, label in zip(content, labels, strict=True) if label != IGNORED], dtype=torch.bool)


def _by_length(model: nn.Module, rows: Sequence[Row], pad_id: int, batch: int) -> list[Tensor]:
    """token_losses in the order of the rows, computed in the order of their lengths."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    losses = token_losses(model, [rows[i] for i in order], pad_id, batch)
    placed: list[Tensor] = [losses[0]] * len(rows)
    for i, loss in zip(order, losses, strict=True):
        placed[i] = loss
    return placed


def calibrations(tokenizer, length: int, seed: int, count: int) -> dict[str, list[Example]]:
    """Those of the three generated sets that fit a length, ``count`` examples each, by the names of SETS."""
    made = {}
    for name, examples in (
        ("format", lambda: Format(tokenizer, length, seed).examples()),
        ("facts", lambda: Knowledge(tokenizer, length, seed).examples()),
        ("style", lambda: Style(tokenizer, seed).examples()),
    ):
        with contextlib.suppress(ValueError):  # a row is longer than the length
            made[name] = examples()[:count]
    return made


def finding(own: dict, generated: dict[str, dict], recall: bool) -> str:
    """What may be concluded of one set's summary beside the generated ones'."""
    share, (low, high) = own["share"], own["intervals"]["share"]
    if own["examples"] < LEAST:
        return f"No verdict: {own['examples']} examples are too few; expected at least {LEAST}."
    if own["most"] < max(CONTEXTS):
        return f"No verdict: only {own['most']} of {max(CONTEXTS)} examples fit into the model's context."
    if not {"format", "facts", "style"} <= generated.keys():
        return "No verdict: a generated set could not be measured."
    for whose, of in (("this model", own), ("of the generated format, this model", generated["format"])):
        if of["intervals"]["gain"][0] <= 0:
            return (
                f"No verdict: {whose} gains nothing even from the example itself in its context; it does not read it."
            )
    if generated["format"]["share"] < FOLLOWS:
        return (
            f"No verdict: even of the generated format, examples in the context give this model a share of "
            f"{generated['format']['share']:.2f} (expected at least {FOLLOWS}): it does not follow examples."
        )
    others = max(generated[name]["intervals"]["share"][1] for name in ("facts", "style"))
    figure = f"share {share:.2f} [{low:.2f}, {high:.2f}]"
    if low > others:
        return (
            f"Behaviour: a prompt or a small adapter is enough ({figure}, above that of facts and of a style over open "
            "content)."
        )
    total = own["elicited"] + own["specific"]
    text = f"{own['specific']:.2f} of {total:.2f} nats per token are specific to single examples ({figure}): "
    if recall:
        return (
            text
            + "knowledge, since the model is to give them back later. Expect more steps, and full training or a high rate."
        )
    return text + "knowledge if the model must give them back later, content that need not be learnt if not."


@dataclass(frozen=True)
class Trained:
    """The counterparts after training: nats per token of held-out examples and of trained ones, and of the first before."""

    alone: float
    held_out: float
    trained: float

    @property
    def general(self) -> float:
        """What training gave to examples that it did not see."""
        return self.alone - self.held_out

    @property
    def specific(self) -> float:
        return self.held_out - self.trained

    @property
    def share(self) -> float:
        return self.general / (self.alone - self.trained)


def held(forecast: dict | None, trained: Trained) -> str:
    """What training gave, and whether it lies on the side of one half where the forecast of a share did."""
    text = (
        f"after training, {trained.general:.2f} nats per token in general and {trained.specific:.2f} on trained examples "
        f"alone, a share of {trained.share:.2f}"
    )
    if forecast is None:
        return text
    same = (forecast["share"] >= 0.5) == (trained.share >= 0.5)
    return f"{text}: the forecast of {forecast['share']:.2f} {'held' if same else 'did NOT hold'}"


def distinct(examples: Sequence[Example]) -> list[Example]:
    """One of each prompt, or of each text: a copy in the context would be the example itself."""
    first = {(example.prompt or example.row.ids): example for example in reversed(examples)}
    return list(reversed(first.values()))


def positions(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2048


def probe(
    model: nn.Module,
    tokenizer,
    sets: dict[str, Sequence[Example]],
    *,
    draws: dict[str, int] | None = None,
    seed: int = 0,
    tick=lambda name: None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Summaries by set, and {set: why not} of those that do not fit the model's context.  draws: by set, else one."""
    done, why_not = {}, {}
    fitting = [longest_context(examples, positions(model)) for examples in sets.values()]
    most = min((k for k in fitting if k), default=0)  # the same for all, so that they can be compared
    for name, examples in sets.items():
        try:
            measured = elicit(
                name,
                model,
                examples,
                tokenizer.pad,
                positions(model),
                draws=(draws or {}).get(name, 1),
                seed=seed,
                most=most,
            )
            done[name] = measured.summary()
        except ValueError as error:
            why_not[name] = str(error)
        tick(name)
    return done, why_not
