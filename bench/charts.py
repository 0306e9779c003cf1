"""README's charts, from the JSON of bench/readme.py: SVG, text as text, dark on white, every scale from 0."""

import contextlib
from pathlib import Path

INK, FAINT = "#222222", "#666666"
FROZEN, PEFT, LOWRANK = "#C9CDD2", "#7B8794", "#0072B2"
METHODS = {"frozen": ("frozen model", FROZEN), "peft": ("PEFT", PEFT), "lowrank": ("lowrank", LOWRANK)}
DROPOUT = 0.05
KEPT = {  # what saved_for_backward.py tells apart: its name here, and its colour
    "x": ("inputs x", "#0072B2"),
    "x, dropped and cast": ("x, dropped and cast", "#7FB2D6"),
    "dropout's mask": ("dropout masks, {bits:.0f} bit{s} an element", "#C9CDD2"),
    "A and B, cast": ("A and B, cast", "#444444"),
    "S": ("S = xAᵀ", "#D55E00"),
}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lowrank",  # the same file from the same figures
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
}


@contextlib.contextmanager
def _figure(width: float, height: float, path: Path):
    """A white figure [inches], written to ``path`` on leaving."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasSVG(figure)  # not pyplot: no window, no global state
        yield figure
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def step(result: dict, path: Path) -> None:
    """Time and peak memory of one training step: frozen model, PEFT, lowrank."""
    table = result["tables"]["step"]
    of = {row["method"]: row for row in table["rows"] if row["dropout"] == DROPOUT}
    with _figure(9, 2.3, path) as figure:
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.115, right=0.995, top=0.84, bottom=0.16, wspace=0.27)
        _bars(left, "time of a training step", {name: row["us"] / 1e6 for name, row in of.items()}, "{:.2f} s")
        _bars(right, "its peak memory", {name: row["peak_bytes"] / 2**20 for name, row in of.items()}, "{:,.0f} MiB")
        env, s = result["environment"], table["settings"]
        where = (
            f"Llama, {s['num_hidden_layers']} layers of hidden size {s['hidden_size']}, {s['batch']} × {s['length']} tokens, "
            f"bf16 under fp32 adapters, r = {s['rank']}, dropout {DROPOUT}; {env['device']}, torch {env['torch']}, "
            f"PEFT {env['peft']}"
        )
        figure.text(0.012, 0.03, where, fontsize=8, color=FAINT)


def _bars(axes, title: str, values: dict[str, float], written: str) -> None:
    heights = {method: -i for i, method in enumerate(METHODS)}
    axes.barh(list(heights.values()), [values[m] for m in METHODS], color=[c for _, c in METHODS.values()], height=0.66)
    for method, y in heights.items():
        said, weight = written.format(values[method]), "normal"
        if method == "lowrank":
            said, weight = f"{said}, {values[method] / values['peft']:.2f}× PEFT's", "bold"
        beside = dict(xytext=(4, 0), textcoords="offset points", va="center", fontweight=weight)
        axes.annotate(said, (values[method], y), **beside)
    axes.set_yticks(list(heights.values()), [name for name, _ in METHODS.values()])
    axes.set_xlim(0, 1.9 * max(values.values()))
    axes.set_title(title, loc="left", fontsize=10.5, pad=6)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_xticks([])


def kept(result: dict, path: Path) -> None:
    """What one Llama block's seven adapted linears keep for backward: a box per tensor, its area its bytes."""
    table = result["tables"]["kept"]
    of = {row["method"]: row for row in table["rows"] if row["dropout"] == DROPOUT}
    rows = {"PEFT": of["PEFT"], "lowrank": of["PEFT, patched"]}
    widest = max(row["bytes"] for row in rows.values())
    elements = sum(rows["PEFT"]["tensors"]["x, dropped and cast"]) / 2  # bf16
    with _figure(9, 2.9, path) as figure:
        axes = figure.add_axes((0.012, 0.13, 0.976, 0.86))
        axes.set_axis_off()
        axes.set(xlim=(0, widest), ylim=(0, 2))
        for (name, row), bottom in zip(rows.items(), (1.3, 0.3), strict=True):
            total = f"{name}: {row['bytes'] / 2**20:.1f} MiB, {row['over_inputs']:.2f}× the inputs"
            weight = "bold" if name == "lowrank" else "normal"
            axes.text(0, bottom + 0.55, total, fontsize=10.5, va="center", fontweight=weight)
            bits = round(8 * sum(row["tensors"]["dropout's mask"]) / elements)
            _boxes(axes, row["tensors"], bottom, 0.42, dict(bits=bits, s="s" * (bits > 1)))
        s, env = table["settings"], result["environment"]
        where = (
            f"Kept for backward by a Llama block's seven adapted linears: {s['tokens']} tokens, hidden size {s['hidden']}, "
            f"MLP {s['mlp']}, r = {s['r']}, dropout {DROPOUT},\nbf16 under fp32 adapters, bf16 autocast. Counted: a box is a "
            f"tensor, its area the bytes. {env['device']}, torch {env['torch']}, PEFT {env['peft']}"
        )
        figure.text(0.012, 0.025, where, fontsize=8, color=FAINT, linespacing=1.4)


def _boxes(axes, tensors: dict[str, list[int]], bottom: float, height: float, words: dict) -> None:
    """One row of boxes, what is larger first, named below; those too small to have a name each are named together."""
    left, small = 0.0, []
    for kind in sorted(tensors, key=lambda kind: -sum(tensors[kind])):
        name, colour = KEPT[kind]
        start = left
        for size in tensors[kind]:
            axes.barh(
                bottom, size, left=left, height=height, align="edge", color=colour, edgecolor="white", linewidth=0.5
            )
            left += size
        said = f"{len(tensors[kind])} {name.format(**words)}: {(left - start) / 2**20:.1f} MiB"
        if left - start > 0.2 * axes.get_xlim()[1]:
            axes.text(start, bottom - 0.11, said, fontsize=9, va="center")
        else:
            small.append(said)
    right = left > 0.7 * axes.get_xlim()[1]
    place = dict(ha="right", y=bottom + height + 0.13) if right else dict(ha="left", y=bottom + height / 2)
    axes.text(
        s=", ".join(small), x=left + (0 if right else 0.01 * axes.get_xlim()[1]), va="center", fontsize=9, **place
    )
