"""What reinforcement learning changes of a model, by full fine-tuning, LoRA and SVF, in four minutes of a core.

A byte-level Llama is pretrained on prose and on sums that it sees answered in two formats, "12+34=46" and, less often, the
worked "12+34:6,4=46", until it is right sometimes. GRPO (arXiv 2402.03300; the advantages of groups, one update per batch)
rewards right sums in either format. Printed per method: reward, entropy, exact KL to the base model, the share of each format
(does it collapse onto one, as arXiv 2504.07912 finds?), the loss on prose, and how many weights changed (arXiv 2505.11711): of
their fp32 bits, and of the bf16 numbers that a checkpoint would store. What is printed is measured in this run.

python examples/rl.py
"""

import argparse
import copy
import re

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank import analysis, bits
from lowrank.compare.data import Corpus, batches, embedded_config, split, topics_text
from lowrank.compare.settings import Embedded
from lowrank.compare.train import evaluate, fit, optimizer_and_schedule
from lowrank.optim import AdamW

LENGTH, PROMPT, ANSWER = 78, 6, 8  # bytes of a pretraining sequence, of "\n12+34", and of ":6,4=46\n"
FORMATS = {"plain": r"=(\d\d)\n", "worked": r":\d,\d=(\d\d)\n"}


def sums(count: int, limit: int, worked: float, seed: int) -> bytes:
    """Lines of sums of two numbers below ``limit``, a share of them ``worked``: units, tens, and then the answer."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(limit, (count, 2), generator=generator).tolist()
    steps = [f":{(a + b) % 10},{(a + b) // 10}" for a, b in numbers]
    shown = (torch.rand(count, generator=generator) < worked).tolist()
    lines = (f"\n{a:02}+{b:02}{s * w}={a + b:02}" for (a, b), s, w in zip(numbers, steps, shown, strict=True))
    return "".join(lines).encode()


def corpus(text: bytes) -> Corpus:
    return split(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), LENGTH, "")


def head_of(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict the answers' bytes, [B, ANSWER, H], and the vocabulary head's weight."""
    llama = model.get_base_model() if hasattr(model, "get_base_model") else model
    return llama.model(input_ids=ids[:, :-1]).last_hidden_state[:, -ANSWER:], llama.lm_head.weight


