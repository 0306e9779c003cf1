"""The figures that README and docs/benchmarks.md show: measured in one go on one machine, kept as one JSON, rendered from it.

    python bench/readme.py                 measure (some six minutes on two CPU cores), then print and write
    python bench/readme.py --print         the tables of the JSON that is there, without measuring
    python bench/readme.py --write         the tables into the two pages, the charts into docs/images, without measuring

On a GPU the JSON is gpu.json, beside cpu.json.  A table stands in a page between ``<!-- table: NAME (bench/readme.py) -->`` and
``<!-- end -->``: headline, linear, kept, host and step are the CPU's, headline-gpu and so on the GPU's.  Every measurement is
another script's of this folder, in a process of its own; the tests of what they time run first.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import charts
import torch
from run import commit

from lowrank.compare import figure
from lowrank.measure.environment import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/readme"
PAGES = (ROOT / "README.md", ROOT / "docs/benchmarks.md")
IMAGES = ROOT / "docs/images"
COMPARED = ROOT / "bench/results/cpu/compare/compare.json"  # of lowrank compare --out bench/results/cpu/compare

LINEAR = "bench/run.py lora_linear --dropouts 0,0.05 --modes both --peers frozen,peft,lowrank --rounds 40"
STEP = "bench/llama_model.py --bases bf16 --checkpointing off --dropouts 0,0.05 --methods frozen,peft,lowrank"
COMMANDS = {
    "cpu": {
        "linear": f"{LINEAR} --shapes 2048x2048x2048",
        "kept": "bench/saved_for_backward.py",
        "host": "bench/test_host_overhead.py",
        "step": f"{STEP} --size 135m --length 512 --steps 8 --warmup 1",
    },
    "gpu": {
        "linear": f"{LINEAR} --shapes 8192x4096x4096",
        "kept": "bench/saved_for_backward.py --device cuda",
        "host": "bench/test_host_overhead.py --device cuda",
        "step": STEP,
    },
    "toy": {  # does it run?
        "linear": f"{LINEAR} --toy",
        "kept": "bench/saved_for_backward.py",
        "host": "bench/test_host_overhead.py --rounds 1",
        "step": f"{STEP} --toy",
    },
}
GATE = "bench/gate.py lora_linear llama_layer"
DROPOUTS = (0.05, 0.0)


def measured(device: torch.device, toy: bool = False) -> dict:
    """{"environment", "tables": {name: what its script wrote, and the command}}.  Raises CalledProcessError where one fails."""
    commands = COMMANDS["toy" if toy else name_of(device)]
    env = environment(device) | {"capability": capability(device), "commit": commit()}
    env |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "command": "python bench/readme.py"}
    with tempfile.TemporaryDirectory() as folder:
        writes = {
            "linear": (f"--out {folder} {'--no-gate' if toy else f'--gate {folder}/gate.json'}", "lora_linear.json"),
            "kept": (f"--json {folder}/kept.json", "kept.json"),
            "host": (f"--json {folder}/host.json", "host.json"),
            "step": (f"--out {folder}", "llama_model.json"),
        }
        if not toy:
            _run(f"{GATE} --out {folder}/gate.json")
        tables = {}
        for name, command in commands.items():
            options, file = writes[name]
            _run(f"{command} {options}")
            result = json.loads((Path(folder) / file).read_text())
            tables[name] = {"command": f"python {command}"} | {
                key: result[key] for key in ("where", "settings", "rows", "absent") if key in result
            }
    return {"environment": env, "tables": tables}


def name_of(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else "cpu"


def capability(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def _run(command: str) -> None:
    print(f"== python {command}", flush=True)
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)


class Table(NamedTuple):
    """``note``: what the figures are, for the small print; the machine, the versions and ``command`` are added."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str
    command: str
    threads: int | None = None


def headline(tables: dict) -> Table:
    def row(name, figures, written="{:.2f}×".format):
        """``figures(p)``: PEFT's and lowrank's at dropout ``p``."""
        pairs = (_pair(*figures(p), written) for p in DROPOUTS)
        return (name, *(" / ".join(cells) for cells in zip(*pairs, strict=True)))

    def over_frozen(p):
        of = _by_method(tables["step"], p)
        return [of[method]["us"] / of["frozen"]["us"] for method in ("peft", "lowrank")]

    rows = [
        row("one linear: time over the frozen linear's", lambda p: _linears(tables, p, "fp32")),
        row("a training step: time over the frozen model's", over_frozen),
        row(
            "a training step: peak memory", lambda p: _of_both(tables["step"], p, "peft", "lowrank", "peak_bytes"), _mib
        ),
        row("a block's linears: bytes kept for backward over their inputs'", lambda p: _kept(tables, p)),
    ]
    note = (
        f"Forward and backward, PEFT's default fp32 adapters of r = 16 over a bf16 base. Linear: {_sizes(tables)}. Step: "
        f"{_model(tables)}, under bf16 autocast. Block: {_block(tables)}, under bf16 autocast.{_mask(tables)}"
    )
    return Table(("dropout 0.05 / none", "PEFT", "lowrank"), rows, note, "make bench-readme")


