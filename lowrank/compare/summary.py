"""A Comparison as plain data: what compare.json holds, and all that the tables, the figure and the verdict read."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..tasks.task import Task
from .comparison import Comparison, MethodRuns, TaskRuns
from .methods import directions, method_of, stacks_of
from .probe import YOURS, finding
from .statistics import FALLS, SHARES, Crossing, crossing, ends, finite, leaders, noise, separated
from .train import Point, Run


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, least and most over the seeds; None of nothing."""
    values = [float(v) for v in values]
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)} if values else None


def summarize(comparison: Comparison) -> dict:
    """Losses are nats per token, times seconds, sizes bytes, shares of 1."""
    settings, subject, forgetting = comparison.settings, comparison.subject, comparison.forgetting
    probed = comparison.probed
    tasks = {
        name: {**_task(runs), **_forecast(name, comparison)} for name, runs in comparison.tasks.items() if _begun(runs)
    }
    return {
        "command": settings.command,
        "seconds": comparison.seconds,
        "complete": comparison.complete,
        "not_done": comparison.not_done,
        "environment": comparison.environment,
        "model": {
            "name": subject.name,
            "embedded": subject.embedded,
            "invented": list(subject.invented),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "pretraining": comparison.pretraining,
            "config": subject.model.config.to_dict(),
        },
        "general": {
            "source": subject.general.source,
            "sha256": subject.general.digest,
            "sequences": len(subject.general.test),
        },
        "settings": {
            "dtype": settings.dtype,
            "device": settings.device,
            "batch": subject.batch,
            "length": subject.length,
            "rank": settings.rank,
            "alpha": "rank" if settings.alpha is None else settings.alpha,
            "target_modules": list(settings.target_modules),
            "replay": settings.replay,
            "rates": {name: list(rates) for name, rates in settings.rates.items()},
            "loss": settings.loss,
            "in_place": settings.in_place,
            "seed": settings.seed,
            "seeds": settings.seeds,
            "minutes": settings.minutes,
            "estimated_seconds": comparison.budget and comparison.budget.seconds,
        },
        "memory_measure": "CUDA allocator peak" if settings.device != "cpu" else "counted bytes",
        "forgetting": {
            "known_items": forgetting.known,
            "nothing_to_forget": forgetting.nothing_to_forget,
            "diversity": forgetting.before and list(forgetting.before),
            "diverse": forgetting.diverse,
        },
        "methods": {name: _costs(name, comparison) for name in settings.names if _first(name, comparison)},
        "tasks": tasks,
        "probe": {"sets": probed},
        "agreement": comparison.agreement,
    }


def _forecast(name: str, comparison: Comparison) -> dict:
    """Which set of examples stands for the task, and what may be concluded of it."""
    own = YOURS + name if comparison.settings.data is not None else {"knowledge": "facts"}.get(name, name)
    summary = comparison.probed.get(own)
    recall = name == "knowledge"
    return {"probed": own, "finding": finding(summary, comparison.probed, recall) if summary else None}


def _begun(runs: TaskRuns) -> list[str]:
    return [name for name, done in runs.methods.items() if any(not run.diverged for run in done.sweep)]


def _first(name: str, comparison: Comparison) -> Run | None:
    done = (task.methods.get(name) for task in comparison.tasks.values())
    return next((run for d in done if d for run in d.sweep if run.memory and not run.diverged), None)


def _costs(name: str, comparison: Comparison) -> dict:
    first, costs, settings = _first(name, comparison), comparison.costs.get(name), comparison.settings
    memory = [
        run.memory
        for task in comparison.tasks.values()
        if (d := task.methods.get(name))
        for run in d.sweep
        if run.memory
    ]
    adapter = settings.adapter(name)
    return {
        "summary": method_of(name).summary,
        "rank": adapter.rank if method_of(name).is_lora else None,
        "alpha": adapter.alpha if method_of(name).is_lora else None,
        "layers": _layers(name, comparison),
        "stacks": _stacks(name, comparison),
        "directions": directions(comparison.subject.model, adapter) if name == "svf" else None,
        "trainable_parameters": first.trainable,
        "memory": max(memory, key=lambda m: m.total).as_dict(),
        "checkpoint_bytes": first.checkpoint_bytes,
        "latency": costs.latency if costs else {"unmerged": None, "merged": None},
        "paths": costs.paths if costs else None,
        "not_measured": costs.not_measured if costs else {},
    }


def _layers(name: str, comparison: Comparison) -> str | None:
    """A LoRA method's target_modules as Python, where it chooses them itself: the last parts of their names."""
    chosen = method_of(name).chooses
    if chosen is None:
        return None
    return repr(sorted({layer.rpartition(".")[2] for layer in chosen(comparison.subject.model)}))


def _stacks(name: str, comparison: Comparison) -> list[str]:
    """A LoRA method's target_parameters: the experts of a mixture."""
    if not method_of(name).is_lora or name.startswith("lora-attention"):
        return []
    return stacks_of(comparison.subject.model, comparison.settings.adapter(name))


