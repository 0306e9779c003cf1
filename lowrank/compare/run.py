"""The whole comparison: pretrain where needed, sweep each method's learning rate, run it, measure it."""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import nn

from .. import _screen
from ..measure.environment import environment
from . import train
from .costs import latency, merged, weight_changes
from .data import Subject, load, one_line
from .methods import METHODS, Adapter, Method
from .settings import Settings
from .verdict import invented

FULL_RATE = 1.2e-3 * 128  # over the model's width: the centre of full fine-tuning's grid, found on the embedded model
GRID_FACTOR = 3.0
EXTENSIONS = 2  # values added beyond an edge that wins before the sweep gives up and flags it


@dataclass(frozen=True)
class Sweep:
    """Validation loss by learning rate, and the training losses of the short runs."""

    validation: dict[float, float]
    curves: dict[float, list[float]]

    @property
    def picked(self) -> float:
        return min(self.validation, key=self.validation.get)

    @property
    def edge(self) -> bool:
        return self.picked in (min(self.validation), max(self.validation))


@dataclass
class Row:
    """One method.  runs: one per seed, models dropped; the other figures are the first seed's, None where they could not
    be taken, for the reason in not_measured."""

    name: str
    sweep: Sweep
    runs: list[train.Run] = field(default_factory=list)
    changes: dict | None = None
    latency: dict = field(default_factory=lambda: {"unmerged": None, "merged": None})
    paths: dict | None = None  # lowrank.stats: which calls ran fused
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """rows: what has a run.  not_done: {method: why it, or the rest of it, could not be done to this model}."""

    settings: Settings
    subject: Subject
    environment: dict[str, str]
    pretraining: dict | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)
    control: list[float] | None = None  # losses of peft-lora started one rounding apart
    seconds: float = 0.0
    complete: bool = False


def compare(settings: Settings, save: Callable[[Comparison], None] = lambda comparison: None) -> Comparison:
    """Everything that takes time.  save(comparison) follows every run that is finished: a method's, of one seed.

    Raises: ValueError if none of the methods can be done to the model.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.perf_counter()
    subject = load(settings)
    device = torch.device(settings.device)
    comparison = Comparison(
        settings, subject, environment(device), not_done=rehearse(settings.methods, subject, settings.adapter)
    )
    _some_left(comparison)
    with _screen.progress(label=34, bar=24, note=True) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if subject.embedded:
            comparison.pretraining = _pretrain(settings, subject, device, progress)
        subject.model.to(getattr(torch, settings.dtype))
        if not subject.embedded:
            _check_base(subject, device)
        if subject.invented:
            progress.console.print(invented(subject.name, subject.invented), markup=False, highlight=False)
        for name, why in comparison.not_done.items():
            _tell(progress, name, why)
        for name in [name for name in settings.methods if name not in comparison.not_done]:
            runs = _row(name, settings, subject, device, progress)
            while True:
                row = None
                with _or_why_not(comparison, name, progress):
                    row = next(runs, None)
                if row is None:
                    break
                comparison.rows[name] = row
                comparison.seconds = time.perf_counter() - began
                save(comparison)
        _some_left(comparison)
        with _or_why_not(comparison, "rounding control", progress):
            comparison.control = _control(comparison.rows, settings, subject, device, progress)
    comparison.seconds, comparison.complete = time.perf_counter() - began, True
    return comparison


def _check_base(subject: Subject, device: torch.device) -> None:
    """Raises ValueError unless the model runs, sees no later token, and has a finite loss on both domains."""
    what = f"--model {subject.name}: {type(subject.model).__name__}"
    model = copy.deepcopy(subject.model).to(device)
    try:
        losses = [train.evaluate(model, c.test, subject.batch) for c in (subject.new, subject.general)]
        leak = _looks_ahead(model, subject.new.test[:1].to(device))
    except Exception as error:  # whatever this model makes a library raise
        raise ValueError(f"{what} does not run on {device}: {one_line(error)}") from error
    if leak:
        raise ValueError(
            f"{what} sees the tokens it is to predict: its first position's logits change with the last token; expected a "
            "causal language model, no encoder"
        )
    for loss, corpus in zip(losses, (subject.new, subject.general), strict=True):
        if not loss.isfinite().all():
            raise ValueError(f"{what}: its loss on {corpus.source} is {float(loss.mean())} before any training")


@torch.no_grad()
def _looks_ahead(model: nn.Module, block: torch.Tensor) -> bool:
    """Whether the first position's logits depend on the last token by more than rounding."""
    model.eval()  # dropout, too, changes the logits
    changed = block.clone()
    changed[:, -1] = (block[:, -1] + 1) % model.get_input_embeddings().num_embeddings
    one, two = (model(input_ids=b).logits[:, 0].float() for b in (block, changed))
    scale = one.abs().max() * max(1e-4, 8 * torch.finfo(model.dtype).eps)
    return bool((one - two).abs().max() > scale)


def rehearse(methods, subject: Subject, adapter: Adapter) -> dict[str, str]:
    """{method: why not} of those that fail to prepare a copy of the model without weights, each in all of its phases."""
    why_not = {}
    for name in methods:
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
                warnings.simplefilter("ignore")
                model = _without_weights(subject.model)
                for phase in METHODS[name].phases:
                    model = phase.prepare(model, adapter)
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


@contextlib.contextmanager
def _or_why_not(comparison: Comparison, name: str, progress: Progress):
    """What fails inside is noted, and the comparison goes on."""
    try:
        yield
    except Exception as error:  # whatever this model makes a library raise
        done = len(comparison.rows[name].runs) if name in comparison.rows else 0
        comparison.not_done[name] = (
            f"after {done} of {comparison.settings.seeds} seeds, {one_line(error)}" if done else one_line(error)
        )
        _tell(progress, name, comparison.not_done[name])


