"""compare.md, compare.json, compare.png and the same tables on the terminal."""

import json
import math
import tempfile
from pathlib import Path

from .. import _screen
from ..checkpoints import publish
from .comparison import Comparison
from .settings import REPORTS
from .summary import summarize
from .train import replayed
from .verdict import answer, details, megabytes, paste, took, value

Rows = tuple[str, list[str], list[list[str]]]  # title, columns, cells

MEASURES = {  # in the order of columns
    "trained_exact": "recall",
    "asked_exact": "asked: exact",
    "cloze_exact": "cloze",
    "question_exact": "question",
    "question_chosen": "of 30",
    "trained_nats": "nats/fact",
    "asked_nats": "nats/answer",
    "valid": "valid",
    "right": "right",
    "loss": "loss",
}


def _over_seeds(values: dict | None, digits: int = 3, sign: str = "", ranges: bool = True) -> str:
    if values is None or math.isnan(values["mean"]):
        return "–"
    text, low, high = (f"{values[key]:{sign}.{digits}f}" for key in ("mean", "least", "most"))
    return text if low == high or not ranges else f"{text} [{low}…{high}]"


def tables(result: dict) -> list[Rows]:
    """What was learnt, where targets were met, what was forgotten, a table each per task; cost; every rate tried."""
    kinds = (_learnt, _targets, _forgotten)
    of_tasks = [kind(name, task, result) for kind in kinds for name, task in result["tasks"].items()]
    rates = [_rates(name, task) for name, task in result["tasks"].items()]
    return [table for table in [*of_tasks, _cost(result), *rates] if table[2]]


def _learnt(name: str, task: dict, result: dict) -> Rows:
    """Of seeds, the range of what is learnt alone: the columns have to fit a page."""
    shown = [key for key in MEASURES if key in task["base"]]
    rows = [["before", *(_number(task["base"][key]) for key in shown)]]
    for method, m in task["methods"].items():
        rows.append([method, *(_over_seeds(m["after"][key], ranges=key == task["learnt"]) for key in shown)])
    title = f"{name}: learnt after {task['steps']} steps at the picked rate"
    return title, ["method", *(MEASURES[key] for key in shown)], rows


def _forgotten(name: str, task: dict, result: dict) -> Rows:
    items, diverse = "items" in task["base"], result["forgetting"]["diverse"]
    columns = ["method", "general Δ", *["known kept"] * items, *["formats, nats"] * diverse]
    before = ["before", f"({task['base']['general']:.3f})", *[f"{task['base'].get('items', 0):.2f}"] * items]
    rows = [[*before, *[_entropy(result["forgetting"]["diversity"])] * diverse]]
    for method, m in task["methods"].items():
        row = [method, _over_seeds(m["forgot"], sign="+")]
        row += [_over_seeds(m["after"].get("items"), 2)] * items
        rows.append([*row, *[_entropy(m["diversity"])] * diverse])
    return f"{name}: forgotten after {task['steps']} steps at the picked rate", columns, rows


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _entropy(nats: list[float] | None) -> str:
    return f"{abs(nats[0]):.2f} ± {nats[1]:.2f}" if nats else "–"


def _targets(name: str, task: dict, result: dict) -> Rows:
    rows = []
    for index, target in enumerate(task["targets"]):
        for method, m in task["methods"].items():
            at = m["at_targets"][index]
            row = [f"loss {target:.3f}" if task["learnt"] == "loss" else value(task, target), method]
            if task["constant_rate"]:
                missing = f"not in {task['steps']} steps"
                row += [_over_seeds(at["step"], 0) if at["step"] else missing, _over_seeds(at["seconds"], 1)]
            rows.append(
                [*row, _over_seeds(at["forgot"], 3, "+") if at["forgot"] else "–" if len(row) > 2 else "not reached"]
            )
    columns = ["target", "method", *(["steps", "s"] if task["constant_rate"] else []), "general Δ"]
    return f"{name}: where it was learnt", columns, rows