@torch.no_grad()
def answer(model: nn.Module, problems: list[list[int]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sampled ids int64 [B, PROMPT + ANSWER], rewards [B], 1 for a right sum; and which are of which format, bool [B]."""
    ids = torch.tensor([list(f"\n{a:02}+{b:02}".encode()) for a, b in problems])
    for _ in range(ANSWER):
        ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)], 1)
    texts = [bytes(min(byte, 255) for byte in row).decode("latin1") for row in ids[:, PROMPT:].tolist()]
    matched = {name: [re.match(pattern, text) for text in texts] for name, pattern in FORMATS.items()}
    answers = zip(problems, *matched.values(), strict=True)
    right = [any(match and int(match[1]) == a + b for match in matches) for (a, b), *matches in answers]
    formats = {name: torch.tensor([match is not None for match in matches]) for name, matches in matched.items()}
    return ids, torch.tensor(right).float(), formats


def scored(model: nn.Module, base: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the answers' bytes [B, ANSWER], 0 after their line; mean entropy; mean exact KL(model || base)."""
    ends = (ids[:, PROMPT:] == ord("\n")).long()
    targets = ids[:, PROMPT:].masked_fill(ends.cumsum(1) > ends, -100)
    states, weight = head_of(model, ids)
    logp, entropy = lowrank.linear_logprob(states, weight, targets)
    with torch.no_grad():
        base_head = lowrank.Head(*head_of(base, ids))
    counted = targets != -100
    kl = lowrank.kl_to(lowrank.Head(states, weight), base_head)[counted].mean()
    return logp, entropy.sum() / counted.sum(), kl


def grpo(name: str, model: nn.Module, base: nn.Module, rate: float, seed: int, args) -> list[dict[str, float]]:
    """Train whatever requires grad, in place.  Returns reward, entropy, KL and shares of formats at every step."""
    torch.manual_seed(seed)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    history = []
    for step in range(args.steps):
        problems = torch.randint(args.limit, (args.prompts, 2)).repeat_interleave(args.group, 0)
        ids, rewards, formats = answer(model, problems.tolist())
        groups = rewards.view(-1, args.group)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        logp, entropy, kl = scored(model, base, ids)
        (args.kl * kl - (advantages.view(-1, 1) * logp).mean()).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen = {"reward": rewards, "entropy": entropy, "kl": kl, **formats}
        history.append({what: x.detach().float().mean().item() for what, x in seen.items()})
        if step % args.every == 0 or step == args.steps - 1:
            print(f"{name:10} step {step:3}: " + ", ".join(f"{what} {x:.3f}" for what, x in history[-1].items()))
    return history


@torch.no_grad()
def measured(model: nn.Module, base: nn.Module, prose: Tensor, args) -> dict[str, float]:
    """On every problem there is, each answered ``args.asked`` times; and the loss on prose."""
    torch.manual_seed(args.seed)
    problems = [[a, b] for a in range(args.limit) for b in range(args.limit)] * args.asked
    ids, rewards, formats = answer(model, problems)
    _, entropy, kl = scored(model, base, ids)
    error = rewards.view(args.asked, -1).mean(0).std() / (len(problems) / args.asked) ** 0.5  # over problems
    seen = {"reward": rewards, "error": error, "entropy": entropy, "kl": kl, **formats}
    return {k: x.float().mean().item() for k, x in seen.items()} | {"prose": evaluate(model, prose, 64).mean().item()}


METHODS = {  # what adapts the model, and the learning rate
    "full": (None, 1e-4),
    "full again": (None, 1e-4),  # another seed
    "LoRA 1": (LoraConfig(r=1, lora_alpha=1, target_modules="all-linear"), 3e-3),
    "LoRA 16": (LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), 1e-3),
    "SVF": (lowrank.SVFConfig(mode="delta"), 1e-2),
}


def weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def conclusion(rows: dict[str, dict[str, float]]) -> str:
    """What training every weight bought in this run, in words."""
    base, full, again = (rows[name] for name in ("base", "full", "full again"))
    best = max((name for name in rows if name not in ("base", "full", "full again")), key=lambda n: rows[n]["reward"])
    adapter, mean = rows[best], (full["reward"] + again["reward"]) / 2
    noise = max(2 * (full["error"] ** 2 / 2 + adapter["error"] ** 2) ** 0.5, abs(full["reward"] - again["reward"]))
    bought = f"{mean - adapter['reward']:+.3f} reward against {best}, the best of the adapters afterwards"
    if abs(mean - adapter["reward"]) <= noise:
        bought = (
            f"nothing in reward that can be told from {best}, the best of the adapters afterwards ({bought.split()[0]})"
        )
    kinds = {name: max(FORMATS, key=row.get) for name, row in rows.items()}
    onto = [f"{name} {kind} {rows[name][kind]:.2f}" for name, kind in kinds.items() if name != "base"]
    collapsed = sum(rows[name][kind] >= 0.9 for name, kind in kinds.items() if name != "base")
    return (
        f"In this run training every weight bought {bought}; noise is {noise:.3f}, and the base's {base['reward']:.3f} became"
        f" {mean:.3f}. Its loss on prose moved by {full['prose'] - base['prose']:+.3f}, {best}'s by"
        f" {adapter['prose'] - base['prose']:+.3f}; its KL is {full['kl']:.3f}, {best}'s {adapter['kl']:.3f}; it changed"
        f" {full['bf16']:.1%} of the bf16 weights, {best}, merged, {adapter['bf16']:.1%}. The base answered {kinds['base']}"
        f" {base[kinds['base']]:.2f} of the time; {collapsed} of {len(onto)} runs ended with nine of ten answers or more in one"
        f" format ({', '.join(onto)}). One toy, and one seed but for full: nothing follows for other models."
    )


OPTIONS = {
    "hidden": 64,
    "limit": 20,
    "batch": 16,
    "pretrain-steps": 700,
    "worked": 0.3,
    "seed": 0,
    "steps": 100,
    "prompts": 16,
    "group": 16,
    "kl": 0.0,
    "every": 20,
    "asked": 4,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=str(default))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    prose, known = corpus(topics_text()), corpus(sums(40_000, args.limit, args.worked, args.seed)).train
    base = LlamaForCausalLM(embedded_config(Embedded(args.hidden, args.hidden * 8 // 3, layers=3, length=LENGTH)))
    optimizer, schedule = optimizer_and_schedule(base, 4e-3, args.pretrain_steps)
    stream = batches(torch.cat([prose.train[: len(known) // 3], known]), args.batch, args.pretrain_steps, args.seed)
    losses, _ = fit(base, optimizer, schedule, stream, base.device, tick=lambda loss: None)
    print(f"base: {args.pretrain_steps} steps, training loss {losses[0]:.3f} to {losses[-1]:.3f}")
    rows, histories, changed = {"base": measured(base, base, prose.test, args)}, {}, {}
    for n, (name, (config, rate)) in enumerate(METHODS.items()):
        model = copy.deepcopy(base)
        model = lowrank.adapt(model, config) if config else model
        histories[name] = grpo(name, model, base, rate, args.seed + n, args)
        rows[name] = measured(model, base, prose.test, args)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        for what, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            old, new = weights(base, dtype), weights(model, dtype)
            rows[name][what] = analysis.total(analysis.diff_stats(old, new)).share_changed
        changed[name] = {weight: bits.pack(new[weight] != before) for weight, before in old.items()}  # of bf16
    overlap = analysis.overlap([changed["full"], changed["full again"]], {k: t.numel() for k, t in old.items()})
    columns = {"reward": ".3f", "error": ".3f", "entropy": ".3f", "kl": ".3f", **dict.fromkeys(FORMATS, ".2f")}
    columns |= {"prose": ".3f", "fp32": ".1%", "bf16": ".1%"}
    table = Table(
        "", *columns, title="sums; loss on prose in nats per byte; share of weights changed, as fp32 and as bf16"
    )
    for name, row in rows.items():
        table.add_row(name, *(format(row[what], spec) if what in row else "" for what, spec in columns.items()))
    Console(width=110).print(table)
    shared, chance = overlap.jaccard[0, 1], overlap.random_jaccard[0, 1]
    print(f"bf16 weights changed by both seeds of full: Jaccard {shared:.3f}, by chance {chance:.3f}")
    print(conclusion(rows))
    return dict(rows=rows, histories=histories, overlap=overlap, changed=changed, base=base)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is too small for more
    main()