def linear(tables: dict) -> Table:
    rows = [
        (name, f"{p:g}", *_pair(*_linears(tables, p, kind)))
        for kind, name in (("fp32", "fp32, PEFT's default"), ("16bit", "bf16"))
        for p in DROPOUTS
    ]
    of = {(row["provider"], row["dropout"]): row for row in tables["linear"]["rows"]}
    shown = [row for (provider, _), row in of.items() if "autocast" not in provider]
    frozen = sorted(f"{of['frozen', p]['us'] / 1e3:.3g}" for p in DROPOUTS)
    note = (
        f"One LoRA linear over a frozen bf16 one, {_sizes(tables)}, r = 16: forward and backward, over the frozen linear's "
        f"{' to '.join(dict.fromkeys(frozen))} ms. Medians of paired rounds, {_spread(shown)}."
    )
    return Table(("adapters", "dropout", "PEFT", "lowrank"), rows, note, tables["linear"]["command"])


def kept(tables: dict) -> Table:
    rows = [(f"{p:g}", *_pair(*_kept(tables, p))) for p in DROPOUTS]
    note = (
        f"Bytes kept for backward by the seven adapted linears of one Llama block, over those of their distinct inputs: "
        f"{_block(tables)}, r = 16, bf16 base, fp32 adapters, bf16 autocast. Counted.{_mask(tables)}"
    )
    return Table(("dropout", "PEFT", "lowrank"), rows, note, tables["kept"]["command"])


def host(tables: dict) -> Table:
    names = {
        "fp32": "a linear, fp32",
        "bf16, fp32 adapters, dropout 0.05": "a linear, bf16 under fp32 adapters, dropout 0.05",
        "q/k/v, bf16, fp32 adapters, dropout 0.05": "q, k and v, bf16 under fp32 adapters, dropout 0.05",
        "Llama, 6 layers of 64, 16 tokens, dropout 0.05": "a Llama of 6 layers of hidden size 64, 16 tokens, dropout 0.05",
    }
    of = {(row["case"], row["passes"]): row for row in tables["host"]["rows"]}
    rows = []
    for case, name in names.items():
        cells = [of[case, passes] for passes in ("forward + backward", "without grad")]
        rows.append((name, *(f"{r['ratio']:.2f}× ({_us(r['peft_us'])} → {_us(r['lowrank_us'])})" for r in cells)))
    note = (
        "A patched layer's time over PEFT's own where the host is what counts: x [4, 32], 32 → 32, r = 8. Medians of the "
        "ratios of paired rounds; in brackets the fastest call of PEFT's and of the patched layer."
    )
    head = ("", "forward + backward", "without grad")
    return Table(head, rows, note, tables["host"]["command"], tables["host"]["where"]["threads"])


def step(tables: dict) -> Table:
    rows = []
    for p in DROPOUTS:
        frozen, *adapted = (_by_method(tables["step"], p)[method] for method in ("frozen", "peft", "lowrank"))
        times = (f"{row['us'] / 1e6:.2f} s, {row['us'] / frozen['us']:.2f}×" for row in adapted)
        rows.append((f"{p:g}", "time", f"{frozen['us'] / 1e6:.2f} s", *times))
        peaks = (f"{_mib(row['peak_bytes'])}, {row['peak_bytes'] / frozen['peak_bytes']:.2f}×" for row in adapted)
        rows.append((f"{p:g}", "peak memory", _mib(frozen["peak_bytes"]), *peaks))
    note = (
        f"One training step of {_model(tables)}, fp32 adapters of r = 16 on all linears, bf16 autocast, AdamW; frozen: without "
        f"adapters, forward and backward. Medians of paired rounds, {_spread(tables['step']['rows'])}. Peak memory: weights, "
        "optimizer state, and what a step holds at most beyond them."
    )
    return Table(("dropout", "", "frozen", "PEFT", "lowrank"), rows, note, tables["step"]["command"])


TABLES: dict[str, Callable[[dict], Table]] = {f.__name__: f for f in (headline, linear, kept, host, step)}


def _by_method(table: dict, p: float) -> dict[str, dict]:
    return {row["method"]: row for row in table["rows"] if row["dropout"] == p}


def _of_both(table: dict, p: float, peft: str, lowrank: str, key: str) -> list[float]:
    of = _by_method(table, p)
    return [of[peft][key], of[lowrank][key]]


def _kept(tables: dict, p: float) -> list[float]:
    return _of_both(tables["kept"], p, "PEFT", "PEFT, patched", "over_inputs")


def _linears(tables: dict, p: float, kind: str) -> list[float]:
    of = {row["provider"]: row for row in tables["linear"]["rows"] if row["dropout"] == p}
    return [of[f"{method}-{kind}"]["over_baseline"] for method in ("peft", "lowrank")]


def _pair(peft: float, lowrank: float, written: Callable[[float], str] = "{:.2f}×".format) -> tuple[str, str]:
    """Two cells, the smaller figure in bold where they differ as written."""
    left, right = written(peft), written(lowrank)
    if left == right:
        return left, right
    return (left, f"**{right}**") if lowrank < peft else (f"**{left}**", right)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _us(us: float) -> str:
    return f"{us:.1f} µs" if us < 1e3 else f"{us / 1e3:.2f} ms"


