"""compare.png: loss against time, memory, forgetting."""

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


def draw(result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    loss, memory, forgetting = figure.subplots(1, 3)
    _loss(loss, result)
    _memory(memory, result)
    _forgetting(forgetting, result)
    for axes in (loss, memory, forgetting):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_caption(result), fontsize=10, color="#444444")
    figure.savefig(path, dpi=130)


def _caption(result: dict) -> str:
    s, model = result["settings"], result["model"]
    seeds = "one seed" if s["seeds"] == 1 else f"{s['seeds']} seeds"
    return (
        f"{model['name']}, {model['parameters'] / 1e6:.2f} M parameters, "
        f"{s['steps']} steps of {s['batch']} × {s['length']} tokens, rank {s['rank']}, {s['dtype']}, "
        f"{seeds}; {result['environment']['device']}"
    )


def _loss(axes, result: dict) -> None:
    for (name, method), colour in zip(result["methods"].items(), COLOURS, strict=False):
        points = method["points"]
        dashed = {"linestyle": (0, (2, 2)), "zorder": 3} if name == "peft-lora" else {}  # on top of lora's curve
        axes.plot(
            [p["seconds"] for p in points],
            [p["new"] for p in points],
            color=colour,
            label=name,
            marker="o",
            ms=3,
            **dashed,
        )
    axes.axhline(result["target_loss"], color="#888888", lw=0.8, ls=":")
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axes.annotate("equal-loss target", (1, result["target_loss"]), fontsize=8, color="#666666", **place)
    axes.set(
        title="New domain: loss against training time",
        xlabel="seconds of training steps",
        ylabel="test loss (nats/token)",
    )
    axes.legend(frameon=False, fontsize=9)


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
        axes.annotate(f" {m['total'] / unit:.1f}", (max(edge, m["total"] / unit), name), va="center", fontsize=9)
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
        axes.bar_label(bars, fmt=" %+.3f", fontsize=9)
    axes.axvline(0, color="#888888", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(title="Old domain: rise of the loss (forgetting)", xlabel="nats/token")
    axes.margins(x=0.18)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
