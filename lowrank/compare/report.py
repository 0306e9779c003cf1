"""compare.md, compare.json, compare.png and the same tables on the terminal."""

import json
import math
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import _screen
from ..checkpoints import publish
from . import train
from .run import Comparison
from .settings import REPORTS
from .summary import summarize
from .verdict import megabytes, verdict

Rows = tuple[str, list[str], list[list[str]]]  # title, columns, cells


def _over_seeds(values: dict, digits: int = 3) -> str:
    text = f"{values['mean']:.{digits}f}"
    return (
        text
        if values["least"] == values["most"]
        else f"{text} [{values['least']:.{digits}f}–{values['most']:.{digits}f}]"
    )


def tables(result: dict) -> list[Rows]:
    """Cost, result and learning rates: one row per method."""
    cost, effect, rates = [], [], []
    for name, m in result["methods"].items():
        milliseconds = {key: value * 1e3 for key, value in m["seconds_per_step"].items()}
        forward, rank = m["latency"], m["stable_rank"]
        cost.append(
            [
                name,
                f"{m['trainable_parameters']:,}",
                _over_seeds(milliseconds, 1),
                megabytes(m["memory"]["total"]),
                megabytes(m["checkpoint_bytes"]),
                *("–" if forward[key] is None else f"{forward[key] * 1e3:.1f}" for key in ("unmerged", "merged")),
            ]
        )
        before, at = m["old_loss"]["before"], m["at_target"]
        effect.append(
            [
                name,
                f"{m['new_loss']['before']:.3f} → {_over_seeds(m['new_loss']['after'])}",
                f"{before:.3f} → {_over_seeds(m['old_loss']['after'])}",
                _over_seeds({key: value - before for key, value in at["old_loss"].items()}),
                f"{at['step']['mean']:.0f}",
                f"{at['seconds']['mean']:.1f}",
                *("–" if m[key] is None else f"{m[key]:.1%}" for key in ("share_changed", "share_beyond_tolerance")),
                "–" if rank is None else f"{rank['median']:.1f}",
            ]
        )
        tried = ", ".join(f"{s['learning_rate']:g}: {s['validation_loss']:.3f}" for s in m["sweep"])
        rates.append([name, tried, f"{m['learning_rate']:g}", "edge of the grid" if m["edge_of_grid"] else ""])
    steps, target = result["settings"]["steps"], result["target_loss"]
    return [
        (
            "Cost",
            ["method", "trainable", "ms/step", "memory", "checkpoint", "forward ms", "merged ms"],
            cost,
        ),
        (
            f"Result after {steps} steps, and where the new domain's loss is {target:.3f}",
            [
                "method",
                "new-domain loss",
                "old-domain loss",
                "old Δ at equal loss",
                "steps",
                "s",
                "changed",
                "by > 1e-5",
                "stable rank",
            ],
            effect,
        ),
        (
            f"Learning rates (validation loss after {result['settings']['sweep_steps']} steps)",
            ["method", "rate: loss", "picked", "note"],
            rates,
        ),
    ]


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the tables and the verdict, as far as the terminal can spell them and its reader stays."""
    console = console or _screen.console(folds=True)
    result = summarize(comparison)
    for title, columns, rows in tables(result):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in verdict(result):
        console.print(sentence, highlight=False)


def markdown(result: dict) -> str:
    env, settings, model = result["environment"], result["settings"], result["model"]
    lines = ["# lowrank compare", "", "```", result["command"], "```", "", "## Verdict", ""]
    lines += [f"- {sentence}" for sentence in verdict(result)]
    for title, columns, rows in tables(result):
        lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "![loss against time, memory and forgetting](compare.png)", "", "## How it was measured", ""]
    parts = ", ".join(f"{key} {value}" for key, value in env.items())
    sentences = [
        f"{parts}; {settings['dtype']}, batch {settings['batch']} × {settings['length']} tokens; "
        f"the whole comparison took {result['seconds']:.0f} s.",
        f"Model: {model['name']}, {model['parameters']:,} parameters. New domain: {_source(result['data']['new'])}. "
        f"Old domain: {_source(result['data']['general'])}.",
        *(f"{name}: {m['summary']}." + _paths(m["paths"]) + _unmeasured(m) for name, m in result["methods"].items()),
        *caveats(result),
    ]
    lines += [f"- {sentence}" for sentence in sentences]
    return "\n".join(lines) + "\n"


def _source(corpus: dict) -> str:
    return f"{corpus['source']} (sha256 {corpus['sha256']}…, {corpus['sequences']['train']} training sequences)"


def _paths(paths: dict | None) -> str:
    """What lowrank.stats said of the method's model."""
    if not paths or not (paths["fused"] or paths["fallback"]):
        return ""
    reasons = "".join(f", {count} fell back ({reason})" for reason, count in paths["fallback"].items())
    return f" lowrank.stats: {paths['fused']} fused{reasons}."


def _unmeasured(method: dict) -> str:
    return "".join(f" No {what}: {why.rstrip('.')}." for what, why in method["not_measured"].items())


def caveats(result: dict) -> list[str]:
    settings = result["settings"]
    counted = (
        "Memory is counted: bytes of weights, gradients, optimizer state and the distinct tensors autograd saved for "
        "backward, at one step. Temporaries and the allocator's slack are not in it."
    )
    lines = [
        counted
        if settings["device"] == "cpu"
        else "Memory is the CUDA allocator's peak over a step, with temporaries.",
        "AdamW without weight decay, gradients clipped to norm 1, 10 % warm-up and cosine to zero in each phase; "
        "the same batches in the same order for every method. "
        f"LoRA: rank {settings['rank']}, alpha {settings['alpha']} (a scale of {settings['alpha'] / settings['rank']:g}), no "
        "dropout; rates of LoRA are divided by the scale.",
        "Learning rates were picked on validation sequences by runs of a third of the steps, with the first seed; a "
        "longer run may prefer a lower rate. Losses are of test sequences that picked nothing, in nats per token.",
        "Old Δ at equal loss: change of the old domain's loss when the new domain's first comes down to the worst of "
        "the methods' best losses, linear between evaluations; for full→lora that can be in its first phase.",
        "Changed: share of the weights of all linear layers and experts (the output head included, the embedding not) "
        "whose stored value differs after merging. Stable rank: ‖Δ‖F²/‖Δ‖2² of the update, the median over the matrices "
        "that changed.",
        "By > 1e-5: the same by more than the tolerance of arXiv 2505.11711, where much of the published sparsity of RL's "
        "updates comes from it: in bfloat16 a weight below 0.002 can move by a whole unit and still count as equal.",
        "Checkpoint: the files to keep beside the original model; for full→lora the continued model and the adapter (its "
        "memory and trainable parameters are those of the larger phase), for full-masked a sparse delta.",
        f"full-masked: its probe run, of the run's steps over {train.PROBE}, is in no time or memory shown; the gradient is "
        "still dense.",
        "The first two steps of a phase are not timed. Times are of this machine with whatever else it was running.",
    ]
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
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".compare-") as folder:
        draft = Path(folder)
        texts = {"compare.json": _json({**result, "verdict": verdict(result)}), "compare.md": markdown(result)}
        for name, text in texts.items():  # a path may hold bytes that are no text
            (draft / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        draw(result, draft / "compare.png")
        for name in REPORTS:
            publish(draft / name, out / name)
