"""Paired timing: every candidate once per round, in turn, so that a machine whose speed drifts drifts for all of them."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds per call: median and the 20 % and 80 % quantiles."""

    median: float
    q20: float
    q80: float


def paired(candidates: dict[str, Callable[[int], object]], device: torch.device, rounds: int = 20, warm: int = 3):
    """{name: Timing} of ``candidates[name](i)``; i counts rounds, so that a candidate can rotate its inputs.

    CUDA is timed with events, the CPU with the wall clock.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warm):
        for call in candidates.values():
            call(i)
    for i in range(rounds):
        for name, call in candidates.items():
            times[name].append(_once(call, i, device))
    return {name: _quantiles(t) for name, t in times.items()}


def _once(call: Callable[[int], object], i: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)
    start = time.perf_counter()
    call(i)
    return 1e6 * (time.perf_counter() - start)


def _quantiles(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    q = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), q[0], q[3])
