"""What the numbers allow to be said: loss at equal loss, and which differences are larger than the spread."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .train import Point, Run

ROUNDING_FACTOR = 10.0  # two implementations round at every step, the control only once, at the start
CHAOS = 1e-4  # of the loss: a tenth of a percent allowed at most, which a wrong scale or a missing layer exceeds
FLOAT32_EPS = 2.0**-23  # losses are float32


def finite(points: Sequence[Point]) -> list[Point]:
    """Without the evaluations of a run that diverged."""
    return [p for p in points if p.new.isfinite().all() and p.old.isfinite().all()]


def target_loss(runs: Sequence[Run]) -> float:
    """The worst of the runs' best new-domain losses: the lowest loss that every one of them reached."""
    return max(min(float(p.new.mean()) for p in finite(run.points)) for run in runs)


def at_loss(points: Sequence[Point], target: float) -> Point:
    """The first time the new-domain loss comes down to target, linear between the evaluations around it."""
    points = finite(points)
    means = [float(p.new.mean()) for p in points]
    if means[0] <= target:
        return points[0]
    for before, after, high, low in zip(points, points[1:], means, means[1:], strict=False):
        if high > target >= low:
            w = (high - target) / (high - low)
            return Point(
                round(before.step + w * (after.step - before.step)),
                before.seconds + w * (after.seconds - before.seconds),
                before.new + w * (after.new - before.new),
                before.old + w * (after.old - before.old),
            )
    raise ValueError(f"expected a target that the run reaches, got {target}; its lowest loss is {min(means)}")


def mean(values: Sequence[float]) -> float:
    """Of a loss over the seeds; infinite where one of them diverged."""
    return sum(values) / len(values) if all(map(math.isfinite, values)) else math.inf


def noise(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Two standard errors of two methods' mean difference on the same sequences.  a, b: one tensor [n] per seed."""
    difference = torch.stack(list(a)).mean(0) - torch.stack(list(b)).mean(0)
    return 2 * float(difference.std() / difference.numel() ** 0.5)


def separated(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two methods differ by more than the evaluation's noise and, with several seeds, their ranges part."""
    low, high = sorted(([float(t.mean()) for t in x] for x in (a, b)), key=mean)
    difference = mean(high) - mean(low)
    if math.isinf(difference):
        return True
    return difference > noise(a, b) and (len(low) == 1 or max(low) < min(high))


def leaders(losses: dict[str, Sequence[Tensor]]) -> list[str]:
    """The method with the lowest mean and all that are not separated from it, lowest first."""
    order = sorted(losses, key=lambda name: mean([float(t.mean()) for t in losses[name]]))
    return order[:1] + [name for name in order[1:] if not separated(losses[order[0]], losses[name])]


def agreement(lora: Sequence[float], peft: Sequence[float], control: Sequence[float], eps: float) -> dict:
    """Loss curves from one start at one rate.  control: peft's with every weight moved by one rounding.

    Training amplifies rounding; once the control is further from peft than max(CHAOS, eps) of the loss, nothing follows
    from a difference, so only the steps before count.  There, within rounding means no further apart than
    ROUNDING_FACTOR times the control's largest distance, or four units in the last place of the loss itself.
    """
    drift = [abs(c - p) for c, p in zip(control, peft, strict=False)]
    calm = next(
        (i for i, (d, p) in enumerate(zip(drift, peft, strict=False)) if not d <= max(CHAOS, eps) * p), len(drift)
    )
    steps = max(calm, 1)
    apart = [abs(a - p) for a, p in zip(lora, peft, strict=False)]
    difference = max(apart[:steps])
    allowed = max(ROUNDING_FACTOR * max(drift[:steps]), 4 * FLOAT32_EPS * max(peft[:steps]))
    return {
        "steps": steps,
        "largest_difference": difference,
        "rounding_alone": max(drift[:steps]),
        "allowed": allowed,
        "within_rounding": difference <= allowed,
        "all_steps": len(apart),
        "largest_difference_of_all": max(apart),
        "rounding_alone_of_all": max(drift),
    }
