"""Which learning rates a method tries."""

import math
from collections.abc import Callable, Iterator

from .methods import Method
from .settings import Adapter
from .train import Run

FULL_RATE = 1.2e-3 * 128  # over the model's width: the centre of full fine-tuning's grid, found on the embedded model
GRID_FACTOR = 3.0
EXTENSIONS = 2  # values added beyond an edge that wins before the sweep gives up and flags it


def grid(method: Method, width: int, adapter: Adapter, count: int = 3) -> list[float]:
    """Learning rates a factor of three apart, to one significant digit or two; of one, the middle."""
    centre = method.centre(adapter) * FULL_RATE / width
    return [float(f"{centre * GRID_FACTOR**power:.1e}") for power in ((-1, 0, 1) if count > 1 else (0,))]


def sweep(run_at: Callable[[float], Run], rates: list[float], extend: bool = True) -> Iterator[Run]:
    """A run at every rate.  An edge that wins is moved out, at most EXTENSIONS times."""
    validation: dict[float, float] = {}
    pending, extensions = list(rates), EXTENSIONS if extend and len(rates) > 1 else 0
    while pending:
        run = run_at(pending.pop(0))
        validation[run.rate] = run.validation
        yield run
        best = min(validation, key=lambda rate: (validation[rate], rate))
        if not pending and extensions and math.isfinite(validation[best]):
            if best == max(validation):
                pending, extensions = [float(f"{best * GRID_FACTOR:.1e}")], extensions - 1
            elif best == min(validation):
                pending, extensions = [float(f"{best / GRID_FACTOR:.1e}")], extensions - 1
