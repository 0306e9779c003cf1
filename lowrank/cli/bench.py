"""``lowrank bench``: one model's own layer shapes on this device: frozen, PEFT at its strongest, lowrank.

Forward and backward of each distinct linear, one call after the other in paired rounds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from .._screen import console
from ..measure.environment import environment
from ..measure.layer import DTYPES, Problem, adapter_kinds, frozen, lowrank_method, passes, peft_method, tensors
from ..measure.models import BUILT_IN, load_config

SUMMARY = "time a model's own layer shapes on this device: frozen, PEFT, lowrank"


def layer_shapes(config, dtype: str) -> list[tuple[int, int, list[str], int]]:
    """(K, N, names, count) of the distinct linear layers of a model, its output head left out."""
    import torch

    from .._linears import is_linear
    from ..measure import meta_forward

    model = meta_forward.build(config, getattr(torch, dtype))
    head = model.get_output_embeddings()
    names_of: dict[tuple[int, int], list[str]] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            N, K = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            names_of.setdefault((K, N), []).append(name.rpartition(".")[2])
    if not names_of:
        raise ValueError(f"{type(model).__name__} has no linear layers to adapt: not supported")
    return [(K, N, list(dict.fromkeys(names)), len(names)) for (K, N), names in names_of.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="llama-3.1-8b", help=f"{', '.join(BUILT_IN)}, a path, a hub id (%(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    parser.add_argument("--tokens", type=int, help="rows of x (8192 on CUDA, 512 on a CPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of base and activations (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="before the adapters (%(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (a GPU if there is one)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to spend at most, about (%(default)s)")
    parser.add_argument("--out", type=Path, help="write everything measured here as JSON")


def main(args: argparse.Namespace) -> int:
    import torch

    from ..compare.settings import try_out

    started = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {device}: this torch ({torch.__version__}) cannot use it")
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    tokens = args.tokens if args.tokens is not None else 8192 if device.type == "cuda" else 512
    for option, value in (("--tokens", tokens), ("--rank", args.rank)):
        if value < 1:
            raise ValueError(f"{option} must be a positive integer, got {value}")
    where = {"M": tokens, "r": args.rank, "dtype": args.dtype, "device": str(device), "dropout": args.dropout}
    Problem(K=1, N=1, **where)  # refuse a wrong number before a model is looked for
    if args.out:
        try_out(f"--out {args.out}", args.out.parent, [args.out.name])
    shapes = layer_shapes(load_config(args.model), args.dtype)
    result = {"model": args.model, "tokens": tokens, "rank": args.rank, "dtype": args.dtype, "dropout": args.dropout}
    result |= {"environment": environment(device), "shapes": [], "absent": {}}
    compiling = args.seconds / 3  # seconds left for it; its first use costs 15, later ones a few
    for done, (K, N, names, count) in enumerate(shapes):
        share = 0.5 / (len(shapes) - done) + 0.5 * K * N / sum(k * n for k, n, *_ in shapes[done:])
        # two weights larger than a CPU's caches are enough to rotate through
        sets = 2 if device.type == "cpu" and K * N > 1 << 25 else 4
        problem = Problem(K=K, N=N, sets=sets, **where)
        calls, first, spent = _candidates(problem, compiling / (len(shapes) - done), result["absent"])
        compiling -= spent
        left = args.seconds - (time.perf_counter() - started) - max(0.0, compiling) * (len(shapes) > done + 1)
        measured = _measure(calls, first, device, left * share)
        result["shapes"].append({"K": K, "N": N, "layers": names, "count": count, **measured})
        del calls
    result["seconds_asked"], result["seconds"] = args.seconds, time.perf_counter() - started
    result["summary"] = summary(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)
    return 0


def _candidates(p: Problem, compile_seconds: float, absent: dict[str, str]):
    """({method: call(i), forward and backward}, {method: us of one call}, seconds spent compiling).

    PEFT's variants are compiled in the order of their eager speed, at least one and then while there is time.  What cannot
    run goes to ``absent``, with why.
    """
    import torch

    from ..measure.timing import paired

    data, device = tensors(p), torch.device(p.device)
    dYs = [one.dY for one in data]
    calls: dict[str, Callable] = {"frozen": passes(frozen(p, data), dYs)["both"]}
    calls |= {f"lowrank {kind}": passes(lowrank_method(p, data, kind), dYs)["both"] for kind in adapter_kinds(p)}
    try:
        calls |= {f"peft {kind}": passes(peft_method(p, data, kind), dYs)["both"] for kind in adapter_kinds(p)}
    except ImportError:
        absent["peft"] = "not installed: pip install 'lowrank-kernels[peft]'"
    first = {name: t.median for name, t in paired(calls, device, rounds=1, warm=1).items()}
    spent = last = 0.0
    for name in sorted((name for name in calls if name.startswith("peft")), key=first.get):
        compiled = f"{name}, compiled"
        if spent + last > compile_seconds:
            absent[compiled] = "not for every shape: no time left to compile it (--seconds)"
            continue
        started = time.perf_counter()
        call = passes(peft_method(p, data, name.removeprefix("peft "), compiled=True), dYs)["both"]
        try:
            call(0)
            first[compiled] = paired({"": call}, device, rounds=1, warm=0)[""].median
        except Exception as error:  # a compiler that is missing, whatever it raises, is no failure of ours
            absent[compiled] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            calls[compiled] = call
        last = time.perf_counter() - started
        spent += last
    return calls, first, spent


def _measure(calls: dict[str, Callable], first: dict[str, float], device, seconds: float) -> dict:
    """{"rounds", "us": {method: {median, q20, q80}}, "peak": {method: bytes, on CUDA}} in about ``seconds``.

    ``first``: us of one call of each.  Three rounds at least.
    """
    from ..measure.timing import paired, peak_memory

    rounds = max(3, min(50, int(1e6 * seconds / sum(first.values()))))
    times = paired(calls, device, rounds, warm=0 if rounds < 10 else 2)
    peak = {name: peak_memory(call, device) for name, call in calls.items()}
    us = {name: {"median": t.median, "q20": t.q20, "q80": t.q80} for name, t in times.items()}
    return {"rounds": rounds, "us": us, "peak": {name: value for name, value in peak.items() if value is not None}}


def best(us: dict[str, dict[str, float]], method: str) -> tuple[str, float] | None:
    """(variant, median) of the fastest variant of ``method``, None where it was not timed."""
    medians = {name: t["median"] for name, t in us.items() if name.split()[0] == method}
    return min(medians.items(), key=lambda item: item[1]) if medians else None


def summary(result: dict) -> str:
    """One sentence from the numbers: all linears of the model together, and where lowrank is faster, level or slower."""
    total = {"frozen": 0.0, "peft": 0.0, "lowrank": 0.0}
    compared: dict[str, list[str]] = {"slower": [], "level within the spread": [], "faster": []}
    for shape in result["shapes"]:
        us = shape["us"]
        fastest = {method: best(us, method) for method in total}
        for method, variant in fastest.items():
            total[method] += shape["count"] * (variant[1] if variant else float("nan"))
        if fastest["peft"] is not None:
            (_, peft_us), (_, lowrank_us) = fastest["peft"], fastest["lowrank"]
            low, high = us[fastest["lowrank"][0]], us[fastest["peft"][0]]
            word = (
                "slower"
                if low["q20"] > high["q80"]
                else "faster"
                if low["q80"] < high["q20"]
                else "level within the spread"
            )
            compared[word].append(f"{', '.join(shape['layers'])} ({lowrank_us / peft_us:.2f}×)")
    layers = sum(shape["count"] for shape in result["shapes"])
    said = f"All {layers} linears, forward + backward, over the frozen ones' time: "
    said += f"lowrank {total['lowrank'] / total['frozen']:.2f}×"
    if "peft" in result["absent"]:
        return f"{said}; PEFT: {result['absent']['peft']}."
    said += f", PEFT at its fastest {total['peft'] / total['frozen']:.2f}×; against PEFT, lowrank is "
    return said + "; ".join(f"{word} on {', '.join(where)}" for word, where in compared.items() if where) + "."


def _print(result: dict) -> None:
    from rich import box
    from rich.table import Table

    screen = console()
    env = result["environment"]
    screen.print(
        f"{result['model']}: {result['tokens']} tokens, rank {result['rank']}, {result['dtype']}, dropout "
        f"{result['dropout']:g}; {env['device']}, torch {env['torch']}, peft {env.get('peft', 'not installed')}, "
        f"lowrank {env['lowrank']}"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for head in ("K → N", "count", "rounds", "frozen ms", "PEFT ms", "/frozen", "lowrank ms", "/frozen", "/PEFT"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("fastest variants", overflow="fold")
    for shape in result["shapes"]:
        us = shape["us"]
        base, peft, ours = us["frozen"]["median"], best(us, "peft"), best(us, "lowrank")
        cells = [", ".join(shape["layers"]), f"{shape['K']} → {shape['N']}", str(shape["count"]), str(shape["rounds"])]
        cells += [f"{base / 1e3:.3f}"]
        cells += ["", ""] if peft is None else [f"{peft[1] / 1e3:.3f}", f"{peft[1] / base:.2f}×"]
        cells += [f"{ours[1] / 1e3:.3f}", f"{ours[1] / base:.2f}×", "" if peft is None else f"{ours[1] / peft[1]:.2f}×"]
        table.add_row(*cells, "; ".join(variant[0] for variant in (peft, ours) if variant))
    screen.print(table)
    screen.print(
        "Medians of forward + backward, the methods in turn within each round; adapters in 16 bits, in fp32, and in fp32 "
        f"under autocast, each method at its fastest. {result['seconds']:.0f} s."
    )
    if result["seconds"] > 1.2 * result["seconds_asked"]:
        screen.print(f"Three rounds are the least, and took more than --seconds {result['seconds_asked']:g}.")
    for name, why in result["absent"].items():
        screen.print(f"not timed: {name}: {why}")
    screen.print(result["summary"], soft_wrap=True)
