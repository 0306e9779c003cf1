"""Time entries of the registry on this device and write one JSON per entry.

    python bench/run.py shrink expand                      their tests, then their times; default shapes
    python bench/run.py lora_linear --shapes 8192x4096x4096 --ranks 8,16,64 --dropouts 0 --out bench/results/local
    python bench/run.py all --toy                          everything once at toy sizes: does the harness run?

The tests of an entry run first; red ones, and nothing is said about its speed.  --no-gate leaves them out, which the result
records.  Providers of one pass are timed in paired rounds over several weight sets, on CUDA from CUDA graphs where they can be
captured.  Columns: median, 20 % and 80 % quantiles, ratio to the baseline, share of the floor (registry.py says what it is).
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stdout

import gate
import torch
from registry import REGISTRY, Benchmark, Options, floor_us
from verdict import verdict

from lowrank.measure.environment import environment
from lowrank.measure.layer import DTYPES, Problem
from lowrank.measure.timing import copy_rate, matmul_rate, paired, peak_memory

ROOT = Path(__file__).parent.parent
OTHERS = ("peft", "unsloth", "lorafusion", "trl", "torch-ce", "liger", "cut")
SHAPES = {"cuda": "8192x4096x4096,8192x4096x14336", "cpu": "512x1024x1024", "toy": "64x64x96"}


def problems(benchmark: Benchmark, shapes, ranks, dropouts, toy=False, **settings) -> list[Problem]:
    """The product, without what the benchmark does not vary."""
    shapes = [
        (M, *rest) for M in benchmark.rows[: 2 if toy else None] for rest in dict.fromkeys(s[1:] for s in shapes)
    ] or shapes
    ranks = ranks[:1] if benchmark.name == "addmm" else ranks
    dropouts = dropouts if dropouts and len(benchmark.dropouts) > 1 else benchmark.dropouts
    return [Problem(M, K, N, r, dropout=p, **settings) for M, K, N in shapes for r in ranks for p in dropouts]


def measure(
    benchmark: Benchmark, p: Problem, rates: dict[str, float], rounds: int, options: Options, modes=()
) -> list[dict]:
    """One row per pass and provider."""
    device, rows = torch.device(p.device), []
    calls = benchmark.calls(p, benchmark.make_inputs(p), options)
    for mode, providers in calls.items():
        if modes and mode not in modes:
            continue
        for name in [name for name in providers if name.startswith(OTHERS)]:
            try:
                providers[name](0)
            except Exception as error:  # what of others does not run here is absent, with its reason; ours must run
                options.absent[f"{name} {mode}"] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
                del providers[name]
        times = paired(providers, device, rounds, warm=2, sets=p.sets, graphs=benchmark.graphs)
        floor = floor_us(benchmark, p, mode, rates["copy"], rates[p.dtype])
        for name, t in times.items():
            over = t.median / times[benchmark.baseline].median if benchmark.baseline in times else None
            row = {"name": benchmark.name, "mode": mode, "provider": name, **dataclasses.asdict(p)}
            row |= {"us": t.median, "us_20": t.q20, "us_80": t.q80, "how": t.how, "over_baseline": over}
            row |= {"bytes": benchmark.bytes(p, mode), "flops": benchmark.flops(p, mode), "floor_us": floor}
            rows.append(row | {"percent_of_floor": 100 * floor / t.median, "peak": peak(providers[name], device)})
    return rows


def peak(call, device: torch.device) -> int:
    """lowrank.measure.timing.peak_memory; on a CPU the allocations and releases that the profiler records, added up."""
    if device.type == "cuda":
        return peak_memory(call, device)
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = call(0)
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    del result
    return max(held, default=0)


def run(benchmark: Benchmark, todo: list[Problem], rates, rounds, options: Options, seconds: float, modes=()) -> dict:
    """{"rows", "absent", "skipped", "verdict"}; problems that ``seconds`` leave no time for are skipped and listed."""
    result = {"benchmark": benchmark.name, "baseline": benchmark.baseline, "rows": [], "skipped": []}
    started = time.perf_counter()
    print(f"{benchmark.name}: over {benchmark.baseline}", flush=True)
    for p in todo:
        if time.perf_counter() - started > seconds:
            result["skipped"].append(dataclasses.asdict(p))
            continue
        for row in measure(benchmark, p, rates, rounds, options, modes):
            result["rows"].append(row)
            print(line(row), flush=True)
        gc.collect()
        if p.device.startswith("cuda"):
            torch.cuda.empty_cache()
    for name, why in options.absent.items():
        print(f"  absent: {name}: {why}")
    if result["skipped"]:
        print(f"  no time for {len(result['skipped'])} of {len(todo)} problems (--seconds)")
    result |= {"absent": dict(options.absent), "verdict": verdict(benchmark.name, result["rows"])}
    print(f"VERDICT {benchmark.name}: {result['verdict']}", flush=True)
    return result


def line(row: dict) -> str:
    over = f"{row['over_baseline']:7.3f}" if row["over_baseline"] else " " * 7
    return (
        f"  {row['M']:>5}x{row['K']}x{row['N']:<6} r {row['r']:<3} p {row['dropout']:<4g} {row['mode']:<8} "
        f"{row['provider']:<28} {row['us']:>10.1f} us ({row['us_20']:.1f}-{row['us_80']:.1f}) {over} "
        f"{row['percent_of_floor']:6.1f} % of floor  {row['how']}"
        f"  {row['peak'] / 2**20:.1f} MB"
    )


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of {', '.join(REGISTRY)}")
    parser.add_argument("--shapes", help="MxKxN, comma separated")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--dropouts", help="those the entry is defined for, if not given")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--thin-dtype", choices=DTYPES, help="of the thin products' factors (--dtype)")
    parser.add_argument("--modes", help="forward, backward, both, ...: only these")
    parser.add_argument("--peers", help="frozen,lowrank,peft,peft-compiled,unsloth,lorafusion (all but compiled)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sets", type=int, default=4, help="of weights that calls rotate through (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="per entry: what is left then is skipped, and said")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="directory for NAME.json")
    parser.add_argument("--label", default="", help="NAME-LABEL.json instead")
    parser.add_argument("--toy", action="store_true", help="toy sizes, few rounds")
    parser.add_argument(
        "--gate", type=Path, metavar="JSON", help="of bench/gate.py --out, instead of running the tests"
    )
    parser.add_argument("--no-gate", action="store_true")
    args = parser.parse_args(argv)
    names = list(REGISTRY) if args.names == ["all"] else args.names
    if unknown := set(names) - set(REGISTRY):
        parser.error(f"no benchmark named {', '.join(unknown)}: {', '.join(REGISTRY)}")
    device = torch.device(args.device)
    try:
        shapes = [
            tuple(map(int, s.split("x")))
            for s in (args.shapes or SHAPES["toy" if args.toy else device.type]).split(",")
        ]
        dropouts = [float(p) for p in args.dropouts.split(",")] if args.dropouts else []
        settings = dict(dtype=args.dtype, thin_dtype=args.thin_dtype or args.dtype, device=str(device))
        todo = {
            name: problems(
                REGISTRY[name],
                shapes,
                [int(r) for r in args.ranks.split(",")],
                dropouts,
                sets=2 if args.toy else args.sets,
                **settings,
            )
            for name in names
        }
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    if args.toy:
        args.rounds = 3
    size = (1 << 20, 64) if args.toy else (None, None)
    rates = {"copy": copy_rate(device, size[0]), args.dtype: matmul_rate(device, getattr(torch, args.dtype), size[1])}
    status, how, red = 0, "green", set()
    if args.no_gate:
        how = "left out"
    elif args.gate:
        red = {test for name in names for test in REGISTRY[name].tests if not gate.recorded(args.gate, (test,))}
    else:
        red = gate.red(tuple(dict.fromkeys(test for name in names for test in REGISTRY[name].tests)))
    for name in names:
        if red & set(REGISTRY[name].tests):
            print(f"{name}: its tests are not green: no speed is shown")
            status = 1
            continue
        options = Options(tuple(args.peers.split(","))) if args.peers else Options()
        modes = tuple(args.modes.split(",")) if args.modes else ()
        result = run(REGISTRY[name], todo[name], rates, args.rounds, options, args.seconds, modes)
        if args.out:
            env = environment(device) | {
                "commit": commit(),
                "command": "python bench/run.py " + " ".join(argv or sys.argv[1:]),
            }
            env |= {"timestamp": time.strftime("%Y-%m-%d %H:%M:%S"), "rates": rates, "gate": how, "toy": args.toy}
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{name}{'-' + args.label if args.label else ''}.json"
            path.write_text(json.dumps({"environment": env, **result}, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
