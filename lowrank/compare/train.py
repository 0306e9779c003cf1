"""One training run: AdamW, warm-up, then a cosine or a constant rate; steps timed, memory counted, measured on the way."""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import analysis, delta
from ..measure.saved import SavedActivations
from ..optim import AdamW
from ..tasks.rows import Batch, Row, orders, pad, rows_of
from ..tasks.task import Task
from .costs import Memory, checkpoint_bytes, memory, synchronize
from .data import Subject, batches
from .methods import Adapter, Method

WARM_UP = 0.1  # of a phase's steps, before a cosine
WARM_UP_STEPS = 5  # before a constant rate: of any length's run, so that a shorter run is the beginning of a longer one
PROBE = 3  # a probe run for a subnetwork has the steps of the run over this
UNTIMED = 2  # first steps of a phase: allocations, and the hooks that count memory

Measures = dict[str, Tensor]  # fp64 [items] by name


@dataclass(frozen=True)
class Point:
    """What was measured after some steps, by name: of each item an fp64 number; "general" is the loss on general text."""

    step: int
    seconds: float
    measures: Measures

    def mean(self, name: str) -> float:
        """Of the items that have a value; NaN of none."""
        return float(self.measures[name].nanmean())


@dataclass
class Run:
    """A method at a rate with a seed.  validation: mean nats per token at the end, infinite of a run that diverged."""

    rate: float
    seed: int
    steps: int
    validation: float = math.inf
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one per step; an untimed step has its phase's median
    points: list[Point] = field(default_factory=list)
    trainable: int = 0  # parameters, in the phase that trains most
    memory: Memory | None = None  # of the phase that needs most
    checkpoint_bytes: int = 0  # of everything that has to be kept beside the original model
    changes: dict | None = None
    diversity: tuple[float, float] | None = None  # of the formats of answers: nats, standard error
    shown: tuple[float, float] | None = None  # nats per token of examples that were not trained, and of trained ones

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.validation)


@dataclass(frozen=True)
class Plan:
    """Of every run of a task: steps, sequences of a batch, evaluations after the start, and the share of old text."""

    steps: int
    batch: int
    points: int
    replay: float = 0.0

    def wanted(self) -> set[int]:
        """Steps after which it is measured, denser at the start, where curves move fastest; the last is one."""
        return {max(1, round(self.steps * (i / self.points) ** 1.5)) for i in range(1, self.points + 1)}


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Tensor, batch: int) -> Tensor:
    """fp64 [n]: mean next-token loss of each block of int64 [n, length], ``batch`` of them in every call."""
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for block in blocks.split(batch):
        block = block.to(device)
        logits = model(input_ids=block).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), block[:, 1:], reduction="none")
        losses.append(loss.mean(1).double().cpu())
    model.train()
    return torch.cat(losses)


