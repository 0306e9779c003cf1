"""What the launchers themselves cost the host: the four thin products of a layer as an H100 would plan them, launching nothing.

    python bench/launchers.py [--size 1024] [--dropout]

Tensors are on the CPU, and what a launcher allocates is counted, out of memory that malloc already has; the last step, Triton's
``kernel[grid](...)``, is left out.  Microseconds, median over rounds that take turns.
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


def calls(size: int, dropout: bool, r: int = 16, thin=thin) -> dict:
    """By name, of one adapter in bf16 over M = K = N = ``size``."""

    def new(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

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


def timed(calls: dict, rounds: int = 60, each: int = 50) -> dict[str, float]:
    """Microseconds of a call."""
    times = {name: [] for name in calls}
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(each):
                call()
            times[name].append((time.perf_counter() - start) / each * 1e6)
    gc.enable()
    return {name: statistics.median(of) for name, of in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dropout", action="store_true")
    args = parser.parse_args(argv)
    imagine_h100()
    times = timed(calls(args.size, args.dropout))
    for name, us in times.items():
        print(f"{name:8} {us:6.1f} us")
    print(f"layer    {sum(times.values()):6.1f} us")


if __name__ == "__main__":
    main()
