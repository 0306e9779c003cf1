"""What a patched layer's call costs the host, counted in Python frames: a number that no machine changes."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lowrank
from lowrank.integrations.peft import patch
from lowrank.ops._choice import choice, forced

OURS = str(Path(lowrank.__file__).parent)


def frames(call) -> tuple[int, int]:
    """(of lowrank's functions, of all) that a call enters, the third time it runs."""
    seen = []

    def profile(frame, event, _):
        if event == "call":
            seen.append(frame.f_code.co_filename.startswith(OURS))

    for _ in range(2):
        call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sum(seen), len(seen)


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
        with context(), torch.set_grad_enabled(grad):
            counts[name] = frames((lambda m=module: step(m, x, dy)) if grad else (lambda m=module: m(x)))
    print(
        f"{form}, grad {grad}: {counts['lowrank'][0]} frames of ours, {counts['lowrank'][1]} in all; PEFT {counts['PEFT'][1]}"
    )
    assert 0 < counts["lowrank"][0] <= most
