"""Paired timing: every candidate once per round, in turn, so that a machine whose speed drifts drifts for all of them.

Also what a time is compared with: this device's own copy and matrix rates, the memory of one call, and its Python frames, which
no machine changes.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds per call: median and the 20 % and 80 % quantiles; and by what they were taken."""

    median: float
    q20: float
    q80: float
    how: str = ""  # "graph", "events" (or why it is not "graph"), "wall clock"


def paired(
    candidates: dict[str, Callable[[int], object]],
    device: torch.device,
    rounds: int = 20,
    warm: int = 3,
    sets: int = 1,
    graphs: bool = False,
) -> dict[str, Timing]:
    """{name: Timing} of ``candidates[name](i)``; i counts rounds, so that a candidate can rotate its inputs.

    CUDA is timed with events, the CPU with the wall clock.  ``graphs``: on CUDA, calls 0 to ``sets`` - 1 are captured in one
    CUDA graph and a replay is timed, which leaves the host out; what cannot be captured is timed call by call.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stream = torch.cuda.Stream(device) if graphs and device.type == "cuda" else None
    if stream is not None:  # one stream for warming up and capturing: autograd runs backward where forward ran
        stream.wait_stream(torch.cuda.current_stream(device))
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        for i in range(warm if stream is None else max(warm, sets)):
            for call in candidates.values():
                call(i)
        units = {name: _unit(call, sets, device, stream) for name, call in candidates.items()}
        for i in range(rounds):
            for name, (call, calls, _) in units.items():
                times[name].append(_once(call, i, device) / calls)
    return {name: _quantiles(t, units[name][2]) for name, t in times.items()}


def peak_memory(call: Callable[[int], object], device: torch.device) -> int | None:
    """Bytes that one call holds at its peak beyond what was allocated before, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    call(0)  # what a first call leaves behind is not this one's
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call(0)
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def frames(call: Callable[[], object]) -> tuple[int, int]:
    """Python frames that one call enters: of lowrank's functions, and all."""
    ours, seen = str(Path(__file__).parent.parent), []

    def profile(frame, event, _):
        if event == "call":
            seen.append(frame.f_code.co_filename.startswith(ours))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sum(seen), len(seen)


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes, which should be larger than every cache."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 27)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2e6 * size / paired({"copy": lambda i: target.copy_(source)}, device, rounds=10)["copy"].median


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of n x n matrix products in ``dtype``."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2e6 * n**3 / paired({"mm": lambda i: torch.mm(a, b, out=out)}, device, rounds=10)["mm"].median


def _unit(call, sets: int, device: torch.device, stream) -> tuple[Callable[[int], object], int, str]:
    """(what one timing runs, how many calls that is, how it is timed)."""
    if device.type != "cuda":
        return call, 1, "wall clock"
    if stream is None:
        return call, 1, "events"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for i in range(sets):
                call(i)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return call, 1, f"events, not captured: {str(error).splitlines()[0]}"
    graph.replay()
    return lambda i: graph.replay(), sets, "graph"


def _once(call: Callable[[int], object], i: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)
    before = time.perf_counter()
    call(i)
    return 1e6 * (time.perf_counter() - before)


def _quantiles(times: list[float], how: str) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], how)
    q = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), q[0], q[3], how)
