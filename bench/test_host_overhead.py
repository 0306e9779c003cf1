"""What a patched layer costs beside PEFT's own, where the host is what counts, and at the sizes in between.

    python bench/test_host_overhead.py                    # small layers and a tiny Llama, one thread
    python bench/test_host_overhead.py --sizes --threads 2
    LOWRANK_BACKEND=eager python bench/test_host_overhead.py      # in Python alone

Paired rounds in one process: every figure is the median of the rounds' ratios patched / PEFT, with the fastest call of each in
microseconds, and the Python frames that one call enters.  ``--json PATH`` keeps all of it with machine and versions.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowrank.integrations.peft import patch
from lowrank.measure.environment import device_name
from lowrank.measure.timing import frames

# dtype of the base, whether adapters are fp32 (as PEFT makes them), dropout, names of the linears
CASES = {
    "fp32": (torch.float32, True, 0.0, ("proj",)),
    "fp32, dropout 0.05": (torch.float32, True, 0.05, ("proj",)),
    "bf16, fp32 adapters": (torch.bfloat16, True, 0.0, ("proj",)),
    "bf16, fp32 adapters, dropout 0.05": (torch.bfloat16, True, 0.05, ("proj",)),
    "bf16": (torch.bfloat16, False, 0.0, ("proj",)),
    "q/k/v, fp32": (torch.float32, True, 0.0, ("q_proj", "k_proj", "v_proj")),
    "q/k/v, bf16, fp32 adapters, dropout 0.05": (torch.bfloat16, True, 0.05, ("q_proj", "k_proj", "v_proj")),
}
SIZES = ((64, 512), (512, 512), (512, 1024), (512, 4096), (2048, 2048))  # rows, K = N


class Linears(nn.Module):
    def __init__(self, K: int, names: tuple[str, ...]):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(K, K, bias=False))

    def forward(self, x):
        first, *rest = self.children()
        y = first(x)
        for linear in rest:
            y = y + linear(x)
        return y


def linears(K: int, rank: int, case: tuple, patched: bool, device: str) -> nn.Module:
    dtype, wide, p, names = case
    torch.manual_seed(0)
    inner = nn.ModuleDict({"attn": Linears(K, names)}).to(device, dtype)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules=list(names))
    model = get_peft_model(inner, config, autocast_adapter_dtype=wide).train()
    return (patch(model) if patched else model).base_model.model["attn"]


def llama(p: float, patched: bool, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=128)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    model = get_peft_model(model, LoraConfig(r=8, lora_dropout=p, target_modules="all-linear")).to(device).train()
    return patch(model) if patched else model


def passes(module: nn.Module, x: torch.Tensor, dy: torch.Tensor | None) -> dict[str, Callable[[], object]]:
    def both():
        if dy is None:
            module(input_ids=x, labels=x).loss.backward()
        else:
            module(x).backward(dy)

    def alone():
        with torch.no_grad():
            module(x)

    return {"forward + backward": both, "without grad": alone}


def compared(theirs: Callable, ours: Callable, rounds: int, seconds: float) -> dict[str, object]:
    """Ratio with its 20 % and 80 % quantiles, the fastest microseconds of each, and frames; about ``seconds`` a round."""
    for call in (theirs, ours):
        for _ in range(10 if rounds > 1 else 2):
            call()
    calls = max(1, int(seconds / max(_seconds(theirs, 3), 1e-7)))
    times = [(_seconds(theirs, calls), _seconds(ours, calls)) for _ in range(rounds)]
    fastest = [1e6 * min(of) for of in zip(*times, strict=True)]
    ratios = [b / a for a, b in times]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive") if rounds > 1 else ratios * 2
    return dict(
        ratio=statistics.median(ratios), ratio_20=low, ratio_80=high, peft_us=fastest[0], lowrank_us=fastest[1],
        peft_frames=frames(theirs)[1], lowrank_frames=frames(ours),
    )  # fmt: skip


def _seconds(call: Callable, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def small(device: str, rounds: int, seconds: float = 0.02):
    """(name, pass, figures) of each case at x [4, 32], K = N = 32, r = 8, and of a 6-layer Llama of hidden size 64."""
    for name, case in CASES.items():
        modules = [linears(32, 8, case, patched, device) for patched in (False, True)]
        x = torch.randn(4, 32, dtype=case[0], device=device, requires_grad=True)
        yield from _each(name, modules, x, torch.randn_like(x).detach(), rounds, seconds)
    for p in (0.0, 0.05):
        modules = [llama(p, patched, device) for patched in (False, True)]
        ids = torch.randint(0, 128, (1, 16), device=device)
        yield from _each(f"Llama, 6 layers of 64, 16 tokens, dropout {p}", modules, ids, None, rounds, seconds)


def between(device: str, rounds: int, sizes=SIZES, seconds: float = 0.05):
    for dtype, wide in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        for M, K in sizes:
            for p in (0.0, 0.05):
                case = (dtype, wide, p, ("proj",))
                modules = [linears(K, 16, case, patched, device) for patched in (False, True)]
                x = torch.randn(M, K, dtype=dtype, device=device, requires_grad=True)
                adapters = "fp32 adapters" if wide and dtype is not torch.float32 else "one dtype"
                name = f"{str(dtype).removeprefix('torch.')}, {adapters}, {M} rows of {K} x {K}, dropout {p}"
                yield next(_each(name, modules, x, torch.randn_like(x).detach(), rounds, seconds))


def _each(name, modules, x, dy, rounds, seconds):
    theirs, ours = (passes(module, x, dy) for module in modules)
    for which in theirs:
        yield name, which, compared(theirs[which], ours[which], rounds, seconds)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sizes", action="store_true", help="the sizes in between, r = 16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    import peft

    from lowrank.ops._choice import choice

    chosen = choice(torch.device(options.device))
    form = (
        "kernels"
        if chosen.backend == "triton"
        else "node"
        if chosen.node
        else "one call"
        if chosen.native
        else "Python"
    )
    where = dict(
        device=device_name(torch.device(options.device)), threads=options.threads, torch=torch.__version__,
        peft=peft.__version__, python=sys.version.split()[0], form=form,
    )  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    found = []
    run = between if options.sizes else small
    for name, which, figures in run(options.device, options.rounds):
        ours, total = figures["lowrank_frames"]
        print(
            f"{name:52s} {which:19s} {figures['ratio']:5.2f}   {figures['peft_us']:9.1f} -> {figures['lowrank_us']:9.1f} us"
            f"   frames {figures['peft_frames']} -> {total} ({ours} of ours)",
            flush=True,
        )
        found.append(dict(case=name, passes=which, **figures))
    if options.json:
        options.json.write_text(json.dumps(dict(where=where, rows=found), indent=1))


def test_every_row_is_printed(tmp_path, capsys):
    main(["--rounds", "1", "--json", str(tmp_path / "host.json")])
    results = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert len(results) == 2 * (len(CASES) + 2)
    assert all(0 < row["ratio_20"] <= row["ratio"] <= row["ratio_80"] for row in results)
    rows = list(between("cpu", 1, sizes=((8, 64),), seconds=0.001))
    assert len(rows) == 6
    assert "Llama" in capsys.readouterr().out


if __name__ == "__main__":
    main()
