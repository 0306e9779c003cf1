"""One training run: AdamW, warm-up, cosine; steps timed, memory counted, both domains evaluated on the way."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import analysis, delta
from ..measure.saved import SavedActivations
from ..optim import AdamW
from .costs import Memory, checkpoint_bytes, memory, synchronize
from .data import Corpus, Subject, batches
from .methods import Adapter, Method

WARM_UP = 0.1  # of a phase's steps
POINTS = 9  # evaluations of a full run, denser at its start, where the losses move fastest
PROBE = 3  # a probe run for a subnetwork has the steps of the run over this
UNTIMED = 2  # first steps of a phase: allocations, and the hooks that count memory


@dataclass(frozen=True)
class Point:
    """Held-out losses after some steps.  new, old: fp64 [sequences], mean nats per token of each test sequence."""

    step: int
    seconds: float
    new: Tensor
    old: Tensor


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one per step; an untimed step has its phase's median
    points: list[Point] = field(default_factory=list)
    trainable: int = 0  # parameters, in the phase that trains most
    memory: Memory | None = None  # of the phase that needs most
    checkpoint_bytes: int = 0  # of everything that has to be kept beside the original model
    model: nn.Module | None = None


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Tensor, batch: int) -> Tensor:
    """fp64 [blocks]: mean next-token loss of each sequence."""
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
    model, optimizer, schedule, stream, device, tick: Callable[[float], None], after_backward=None, after_step=None
):
    """Train on every batch of stream.  Returns (losses, seconds).  after_backward(saved bytes), after_step(step)."""
    model.train()
    losses, seconds = [], []
    for step, batch in enumerate(stream):
        counted = step == UNTIMED - 1 and after_backward is not None
        if counted and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        batch = batch.to(device)
        if counted:
            with SavedActivations((*model.parameters(), *model.buffers())) as saved:
                loss = model(input_ids=batch, labels=batch).loss
        else:
            loss = model(input_ids=batch, labels=batch).loss
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
        if after_step is not None:
            after_step(step)
    return losses, timed(seconds)


def timed(seconds: list[float]) -> list[float]:
    """The first UNTIMED replaced by the median of the others."""
    return [statistics.median(seconds[UNTIMED:])] * UNTIMED + seconds[UNTIMED:] if len(seconds) > UNTIMED else seconds


def optimizer_and_schedule(
    model: nn.Module, rate: float, steps: int, masks: dict[str, Tensor] | None = None, in_place: bool = False
):
    """AdamW and a cosine.  16-bit weights that train have fp32 masters, unless ``in_place``: without, a step below half of a
    weight's spacing is lost, which decides what full fine-tuning reaches.

    No weight decay: it pulls W towards 0 in full fine-tuning and B A towards 0 in LoRA, which is not the same.
    """
    from transformers import get_cosine_schedule_with_warmup

    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    options = {"masks": masks, "master_weights": not in_place, "nonfinite": "propagate"}
    optimizer = AdamW(parameters, lr=rate, weight_decay=0.0, **options)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, max(1, round(WARM_UP * steps)), steps)


def train(
    subject: Subject,
    method: Method,
    rate: float,
    steps: int,
    seed: int,
    *,
    adapter: Adapter,
    device: torch.device,
    in_place: bool = False,
    tick: Callable[[float], None] = lambda loss: None,
    points: int = 0,
    after_prepare: Callable[[nn.Module], None] | None = None,
) -> Run:
    """Adapt a copy of the subject's model.  points: evaluations on the way, 0 for a run of the sweep.
    tick(loss) follows every step, after_prepare(model) every phase's preparation."""
    run, evaluations = Run(), []
    model = copy.deepcopy(subject.model).to(device)
    stream = batches(subject.new.train, subject.batch, steps, seed)
    wanted = {round(steps * (i / (points - 1)) ** 1.5) for i in range(points)} if points else set()

    def look(step: int) -> None:
        if step in wanted:
            new, old = (evaluate(model, c.test, subject.batch) for c in (subject.new, subject.general))
            evaluations.append((step, new, old))

    def count(saved: int) -> None:
        run.memory = max(run.memory, memory(model, optimizer, saved, device), key=lambda m: m.total if m else -1)

    masks = None
    if method.subnetwork is not None:
        masks = subnetwork(subject, method.subnetwork, rate, max(steps // PROBE, 2), seed, device, in_place)
    look(0)
    for index, phase in enumerate(method.phases):
        first = len(run.losses)
        length = steps - first if index == len(method.phases) - 1 else round(steps * phase.share)
        torch.manual_seed(seed)  # the same adapters for every implementation of a method
        model = phase.prepare(model, adapter)
        if after_prepare is not None:
            after_prepare(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.trainable = max(run.trainable, round((method.subnetwork or 1) * trainable))
        optimizer, schedule = optimizer_and_schedule(model, phase.learning_rate(rate, adapter), length, masks, in_place)
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
        if points:
            run.checkpoint_bytes += delta_bytes(subject.model, model) if masks else checkpoint_bytes(model)
    run.points = [Point(step, sum(run.seconds[:step]), new, old) for step, new, old in evaluations]
    run.model = model
    return run


def subnetwork(
    subject: Subject, share: float, rate: float, steps: int, seed: int, device: torch.device, in_place: bool
) -> dict:
    """{parameter's name: mask} of the parameters that full fine-tuning moves most, found on a copy by a run of ``steps``."""
    model = copy.deepcopy(subject.model).to(device).requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, schedule = optimizer_and_schedule(model, rate, steps, in_place=in_place)
    fit(model, optimizer, schedule, batches(subject.new.train, subject.batch, steps, seed), device, lambda loss: None)
    return analysis.topk_mask((before, {name: p.detach() for name, p in model.named_parameters()}), share)


def delta_bytes(base: nn.Module, model: nn.Module) -> int:
    """Bytes of lowrank.delta's file that makes ``model`` of ``base``."""
    old, new = ({name: p.detach().cpu() for name, p in m.named_parameters()} for m in (base, model))
    return len(delta.encode(new, old=old))


def pretrain(subject: Subject, steps: int, rate: float, seed: int, device: torch.device, tick) -> list[float]:
    """Train the embedded model's every weight on the general domain, in place and in fp32.  Returns the losses."""
    model = subject.model.to(device)
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    stream = batches(subject.general.train, subject.batch, steps, seed)
    losses, _ = fit(model, optimizer, schedule, stream, device, tick)
    model.zero_grad(set_to_none=True)
    model.to("cpu")
    return losses


def held_out(corpus: Corpus, model: nn.Module, batch: int) -> float:
    """Mean validation loss: what learning rates are picked by."""
    return float(evaluate(model, corpus.validation, batch).mean())
