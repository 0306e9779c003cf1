"""What a patched layer's call costs the host, counted in Python frames: a number that no machine changes."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowrank.integrations.peft import patch
from lowrank.measure.timing import frames
from lowrank.ops._choice import choice, forced


def layer(patched: bool):
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32, bias=False)), LoraConfig(r=8, target_modules=["0"]))
    return (patch(model) if patched else model).base_model.model[0]


def step(module, x, dy):
    module(x).backward(dy)


FORMS = {"python": (lambda: forced("eager"), 30), "library": (contextlib.nullcontext, 12)}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_frames_of_a_patched_layer(form, grad):
    if form == "library" and not choice(torch.device("cpu")).node:
        pytest.skip("needs csrc/node.cpp")
    context, most = FORMS[form]
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)
    counts = {}
    for name, patched in (("PEFT", False), ("lowrank", True)):
        module = layer(patched)
        call = (lambda m=module: step(m, x, dy)) if grad else (lambda m=module: m(x))
        with context(), torch.set_grad_enabled(grad):
            call()
            counts[name] = frames(call)
    print(
        f"{form}, grad {grad}: {counts['lowrank'][0]} frames of ours, {counts['lowrank'][1]} in all; PEFT {counts['PEFT'][1]}"
    )
    assert 0 < counts["lowrank"][0] <= most
