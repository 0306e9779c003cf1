"""compare.png: loss against time, memory, forgetting.  Readable at the width of a page; ``draw`` writes SVG too."""

from pathlib import Path

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#000000",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#999999",
)  # Okabe and Ito: safe for the colour-blind
PARTS = {"weights": "#4C566A", "gradients": "#81A1C1", "optimizer": "#D08770", "activations": "#D8DEE9"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lowrank", "font.size": 9}  # in SVG text stays text


def draw(result: dict, path: Path) -> None:
    """``path``: .png or .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 7.4), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: no window, no global state
        panels = figure.subplot_mosaic([["loss", "loss"], ["memory", "forgetting"]], height_ratios=(1.25, 1))
        _loss(panels["loss"], result)
        _memory(panels["memory"], result)
        _forgetting(panels["forgetting"], result)
        panels["forgetting"].tick_params(labelleft=False, left=False)  # the methods are named beside the memory
        for axes in panels.values():
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(_caption(result), fontsize=9, color="#444444")
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _caption(result: dict) -> str:
    s, model = result["settings"], result["model"]
    seeds = "one seed" if s["seeds"] == 1 else f"{s['seeds']} seeds"
    return (
        f"{model['name']}, {model['parameters'] / 1e6:.2f} M parameters, "
        f"{s['steps']} steps of {s['batch']} × {s['length']} tokens, rank {s['rank']}, {s['dtype']}, "
        f"{seeds}; {result['environment']['device']}"
    )


def _loss(axes, result: dict) -> None:
    ends: dict[str, tuple[float, float, str]] = {}
    for (name, method), colour in zip(result["methods"].items(), COLOURS, strict=False):
        seconds, losses = zip(*((p["seconds"], p["new"]) for p in method["points"]), strict=True)
        dashed = {"linestyle": (0, (2, 2)), "zorder": 3} if name == "peft-lora" else {}  # on top of lora's curve
        axes.plot(seconds, losses, color=colour, marker="o", ms=3, **dashed)
        ends[name] = (seconds[-1], losses[-1], colour)
    axes.axhline(result["target_loss"], color="#888888", lw=0.8, ls=":", zorder=0)
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
    axes.annotate("equal-loss target", (1, result["target_loss"]), fontsize=8, color="#666666", **place)
    axes.set(title="New domain: loss against training time", xlabel="seconds of training steps")
    axes.set_ylabel("test loss (nats/token)")
    _name(axes, ends)


def _name(axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Names right of the axes, each at the height of its curve's end (x, y, colour), as far as they find room."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    step = 0.06 * (high - low)
    ends = dict(sorted(ends.items(), key=lambda item: -item[1][1]))
    lowered = _apart([y for _, y, _ in ends.values()], step)
    raised = _apart([-y for _, y, _ in reversed(ends.values())], step)[::-1]
    for (name, (x, y, colour)), a, b in zip(ends.items(), lowered, raised, strict=True):
        height = (a - b) / 2
        axes.plot((x, right), (y, height), color=colour, lw=0.6, alpha=0.6)
        place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (right, height), color=colour, **place)
        low = min(low, height)
    axes.set(xlim=(None, right), ylim=(low, high))


def _apart(heights: list[float], step: float) -> list[float]:
    """Heights, highest first, each at least ``step`` below the one before it."""
    placed: list[float] = []
    for y in heights:
        placed.append(min(y, placed[-1] - step) if placed else y)
    return placed


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
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=5,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _forgetting(axes, result: dict) -> None:
    names = list(result["methods"])[::-1]
    for offset, key, label, colour in (
        (0.19, "steps", "after equal steps", "#D55E00"),
        (-0.19, "loss", "at equal new-domain loss", "#0072B2"),
    ):
        values, errors = [], [[], []]
        for name in names:
            method = result["methods"][name]
            after = method["old_loss"]["after"] if key == "steps" else method["at_target"]["old_loss"]
            values.append(after["mean"] - method["old_loss"]["before"])
            errors[0].append(after["mean"] - after["least"])
            errors[1].append(after["most"] - after["mean"])
        bars = axes.barh(
            [i + offset for i in range(len(names))],
            values,
            height=0.36,
            color=colour,
            label=label,
            xerr=errors if result["settings"]["seeds"] > 1 else None,
        )
        axes.bar_label(bars, fmt="%+.3f", padding=3, fontsize=8)
    axes.axvline(0, color="#888888", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(title="Old domain: rise of the loss (forgetting)", xlabel="nats/token")
    axes.margins(x=0.18)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
