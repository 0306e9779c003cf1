"""What one call costs the host: inputs so small that the arithmetic is nothing.

python -m pytest bench/test_host_overhead.py --benchmark-only --benchmark-columns=median,iqr
"""

import pytest
import torch
from torch import nn

import lowrank

x = torch.randn(1, 16)
W, A, B = torch.randn(16, 16), torch.randn(4, 16), torch.randn(16, 4)


def peft_layer():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    return Linear(nn.Linear(16, 16, bias=False), "default", LoraConfig(r=4), r=4, lora_alpha=8)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "forward+backward"])
@pytest.mark.parametrize("what", ["frozen", "peft", "lowrank", "lowrank, PEFT's layer"])
def test_call(benchmark, what, grad):
    layer = peft_layer() if "peft" in what.lower() else None
    if what == "lowrank, PEFT's layer":
        from lowrank.integrations.peft import patch

        patch(nn.Sequential(layer))
    inputs = x.clone().requires_grad_(grad)
    factors = A.clone().requires_grad_(grad), B.clone().requires_grad_(grad)
    forward = {
        "frozen": lambda: nn.functional.linear(inputs, W),
        "lowrank": lambda: lowrank.lora_linear(inputs, W, *factors),
    }.get(what, lambda: layer(inputs))

    def call():
        y = forward()
        if grad:
            y.sum().backward()

    with torch.set_grad_enabled(grad):
        benchmark(call)
