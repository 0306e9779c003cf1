"""The whole comparison: pretrain where needed, sweep each method's learning rate, run it, measure it."""

import math
import time
import warnings
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from . import train
from .data import Subject, load
from .measure import environment, latencies, weight_changes
from .methods import METHODS, Method, attention_layers
from .settings import Settings

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
    """One method.  runs: one per seed, models dropped; the other figures are the first seed's."""

    name: str
    sweep: Sweep
    runs: list[train.Run] = field(default_factory=list)
    changes: dict = field(default_factory=dict)
    latency: dict = field(default_factory=dict)
    paths: dict | None = None  # lowrank.stats: which calls ran fused


@dataclass
class Comparison:
    settings: Settings
    subject: Subject
    environment: dict[str, str]
    pretraining: dict | None
    rows: dict[str, Row]
    control: list[float] | None  # losses of peft-lora started one rounding apart
    seconds: float


def compare(settings: Settings) -> Comparison:
    """Everything that takes time."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.perf_counter()
    subject = load(settings)
    if "lora-attention" in settings.methods:
        attention_layers(subject.model)  # raises now rather than after the other methods' runs
    device = torch.device(settings.device)
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn()) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        pretraining = _pretrain(settings, subject, device, progress) if subject.embedded else None
        subject.model.to(getattr(torch, settings.dtype))
        rows = {name: _row(name, settings, subject, device, progress) for name in settings.methods}
        control = _control(rows, settings, subject, device, progress)
    seconds = time.perf_counter() - began
    return Comparison(settings, subject, environment(device), pretraining, rows, control, seconds)


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


def grid(method: Method, width: int) -> list[float]:
    """Three learning rates a factor of three apart, to one significant digit or two."""
    centre = method.rate * FULL_RATE / width
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


def _row(name: str, settings: Settings, subject: Subject, device: torch.device, progress: Progress) -> Row:
    method = METHODS[name]
    short, width = settings.sweep_steps, subject.model.get_input_embeddings().embedding_dim
    rates = grid(method, width)
    tick, grow = _task(progress, f"{name}: learning rates", short * len(rates))
    common = {"rank": settings.rank, "device": device}

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
    return row


def _finish(row: Row, model: nn.Module, subject: Subject, device: torch.device) -> None:
    """What needs the trained model."""
    import lowrank

    if row.name != "full":
        row.paths = lowrank.stats(model)
    row.changes = weight_changes(subject.model, model)
    row.latency = latencies(model, subject.new.test[: subject.batch].to(device))


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
    common = {"rank": settings.rank, "device": device, "tick": tick, "after_prepare": perturb}
    return train.train(subject, METHODS["peft-lora"], rate, steps, settings.seed, **common).losses


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every weight by about one unit in the last place of its dtype, up or down at random."""
    for parameter in model.parameters():
        unit = torch.finfo(parameter.dtype).eps
        parameter.mul_(1 + unit * torch.randn_like(parameter).sign())
