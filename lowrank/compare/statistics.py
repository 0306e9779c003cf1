"""What the numbers allow to be said: forgetting at equal learning, and which differences are larger than the spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .train import Point, Run

FALLS = "loss"  # the one measure that falls when something is learnt
SHARES = (0.5, 0.9)  # of the largest gain in it: the targets of a task that has none of its own


@dataclass(frozen=True)
class Crossing:
    """Where a curve first meets a target, linear between the evaluations around it.  forgot: rise of the general loss."""

    step: float
    seconds: float
    forgot: float


def finite(points: Sequence[Point]) -> list[Point]:
    """Up to the first evaluation of a run that diverged."""
    kept = []
    for point in points:
        if not all(math.isfinite(float(values.sum())) for name, values in point.measures.items() if name != "right"):
            break  # right: NaN of an answer that is not valid
        kept.append(point)
    return kept


def crossing(points: Sequence[Point], measure: str, target: float) -> Crossing | None:
    """The first time the mean of ``measure`` comes to the target; None where it does not.  points[0] is before training."""
    sign = -1.0 if measure == FALLS else 1.0
    points = finite(points)
    means = [sign * p.mean(measure) for p in points]
    before = points[0].mean("general")
    if means[0] >= sign * target:
        return Crossing(0, 0.0, 0.0)
    for a, b, low, high in zip(points, points[1:], means, means[1:], strict=False):
        if low < sign * target <= high:
            w = (sign * target - low) / (high - low)
            values = ((p.step, p.seconds, p.mean("general") - before) for p in (a, b))
            return Crossing(*(x + w * (y - x) for x, y in zip(*values, strict=True)))
    return None


def ends(base: Point, runs: Sequence[Run]) -> list[Point]:
    """Before training, then the last point of each run that did not diverge, by rate."""
    return [base, *(run.points[-1] for run in sorted(runs, key=lambda run: run.rate) if not run.diverged)]


def mean(values: Sequence[float]) -> float:
    """Over the seeds; infinite where one of them diverged."""
    return sum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


def noise(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Two standard errors of two methods' mean difference on the same items.  a, b: one tensor [n] per seed."""
    difference = torch.stack(list(a)).mean(0) - torch.stack(list(b)).mean(0)
    return 2 * float(difference.std() / difference.numel() ** 0.5)


def separated(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two methods differ by more than the evaluation's noise and, with several seeds, their ranges part."""
    low, high = sorted(([float(t.mean()) for t in x] for x in (a, b)), key=mean)
    difference = mean(high) - mean(low)
    if math.isinf(difference):
        return True
    return difference > noise(a, b) and (len(low) == 1 or max(low) < min(high))


def leaders(values: dict[str, Sequence[Tensor]]) -> list[str]:
    """The method with the lowest mean and all that are not separated from it, lowest first."""
    order = sorted(values, key=lambda name: mean([float(t.mean()) for t in values[name]]))
    return order[:1] + [name for name in order[1:] if not separated(values[order[0]], values[name])]