def _rates(name: str, task: dict) -> Rows:
    rows = []
    for method, m in task["methods"].items():
        for rate in m["rates"]:
            end = rate["curve"][-1]
            marks = ["picked"] * (rate["learning_rate"] == m["learning_rate"])
            marks += ["edge"] * (bool(marks) and m["edge_of_grid"]) + ["diverged"] * rate["diverged"]
            share = rate["changes"]["share_changed"] if rate["changes"] else None
            rows.append(
                [
                    method,
                    f"{rate['learning_rate']:g}",
                    f"{rate['validation']:.3f}",
                    value(task, end[task["learnt"]]),
                    f"{end['general'] - task['base']['general']:+.3f}",
                    "–" if share is None else f"{share:.1%}",
                    "–" if share is None else f"{rate['changes']['stable_rank']['median']:.1f}",
                    ", ".join(marks),
                ]
            )
    columns = ["method", "rate", "validation", "learnt", "general Δ", "changed", "stable rank", ""]
    return f"{name}: every rate tried, with the first seed", columns, rows


def _cost(result: dict) -> Rows:
    rows = []
    for name, m in result["methods"].items():
        of_tasks = [task["methods"].get(name) for task in result["tasks"].values()]
        steps = [f"{1e3 * of['seconds_per_step']['mean']:.0f}" if of else "–" for of in of_tasks]
        forward = m["latency"]
        rows.append(
            [
                name,
                f"{m['trainable_parameters']:,}",
                megabytes(m["memory"]["total"]),
                megabytes(m["checkpoint_bytes"]),
                " / ".join(steps),
                *("–" if forward[key] is None else f"{forward[key] * 1e3:.1f}" for key in ("unmerged", "merged")),
            ]
        )
    columns = ["method", "trainable", "memory", "checkpoint", "step", "forward", "merged"]
    return (
        f"Cost; ms of a training step ({' / '.join(result['tasks'])}) and of a forward, unmerged and merged",
        columns,
        rows,
    )


def show(comparison: Comparison, console=None) -> None:
    """Print the answer, the tables and the rest, as far as the terminal can spell them and its reader stays."""
    from rich.table import Table

    console = console or _screen.console(folds=True)
    result = summarize(comparison)
    for sentence in answer(result):
        console.print(sentence, highlight=False, markup=False)
    for title, columns, rows in tables(result):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in details(result):
        console.print(sentence, highlight=False, markup=False)
    for line in paste(result):
        console.print(line, highlight=False, markup=False)


def markdown(result: dict) -> str:
    lines = ["# lowrank compare", "", "```", result["command"], "```", ""]
    lines += [f"- {sentence}" for sentence in answer(result)]
    lines += ["", "![what was learnt against what was forgotten, and memory](compare.png)"]
    for title, columns, rows in tables(result):
        lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "## How far this goes", "", *(f"- {sentence}" for sentence in details(result))]
    if pasted := paste(result):
        lines += ["", "## What to run next", "", "```python", *pasted, "```"]
    lines += ["", "## How it was measured", "", *(f"- {sentence}" for sentence in measured(result))]
    return "\n".join(lines) + "\n"


def measured(result: dict) -> list[str]:
    env, settings, model = result["environment"], result["settings"], result["model"]
    parts = ", ".join(f"{key} {value}" for key, value in env.items() if value is not None)
    general = result["general"]
    sentences = [
        f"{parts}; {settings['dtype']}, sequences of at most {settings['length']} tokens; the whole comparison took "
        f"{took(result)}.",
        f"Model: {model['name']}, {model['parameters']:,} parameters. General text: {general['source']} (sha256 "
        f"{general['sha256']}…), {general['sequences']} sequences of it.",
    ]
    for name, task in result["tasks"].items():
        sentences.append(
            f"{name}: {task['source']} (sha256 {task['sha256']}…), {task['steps']} steps of {task['batch']} sequences, "
            f"measured at the start and {task['evaluations']} times."
        )
    sentences += [
        f"{name}: {_summary(m, settings)}." + _size(m) + _paths(m["paths"]) + _unmeasured(m)
        for name, m in result["methods"].items()
    ]
    return sentences + caveats(result)


