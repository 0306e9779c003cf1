"""A whole Llama with random weights, trained for some steps: tokens per second and peak memory, PEFT against PEFT patched.

    python bench/llama_model.py --out bench/results/local              four layers of Llama-3.1-8B's sizes
    python bench/llama_model.py --toy                                  does it run?

Every method trains the same weights, adapters and tokens with torch's AdamW under bf16 autocast (PEFT's fp32 adapters), each
from a fresh copy; their losses are recorded beside the figures and have to agree.  "+liger" is Liger's own patch of the base
model (RMSNorm, rotary, SwiGLU, fused cross entropy) under either.  --bases 4bit: bitsandbytes' NF4 for every
linear but lm_head.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from lowrank.measure.environment import environment

METHODS = ("peft", "lowrank", "peft+liger", "lowrank+liger")
LIMIT = 0.02  # relative difference of the last losses above which figures are not comparable
SIZES = {
    False: dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    ),
    True: dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=96),
}


def make(args, method: str, base: str, checkpointed: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=args.layers, **SIZES[args.toy])).to(torch.bfloat16)
    if base == "4bit":
        quantise(model, args.device)
    if method.endswith("+liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, target_modules="all-linear")
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


def measure(args, method: str, base: str, checkpointed: bool) -> dict:
    """One row.  Peak memory is the device's, of training alone; a CPU has no such count."""
    device = torch.device(args.device)
    model = make(args, method, base, checkpointed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(SIZES[args.toy]["vocab_size"], (args.batch, args.length), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.warmup + args.steps):
        wait()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[args.warmup :]
    rates = [args.batch * args.length / s for s in seconds]
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row = dict(method=method, base=base, checkpointed=checkpointed, loss=float(loss.detach()), peak_bytes=peak)
    return row | dict(tokens_per_s=statistics.median(rates), q25=low, q75=high)


def verdict(rows: list[dict]) -> str:
    """Ours over PEFT's in each setting, with and without Liger; nothing of settings whose losses disagree."""
    said, wrong = [], []
    for key, group in itertools.groupby(rows, lambda row: (row["base"], row["checkpointed"])):
        of = {row["method"]: row for row in group}
        for liger in ("", "+liger"):
            theirs, ours = of.get(f"peft{liger}"), of.get(f"lowrank{liger}")
            if theirs is None or ours is None:
                continue
            where = f"{key[0]}{', checkpointed' * key[1]}{liger}"
            if not math.isclose(theirs["loss"], ours["loss"], rel_tol=LIMIT):
                wrong.append(f"{where}: losses {theirs['loss']:.4f} and {ours['loss']:.4f}")
                continue
            memory = f", {ours['peak_bytes'] / theirs['peak_bytes']:.3f}x memory" if ours["peak_bytes"] else ""
            said.append(f"{where} {ours['tokens_per_s'] / theirs['tokens_per_s']:.3f}x tokens/s{memory}")
    line = "; ".join([*said, *(f"NOT COMPARABLE {each}" for each in wrong)]) or "nothing to compare"
    return line if all(row["peak_bytes"] for row in rows) else f"{line} [cpu: says nothing about a GPU]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bases", default="bf16,4bit")
    parser.add_argument("--checkpointing", default="off,on")
    for name, value in dict(layers=4, batch=2, length=4096, rank=16, steps=10, warmup=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    wanted = {name: getattr(args, name).split(",") for name in ("methods", "bases", "checkpointing")}
    for name, known in dict(methods=METHODS, bases=("bf16", "4bit"), checkpointing=("off", "on")).items():
        if unknown := set(wanted[name]) - set(known):
            parser.error(f"--{name}: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    if args.toy:
        args.layers, args.batch, args.length, args.steps, args.warmup = 2, 2, 16, 2, 1
    rows, absent = [], {}
    for base, checkpointing, method in itertools.product(wanted["bases"], wanted["checkpointing"], wanted["methods"]):
        try:
            row = measure(args, method, base, checkpointing == "on")
        except Exception as error:  # a peer that is not here or does not run here
            absent[f"{method}, {base}, checkpointing {checkpointing}"] = (
                f"{type(error).__name__}: {error}".splitlines()[0]
            )
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows.append(row)
        peak = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.2f} GiB"
        rate = f"{row['tokens_per_s']:12.1f} tokens/s"
        print(f"{base:5} checkpointing {checkpointing:3} {method:14} {rate}{peak}  loss {row['loss']:.4f}")
    print(
        *(f"absent: {name}: {why}" for name, why in absent.items()), f"VERDICT llama_model: {verdict(rows)}", sep="\n"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        command = "python bench/llama_model.py " + " ".join(sys.argv[1:] if argv is None else argv)
        settings = {k: v for k, v in vars(args).items() if k != "out"} | SIZES[args.toy]
        result = dict(environment=environment(torch.device(args.device)), command=command, settings=settings)
        (args.out / "llama_model.json").write_text(json.dumps(result | dict(rows=rows, absent=absent), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
