"""What one comparison is and has so far: tasks, methods, runs, and what stands beside them."""

import math
from dataclasses import dataclass, field

from ..tasks.forgetting import Forgetting
from ..tasks.task import Task
from . import train
from .budget import Budget
from .data import Subject
from .settings import Settings


@dataclass
class MethodRuns:
    """One method in one task.  sweep: a run per rate, with the first seed; more: the picked rate with the other seeds."""

    sweep: list[train.Run] = field(default_factory=list)
    more: list[train.Run] = field(default_factory=list)

    @property
    def picked(self) -> train.Run:
        """The one with the lowest validation loss, which is neither trained nor reported."""
        return min(self.sweep, key=lambda run: (run.validation, run.rate))

    @property
    def edge(self) -> bool:
        rates = [run.rate for run in self.sweep]
        return len(rates) > 1 and self.picked.rate in (min(rates), max(rates))

    @property
    def of_seeds(self) -> list[train.Run]:
        return [self.picked, *self.more]


@dataclass
class TaskRuns:
    """of_seeds, base: by seed, the task as it redraws it, and what was measured before training."""

    of_seeds: dict[int, Task]
    plan: train.Plan
    base: dict[int, train.Point]
    alone: float = math.nan  # nats per token of its examples that are not trained, before training
    methods: dict[str, MethodRuns] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return next(iter(self.of_seeds.values()))


@dataclass
class Costs:
    """What a method costs, from its first run; None where it could not be taken, for the reason in not_measured."""

    latency: dict = field(default_factory=lambda: {"unmerged": None, "merged": None})
    paths: dict | None = None  # lowrank.stats: which calls ran fused
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """tasks: what has a run.  not_done: {method or "task: method": why it, or the rest of it, could not be done}."""

    settings: Settings
    subject: Subject
    environment: dict[str, object]
    pretraining: dict | None = None
    forgetting: Forgetting | None = None
    tasks: dict[str, TaskRuns] = field(default_factory=dict)
    costs: dict[str, Costs] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)
    agreement: dict | None = None
    probed: dict[str, dict] = field(default_factory=dict)  # by set, what examples in the context give
    budget: Budget | None = None  # what fits into --minutes
    seconds: float = 0.0
    complete: bool = False

    @property
    def any_run(self) -> bool:
        runs = (run for task in self.tasks.values() for method in task.methods.values() for run in method.sweep)
        return any(not run.diverged for run in runs)
