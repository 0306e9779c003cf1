"""Bytes kept for backward by one Llama block's seven adapted projections, over the bytes of their distinct inputs.

    python bench/saved_for_backward.py

bf16 base, PEFT's default fp32 adapters, bf16 autocast, r = 16: q/k/v share an input, and gate/up do.  Counted, not timed:
distinct storages that autograd holds between forward and backward, parameters excluded.  On the CPU nn.Dropout keeps its mask
in the activations' dtype, on CUDA in one byte.
"""

import itertools

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import lowrank
from lowrank.integrations.peft import patch, unpatch

T, H, F, R = 1024, 1024, 3584, 16
GROUPS = {"attention": (H, (H, H // 4, H // 4)), "o": (H, (H,)), "mlp": (H, (F, F)), "down": (F, (H,))}


def held(run, parameters) -> int:
    own, seen = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        keep = run()
    del keep
    return sum(seen.values())


def main() -> None:
    for p in (0.0, 0.05):
        config = LoraConfig(r=R, lora_dropout=p)
        inputs = {name: torch.randn(T, K, dtype=torch.bfloat16, requires_grad=True) for name, (K, _) in GROUPS.items()}
        layers = {
            name: nn.ModuleList(
                PeftLinear(
                    nn.Linear(K, N, bias=False, dtype=torch.bfloat16).requires_grad_(False), "default", config, r=R
                )
                for N in Ns
            )
            for name, (K, Ns) in GROUPS.items()
        }
        for layer in itertools.chain(*layers.values()):
            layer.lora_A.float(), layer.lora_B.float()
        parameters = list(itertools.chain(*(group.parameters() for group in layers.values())))
        size = sum(x.nbytes for x in inputs.values())

        def separately(layers=layers, inputs=inputs):
            return [layer(inputs[name]) for name, group in layers.items() for layer in group]

        def together(shared_mask, layers=layers, inputs=inputs, p=p):
            return [
                lowrank.lora_linears(
                    inputs[name],
                    [layer.weight for layer in group],
                    [layer.lora_A["default"].weight for layer in group],
                    [layer.lora_B["default"].weight for layer in group],
                    [layer.scaling["default"] for layer in group],
                    dropout_p=p,
                    shared_mask=shared_mask,
                )
                for name, group in layers.items()
            ]

        rows = {"PEFT": held(separately, parameters)}
        for group in layers.values():
            patch(group)
        rows["PEFT, patched"] = held(separately, parameters)
        for group in layers.values():
            unpatch(group)
        if p:
            rows["lora_linears, shared_mask=True"] = held(lambda together=together: together(True), parameters)
        for name, count in rows.items():
            print(f"dropout {p:<5} {name:<32} {count / size:.2f}x")


if __name__ == "__main__":
    main()
