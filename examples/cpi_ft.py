"""CPI-FT (Wang et al. 2025, arXiv 2508.21741): find each task's core parameters, group, merge, and freeze them, in two minutes.

A byte-level Llama is pretrained on source code. Three tasks follow: prose, lines that count up and lines that count down. A
short probe run per task shows its core, the 1 % of all weights that it moved most; tasks whose cores overlap form a group. The
probes are merged (cores transplanted, the rest interpolated on the sphere, task vector by task vector), and the groups are
trained one after the other, each with the cores of all earlier groups frozen. Beside it, on the same batches: the same stages
from the same start without freezing, and plain fine-tuning on one task after the other. What is printed is measured in this
run; a toy says nothing about large models.

python examples/cpi_ft.py
"""

import argparse
import copy
import itertools

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from lowrank import analysis, bits
from lowrank.compare.data import Corpus, batches, embedded_config, library_text, split, topics_text
from lowrank.compare.settings import Embedded
from lowrank.compare.train import evaluate, fit
from lowrank.optim import AdamW

LENGTH, LINE = 120, 5  # bytes of a sequence, and of a line of counting: "\n3456"
Weights = dict[str, Tensor]


def corpus(text: bytes) -> Corpus:
    return split(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), LENGTH, "")


def counting(blocks: int, seed: int, step: int) -> Tensor:
    """int64 [blocks, LENGTH]: lines of four digits from a random one on, ``step`` apart."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(10, (blocks, LENGTH // LINE, 1), generator=generator)
    digits = ord("0") + (start + step * torch.arange(LINE - 1)) % 10
    return torch.cat([torch.full_like(start, ord("\n")), digits], 2).flatten(1)


def train(model: nn.Module, blocks: Tensor, steps: int, args, frozen: Weights | None = None) -> None:
    """Full fine-tuning in place; where ``frozen`` has a bit, neither the weight nor its moments move."""
    masks = {name: ~words for name, words in (frozen or {}).items()}
    optimizer = AdamW(model.named_parameters(), lr=args.rate, weight_decay=0.0, masks=masks)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    fit(model, optimizer, schedule, batches(blocks, args.batch, steps, args.seed), model.device, lambda loss: None)


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def with_weights(model: nn.Module, values: Weights) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    return model


def groups_of(jaccard: Tensor, threshold: float) -> list[list[int]]:
    """Connected components of the tasks whose cores overlap at least so much, in order of their first task."""
    group = list(range(len(jaccard)))
    for a, b in itertools.combinations(range(len(jaccard)), 2):
        if jaccard[a, b] >= threshold:
            group = [group[a] if g == group[b] else g for g in group]
    return [[task for task, g in enumerate(group) if g == first] for first in dict.fromkeys(group)]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between two tensors taken as vectors; the angle by atan2 (Kahan), which keeps small ones; a straight line below 1e-3."""
    x, y = a.double().flatten(), b.double().flatten()
    u, v = x / x.norm().clamp_min(1e-30), y / y.norm().clamp_min(1e-30)
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    if angle < 1e-3 or angle > torch.pi - 1e-3:
        return torch.lerp(a, b, t)
    mixed = torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y
    return (mixed / torch.sin(angle)).view_as(a).to(a.dtype)


def merge(base: Weights, tuned: list[Weights], cores: list[Weights], on: str) -> Weights:
    """Interpolated on the sphere, weights or task vectors; but each core as its task has it, or as the one that moved most."""
    merged = {}
    for name, start in base.items():
        origin = start if on == "vectors" else torch.zeros_like(start)
        rest = tuned[0][name] - origin
        for n, one in enumerate(tuned[1:], 2):
            rest = slerp(rest, one[name] - origin, 1 / n)
        inside = torch.stack([bits.unpack(core[name], start.shape) for core in cores])
        steps = torch.stack([one[name] - start for one in tuned]) * inside
        largest = steps.gather(0, steps.abs().argmax(0, keepdim=True))[0]
        merged[name] = torch.where(inside.any(0), start + largest, origin + rest)
    return merged