def _spread(rows: list[dict]) -> str:
    widest = max(max(row["us_80"] / row["us"], row["us"] / row["us_20"]) for row in rows) - 1
    return f"their 20 % and 80 % quantiles within {100 * widest:.0f} %"


def _sizes(tables: dict) -> str:
    row = tables["linear"]["rows"][0]
    return f"{row['M']} rows, {row['K']} → {row['N']}"


def _block(tables: dict) -> str:
    s = tables["kept"]["settings"]
    return f"{s['tokens']} tokens, hidden size {s['hidden']}, MLP {s['mlp']}"


def _mask(tables: dict) -> str:
    """Where nn.Dropout's mask, as PEFT keeps it, takes more than a byte an element, that it does."""
    tensors = _by_method(tables["kept"], 0.05)["PEFT"]["tensors"]
    size = 2 * sum(tensors["dropout's mask"]) / sum(tensors["x, dropped and cast"])  # what is dropped is in bf16
    return f" nn.Dropout's mask takes {size:.0f} bytes an element here, one on CUDA." if size > 1 else ""


def _model(tables: dict) -> str:
    s = tables["step"]["settings"]
    sizes = {"135m": "SmolLM2-135M's sizes", "8b": f"{s['num_hidden_layers']} layers of Llama-3.1-8B's sizes"}
    name = sizes.get(s["size"], f"{s['num_hidden_layers']} layers of hidden size {s['hidden_size']}")
    return f"a Llama of {name}, {s['batch']} × {s['length']} tokens"


def markdown(table: Table, env: dict) -> str:
    n = table.threads or env["threads"]
    threads = "" if env["capability"].startswith("sm_") else f", {n} thread{'s' * (n > 1)}"
    versions = f"torch {env['torch']}, PEFT {env['peft']}, transformers {env['transformers']}, Python {env['python']}"
    head, *rows = (f"| {' | '.join(cells)} |" for cells in (table.head, *table.rows))
    small = f"<sub>{table.note} {env['device']}{threads}, {versions}; `{table.command}`</sub>"
    return "\n".join([head, "|---" * len(table.head) + "|", *rows, "", small])


def results() -> dict[str, dict]:
    """{"cpu" or "gpu": the JSON}, of those that are there."""
    paths = {name: RESULTS / f"{name}.json" for name in ("cpu", "gpu")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def rendered(results: dict[str, dict]) -> dict[str, str]:
    """{name of a table: markdown}; one of the GPU's is NAME-gpu."""
    return {
        name + ("-gpu" if device == "gpu" else ""): markdown(table(result["tables"]), result["environment"])
        for device, result in results.items()
        for name, table in TABLES.items()
    }


MARKED = re.compile(r"<!-- table: (\S+) \(bench/readme\.py\) -->\n(.*?)<!-- end -->", re.DOTALL)


def filled(page: str, tables: dict[str, str]) -> str:
    """``page`` with each marked table as it is in ``tables``.  Raises ValueError for a name or a marker that fits nothing."""
    if len(MARKED.findall(page)) != page.count("<!-- table:") or page.count("<!-- table:") != page.count(
        "<!-- end -->"
    ):
        raise ValueError("every '<!-- table: NAME (bench/readme.py) -->' line needs an '<!-- end -->' line of its own")
    if unknown := {name for name, _ in MARKED.findall(page)} - set(tables):
        raise ValueError(f"no table named {', '.join(sorted(unknown))}: expected some of {', '.join(tables)}")
    return MARKED.sub(lambda m: f"<!-- table: {m[1]} (bench/readme.py) -->\n{tables[m[1]]}\n<!-- end -->", page)


def write(results: dict[str, dict]) -> None:
    for page in filter(Path.exists, PAGES):
        page.write_text(filled(page.read_text(), rendered(results)))
    IMAGES.mkdir(exist_ok=True)
    for path, draw in drawings(results).items():
        draw(path)
        print(path.relative_to(ROOT))


def drawings(results: dict[str, dict]) -> dict[Path, Callable[[Path], None]]:
    """{file: what draws it}."""
    files = {
        IMAGES / f"{draw.__name__}{'-gpu' if device == 'gpu' else ''}.svg": functools.partial(draw, result)
        for device, result in results.items()
        for draw in (charts.step, charts.kept)
    }
    if COMPARED.exists():
        files[IMAGES / "compare.svg"] = functools.partial(figure.draw, json.loads(COMPARED.read_text()))
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only_print")
    parser.add_argument("--write", action="store_true", dest="only_write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not (args.only_print or args.only_write):
        device = torch.device(args.device)
        try:
            result = measured(device)
        except subprocess.CalledProcessError as error:
            print(f"nothing is written: status {error.returncode} of {' '.join(error.cmd)}", file=sys.stderr)
            return 1
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name_of(device)}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.only_write:
        for name, table in rendered(results()).items():
            print(f"\n{name}\n\n{table}")
    if not args.only_print:
        write(results())
    return 0


if __name__ == "__main__":
    sys.exit(main())
