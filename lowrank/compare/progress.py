"""What is seen of a long run: bars on a terminal, one plain line per finished stage anywhere else."""

import contextlib
import sys
import time
from collections.abc import Iterator

from .. import _screen


class Stage:
    """tick(loss) follows every step; result: what to say of it when it is done."""

    def __init__(self, tick):
        self._tick, self.result = tick, ""

    def tick(self, loss: float | None = None) -> None:
        self._tick(loss)


class Stages:
    def __init__(self, progress, console):
        self._progress, self._console = progress, console

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Stage]:
        bar = self._progress.add_task(name, total=steps, note="") if self._progress else None

        def tick(loss: float | None) -> None:
            if bar is not None:
                self._progress.update(bar, advance=1, note="" if loss is None else f"loss {loss:.3f}")

        stage, start = Stage(tick), time.perf_counter()
        yield stage
        if bar is not None:
            self._progress.update(bar, note=stage.result)
        else:
            self.line(f"{name}: {stage.result or 'done'} ({time.perf_counter() - start:.0f} s)")


@contextlib.contextmanager
def stages() -> Iterator[Stages]:
    """On stderr, so that stdout may be read by a program."""
    from rich.console import Console

    stream = _screen.Unbreakable(sys.stderr)
    if stream.isatty():
        with _screen.progress(label=34, bar=24, note=True) as progress:
            yield Stages(progress, progress.console)
    else:
        yield Stages(None, Console(file=stream, highlight=False, width=1000))
