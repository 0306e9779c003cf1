"""What the launchers cost the host: the four thin products of a layer in bf16, one adapter of rank 16, M = K = N.

    python bench/launchers.py [--size 1024] [--dropout]

Without a GPU, the launchers alone, as an H100 would have them planned: tensors are on the CPU, what a launcher allocates is
counted, out of memory that malloc already has, and the last step, Triton's ``kernel[grid](...)``, is left out.  On a GPU, with
their launches, through Triton's launcher and through csrc/plan_cuda.cpp.  Microseconds, median over rounds that take turns.
"""

import argparse
import ctypes
import gc
import statistics
import time

import torch

from lowrank.kernels import _launch, _reduce, dy_pass, expand, shrink, thin, x_pass


class Nothing:
    """In a kernel's place."""

    def __getitem__(self, grid):
        return lambda *args, **constants: None


def imagine_h100() -> None:
    torch.set_num_threads(1)
    for option in (
        -1,
        -3,
    ):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: large blocks are kept, as CUDA's caching allocator keeps them
        ctypes.CDLL(None).mallopt(option, 1 << 30)
    _launch.GPU.of = lambda device: _launch.GPU(90, 132)
    for module in (_reduce, shrink, expand, dy_pass, x_pass):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Nothing())


def calls(size: int, dropout: bool, device: str = "cpu", r: int = 16, thin=thin) -> dict:
    """By name."""

    def new(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype, device=device)

    x, dY, dX, S, dS = new(size, size), new(size, size), new(size, size), new(size, r), new(size, r)
    A, B, seeds, keep = new(r, size), new(size, r), new(1, dtype=torch.int64), new(size, size // 32, dtype=torch.int32)
    masks, cuts, keeps = ([0], [6554], [keep]) if dropout else ([-1], [], [])
    bf16 = torch.bfloat16
    return {
        "shrink": lambda: thin.shrink(x, [A], bf16, masks, cuts, seeds if dropout else None),
        "expand": lambda: thin.expand(S, [B], [2.0], [None], None, bf16),
        "dy_pass": lambda: thin.dy_pass(dY, [B], [2.0], [None], S, [True], True, bf16),
        "x_pass": lambda: thin.x_pass(x, [dS], [A], [True], dX, masks, keeps),
    }


def by_triton(call):
    """The same, launched by Triton."""

    def through(hooked=_launch._hooked):
        _launch._hooked = lambda: True
        try:
            call()
        finally:
            _launch._hooked = hooked

    return through


def timed(calls: dict, rounds: int = 60, repeats: int = 50) -> dict[str, float]:
    """Microseconds of a call."""
    times = {name: [] for name in calls}
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    gc.enable()
    return {name: statistics.median(of) for name, of in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dropout", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        imagine_h100()
        launchers = calls(args.size, args.dropout)
        columns = {"planned": launchers}
    else:
        launchers = calls(args.size, args.dropout, "cuda")
        columns = {"through Triton": {name: by_triton(call) for name, call in launchers.items()}, "csrc/": launchers}
    for of in columns.values():
        for call in of.values():
            call()
    times = timed({(column, name): call for column, of in columns.items() for name, call in of.items()})
    print(" " * 8, *(f"{column:>16}" for column in columns))
    for name in launchers:
        print(f"{name:8}", *(f"{times[column, name]:13.1f} us" for column in columns))
    print("layer   ", *(f"{sum(times[column, name] for name in launchers):13.1f} us" for column in columns))


if __name__ == "__main__":
    main()
