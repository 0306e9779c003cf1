"""How long a comparison takes, and what of it fits into so many minutes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .settings import Settings

EVALUATION_SHARE = 0.25  # of a run's work, at most
MOST_POINTS = 8
TRAINED = 3  # a token's forward and backward, in forwards
CALL = 128  # tokens that a call of few takes the time of
SHORTEST = 64  # tokens of a sequence
LEAST_STEPS = 6
EXTENDED = 0.5  # further rates that a sweep takes, in the mean: an edge that wins is moved out


@dataclass(frozen=True)
class Cost:
    """Seconds of one method in one task: a training step, an evaluation, and what follows a run's end."""

    step: float
    evaluation: float
    end: float


@dataclass(frozen=True)
class Budget:
    """What fits: sequence length, the share of every task's steps, and how many rates each method tries."""

    length: int
    share: float
    rates: int
    seconds: float

    def steps(self, whole: int) -> int:
        return max(LEAST_STEPS, round(whole * self.share))


def points(steps: int, step_tokens: int, evaluation_tokens: int) -> int:
    """Evaluations of a run after the start: no more than a quarter of its work, counted in tokens (no timing: the same on
    every machine)."""
    training = TRAINED * steps * step_tokens
    allowed = training * EVALUATION_SHARE / (1 - EVALUATION_SHARE) / max(evaluation_tokens, 1)
    return max(1, min(MOST_POINTS, int(allowed), steps))


def seconds(
    costs: dict[tuple[str, str], Cost],
    steps: dict[str, int],
    evaluations: dict[str, int],
    rates: dict[tuple[str, str], float],
    seeds: int,
    shortened: float = 1.0,
) -> float:
    """Of all runs.  shortened: sequences of text over the length that the costs were measured at."""
    total = 0.0
    for (task, method), cost in costs.items():
        runs = rates[task, method] + seeds - 1
        step = cost.step * (shortened if task == "text" else 1.0)
        total += runs * (steps[task] * step + evaluations[task] * cost.evaluation * shortened + cost.end)
    return total


def halves(length: int) -> list[int]:
    """The length and what may come of halving it."""
    lengths = [length]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths


def candidates(shorter: Sequence[int]) -> Iterator[tuple[int, float, int]]:
    """(length, share of the steps, rates), from the best to what is still worth reading.  shorter: the lengths, falling."""
    length = shorter[0]
    yield from ((length, share, 3) for share in (1.0, 0.75, 0.5))
    yield from ((short, 0.5, 3) for short in shorter[1:])
    yield from ((shorter[-1], share, 3) for share in (0.35, 0.25))
    yield from ((shorter[-1], share, 1) for share in (0.5, 0.35, 0.25, 0.15, 0.1, 0.0))


def fitted(
    costs: dict[tuple[str, str], Cost],
    evaluations: dict[str, int],
    settings: Settings,
    lengths: Sequence[int],
    minutes: float,
    ahead: float = 0.0,
) -> Budget:
    """The first of the candidates that takes no longer than so many minutes.  ahead: seconds that are gone or that nothing
    shortens; lengths: that sequences may have, the first of them what the costs were measured at.

    Raises: ValueError where even the least does not fit, naming the methods that would.
    """

    def budget(chosen, length_, share, rates) -> Budget:
        budget = Budget(length_, share, rates, 0.0)
        steps = {task: budget.steps(settings.steps_of(task)) for task, _ in chosen}
        tried = {
            (task, name): len(settings.rates.get(name, ())) or (rates + EXTENDED if rates > 1 else 1)
            for task, name in chosen
        }
        few = {task: min(evaluations[task], steps[task]) for task, _ in chosen}
        taken = ahead + seconds(chosen, steps, few, tried, settings.seeds, length_ / lengths[0])
        return Budget(length_, share, rates, taken)

    least = None
    for candidate in candidates(lengths):
        least = budget(costs, *candidate)
        if least.seconds <= 60 * minutes:
            return least
    fit, spent = [], ahead
    alone = {name: {key: cost for key, cost in costs.items() if key[1] == name} for _, name in costs}
    smallest = (least.length, least.share, least.rates)
    for name, own in sorted(alone.items(), key=lambda item: budget(item[1], *smallest).seconds):
        spent += budget(own, *smallest).seconds - ahead
        if spent <= 60 * minutes:
            fit.append(name)
    would = f"--methods {','.join(fit)} would fit" if fit else "no method alone would fit"
    raise ValueError(
        f"--minutes {minutes:g}: {LEAST_STEPS} steps of each method, and what is around them, take "
        f"{least.seconds / 60:.1f} minutes; {would}"
    )


def words(taken: float) -> str:
    if taken < 90:
        return f"{taken:.0f} s"
    minutes = round(taken / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
