"""Tables and a figure from the JSON files of bench/run.py:   python bench/report.py bench/results/local

Writes report.md, report.csv and report.png beside them.  The CSV has Liger-Kernel's benchmark columns, so that its tools read
it, and ours after them; its liger_version is empty, as Liger is not what was timed.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

LIGER = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
OURS = ("dtype", "thin_dtype", "rank", "lowrank_version", "torch_version")
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito
MARKERS = "osD^vP*X"


def load(folder: Path) -> list[dict]:
    """The results in ``folder`` that bench/run.py wrote, by name."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in results if isinstance(result, dict) and "benchmark" in result and result["rows"]]


def markdown(results: list[dict]) -> str:
    lines = []
    for result in results:
        env = result["environment"]
        versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton", "peft", "lowrank") if env.get(name))
        lines += [f"## {result['benchmark']}", "", result["verdict"], ""]
        lines += [f"{env['device']}, {versions}, commit {env['commit']}, tests {env['gate']}; `{env['command']}`", ""]
        if env["toy"]:
            lines += ["Toy sizes: the harness ran, the figures mean nothing.", ""]
        lines += [
            f"| M x K x N | r | dropout | dtype | pass | provider | us | 20-80 % | over {result['baseline']} | % of floor |"
        ]
        lines += ["|---" * 10 + "|"]
        for row in result["rows"]:
            over = "" if row["over_baseline"] is None else f"{row['over_baseline']:.3f}"
            cells = [
                f"{row['M']} x {row['K']} x {row['N']}",
                row["r"],
                f"{row['dropout']:g}",
                row["dtype"],
                row["mode"],
            ]
            cells += [row["provider"], f"{row['us']:.1f}", f"{row['us_20']:.1f}-{row['us_80']:.1f}", over]
            lines.append("| " + " | ".join(map(str, [*cells, f"{row['percent_of_floor']:.1f}"])) + " |")
        lines += ["", *(f"Absent: {name}: {why}" for name, why in result["absent"].items()), ""]
    return "\n".join(lines)


def csv_rows(results: list[dict]) -> list[dict]:
    """One row per time (ms) and per peak of memory (MB), M on the x axis."""
    rows = []
    for result in results:
        env = result["environment"]
        for row in result["rows"]:
            config = {key: row[key] for key in ("K", "N", "r", "dropout", "dtype", "thin_dtype", "sets", "how")}
            common = dict(
                kernel_name=result["benchmark"],
                kernel_provider=row["provider"],
                kernel_operation_mode=row["mode"],
                x_name="M",
                x_label="tokens",
                x_value=row["M"],
                extra_benchmark_config_str=json.dumps(config),
                gpu_name=env["device"],
                timestamp=env["timestamp"],
                liger_version="",
                dtype=row["dtype"],
                thin_dtype=row["thin_dtype"],
                rank=row["r"],
                lowrank_version=env["lowrank"],
                torch_version=env["torch"],
            )
            ms = {"y_value_50": row["us"] / 1e3, "y_value_20": row["us_20"] / 1e3, "y_value_80": row["us_80"] / 1e3}
            rows.append({**common, "metric_name": "speed", "metric_unit": "ms", **ms})
            if row["peak"] is not None:
                megabytes = dict.fromkeys(("y_value_50", "y_value_20", "y_value_80"), row["peak"] / 2**20)
                rows.append({**common, "metric_name": "memory", "metric_unit": "MB", **megabytes})
    return rows


def write_csv(results: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LIGER + OURS)
        writer.writeheader()
        writer.writerows(csv_rows(results))


def draw(results: list[dict], path: Path) -> None:
    """Left: time over the frozen linear, by method.  Right: share of the floor of the four thin products."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    over, share = figure.subplots(1, 2)
    whole = [
        row for result in results for row in result["rows"] if result["baseline"] == "frozen" and row["mode"] == "both"
    ]
    thin = [row for result in results for row in result["rows"] if result["baseline"] == "copy"]
    _dots(over, whole, "over_baseline", [row["provider"] for row in whole])
    over.set(title="Forward + backward over the frozen computation", xlabel="time / frozen")
    over.axvline(1, color="#888888", lw=0.8)
    _dots(share, thin, "percent_of_floor", [row["provider"] for row in thin])
    share.set(title="Thin products: bytes over time, against a large copy's rate", xlabel="% of floor")
    share.axvline(100, color="#888888", lw=0.8)
    env = results[0]["environment"]
    toy = "; toy sizes, the figures mean nothing" if any(result["environment"]["toy"] for result in results) else ""
    figure.suptitle(
        f"{env['device']}, torch {env['torch']}, lowrank {env['lowrank']}{toy}", fontsize=10, color="#444444"
    )
    figure.savefig(path, dpi=130)


def _dots(axes, rows: list[dict], key: str, providers: list[str]) -> None:
    """One line per problem, one mark per provider."""
    from matplotlib.ticker import LogFormatter

    labels = [f"{r['name']} {r['M']}x{r['K']}x{r['N']} r{r['r']} p{r['dropout']:g}" for r in rows]
    heights = {label: -i for i, label in enumerate(dict.fromkeys(labels))}
    for n, provider in enumerate(dict.fromkeys(providers)):
        points = [
            (row[key], heights[label]) for row, label in zip(rows, labels, strict=True) if row["provider"] == provider
        ]
        points = [(x, y) for x, y in points if x is not None]
        style = dict(color=COLOURS[n % len(COLOURS)], marker=MARKERS[(n + n // 8) % len(MARKERS)], s=26, label=provider)
        axes.scatter([x for x, _ in points], [y for _, y in points], **style)
    axes.set_xscale("log")  # eager on a small problem may be hundreds of times off
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_yticks(list(heights.values()), list(heights), fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#EEEEEE")
    if rows:
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    results = load(folder)
    if not results:
        print(f"{folder}: no result of bench/run.py", file=sys.stderr)
        return 2
    (folder / "report.md").write_text(markdown(results))
    write_csv(results, folder / "report.csv")
    draw(results, folder / "report.png")
    print(f"{folder}: report.md, report.csv, report.png from {', '.join(result['benchmark'] for result in results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