def fit(
    model: nn.Module,
    optimizer,
    schedule,
    stream: Iterator[Batch],
    device: torch.device,
    tick: Callable[[float], None],
    after_backward: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Train on every batch of stream, up to a loss that is not finite.  Returns (losses, seconds).  after_backward(saved
    bytes) follows the second step's, after_step(step) every one's."""
    model.train()
    losses, seconds = [], []
    for step, batch in enumerate(stream):
        counted = step == UNTIMED - 1 and after_backward is not None
        if counted and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        arguments = batch.to(device).arguments()
        if counted:
            with SavedActivations((*model.parameters(), *model.buffers())) as saved:
                loss = model(**arguments).loss
        else:
            loss = model(**arguments).loss
        loss.backward()
        if counted:
            after_backward(saved.bytes)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())  # waits for the device
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        tick(losses[-1])
        if not math.isfinite(losses[-1]):
            break
        if after_step is not None:
            after_step(step)
    return losses, timed(seconds)


def timed(seconds: list[float]) -> list[float]:
    """The first UNTIMED replaced by the median of the others."""
    return [statistics.median(seconds[UNTIMED:])] * UNTIMED + seconds[UNTIMED:] if len(seconds) > UNTIMED else seconds


def optimizer_and_schedule(
    model: nn.Module,
    rate: float,
    steps: int,
    masks: dict[str, Tensor] | None = None,
    in_place: bool = False,
    constant: bool = False,
):
    """AdamW and a cosine, or a constant rate.  16-bit weights that train have fp32 masters, unless ``in_place``: without, a
    step below half of a weight's spacing is lost, which decides what full fine-tuning reaches.

    No weight decay: it pulls W towards 0 in full fine-tuning and B A towards 0 in LoRA, which is not the same.
    """
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    options = {"masks": masks, "master_weights": not in_place, "nonfinite": "propagate"}
    optimizer = AdamW(parameters, lr=rate, weight_decay=0.0, **options)
    if constant:
        return optimizer, get_constant_schedule_with_warmup(optimizer, WARM_UP_STEPS)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, max(1, round(WARM_UP * steps)), steps)


def replayed(share: float, batch: int) -> int:
    """Sequences of old text in a batch: at least one where a share is asked for, and never all."""
    return min(max(round(share * batch), 1), batch - 1) if share else 0


def stream_of(task: Task, subject: Subject, plan: Plan, seed: int) -> Iterator[Batch]:
    """The batches of a run: the same for every method.  Old text is cut to the longest of the rows that it comes among."""
    old = replayed(plan.replay, plan.batch)
    order = orders(len(subject.general.train), old, plan.steps, seed) if old else itertools.repeat([])
    for rows, indices in zip(task.batches(plan.batch - old, plan.steps), order, strict=False):
        longest = max(len(row.ids) for row in rows)
        again = _cut(rows_of(subject.general.train[indices]), longest) if indices else []
        yield pad([*rows, *again], subject.tokenizer.pad)


def _cut(rows: list[Row], longest: int) -> list[Row]:
    return [Row(row.ids[:longest], row.labels[:longest]) for row in rows]


def train(
    subject: Subject,
    task: Task,
    method: Method,
    rate: float,
    seed: int,
    plan: Plan,
    *,
    adapter: Adapter,
    device: torch.device,
    measure: Callable[[nn.Module], Measures],
    in_place: bool = False,
    tick: Callable[[float], None] = lambda loss: None,
    after: Callable[[Run, nn.Module], None] = lambda run, model: None,
) -> Run:
    """Adapt a copy of the subject's model.  measure(model) at the plan's points; tick(loss) follows every step, after(run,
    trained model) a run that ended."""
    run, evaluations = Run(rate, seed, plan.steps), []
    model = copy.deepcopy(subject.model).to(device)
    stream, wanted = stream_of(task, subject, plan, seed), plan.wanted()

    def look(step: int) -> None:
        if step in wanted:
            evaluations.append((step, measure(model)))

    def count(saved: int) -> None:
        run.memory = max(run.memory, memory(model, optimizer, saved, device), key=lambda m: m.total if m else -1)

    masks = None
    if method.subnetwork is not None:
        masks = subnetwork(subject, task, method.subnetwork, rate, seed, plan, device, in_place)
    for index, phase in enumerate(method.phases):
        first = len(run.losses)
        length = plan.steps - first if index == len(method.phases) - 1 else round(plan.steps * phase.share)
        torch.manual_seed(seed)  # the same adapters for every implementation of a method
        model = phase.prepare(model, adapter)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.trainable = max(run.trainable, round((method.subnetwork or 1) * trainable))
        optimizer, schedule = optimizer_and_schedule(
            model, phase.learning_rate(rate, adapter), length, masks, in_place, task.constant_rate
        )
        losses, seconds = fit(
            model,
            optimizer,
            schedule,
            itertools.islice(stream, length),
            device,
            tick,
            count,
            lambda step, first=first: look(first + step + 1),
        )
        run.losses += losses
        run.seconds += seconds
        if not math.isfinite(run.losses[-1]):
            break
        run.checkpoint_bytes += delta_bytes(subject.model, model) if masks else checkpoint_bytes(model)
    run.points = [Point(step, sum(run.seconds[:step]), measures) for step, measures in evaluations]
    if math.isfinite(run.losses[-1]):
        validation = task.validate(model)
        run.validation = validation if math.isfinite(validation) else math.inf
    if not run.diverged:
        after(run, model)
    return run


def subnetwork(
    subject: Subject, task: Task, share: float, rate: float, seed: int, plan: Plan, device: torch.device, in_place: bool
) -> dict:
    """{parameter's name: mask} of the parameters that full fine-tuning moves most, found on a copy by a shorter run."""
    short = Plan(max(plan.steps // PROBE, 2), plan.batch, 1, plan.replay)
    model = copy.deepcopy(subject.model).to(device).requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, schedule = optimizer_and_schedule(
        model, rate, short.steps, in_place=in_place, constant=task.constant_rate
    )
    fit(model, optimizer, schedule, stream_of(task, subject, short, seed), device, lambda loss: None)
    return analysis.topk_mask((before, {name: p.detach() for name, p in model.named_parameters()}), share)


def delta_bytes(base: nn.Module, model: nn.Module) -> int:
    """Bytes of lowrank.delta's file that makes ``model`` of ``base``."""
    old, new = ({name: p.detach().cpu() for name, p in m.named_parameters()} for m in (base, model))
    return len(delta.encode(new, old=old))


def pretrain(subject: Subject, steps: int, rate: float, seed: int, device: torch.device, tick) -> list[float]:
    """Train the embedded model's every weight on the general domain, in fp32.  Returns the losses."""
    model, blocks = subject.model.to(device), subject.general.train
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    losses, _ = fit(model, optimizer, schedule, batches(blocks, subject.batch, steps, seed), device, tick)
    model.zero_grad(set_to_none=True)
    model.to("cpu")
    return losses
