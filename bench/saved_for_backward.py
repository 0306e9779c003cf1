"""Bytes kept for backward by one Llama block's seven adapted projections, over the bytes of their distinct inputs.

    python bench/saved_for_backward.py [--device cuda] [--json PATH]

bf16 base, PEFT's default fp32 adapters, bf16 autocast, r = 16: q/k/v share an input, and gate/up do.  Counted, not timed:
distinct storages that autograd holds between forward and backward, parameters excluded.  On the CPU nn.Dropout keeps its mask
in the activations' dtype, on CUDA in one byte.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

import lowrank
from lowrank.integrations.peft import patch, unpatch
from lowrank.measure.saved import SavedActivations

T, H, F, R = 1024, 1024, 3584, 16
GROUPS = {"attention": (H, (H, H // 4, H // 4)), "o": (H, (H,)), "mlp": (H, (F, F)), "down": (F, (H,))}


def held(run: Callable[[], object], parameters: list[Tensor], device: str) -> list[Tensor]:
    """One tensor per storage that autograd holds after ``run``, parameters' own excluded."""
    with SavedActivations(parameters, hold=True) as saved, torch.autocast(device, torch.bfloat16):
        keep = run()
    del keep
    return saved.tensors


@torch.no_grad()
def what(t: Tensor, inputs: list[Tensor], parameters: list[Tensor]) -> str:
    """Which of LoRA's tensors ``t`` is, by its values."""
    alike = [x for x in inputs if x.shape == t.shape]
    if any(x.data_ptr() == t.data_ptr() for x in alike):
        return "x"
    if not t.is_floating_point() or (alike and t.unique().numel() == 2):
        return "dropout's mask"
    if any(p.shape == m.shape and torch.equal(p.to(m.dtype), m) for p in parameters for m in (t, t.mT)):
        return "A and B, cast"
    if alike:
        return "x, cast" if any(torch.equal(x.to(t.dtype), t) for x in alike) else "x, dropped and cast"
    return "S"


def measured(p: float, device: str) -> list[dict]:
    """Per method {"dropout", "method", "bytes", "over_inputs", "tensors": {what it is: [bytes of each]}}."""
    config = LoraConfig(r=R, lora_dropout=p)
    new = dict(device=device, dtype=torch.bfloat16)
    inputs = {name: torch.randn(T, K, **new, requires_grad=True) for name, (K, _) in GROUPS.items()}
    layers = {
        name: nn.ModuleList(
            PeftLinear(nn.Linear(K, N, bias=False, **new).requires_grad_(False), "default", config, r=R) for N in Ns
        )
        for name, (K, Ns) in GROUPS.items()
    }
    for layer in itertools.chain(*layers.values()):
        layer.lora_A.to(device).float(), layer.lora_B.to(device).float()
    parameters = list(itertools.chain(*(group.parameters() for group in layers.values())))
    size = sum(x.nbytes for x in inputs.values())

    def separately():
        return [layer(inputs[name]) for name, group in layers.items() for layer in group]

    def together():
        return [
            lowrank.lora_linears(
                inputs[name],
                [layer.weight for layer in group],
                [layer.lora_A["default"].weight for layer in group],
                [layer.lora_B["default"].weight for layer in group],
                [layer.scaling["default"] for layer in group],
                dropout_p=p,
                shared_mask=True,
            )
            for name, group in layers.items()
        ]

    def row(method, run):
        tensors: dict[str, list[int]] = {}
        for t in held(run, parameters, device):
            tensors.setdefault(what(t, list(inputs.values()), parameters), []).append(t.untyped_storage().nbytes())
        total = sum(itertools.chain(*tensors.values()))
        return dict(dropout=p, method=method, bytes=total, over_inputs=total / size, tensors=tensors)

    rows = [row("PEFT", separately)]
    for group in layers.values():
        patch(group)
    rows.append(row("PEFT, patched", separately))
    for group in layers.values():
        unpatch(group)
    if p:
        rows.append(row("lora_linears, shared_mask=True", together))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="everything counted, by what it is")
    args = parser.parse_args(argv)
    rows = [row for p in (0.0, 0.05) for row in measured(p, args.device)]
    for row in rows:
        tensors = ", ".join(f"{len(each)} {name} {sum(each) / 2**20:.1f}" for name, each in row["tensors"].items())
        print(f"dropout {row['dropout']:<5} {row['method']:<32} {row['over_inputs']:.2f}x   MiB: {tensors}")
    if args.json:
        settings = dict(tokens=T, hidden=H, mlp=F, r=R)
        args.json.write_text(json.dumps(dict(settings=settings, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
