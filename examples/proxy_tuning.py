"""Proxy-tuning (Liu et al. 2024, arXiv 2401.08565): a large model steered by a small tuned one, in two minutes of a core.

Two byte-level Llamas, a large and a small one, are pretrained on source code and on lines that count up or down ("3456",
"3210").  For each of two domains, English prose and lines that all count up, the small one is tuned: that is the expert,
the untuned small one the antiexpert, and base + alpha (expert - antiexpert) is the large model steered, none of whose
weights has changed.  The large model is tuned on the domain as well: the bound that proxy-tuning tries to reach.

"proxy 1.5" in the table is the large model steered with alpha 1.5; "gap" the share of the way from base to tuned, in loss,
that was made; "changed" the share of greedy next tokens that are not base's; "lines" the share of lines of counting that
generate() completes upwards.  Models of this size show how the method works, and nothing about how well it works on large
ones.

python examples/proxy_tuning.py
"""

import argparse
import copy
import time
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank.compare.data import Corpus, batches, embedded_config, library_text, split, topics_text
from lowrank.compare.settings import Embedded
from lowrank.compare.train import evaluate, fit, optimizer_and_schedule
from lowrank.integrations.transformers import ProxyTuning

LENGTH, LINE = 120, 5  # bytes of a sequence, and of a line of counting: "\n3456"
PROMPT, ANSWER = 4 * LINE + 2, 3  # four lines and "\n3"; "456"


def corpus(text: bytes) -> Corpus:
    return split(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), LENGTH, "")


def counting(blocks: int, seed: int, down: bool = False) -> Tensor:
    """int64 [blocks, LENGTH]: lines of four digits from a random one on, upwards; with ``down``, half of them downwards."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(10, (blocks, LENGTH // LINE, 1), generator=generator)
    step = 1 - 2 * torch.randint(2, start.shape, generator=generator) if down else 1
    digits = ord("0") + (start + step * torch.arange(LINE - 1)) % 10
    return torch.cat([torch.full_like(start, ord("\n")), digits], 2).flatten(1)


def llama(hidden: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(embedded_config(Embedded(hidden, hidden * 8 // 3, layers=layers, length=LENGTH)))


def train(name: str, model: nn.Module, blocks: Tensor, steps: int, rate: float, args) -> nn.Module:
    """Next-token loss, every weight."""
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    losses, _ = fit(
        model, optimizer, schedule, batches(blocks, args.batch, steps, args.seed), model.device, tick=lambda loss: None
    )
    print(f"{name}: {steps} steps, training loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return model.eval()


class Steered(nn.Module):
    """The three models as one, for whole sequences: what ``evaluate`` asks for logits."""

    def __init__(self, base: nn.Module, expert: nn.Module, antiexpert: nn.Module, alpha: float):
        super().__init__()
        self.models, self.alpha = nn.ModuleList([base, expert, antiexpert]), alpha

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = [model(input_ids=input_ids).logits for model in self.models]
        return SimpleNamespace(logits=lowrank.combine_logits(*logits, self.alpha))


@torch.no_grad()
def greedy(model: nn.Module, blocks: Tensor) -> Tensor:
    """int64 [B, LENGTH]: the likeliest token after each of the blocks'."""
    return model(input_ids=blocks).logits.argmax(-1)


def lines(model: nn.Module, blocks: Tensor, proxy: ProxyTuning | None = None) -> float:
    """Share of lines, begun as in ``blocks``, that greedy search completes upwards."""
    options = dict(input_ids=blocks[:, :PROMPT], max_new_tokens=ANSWER, do_sample=False, use_cache=True)
    model.eval()
    out = model.generate(**options) if proxy is None else proxy.generate(model, **options)
    return (out == blocks[:, : PROMPT + ANSWER]).all(1).double().mean().item()


OPTIONS = {
    "hidden": 128,
    "layers": 4,
    "small-hidden": 48,
    "small-layers": 2,
    "batch": 8,
    "pretrain-steps": 400,
    "steps": 150,
    "rate": 2e-3,
    "seed": 0,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=str(default))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="0.5 1.0 1.5")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    code = corpus(library_text())
    known = torch.cat([code.train[:2000], counting(2000, 4, down=True)])
    large, small = llama(args.hidden, args.layers), llama(args.small_hidden, args.small_layers)
    for name, model in (("large", large), ("small", small)):
        size = sum(p.numel() for p in model.parameters())
        train(f"{name}, {size:,} parameters", model, known, args.pretrain_steps, args.rate, args)

    count = Corpus("counting", "", counting(2000, 1), counting(64, 2), counting(64, 3))
    domains = {"prose": corpus(topics_text()), "counting": count}
    questions, results = counting(256, 5), {}
    for domain, text in domains.items():
        expert = train(f"small on {domain}", copy.deepcopy(small), text.train, args.steps, args.rate / 2, args)
        tuned = train(f"large on {domain}", copy.deepcopy(large), text.train, args.steps, args.rate / 2, args)
        rows = {"base": (large, None), "expert alone": (expert, None)}
        for alpha in args.alphas:
            rows[f"proxy {alpha:g}"] = Steered(large, expert, small, alpha), ProxyTuning(expert, small, alpha)
        rows["tuned"] = tuned, None
        base = greedy(large, text.test)
        for name, (model, proxy) in rows.items():
            loss = evaluate(model, text.test, len(text.test)).mean().item()
            changed = (greedy(model, text.test) != base).double().mean().item()
            share = lines(large if proxy else model, questions, proxy) if domain == "counting" else None
            results[domain, name] = dict(loss=loss, changed=changed, lines=share)
        first, last = results[domain, "base"]["loss"], results[domain, "tuned"]["loss"]
        for name in rows:
            results[domain, name]["gap"] = (first - results[domain, name]["loss"]) / (first - last)

    table = Table("", title="test loss in nats per byte")
    for domain in domains:
        for column in (domain, "gap", "changed"):
            table.add_column(column, justify="right")
    table.add_column("lines", justify="right")
    for name in rows:
        of_name = [results[domain, name] for domain in domains]
        cells = [c for r in of_name for c in (f"{r['loss']:.4f}", f"{r['gap']:.0%}", f"{r['changed']:.1%}")]
        table.add_row(name, *cells, f"{of_name[-1]['lines']:.1%}")
    Console().print(table)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
