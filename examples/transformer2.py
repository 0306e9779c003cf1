"""Transformer² (Sun, Cetin, Tang 2025, arXiv 2501.06252) from training to two-pass inference, in two minutes of a core.

A byte-level Llama is pretrained on source code and on lines that count up or down ("3456", "3210"). Three experts are trained
on it, each one vector of scales for the singular values of every linear layer: by next-token loss on prose, and on
lines that all count up; and by REINFORCE, rewarded with 1 for counting up and -1 for anything else. At inference a first
pass reads the prompt; the second uses the expert that a classifier picks for it, every row of the batch its own, or a
mixture of all experts, whose weights the cross-entropy method finds on a few examples, a whole population in one batch.
The table's last domain, lines of counting after prose, is one that no expert was trained on.

python examples/transformer2.py --out transformer2
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowrank
from lowrank.compare.data import Corpus, batches, embedded_config, library_text, split, topics_text
from lowrank.compare.settings import Embedded
from lowrank.compare.train import evaluate, fit, optimizer_and_schedule

LENGTH, LINE = 120, 5  # bytes of a sequence, and of a line of counting: "\n3456"
PROMPT, ANSWER = 4 * LINE + 2, 3  # for REINFORCE: four lines and "\n3"; "456"
EXPERTS = ["prose", "counting", "reinforce"]


def corpus(text: bytes) -> Corpus:
    return split(torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), LENGTH, "")


def counting(blocks: int, seed: int, down: bool = False) -> Tensor:
    """int64 [blocks, LENGTH]: lines of four digits from a random one on, upwards; with ``down``, half of them downwards."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(10, (blocks, LENGTH // LINE, 1), generator=generator)
    step = 1 - 2 * torch.randint(2, start.shape, generator=generator) if down else 1
    digits = ord("0") + (start + step * torch.arange(LINE - 1)) % 10
    return torch.cat([torch.full_like(start, ord("\n")), digits], 2).flatten(1)


def train(name: str, model: nn.Module, blocks: Tensor, steps: int, rate: float, args) -> None:
    """Next-token loss, for whatever of the model requires grad."""
    optimizer, schedule = optimizer_and_schedule(model, rate, steps)
    stream = batches(blocks, args.batch, steps, args.seed)
    losses, _ = fit(model, optimizer, schedule, stream, model.device, tick=lambda loss: None)
    print(f"{name}: {steps} steps, training loss {losses[0]:.3f} to {losses[-1]:.3f}")


@torch.no_grad()
def answer(model: nn.Module, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts of ``blocks`` with answers sampled from the model, int64 [B, PROMPT + ANSWER], and their rewards [B]."""
    ids = blocks[:, :PROMPT]
    for _ in range(ANSWER):
        token = torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)
        ids = torch.cat([ids, token], 1)
    return ids, (ids == blocks[:, : PROMPT + ANSWER]).all(1).float() * 2 - 1


def answer_logp(model: nn.Module, ids: Tensor) -> Tensor:
    """fp64 [B, ANSWER, vocabulary]: log-probabilities of every token at each place of the answers."""
    return model(input_ids=ids[:, :-1]).logits[:, -ANSWER:].double().log_softmax(-1)


def kl_to_base(model: nn.Module, ids: Tensor, logp: Tensor) -> Tensor:
    """KL(expert || base), exact for each token of the answers; summed over an answer, averaged over the batch."""
    with torch.no_grad(), model.disable_adapter():
        base = answer_logp(model, ids)
    return (logp.exp() * (logp - base)).sum((1, 2)).mean()


def reinforce(model: nn.Module, blocks: Tensor, args) -> list[float]:
    """Train the active expert on -mean(reward log π(answer)) + λ KL; returns the KL before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.rl_rate)
    kls = []
    for batch in batches(blocks, args.rl_batch, args.rl_steps, args.seed):
        ids, rewards = answer(model, batch.ids)
        logp = answer_logp(model, ids)
        chosen = logp.gather(2, ids[:, PROMPT:, None]).sum((1, 2))
        kl = kl_to_base(model, ids, logp)
        (args.kl * kl - (rewards * chosen).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        kls.append(kl.item())
    return kls


@torch.no_grad()
def first_pass(model: nn.Module, prompts: Tensor) -> Tensor:
    """[B, hidden]: the base model's mean hidden state over each prompt."""
    with model.disable_adapter():
        return model(input_ids=prompts, output_hidden_states=True).hidden_states[-1].mean(1)


def classifier(states: list[Tensor]) -> nn.Linear:
    """Logistic regression from first passes, one tensor per domain, to the domain's index."""
    inputs, labels = torch.cat(states), torch.cat([torch.full((len(s),), i) for i, s in enumerate(states)])
    linear = nn.Linear(inputs.shape[1], len(states))
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(inputs), labels).backward()
        optimizer.step()
    return linear


def mixed_losses(model: nn.Module, blocks: Tensor, alpha: Tensor) -> Tensor:
    """fp64 [B]: losses in one batch under alpha [B, E], a mixture for every row, or [E], one for all."""
    with lowrank.expert_mix(model, alpha, EXPERTS):
        return evaluate(model, blocks, len(blocks))