def _summary(method: dict, settings: dict) -> str:
    """With the layers that --target-modules names."""
    names = settings["target_modules"] if method["rank"] is not None and not method["layers"] else []
    text = method["summary"] + (" and on the experts' stacks" if method["stacks"] else "")
    return text.replace("all linear layers", f"the layers {', '.join(names)}") if names else text


def _size(method: dict) -> str:
    if method["rank"] is None:
        return ""
    return f" Rank {method['rank']}, alpha {method['alpha']:g}: a scale of {method['alpha'] / method['rank']:g}."


def _paths(paths: dict | None) -> str:
    """What lowrank.stats said of the method's model."""
    if not paths or not (paths["fused"] or paths["fallback"]):
        return ""
    reasons = "".join(f", {count} fell back ({reason})" for reason, count in paths["fallback"].items())
    return f" lowrank.stats: {paths['fused']} fused{reasons}."


def _unmeasured(method: dict) -> str:
    return "".join(f" No {what}: {why.rstrip('.')}." for what, why in method["not_measured"].items())


def caveats(result: dict) -> list[str]:
    settings, names = result["settings"], {name.partition(":")[0] for name in result["methods"]}
    lines = [
        "Memory is counted: bytes of weights, gradients, optimizer state and the distinct tensors autograd saved for "
        "backward, at one step. Temporaries and the allocator's slack are not in it."
        if settings["device"] == "cpu"
        else "Memory is the CUDA allocator's peak over a step, with temporaries.",
        "AdamW without weight decay, gradients clipped to norm 1; knowledge and format: 5 steps of warm-up, then a constant "
        "rate, so that a shorter run is the beginning of a longer one; text: 10 % warm-up and a cosine to zero, read at the "
        "ends of runs alone. The same batches in the same order for every method. LoRA without dropout, its rates divided by "
        "its scale.",
        (
            "The rates of --rates were tried with the first seed. "
            if settings["rates"]
            else "Every method tries equally many rates at the same spacing with the first seed, and more beyond an edge that "
            "wins. "
        )
        + "The pick is the lowest loss on a validation that is neither trained nor reported. No figure is a best over rates.",
        "General Δ, forgotten: rise of the loss on general text, in nats per token. At a target: linear between the "
        "evaluations around its first crossing; of text between the ends of the runs at different rates, the start being one.",
        "Changed: share of the weights of all linear layers and experts (the output head included, the embedding not) "
        "whose stored value differs after merging. Stable rank: ‖Δ‖F²/‖Δ‖2² of the update, the median over the matrices "
        "that changed.",
        "Times are of this machine with whatever else it was running; the first two steps of a phase are not timed.",
    ]
    if settings["replay"]:
        lines.append(
            f"{replayed(settings['replay'], settings['batch'])} of {settings['batch']} sequences are old text."
        )
    if "full→lora" in names:
        lines.append(
            "full→lora: its checkpoint is the continued model and the adapter; memory and trainable parameters are those "
            "of the larger phase."
        )
    if "full-masked" in names:
        lines.append(
            "full-masked: its probe run is in no time or memory shown; the gradient is still dense; its checkpoint is a sparse "
            "delta."
        )
    if settings["dtype"] == "bfloat16":
        lines.append(
            "bfloat16 weights that train are stepped in place, and lose updates below half of their spacing (--in-place); "
            "adapters are float32, as PEFT makes them."
            if settings["in_place"]
            else "bfloat16 weights that train have float32 masters, counted with the optimizer's state; adapters are float32, "
            "as PEFT makes them."
        )
    return lines


def _json(result: dict) -> str:
    """Strict JSON: a loss that diverged is null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False, default=str)


def write(comparison: Comparison, out: Path) -> None:
    """The three reports into the directory out, each complete or not there; of what is done so far."""
    from .figure import draw

    result = summarize(comparison)
    if not result["tasks"]:
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".compare-") as folder:
        draft = Path(folder)
        texts = {
            "compare.json": _json({**result, "answer": answer(result), "details": details(result)}),
            "compare.md": markdown(result),
        }
        for name, text in texts.items():  # a path may hold bytes that are no text
            (draft / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        draw(result, draft / "compare.png")
        for name in REPORTS:
            publish(draft / name, out / name)