def union(masks: list[Weights]) -> Weights:
    joined = {name: words.clone() for name, words in masks[0].items()}
    for mask, name in itertools.product(masks[1:], joined):
        joined[name] |= mask[name]
    return joined


def shuffled(parts: list[Tensor], seed: int) -> Tensor:
    """As many sequences of each task, mixed."""
    least = min(len(part) for part in parts)
    mixed = torch.cat([part[:least] for part in parts])
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))]


def losses(model: nn.Module, tasks: dict[str, Corpus]) -> list[float]:
    return [float(evaluate(model, task.test, 64).mean()) for task in tasks.values()]


def stages(model: nn.Module, order: list[list[int]], tasks: dict[str, Corpus], cores: list[Weights] | None, args):
    """Train group after group in place.  Returns the losses on all tasks after each stage, and the last stage's frozen bits."""
    history, frozen = [], None
    data = [task.train for task in tasks.values()]
    for n, group in enumerate(order):
        done = [task for earlier in order[:n] for task in earlier]
        frozen = union([cores[task] for task in done]) if cores and done else None
        train(model, shuffled([data[task] for task in group], args.seed), args.steps * len(group), args, frozen)
        history.append(losses(model, tasks))
    return history, frozen


OPTIONS = {
    "hidden": 96,
    "batch": 8,
    "pretrain-steps": 300,
    "steps": 80,
    "rate": 1e-3,
    "core": 0.01,
    "threshold": 0.2,
    "seed": 0,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=str(default))
    parser.add_argument("--on", choices=("vectors", "weights"), default="vectors", help="what is merged: %(default)s")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tasks = {"prose": corpus(topics_text())}
    for name, step in (("up", 1), ("down", -1)):
        tasks[name] = Corpus(name, "", *(counting(n, seed, step) for n, seed in ((2000, 1), (64, 2), (64, 3))))
    model = LlamaForCausalLM(embedded_config(Embedded(args.hidden, args.hidden * 8 // 3, layers=3, length=LENGTH)))
    train(model, corpus(library_text()).train, args.pretrain_steps, args)
    base, names = weights(model), list(tasks)
    rows = {"base": losses(model, tasks)}

    probes = []
    for name, task in tasks.items():
        probe = with_weights(model, base)
        train(probe, task.train, args.steps, args)
        rows[f"{name} alone"] = losses(probe, tasks)
        probes.append(weights(probe))
    cores = [analysis.topk_mask((base, probe), args.core) for probe in probes]
    overlap = analysis.overlap(cores)
    order = groups_of(overlap.jaccard, args.threshold)

    merged = merge(base, probes, cores, args.on)
    rows["merged"] = losses(with_weights(model, merged), tasks)
    runs = {
        "one after the other": (base, [[n] for n in range(len(tasks))], None),
        "merged, stages": (merged, order, None),
        "CPI-FT": (merged, order, cores),
    }
    histories, models = {}, {}
    for name, (start, stage_order, kept) in runs.items():
        models[name] = with_weights(model, start)
        histories[name], frozen = stages(models[name], stage_order, tasks, kept, args)
        rows[name] = histories[name][-1]

    table = Table(
        "", *names, "forgotten", title="test loss in nats per byte; forgotten: the first task's, since its stage"
    )
    forgotten = {name: history[-1][0] - history[0][0] for name, history in histories.items()}
    for name, row in rows.items():
        table.add_row(name, *(f"{loss:.3f}" for loss in row), f"{forgotten[name]:+.3f}" if name in forgotten else "")
    console = Console()
    console.print(table)
    for a, b in itertools.combinations(range(len(names)), 2):
        console.print(
            f"cores of {names[a]} and {names[b]}: Jaccard {overlap.jaccard[a, b]:.3f}, by chance {args.core / 2:.3f}"
        )
    console.print("groups: " + "; ".join(" + ".join(names[task] for task in group) for group in order), highlight=False)
    return dict(rows=rows, order=order, cores=cores, frozen=frozen, merged=merged, models=models, forgotten=forgotten)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is too small for more
    main()