def _tell(progress: Progress, name: str, why: str) -> None:
    progress.console.print(f"{name} not done: {why.removeprefix(f'{name}: ')}", markup=False, highlight=False)


def _some_left(comparison: Comparison) -> None:
    if len(comparison.not_done.keys() - comparison.rows.keys() - {"rounding control"}) == len(
        comparison.settings.methods
    ):
        reasons = "; ".join(f"{name}: {why}" for name, why in comparison.not_done.items())
        raise ValueError(f"--methods: none can be done to {type(comparison.subject.model).__name__}: {reasons}")


def _task(progress: Progress, name: str, steps: int):
    """A bar of that many steps.  Returns tick(loss), and grow(steps) for work that turned out longer."""
    task = progress.add_task(name, total=steps, note="")

    def grow(more: int) -> None:
        progress.update(task, total=progress.tasks[task].total + more)

    return (lambda loss: progress.update(task, advance=1, note=f"loss {loss:.3f}")), grow


def _pretrain(settings: Settings, subject: Subject, device: torch.device, progress: Progress) -> dict:
    size = settings.embedded
    tick, _ = _task(progress, "pretrain on " + subject.general.source, size.pretrain_steps)
    start = time.perf_counter()
    losses = train.pretrain(subject, size.pretrain_steps, size.pretrain_rate, settings.seed, device, tick)
    return {
        "steps": len(losses),
        "seconds": time.perf_counter() - start,
        "rate": size.pretrain_rate,
        "loss": losses[-1],
    }


def grid(method: Method, width: int, adapter: Adapter) -> list[float]:
    """Three learning rates a factor of three apart, to one significant digit or two."""
    centre = method.centre(adapter) * FULL_RATE / width
    return [float(f"{centre * GRID_FACTOR**power:.1e}") for power in (-1, 0, 1)]


def sweep(run_at, rates: list[float], grow=lambda: None) -> Sweep:
    """run_at(rate) -> (validation loss, training losses).  An edge that wins is moved out, at most EXTENSIONS times."""
    validation, curves = {}, {}
    pending = list(rates)
    for _ in range(len(rates) + EXTENSIONS):
        rate = pending.pop(0)
        loss, curves[rate] = run_at(rate)
        validation[rate] = loss if math.isfinite(loss) else math.inf
        if not pending:
            best = min(validation, key=validation.get)
            if best not in (min(validation), max(validation)):
                break
            factor = GRID_FACTOR if best == max(validation) else 1 / GRID_FACTOR
            pending = [float(f"{best * factor:.1e}")]
            if len(validation) < len(rates) + EXTENSIONS:
                grow()
    return Sweep(dict(sorted(validation.items())), curves)


def _row(name: str, settings: Settings, subject: Subject, device: torch.device, progress: Progress) -> Iterator[Row]:
    """The method's row after the run of each seed."""
    method = METHODS[name]
    short, width = settings.sweep_steps, subject.model.get_input_embeddings().embedding_dim
    rates = grid(method, width, settings.adapter)
    tick, grow = _task(progress, f"{name}: learning rates", short * len(rates))
    common = {"adapter": settings.adapter, "device": device, "in_place": settings.in_place}

    def run_at(rate: float) -> tuple[float, list[float]]:
        run = train.train(subject, method, rate, short, settings.seed, tick=tick, **common)
        return train.held_out(subject.new, run.model, subject.batch), run.losses

    row = Row(name, sweep(run_at, rates, lambda: grow(short)))
    tick, _ = _task(progress, f"{name}: rate {row.sweep.picked:g}", settings.steps * settings.seeds)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        run = train.train(
            subject, method, row.sweep.picked, settings.steps, seed, tick=tick, points=train.POINTS, **common
        )
        if not row.runs:
            _finish(row, run.model, subject, device)
        run.model = None
        row.runs.append(run)
        yield row


def _finish(row: Row, model: nn.Module, subject: Subject, device: torch.device) -> None:
    """What needs the trained model.  The run is done: a figure that cannot be taken costs that figure alone."""
    import lowrank

    if row.name != "full":
        row.paths = lowrank.stats(model)
    try:
        row.changes = weight_changes(subject.model, model)
    except Exception as error:
        row.not_measured["weight changes"] = one_line(error)
    batch = subject.new.test[: subject.batch].to(device)
    for key, measured in (("unmerged", lambda: model), ("merged", lambda: merged(model))):
        try:
            row.latency[key] = latency(measured(), batch)
        except Exception as error:
            row.not_measured[f"{key} forward"] = one_line(error)


def _control(
    rows, settings: Settings, subject: Subject, device: torch.device, progress: Progress
) -> list[float] | None:
    """peft-lora's run with every weight off by one rounding: how far rounding alone drives curves apart.

    A full run at the rate that both picked; where their picks differ, a run of the sweep at lora's.
    """
    if not {"lora", "peft-lora"} <= rows.keys():
        return None
    rate = rows["lora"].sweep.picked
    steps = settings.steps if rate == rows["peft-lora"].sweep.picked else settings.sweep_steps
    tick, _ = _task(progress, "rounding control", steps)
    common = {"adapter": settings.adapter, "device": device, "tick": tick, "after_prepare": perturb}
    return train.train(subject, METHODS["peft-lora"], rate, steps, settings.seed, **common).losses


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every weight by about one unit in the last place of its dtype, up or down at random."""
    for parameter in model.parameters():
        unit = torch.finfo(parameter.dtype).eps
        parameter.mul_(1 + unit * torch.randn_like(parameter).sign())