def _task(runs: TaskRuns) -> dict:
    task, begun = runs.task, {name: runs.methods[name] for name in _begun(runs)}
    targets = _targets(runs, begun)
    apart = {name: [_end(run, task.apart) for run in done.of_seeds] for name, done in begun.items()}
    general = {name: [_end(run, "general") for run in done.of_seeds] for name, done in begun.items()}
    first, order = next(iter(runs.base.values())), leaders(apart)
    return {
        "source": task.source,
        "sha256": task.digest,
        "learnt": task.learnt,
        "apart": task.apart,
        "steps": runs.plan.steps,
        "batch": runs.plan.batch,
        "evaluations": len(runs.plan.wanted()),
        "constant_rate": task.constant_rate,
        "targets": targets,
        "items": {name: len(values) for name, values in first.measures.items()},
        "base": _means(first),
        "methods": {
            name: _method(done, runs, targets, begun[order[0]].of_seeds, general.get("full"))
            for name, done in begun.items()
        },
        "leaders": {"learnt": order, "kept": leaders(general)},
    }


def _end(run: Run, measure: str) -> Tensor:
    """[items], infinite of a run that diverged."""
    values = run.points[-1].measures[measure]
    return torch.full_like(values, math.inf) if run.diverged else values


def _targets(runs: TaskRuns, begun: dict[str, MethodRuns]) -> list[float]:
    """The task's own; of a loss, shares of the largest gain that any picked run made."""
    task, base = runs.task, next(iter(runs.base.values()))
    if task.targets:
        return list(task.targets)
    start = base.mean(task.learnt)
    gain = max(start - done.picked.points[-1].mean(task.learnt) for done in begun.values())
    return [start - share * gain for share in SHARES] if gain > 0 else []


def _unlike(own: list[Tensor], full: list[Tensor] | None) -> bool | None:
    """Whether the general text's loss tells a method's picked runs apart from full training's; None without that."""
    return None if full is None or len(own) != len(full) else separated(own, full)


def _method(done: MethodRuns, runs: TaskRuns, targets: list[float], best: list[Run], full: list[Tensor] | None) -> dict:
    task, picked, of_seeds = runs.task, done.picked, [run for run in done.of_seeds if not run.diverged]
    return {
        "learning_rate": picked.rate,
        "edge_of_grid": done.edge,
        "seeds_done": len(done.of_seeds),
        "seeds_diverged": [run.seed for run in done.of_seeds if run.diverged],
        "seconds_per_step": spread(sum(run.seconds) / len(run.seconds) for run in of_seeds),
        "after": {name: spread(run.points[-1].mean(name) for run in of_seeds) for name in picked.points[-1].measures},
        "forgot": spread(_forgot(run) for run in of_seeds),
        "at_targets": [_reached(done, runs, target) for target in targets],
        "kept_unlike": _unlike([_end(run, "general") for run in done.of_seeds], full),
        "short": _short(of_seeds, best, task, targets),
        "changes": picked.changes,
        "diversity": list(picked.diversity) if picked.diversity else None,
        "trained": [runs.alone, *picked.shown] if picked.shown else None,
        "rates": [_rate(run, task.learnt, targets) for run in sorted(done.sweep, key=lambda run: run.rate)],
    }


def _short(of_seeds: list[Run], best: list[Run], task: Task, targets: list[float]) -> bool | None:
    """Whether a loss misses the last target by more than the noise of its difference from the best's; None of no loss."""
    if task.learnt != FALLS or not targets or len(of_seeds) != len(best):
        return None
    own, others = ([run.points[-1].measures[FALLS] for run in runs] for runs in (of_seeds, best))
    missed = sum(float(values.mean()) for values in own) / len(own) - targets[-1]
    return missed > (0.0 if of_seeds == best else noise(own, others))


def _forgot(run: Run) -> float:
    return run.points[-1].mean("general") - run.points[0].mean("general")


def _reached(done: MethodRuns, runs: TaskRuns, target: float) -> dict:
    """Where the picked runs meet a target.  With a constant rate a run's own curve says it; of cosines only ends do, so
    there it is the line through the ends of the runs at all rates, with the first seed."""
    task = runs.task
    if task.constant_rate:
        found = [None if run.diverged else crossing(run.points, task.learnt, target) for run in done.of_seeds]
    else:
        base = next(iter(runs.base.values()))
        at = crossing(ends(base, done.sweep), task.learnt, target)
        found = [at and Crossing(math.nan, math.nan, at.forgot)]
    met = [at for at in found if at]
    whole = len(met) == len(found)
    return {
        "target": target,
        "reached": len(met),
        "of": len(found),
        "step": spread(at.step for at in met) if whole and task.constant_rate else None,
        "seconds": spread(at.seconds for at in met) if whole and task.constant_rate else None,
        "forgot": spread(at.forgot for at in met) if whole else None,
    }


def _rate(run: Run, learnt: str, targets: list[float]) -> dict:
    points = finite(run.points)
    crossings = [crossing(points, learnt, target) for target in targets]
    return {
        "learning_rate": run.rate,
        "validation": run.validation,
        "diverged": run.diverged,
        "curve": [{"step": p.step, "seconds": p.seconds, **_means(p)} for p in points],
        "at_targets": [at and {"step": at.step, "seconds": at.seconds, "forgot": at.forgot} for at in crossings],
        "changes": run.changes,
        "diversity": run.diversity,
        "training_losses": run.losses,
    }


def _means(point: Point) -> dict[str, float]:
    return {name: point.mean(name) for name in point.measures}
