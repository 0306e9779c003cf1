"""A model's losses, answers and generated texts, in eval mode and without gradients."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rows import IGNORED, Row, pad

BATCH = 32  # rows of an evaluation


@dataclass(frozen=True)
class Question:
    """Asked as a prompt, answered by tokens.  others: first tokens of the wrong answers of a forced choice, if it is one."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    others: tuple[int, ...] = ()

    @property
    def row(self) -> Row:
        return Row.of(self.prompt, self.answer)


@dataclass(frozen=True)
class Answers:
    """One entry per question, fp64 [questions]: exact (greedy decoding gives the answer: 0 or 1), nats of the whole answer, and
    chosen (the answer's first token is likelier than all ``others``: 0 or 1)."""

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


def label_logprobs(
    model: nn.Module, rows: Sequence[Row], pad_id: int, batch: int = BATCH
) -> Iterator[tuple[Row, Tensor, Tensor]]:
    """Per row (row, logprobs fp32 [labels, vocabulary], labels int64 [labels]), of every labelled token but a row's first."""
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            padded = pad(part, pad_id).to(device)
            arguments = {name: value for name, value in padded.arguments().items() if name != "labels"}
            logits = model(**arguments).logits[:, :-1]
            wanted = padded.labels[:, 1:]
            for row, scores, labels in zip(part, logits, wanted, strict=True):
                kept = labels != IGNORED
                yield row, scores[kept].float().log_softmax(-1), labels[kept]


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
        chosen.append(float(all(own[0] > logprobs[0, other] for other in question.others)))
    return Answers(*(torch.tensor(values, dtype=torch.float64) for values in (exact, nats, chosen)))


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    eos: int | None,
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = BATCH,
) -> list[list[int]]:
    """New tokens after each prompt, up to and without eos; greedy at temperature 0, else drawn from the whole distribution.

    torch's generators are left as they were.
    """
    device = next(model.parameters()).device
    drawn = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    texts: list[list[int]] = []
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
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
                eos_token_id=eos,
                pad_token_id=pad_id,
                **drawn,
            )
            for row in made[:, longest:].tolist():
                texts.append(row[: row.index(eos)] if eos in row else row)
    return texts
