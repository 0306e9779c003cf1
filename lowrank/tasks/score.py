"""A model's losses, answers and generated texts, in eval mode and without gradients."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rows import IGNORED, Row, pad

BATCH = 32  # rows of an evaluation
GENERATED = 256  # texts at once
CHUNK = 4096  # labels whose logits are kept at once


@dataclass(frozen=True)
class Question:
    """Asked as a prompt, answered by tokens.  others: the wrong answers of a forced choice, if it is one."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()

    @property
    def row(self) -> Row:
        return Row.of(self.prompt, self.answer)


@dataclass(frozen=True)
class Answers:
    """One entry per question, fp64 [questions]: exact (greedy decoding gives the answer: 0 or 1), nats of the whole answer, and
    chosen (greedy decoding that can only give the answer or one of ``others`` gives the answer: 0 or 1)."""

    exact: Tensor
    nats: Tensor
    chosen: Tensor


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; training mode comes back as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _head_at(model: nn.Module, positions: Tensor) -> Iterator[list[bool]]:
    """The output head computes [1, n, vocabulary] of these positions (bool [B, T]) alone.  Yields a list that is filled once it
    did: a model may have no head, or not call it."""
    head, done = getattr(model, "get_output_embeddings", lambda: None)(), []

    def select(module, args):
        if len(args) == 1 and args[0].shape[:2] == positions.shape:
            done.append(True)
            return (args[0][positions][None],)
        return None

    hook = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield done
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def _head_in_place(model: nn.Module) -> Iterator[None]:
    """The head reads contiguous memory.  generate() gives it every prompt's last position, strided over the prompts, for which
    torch on a CPU has a bf16 product of its own: 900 times slower at 256 prompts (2.13)."""

    def compact(module, args):
        return (args[0].contiguous(), *args[1:]) if args else None

    head = getattr(model, "get_output_embeddings", lambda: None)()
    hook = head.register_forward_pre_hook(compact) if head is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def _no_habits(model: nn.Module) -> Iterator[None]:
    """What a checkpoint asks of generate() (a repetition penalty, a temperature) is left out: greedy is greedy."""
    from transformers import GenerationConfig

    before = {
        module: vars(module)["generation_config"] for module in model.modules() if "generation_config" in vars(module)
    }
    for module in before:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in before.items():
            module.generation_config = config


def _drawn(temperature: float):
    """A logits processor after which the likeliest token is one drawn from them all: by the inverse of the distribution, one
    random number a row.  torch.multinomial draws one for every token of the vocabulary, 40 % of a CPU's time."""

    def draw(ids: Tensor, scores: Tensor) -> Tensor:
        summed = (scores.float() / temperature).softmax(-1).cumsum(-1)
        at = torch.rand(len(scores), 1, device=scores.device) * summed[:, -1:]
        token = torch.searchsorted(summed, at, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    return draw


def label_logprobs(
    model: nn.Module, rows: Sequence[Row], pad_id: int, batch: int = BATCH
) -> Iterator[tuple[Row, Tensor, Tensor]]:
    """Per row (row, logprobs fp32 [labels, vocabulary], labels int64 [labels]), of every labelled token but a row's first.

    Only there is the vocabulary computed: a batch keeps CHUNK tokens' worth of logits at most, and one row's at least.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        for part in _chunks(rows, batch):
            padded = pad(part, pad_id).to(device)
            arguments = {name: value for name, value in padded.arguments().items() if name != "labels"}
            wanted = torch.nn.functional.pad(padded.labels[:, 1:], (0, 1), value=IGNORED)
            kept = wanted != IGNORED
            with _head_at(model, kept) as done:
                logits = model(**arguments).logits
            scores = (logits[0] if done else logits[kept]).split(kept.sum(1).tolist())
            for row, own, labels, at in zip(part, scores, wanted, kept, strict=True):
                yield row, own.float().log_softmax(-1), labels[at]


def _chunks(rows: Sequence[Row], batch: int) -> Iterator[Sequence[Row]]:
    """At most ``batch`` rows, of at most CHUNK labels together."""
    part: list[Row] = []
    labels = 0
    for row in rows:
        own = sum(label != IGNORED for label in row.labels)
        if part and (len(part) == batch or labels + own > CHUNK):
            yield part
            part, labels = [], 0
        part.append(row)
        labels += own
    if part:
        yield part


def token_losses(model: nn.Module, rows: Sequence[Row], pad_id: int, batch: int = BATCH) -> list[Tensor]:
    """Per row the nats of every labelled token, fp64 [labels]; a row's first token has none."""
    return [
        -logprobs.gather(1, labels[:, None])[:, 0].double().cpu()
        for _, logprobs, labels in label_logprobs(model, rows, pad_id, batch)
    ]


def row_losses(model: nn.Module, rows: Sequence[Row], pad_id: int, batch: int = BATCH) -> Tensor:
    """fp64 [rows]: mean nats per labelled token of each."""
    return torch.stack([losses.mean() for losses in token_losses(model, rows, pad_id, batch)])


def answers(model: nn.Module, questions: Sequence[Question], pad_id: int, batch: int = BATCH) -> Answers:
    exact, nats, chosen = [], [], []
    scored = label_logprobs(model, [question.row for question in questions], pad_id, batch)
    for question, (_, logprobs, labels) in zip(questions, scored, strict=True):
        own = logprobs.gather(1, labels[:, None])[:, 0]
        exact.append(float((logprobs.argmax(-1) == labels).all()))
        nats.append(-float(own.double().sum()))
        chosen.append(float(_chosen(logprobs, question)))
    return Answers(*(torch.tensor(values, dtype=torch.float64) for values in (exact, nats, chosen)))


def _chosen(logprobs: Tensor, question: Question) -> bool:
    """Token by token, the answer against those of others that have agreed with it so far: its own logprobs are enough."""
    answer, others = question.answer, question.others
    for at, own in enumerate(answer):
        rivals = {other[at] for other in others if other[:at] == answer[:at] and len(other) > at} - {own}
        if rivals and not bool((logprobs[at, own] > logprobs[at, list(rivals)]).all()):
            return False
    return True


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    eos: int | Sequence[int] | None,
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = GENERATED,
) -> list[list[int]]:
    """New tokens after each prompt, up to the first eos and without it; greedy at temperature 0, else from all of them.  No
    more than the model has positions for.

    Raises: ValueError where a prompt leaves none.  torch's generators are left as they were.
    """
    device = next(model.parameters()).device
    drawn = {"logits_processor": [_drawn(temperature)]} if temperature else {}
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if room is not None and prompts:
        longest = max(map(len, prompts))
        if longest >= room:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for an answer in the model's {room} positions"
            )
        new_tokens = min(new_tokens, room - longest)
    texts: list[list[int]] = []
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with evaluating(model), _head_in_place(model), _no_habits(model), forked:
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in part], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device)
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                use_cache=True,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad_id,
                do_sample=False,
                **drawn,
            )
            for row in made[:, longest:].tolist():
                texts.append(list(itertools.takewhile(lambda token: token not in ends, row)))
    return texts
