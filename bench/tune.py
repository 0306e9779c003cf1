"""Sweep the Configs of the four kernels: which one is fastest, and how far is pick_config's own from it?

    python bench/tune.py --out bench/results/local/tune.json          all four, default shapes and ranks
    python bench/tune.py shrink --shapes 8192x4096x4096 --ranks 16 --seconds 60

Swept is what differs from pick_config's choice in one or two fields.  Every config is checked against eager and fp64 before it
is timed (lowrank.testing's budget); one that does not compile, does not fit or is wrong is listed as such.  The printed table
is what a threshold in pick_config is to cite.  Compiling is the slow part: --compile-only with --shard 0/8 ... 7/8, side by
side, fills Triton's cache on disk first.  Without a GPU: TRITON_INTERPRET=1 and --toy, which shows that the sweep runs.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from registry import REGISTRY, _thin_inputs, floor_us

from lowrank.measure.environment import environment
from lowrank.measure.layer import DTYPES, Problem
from lowrank.measure.timing import copy_rate, matmul_rate, paired
from lowrank.ops import thin_eager
from lowrank.ops._choice import backend
from lowrank.testing import error

# Values of each field of a Config.
GRID = {
    "block_m": (32, 64, 128),
    "block_n": (64, 128, 256),
    "block_k": (64, 128, 256),
    "split_k": (1, 2, 4),
    "blocks": (1, 2, 4),
    "chunks": (1, 4, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
TOY = dict.fromkeys(GRID, ()) | {"block_m": (16, 32), "block_n": (32,), "block_k": (32, 64), "split_k": (1, 2)}
NAMES = ("shrink", "expand", "dy_pass", "x_pass")


def call(name: str, module, t: dict, config=None) -> list[torch.Tensor]:
    """The outputs of one kernel, or of the same function of ops/thin_eager.py (no ``config``), on one set of inputs."""
    thin, more = t["A"].dtype, {} if config is None else {"config": config}
    if name == "shrink":
        masks = [0 if t["cuts"] else -1]
        return [module.shrink(t["x"], [t["A"]], thin, masks, t["cuts"], t["seeds"], **more)[0]]
    if name == "expand":
        return [module.expand(t["S"], [t["B"]], [2.0], [None], None, t["x"].dtype, **more)]
    if name == "dy_pass":
        dS, dB = module.dy_pass(t["dY"], [t["B"]], [2.0], [None], t["S"], [True], True, thin, **more)
        return [dS[0], dB[0]]
    masks = [0 if t["keeps"] else -1]
    dX = torch.empty_like(t["x"])
    return [module.x_pass(t["x"], [t["dS"]], [t["A"]], [True], dX, masks, t["keeps"], **more)[0], dX]


def in_fp64(t: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in t.items()}


def configs(name: str, module, t: dict, toy: bool) -> list:
    """None, which leaves the choice to the launcher; then what differs from its choice in one field, then in two."""
    first, grid = picked(name, module, t), TOY if toy else GRID
    changes = [(field.name, value) for field in dataclasses.fields(first) for value in grid[field.name]]
    candidates = [first]
    for many in (1, 2):
        for chosen in itertools.combinations(changes, many):
            if len(dict(chosen)) == many:
                candidates.append(dataclasses.replace(first, **dict(chosen)))
    return [None, *dict.fromkeys(candidates)]


def picked(name: str, module, t: dict):
    """What pick_config answers when a plan asks it; the default Config if none asks."""
    answers, ask = [module.Config()], module.pick_config
    for cached in vars(module).values():  # a plan that was made before does not ask
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    module.pick_config = lambda *args, **options: answers.append(ask(*args, **options)) or answers[-1]
    try:
        call(name, module, t)
    finally:
        module.pick_config = ask
    return answers[-1]


def sweep(name: str, p: Problem, rates, args) -> list[dict]:
    """One row per config, fastest first; then those that were refused, with why, and those there was no time for."""
    module = importlib.import_module(f"lowrank.kernels.{name}")
    data = _thin_inputs(p)
    plain, oracle = call(name, thin_eager, data[0]), call(name, thin_eager, in_fp64(data[0]))
    rows, sound, started = [], {}, time.perf_counter()
    shard, shards = map(int, args.shard.split("/"))
    for n, config in enumerate(configs(name, module, data[0], args.toy)):
        if args.compile_only and n % shards != shard:
            continue
        row = {"kernel": name, **dataclasses.asdict(p), "config": dataclasses.asdict(config) if config else None}
        rows.append(row)
        if time.perf_counter() - started > args.seconds:
            row["refused"] = "no time left (--seconds)"
            continue
        try:
            for out, eager, truth in zip(call(name, module, data[0], config), plain, oracle, strict=True):
                # of one draw
                distance, bound = error(out, truth), 2 * error(eager, truth) + 1.5 * torch.finfo(out.dtype).eps
                if not distance <= bound:
                    raise AssertionError(f"{name}: error {distance:.3e} > {bound:.3e}")
        except Exception as refusal:  # too much shared memory, a compiler's failure, a wrong result: all are answers
            row["refused"] = f"{type(refusal).__name__}: {(str(refusal) or '-').splitlines()[0]}"
        else:
            sound[n] = config, row
    if args.compile_only:
        return rows
    run = {n: lambda i, c=config: call(name, module, data[i % p.sets], c) for n, (config, _) in sound.items()}
    times = paired(run, torch.device(p.device), args.rounds, warm=2, sets=p.sets, graphs=True)
    floor = floor_us(REGISTRY[name], p, "", rates["copy"], rates[p.dtype])
    for n, t in times.items():
        sound[n][1].update(us=t.median, us_20=t.q20, us_80=t.q80, how=t.how, percent_of_floor=100 * floor / t.median)
    return sorted(rows, key=lambda row: row.get("us", float("inf")))


def show(name: str, p: Problem, rows: list[dict], best: int = 6) -> None:
    timed = [row for row in rows if "us" in row]
    print(
        f"{name} {p.M}x{p.K}x{p.N} r {p.r} p {p.dropout:g} {p.dtype}/{p.thin_dtype}: {len(timed)} of {len(rows)} timed"
    )
    for place, row in enumerate(timed):
        if place < best or row["config"] is None:
            fields = ", ".join(f"{k}={v}" for k, v in (row["config"] or {"as": "dispatched"}).items())
            print(f"  {place + 1:>3}. {row['us']:>9.1f} us {row['percent_of_floor']:6.1f} % of floor  {fields}")
    for why in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
        print(f"  refused {sum(row.get('refused') == why for row in rows)}: {why}")
    chosen = next((row for row in timed if row["config"] is None), None)
    said = f"takes {chosen['us'] / timed[0]['us']:.3f} times the fastest's" if chosen else "was not timed"
    print(f"VERDICT tune {name}: the launcher's own choice {said}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--shapes", default="", help="MxKxN, comma separated (8192x4096x4096)")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--thin-dtype", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="of checking (and so compiling), per kernel and problem"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile-only", action="store_true", help="check, do not time")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th config from the i-th, with --compile-only")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    names = args.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no kernel named {', '.join(unknown)}: {', '.join(NAMES)}")
    device = torch.device(args.device)
    if backend(device)[0] != "triton":
        parser.error(f"no Triton kernel runs here: {backend(device)[1]}")
    torch.manual_seed(0)
    rates = {"copy": copy_rate(device, 1 << 20 if args.toy else None)}
    rates[args.dtype] = matmul_rate(device, getattr(torch, args.dtype), 64 if args.toy else None)
    settings = dict(
        dtype=args.dtype, thin_dtype=args.thin_dtype or args.dtype, device=str(device), dropout=args.dropout
    )
    rows, wrong = [], False
    for shape in (args.shapes or ("48x64x64" if args.toy else "8192x4096x4096")).split(","):
        for r in map(int, args.ranks.split(",")):
            p = Problem(*map(int, shape.split("x")), r, **settings)
            for name in names:
                swept = sweep(name, p, rates, args)
                rows += swept
                wrong |= any(row.get("refused", "").startswith("AssertionError") for row in swept)
                if not args.compile_only:
                    show(name, p, swept)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"environment": environment(device) | {"rates": rates}, "rows": rows}, indent=1) + "\n"
        )
    return int(wrong)  # a config that computes something else is a bug, whatever its speed


if __name__ == "__main__":
    sys.exit(main())