def population_losses(model: nn.Module, shots: Tensor, alphas: Tensor) -> Tensor:
    """fp64 [P]: mean loss on the examples under each of alphas [P, E], in one batch of P times the examples."""
    rows, alpha = shots.repeat(len(alphas), 1), alphas.repeat_interleave(len(shots), 0)
    return mixed_losses(model, rows, alpha).view(len(alphas), -1).mean(1)


def cross_entropy_method(model: nn.Module, shots: Tensor, args) -> Tensor:
    """alpha [E] for z = Σ_e alpha_e z_e: draw a population, fit the normal to its best fifth, repeat."""
    mean, std = torch.full((len(EXPERTS),), 0.5), torch.full((len(EXPERTS),), 0.5)
    for _ in range(args.iterations):
        alphas = (mean + std * torch.randn(args.population, len(EXPERTS))).clamp(0, 1)
        alphas[alphas.sum(1) == 0] = mean  # no mixture at all: "nuclear" would divide by zero
        best = population_losses(model, shots, alphas).argsort()[: max(2, round(0.2 * args.population))]
        mean, std = alphas[best].mean(0), alphas[best].std(0)
    return mean


OPTIONS = {
    "hidden": 96,
    "batch": 8,
    "pretrain-steps": 300,
    "steps": 100,  # of next-token loss, as is rate
    "rate": 0.1,
    "rl-steps": 60,
    "rl-batch": 64,
    "rl-rate": 0.02,
    "kl": 0.1,  # λ; the paper's default is 0
    "prompt": 30,  # bytes that the first pass reads
    "shots": 3,
    "population": 32,
    "iterations": 8,
    "seed": 0,
}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("transformer2"), help="gets the base model and the experts")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=str(default))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    code, prose = corpus(library_text()), corpus(topics_text())
    count = Corpus("counting", "", counting(2000, 1), counting(64, 2), counting(64, 3))
    model = LlamaForCausalLM(embedded_config(Embedded(args.hidden, args.hidden * 8 // 3, layers=3, length=LENGTH)))
    known = torch.cat([code.train[:2000], counting(2000, 4, down=True)])
    train("base", model, known, args.pretrain_steps, 2e-3, args)
    model.save_pretrained(args.out / "base")
    questions, kl, size = counting(512, 5), {}, {}
    rewards = {"base": answer(model, questions)[1].mean().item()}

    # mode "delta" is exactly the base at z = 1: the KL starts at 0
    lowrank.adapt(model, lowrank.SVFConfig(parametrization="sigmoid", normalize="nuclear", mode="delta"), "prose")
    train("prose", model, prose.train, args.steps, args.rate, args)
    model.add_expert("counting")
    train("counting", model, count.train, args.steps, args.rate, args)
    model.add_expert("reinforce")
    kls = reinforce(model, count.train, args)

    pick = classifier([first_pass(model, c.train[:64, : args.prompt]) for c in (prose, count)])
    held_out = {"prose": (prose.validation, prose.test), "counting": (count.validation, count.test)}
    held_out["after prose"] = [torch.cat([a[:, :60], b[:, 60:]], 1) for a, b in zip(*held_out.values(), strict=True)]
    losses, picks, alphas = {}, {}, {}
    for domain, (validation, test) in held_out.items():
        picks[domain] = pick(first_pass(model, test[:, : args.prompt])).argmax(1)
        alphas[domain] = cross_entropy_method(model, validation[: args.shots], args)
        with model.disable_adapter():
            losses[domain] = {"base": evaluate(model, test, len(test))}
        for name in EXPERTS:
            model.set_expert(name)
            losses[domain][name] = evaluate(model, test, len(test))
        losses[domain]["picked"] = mixed_losses(model, test, torch.eye(len(EXPERTS))[picks[domain]])
        losses[domain]["mixed"] = mixed_losses(model, test, alphas[domain])

    for name in EXPERTS:
        model.set_expert(name)
        ids, reward = answer(model, questions)
        rewards[name], kl[name] = reward.mean().item(), kl_to_base(model, ids, answer_logp(model, ids)).item()
        folder = lowrank.save_adapter(model, args.out / name, adapter_name=name)
        size[name] = sum(file.stat().st_size for file in folder.iterdir())

    table = Table("", *held_out, "reward", "KL", "bytes", title="test loss in nats per byte; reward and KL of answers")
    for name in losses["prose"]:
        columns = (rewards, "+.3f"), (kl, ".3f"), (size, ",")
        cells = [format(values[name], spec) if name in values else "" for values, spec in columns]
        table.add_row(name, *(f"{by_name[name].mean():.4f}" for by_name in losses.values()), *cells)
    Console().print(table)
    for domain, alpha in alphas.items():
        mixture = " + ".join(f"{a:.2f} {name}" for name, a in zip(EXPERTS, alpha.tolist(), strict=True))
        print(f"{domain}: {(picks[domain] == 0).sum()} of {len(picks[domain])} picked prose; mixed {mixture}")
    return dict(model=model, losses=losses, picks=picks, alphas=alphas, kls=kls, rewards=rewards, held_out=held_out)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is too small for more
    main()
