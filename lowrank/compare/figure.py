"""compare.png: what was learnt against what was forgotten, a panel per task, and memory.  ``draw`` writes SVG too."""

from pathlib import Path

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#999999",
    "#8C6D31",
)  # Okabe and Ito: safe for the colour-blind
PARTS = {"weights": "#4C566A", "gradients": "#81A1C1", "optimizer": "#D08770", "activations": "#D8DEE9"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lowrank", "font.size": 9}  # in SVG text stays text
TITLES = {
    "knowledge": ("Knowledge", "facts recalled, trained wording"),
    "format": ("Format", "valid answers"),
    "text": ("Text", "test loss (nats/token), better upwards"),
}


def draw(result: dict, path: Path) -> None:
    """``path``: .png or .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colour = dict(zip(result["methods"], COLOURS * 3, strict=False))
    with matplotlib.rc_context(STYLE):
        names = [*result["tasks"], "memory"]
        columns = 2 if len(names) > 1 else 1
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(9.5, 3.6 * rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: no window, no global state
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for name, axes in zip(result["tasks"], panels, strict=False):
            _learnt(axes, name, result["tasks"][name], colour)
        _memory(panels[len(names) - 1], result)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
        handles = [_handle(name, colour[name]) for name in result["methods"]]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)
        figure.suptitle(_caption(result), fontsize=9, color="#444444")
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _handle(name: str, colour: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", ms=4, label=name)


def _caption(result: dict) -> str:
    s, model = result["settings"], result["model"]
    seeds = "one seed" if s["seeds"] == 1 else f"{s['seeds']} seeds, the first shown"
    return (
        f"{Path(model['name']).name}, {model['parameters'] / 1e6:.2f} M parameters, batches of {s['batch']}, {s['dtype']}, "
        f"{seeds}; thick: the picked rate, thin: every other one"
    )


def _learnt(axes, name: str, task: dict, colour: dict[str, str]) -> None:
    """A curve per rate of what was learnt (up) against what the general text's loss rose by (right); of cosines, which are
    read at their ends alone, a curve through the ends at all rates."""
    title, label = TITLES[name]
    learnt = task["learnt"]
    for method, m in task["methods"].items():
        curves = {rate["learning_rate"]: rate["curve"] for rate in m["rates"] if not rate["diverged"]}
        picked = curves.get(m["learning_rate"], [])
        if not task["constant_rate"]:
            through = [picked[0], *(curve[-1] for curve in curves.values())] if picked else []
            axes.plot(*_xy(through, learnt), color=colour[method], lw=0.8, marker="o", ms=3)
            axes.plot(*(values[-1:] for values in _xy(picked, learnt)), color=colour[method], marker="o", ms=7)
            continue
        for rate, curve in curves.items():
            style = {"lw": 2, "marker": "o", "ms": 3, "zorder": 3} if rate == m["learning_rate"] else {"lw": 0.7}
            axes.plot(*_xy(curve, learnt), color=colour[method], **style)
    for target in task["targets"]:
        axes.axhline(target, color="#888888", lw=0.8, ls=":", zorder=0)
    if learnt == "loss":
        axes.invert_yaxis()
    label = {"loss": TITLES["text"][1], "asked_exact": "held-out questions, exact"}.get(learnt, label)
    axes.set(title=f"{title}: learnt against forgotten", ylabel=label)
    axes.set_xlabel("forgotten: rise of the general text's loss (nats/token)")


def _xy(curve: list[dict], learnt: str) -> tuple[list[float], list[float]]:
    before = curve[0]["general"] if curve and curve[0]["step"] == 0 else None
    if before is None:
        return [], []
    return [p["general"] - before for p in curve], [p[learnt] for p in curve]


def _memory(axes, result: dict) -> None:
    names = list(result["methods"])[::-1]
    memory = [result["methods"][name]["memory"] for name in names]
    unit, word = (1e9, "GB") if max(m["total"] for m in memory) >= 1e9 else (1e6, "MB")
    left = [0.0] * len(names)
    for part, colour in PARTS.items():
        width = [m[part] / unit for m in memory]
        axes.barh(names, width, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, width, strict=True)]
    if result["memory_measure"].startswith("CUDA"):
        axes.plot([m["total"] / unit for m in memory], names, "k|", ms=16, label="allocator peak")
    for name, edge, m in zip(names, left, memory, strict=True):
        beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{m['total'] / unit:.1f}", (max(edge, m["total"] / unit), name), **beside)
    axes.set(title=f"Training memory ({result['memory_measure']})", xlabel=word)
    axes.margins(x=0.12)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.16),
        ncols=5,
        columnspacing=1.0,
        handlelength=1.0,
    )
