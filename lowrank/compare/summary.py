"""A Comparison as plain data: what compare.json holds, and all that the tables, the figure and the verdict read."""

from .methods import METHODS
from .run import Comparison, Row
from .statistics import agreement, at_loss, leaders, target_loss


def spread(values) -> dict[str, float]:
    """Mean, least and most over the seeds."""
    values = [float(v) for v in values]
    return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}


def summarize(comparison: Comparison) -> dict:
    """Losses are nats per token, times seconds, sizes bytes."""
    import torch

    rows, settings, subject = comparison.rows, comparison.settings, comparison.subject
    target = target_loss([run for row in rows.values() for run in row.runs])
    return {
        "command": settings.command,
        "seconds": comparison.seconds,
        "complete": comparison.complete,
        "not_done": comparison.not_done,
        "environment": comparison.environment,
        "model": {
            "name": subject.name,
            "embedded": subject.embedded,
            "invented": list(subject.invented),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "pretraining": comparison.pretraining,
            "config": subject.model.config.to_dict(),
        },
        "data": {"new": _corpus(subject.new), "general": _corpus(subject.general)},
        "settings": {
            "dtype": settings.dtype,
            "device": settings.device,
            "batch": subject.batch,
            "length": subject.length,
            "steps": settings.steps,
            "sweep_steps": settings.sweep_steps,
            "rank": settings.rank,
            "alpha": settings.adapter.alpha,
            "in_place": settings.in_place,
            "seed": settings.seed,
            "seeds": settings.seeds,
        },
        "memory_measure": "CUDA allocator peak" if settings.device != "cpu" else "counted bytes",
        "target_loss": target,
        "methods": {name: _method(row, target) for name, row in rows.items()},
        "leaders": {
            "new": leaders({name: [run.points[-1].new for run in row.runs] for name, row in rows.items()}),
            "old": leaders({name: [run.points[-1].old for run in row.runs] for name, row in rows.items()}),
            "old_at_target": leaders(
                {name: [at_loss(run.points, target).old for run in row.runs] for name, row in rows.items()}
            ),
        },
        "agreement": _agreement(comparison, torch.finfo(getattr(torch, settings.dtype)).eps),
    }


def _corpus(corpus) -> dict:
    sizes = {part: len(getattr(corpus, part)) for part in ("train", "validation", "test")}
    return {"source": corpus.source, "sha256": corpus.digest, "sequences": sizes}


def _method(row: Row, target: float) -> dict:
    first, sweep = row.runs[0], row.sweep
    crossings = [at_loss(run.points, target) for run in row.runs]
    return {
        "summary": METHODS[row.name].summary,
        "seeds_done": len(row.runs),
        "learning_rate": sweep.picked,
        "edge_of_grid": sweep.edge,
        "sweep": [{"learning_rate": rate, "validation_loss": loss} for rate, loss in sweep.validation.items()],
        "trainable_parameters": first.trainable,
        "seconds_per_step": spread(sum(run.seconds) / len(run.seconds) for run in row.runs),
        "memory": first.memory.as_dict(),
        "checkpoint_bytes": first.checkpoint_bytes,
        "latency": row.latency,
        **(row.changes or dict.fromkeys(("share_changed", "share_beyond_tolerance", "stable_rank"))),
        "not_measured": row.not_measured,
        "paths": row.paths,
        "new_loss": {
            "before": float(first.points[0].new.mean()),
            "after": spread(run.points[-1].new.mean() for run in row.runs),
        },
        "old_loss": {
            "before": float(first.points[0].old.mean()),
            "after": spread(run.points[-1].old.mean() for run in row.runs),
        },
        "at_target": {
            "step": spread(point.step for point in crossings),
            "seconds": spread(point.seconds for point in crossings),
            "old_loss": spread(point.old.mean() for point in crossings),
        },
        "points": [
            {"step": p.step, "seconds": p.seconds, "new": float(p.new.mean()), "old": float(p.old.mean())}
            for p in first.points
        ],
        "training_losses": first.losses,
    }


def _agreement(comparison: Comparison, eps: float) -> dict | None:
    """lora against peft-lora at lora's rate: over the whole run where both picked it, else over the sweep's."""
    if comparison.control is None:
        return None
    lora, peft = comparison.rows["lora"], comparison.rows["peft-lora"]
    rate = lora.sweep.picked
    if rate == peft.sweep.picked:
        lora_losses, peft_losses = lora.runs[0].losses, peft.runs[0].losses
    else:
        lora_losses, peft_losses = lora.sweep.curves[rate], peft.sweep.curves[rate]
    return {"learning_rate": rate, **agreement(lora_losses, peft_losses, comparison.control, eps)}
