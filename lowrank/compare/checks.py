"""Whether a model can be compared at all, and with which methods: asked before anything trains."""

import contextlib
import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .._screen import one_line
from ..tasks.rows import Row, rows_of
from ..tasks.score import row_losses
from .data import Subject
from .methods import method_of
from .settings import Settings


def check_base(subject: Subject, device: torch.device) -> None:
    """Raises ValueError unless the model runs, sees no later token, and has a finite loss on the general text."""
    what = f"--model {subject.name}: {type(subject.model).__name__}"
    model = copy.deepcopy(subject.model).to(device)
    try:
        loss = row_losses(model, rows_of(subject.general.test), subject.tokenizer.pad).mean()
        leak = bool(loss.isfinite()) and _looks_ahead(model, subject.general.test[:1].to(device))
    except Exception as error:  # whatever this model makes a library raise
        raise ValueError(f"{what} does not run on {device}: {one_line(error)}") from error
    if leak:
        raise ValueError(
            f"{what} sees the tokens it is to predict: its first position's logits depend on later ones; expected a "
            "causal language model, no encoder"
        )
    if not loss.isfinite():
        raise ValueError(f"{what}: its loss on {subject.general.source} is {float(loss)} before any training")


def check_asked(what: str, model: nn.Module, tokenizer, rows: Sequence[Row]) -> None:
    """Raises ValueError unless every token of the rows, and the padding, has an embedding, and the model sees none ahead."""
    count = model.get_input_embeddings().num_embeddings
    used = {i for row in rows for i in row.ids} | {tokenizer.pad} | ({tokenizer.eos} - {None})
    if max(used) >= count:
        raise ValueError(f"{what}: its tokenizer gives token {max(used)}, its embedding has only {count} rows")
    longest = max(rows, key=lambda row: len(row.ids))
    try:
        leak = _looks_ahead(model, torch.tensor([longest.ids], device=next(model.parameters()).device))
    except Exception as error:  # whatever this model makes a library raise
        raise ValueError(f"{what} does not run: {one_line(error)}") from error
    if leak:
        raise ValueError(f"{what} sees the tokens it is to predict; expected a causal language model, no encoder")


def _looks_ahead(model: nn.Module, block: torch.Tensor) -> bool:
    """Whether the first position's logits have a gradient at later tokens: in any dtype exactly zero where none is seen."""
    model.eval()
    seen: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        first = model(input_ids=block).logits[:, 0].float()
    finally:
        hook.remove()
    gradient = torch.autograd.grad(first.square().sum(), seen[0])[0]
    return bool(gradient[:, 1:].any())


def rehearse(settings: Settings, subject: Subject) -> dict[str, str]:
    """{method: why not} of those that fail to prepare a copy of the model without weights, each in all of its phases."""
    why_not = {}
    for name in settings.names:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
                warnings.simplefilter("ignore")
                model = _without_weights(subject.model)
                for phase in method_of(name).phases:
                    model = phase.prepare(model, settings.adapter(name))
                    if not any(p.requires_grad for p in model.parameters()):
                        raise ValueError("nothing of the model would train")
        except Exception as error:  # whatever this model makes a library raise
            why_not[name] = one_line(error)
    return why_not


def _without_weights(model: nn.Module) -> nn.Module:
    """A deep copy with parameters and buffers on the meta device; a plain one where their class has no place there."""
    with contextlib.suppress(Exception):
        memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, memo | {id(b): b.to("meta") for b in model.buffers()})
    return copy.deepcopy(model)
