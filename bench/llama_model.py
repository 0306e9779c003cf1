"""A whole Llama with random weights, trained for some steps: time and peak memory of a step, PEFT against PEFT patched.

    python bench/llama_model.py --out bench/results/local              four layers of Llama-3.1-8B's sizes
    python bench/llama_model.py --size 135m --bases bf16               SmolLM2-135M's, which two CPU cores can train
    python bench/llama_model.py --toy                                  does it run?

Every method trains the same weights, adapters and tokens with torch's AdamW under bf16 autocast (PEFT's fp32 adapters); their
steps are timed in paired rounds over one copy of the base's weights, and their losses are recorded beside the figures and have
to agree.  "frozen" is the model without adapters, forward and backward to its embeddings.  "+liger" is Liger's own patch of the
base model (RMSNorm, rotary, SwiGLU, fused cross entropy).  --bases 4bit: bitsandbytes' NF4 for every linear but lm_head.
Peak memory: a method's parameters and optimizer state, and what one step holds at most beyond them.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from run import peak
from torch import Tensor, nn

from lowrank.measure.environment import environment
from lowrank.measure.saved import storage_bytes
from lowrank.measure.timing import paired

METHODS = ("frozen", "peft", "lowrank", "peft+liger", "lowrank+liger")
LIMIT = 0.02  # relative difference of the last losses above which figures are not comparable
SIZES = {
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        num_hidden_layers=4,
    ),
    "135m": dict(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        num_hidden_layers=30, tie_word_embeddings=True,
    ),
    "toy": dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        num_hidden_layers=2,
    ),
}  # fmt: skip


def base_model(args, base: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(**sizes(args))).to(torch.bfloat16).requires_grad_(False)
    if base == "4bit":
        quantise(model, args.device)
    return model


def sizes(args) -> dict[str, int]:
    return SIZES[args.size] | ({"num_hidden_layers": args.layers} if args.layers else {})


def adapted(args, model: nn.Module, method: str, dropout: float, checkpointed: bool) -> nn.Module:
    """What ``method`` trains: a copy of ``model`` whose weights are the same tensors."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    if method.endswith("+liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if checkpointed or method == "frozen":
        model.enable_input_require_grads()
    if method == "frozen":
        return model.train()
    torch.manual_seed(0)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(model, config).train()
    if method.startswith("lowrank"):
        from lowrank.integrations.peft import patch

        patch(model)
    return model


def quantise(model: nn.Module, device: str) -> None:
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear and name != "lm_head":
                sizes = linear.in_features, linear.out_features
                small = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                small.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, small.to(device))


class Training:
    """Calling it is one training step on ``ids``; the last step's loss stays in ``loss``."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids, self.loss = model, ids, None
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def __call__(self, i: int) -> None:
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss = loss.detach()

    def peak_bytes(self) -> int:
        state = [v for values in self.optimizer.state.values() for v in values.values()] if self.optimizer else []
        own = storage_bytes([*self.model.parameters(), *self.model.buffers(), *state])
        return own + peak(self, self.ids.device)


def measure(args, model: nn.Module, setting: dict, methods: list[str], absent: dict[str, str]) -> list[dict]:
    """One row per method that runs here; why the others do not goes to ``absent``."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    ids = torch.randint(sizes(args)["vocab_size"], (args.batch, args.length), device=device)
    steps = {}
    for method in methods:
        try:
            step = Training(adapted(args, model, method, setting["dropout"], setting["checkpointed"]), ids)
            step(0)
        except Exception as error:  # a peer that is not here or does not run here
            absent[f"{method}, {spoken(setting)}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[method] = step
    times = paired(steps, device, args.steps, args.warmup)
    rows = []
    for method, step in steps.items():
        t, loss = times[method], float(step.loss)
        row = setting | dict(method=method, device=str(device), loss=loss, us=t.median, us_20=t.q20, us_80=t.q80)
        rows.append(row | dict(tokens_per_s=1e6 * ids.numel() / t.median, peak_bytes=step.peak_bytes()))
    return rows


def spoken(setting: dict) -> str:
    dropout = f", dropout {setting['dropout']:g}" if setting["dropout"] else ""
    return f"{setting['base']}{dropout}{', checkpointed' * setting['checkpointed']}"


def verdict(rows: list[dict]) -> str:
    """Ours over PEFT's in each setting, with and without Liger; nothing of settings whose losses disagree."""
    said, wrong = [], []
    for where, group in itertools.groupby(rows, spoken):
        of = {row["method"]: row for row in group}
        for liger in ("", "+liger"):
            theirs, ours = of.get(f"peft{liger}"), of.get(f"lowrank{liger}")
            if theirs is None or ours is None:
                continue
            if not math.isclose(theirs["loss"], ours["loss"], rel_tol=LIMIT):
                wrong.append(f"{where}{liger}: losses {theirs['loss']:.4f} and {ours['loss']:.4f}")
                continue
            memory = f"{ours['peak_bytes'] / theirs['peak_bytes']:.3f}x memory"
            said.append(f"{where}{liger} {ours['tokens_per_s'] / theirs['tokens_per_s']:.3f}x tokens/s, {memory}")
    line = "; ".join([*said, *(f"NOT COMPARABLE {each}" for each in wrong)]) or "nothing to compare"
    return f"{line} [cpu: says nothing about a GPU]" if any(row["device"] == "cpu" for row in rows) else line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=[size for size in SIZES if size != "toy"], default="8b")
    parser.add_argument("--layers", type=int, help="fewer or more than --size says")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bases", default="bf16,4bit")
    parser.add_argument("--checkpointing", default="off,on")
    parser.add_argument("--dropouts", default="0")
    for name, value in dict(batch=2, length=4096, rank=16, steps=10, warmup=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    wanted = {name: getattr(args, name).split(",") for name in ("methods", "bases", "checkpointing")}
    for name, known in dict(methods=METHODS, bases=("bf16", "4bit"), checkpointing=("off", "on")).items():
        if unknown := set(wanted[name]) - set(known):
            parser.error(f"--{name}: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    if args.toy:
        args.size, args.batch, args.length, args.steps, args.warmup = "toy", 2, 16, 2, 1
    dropouts = [float(p) for p in args.dropouts.split(",")]
    rows, absent = [], {}
    for base in wanted["bases"]:
        try:
            model = base_model(args, base)
        except Exception as error:  # bitsandbytes is not here, or does not run here
            absent[base] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        for checkpointing, p in itertools.product(wanted["checkpointing"], dropouts):
            setting = dict(base=base, dropout=p, checkpointed=checkpointing == "on")
            for row in measure(args, model, setting, wanted["methods"], absent):
                rows.append(row)
                print(
                    f"{spoken(row):32} {row['method']:14} {row['us'] / 1e3:10.1f} ms {row['tokens_per_s']:12.1f} tokens/s"
                    f"  peak {row['peak_bytes'] / 2**20:.0f} MiB  loss {row['loss']:.4f}",
                    flush=True,
                )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(
        *(f"absent: {name}: {why}" for name, why in absent.items()), f"VERDICT llama_model: {verdict(rows)}", sep="\n"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        command = "python bench/llama_model.py " + " ".join(sys.argv[1:] if argv is None else argv)
        settings = {k: v for k, v in vars(args).items() if k != "out"} | sizes(args)
        result = dict(environment=environment(torch.device(args.device)), command=command, settings=settings)
        (args.out / "llama_model.json").write_text(json.dumps(result | dict(rows=rows, absent=absent), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
