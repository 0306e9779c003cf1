"""4-bit and 8-bit base weights against PEFT, on whatever device bitsandbytes runs on."""

import copy
import itertools

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from right import in_the_mean

import lowrank
from lowrank.integrations.peft import patch, unpatch
from lowrank.ops import dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = dict(r=8, lora_alpha=12, init_lora_weights=False)


def four_bit(dtype=torch.bfloat16, bias=True, seed=0, **config):
    torch.manual_seed(seed)
    base = bnb.nn.Linear4bit(128, 96, bias=bias, compute_dtype=dtype, quant_type="nf4").to(DEVICE)
    if bias:
        base.bias.data = base.bias.data.to(dtype)
    layer = Linear4bit(base, "default", LoraConfig(**CONFIG, **config), r=8, lora_alpha=12).to(DEVICE)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(0.2)
    return layer


def step(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return dict(zip(("y", "dx", "dA", "dB"), (y, *torch.autograd.grad(y, (x, *factors), dy)), strict=True))


def exact(layer, x, dy):
    """The same formula in fp64 from the dequantised weight."""
    base = layer.base_layer
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    bias = None if base.bias is None else base.bias.double()
    x = x.detach().double().requires_grad_()
    A, B = (f["default"].weight.detach().double().requires_grad_() for f in (layer.lora_A, layer.lora_B))
    y = nn.functional.linear(x, weight, bias) + 1.5 * x @ A.mT @ B.mT
    return dict(zip(("y", "dx", "dA", "dB"), (y, *torch.autograd.grad(y, (x, A, B), dy.double())), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_4bit_is_as_right_as_peft(dtype, autocast):
    names, seeds = ("y", "dx", "dA", "dB"), itertools.count()

    def draw():
        layer = four_bit(dtype, seed=next(seeds))
        x, dy = torch.randn(4, 8, 128, dtype=dtype, device=DEVICE), torch.randn(4, 8, 96, dtype=dtype, device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            dy = dy.to(layer(x).dtype)
            unpatched = step(layer, x, dy)
            model = patch(nn.Sequential(layer))
            with lowrank.strict():
                ours = step(layer, x, dy)
        assert lowrank.stats(model)["fused"] == 1
        return [[of[name] for name in names] for of in (ours, unpatched, exact(layer, x, dy))]

    in_the_mean(draw, names)


def test_4bit_process_wide_and_back():
    layer = four_bit()
    x = torch.randn(3, 128, dtype=torch.bfloat16, device=DEVICE)
    plain = layer(x)
    patch()
    try:
        with lowrank.strict():
            torch.testing.assert_close(layer(x), plain, rtol=2**-7, atol=2**-7)
    finally:
        unpatch()
    assert torch.equal(layer(x), plain)


def test_4bit_dropout_and_the_base_is_left_alone():
    layer = four_bit(lora_dropout=0.5)
    before = copy.deepcopy(layer.base_layer.weight.data)
    x = torch.randn(3, 128, dtype=torch.bfloat16, device=DEVICE)
    patch(nn.Sequential(layer))
    with lowrank.strict():
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        assert not torch.equal(layer(x), first)
    assert torch.equal(layer.base_layer.weight.data, before)


@pytest.mark.parametrize("autocast", [False, True])
def test_4bit_dropout_as_torch_draws_it(autocast, monkeypatch):
    """Over 4 bits PEFT leaves x's cast to CUDA's autocast where that is on: its dropout sees x as it came."""
    layer, x, seen = four_bit(lora_dropout=0.5), torch.randn(3, 128, dtype=torch.bfloat16, device=DEVICE), []
    layer.lora_A.float(), layer.lora_B.float()
    model = nn.Sequential(layer)

    def drawn_for(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x, *args: seen.append(x.dtype) or original(x, *args))
        torch.manual_seed(1)
        y = model(x).float()
        monkeypatch.undo()
        return y

    before = torch.is_autocast_enabled("cuda")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        torch.set_autocast_enabled("cuda", autocast)
        try:
            want = drawn_for(nn.functional, "dropout")
            patch(model, dropout_stream="torch")
            with lowrank.strict():
                got = drawn_for(dropout, "as_torch")
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert seen == [torch.bfloat16 if autocast else torch.float32] * 2
    assert (got - want).norm() < 0.03 * want.norm()  # another mask: a third of it


def test_8bit_where_it_runs():
    torch.manual_seed(0)
    base = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False).to(DEVICE)
    layer = Linear8bitLt(base, "default", LoraConfig(**CONFIG), r=8, lora_alpha=12).to(DEVICE)
    x = torch.randn(16, 128, dtype=torch.float16, device=DEVICE)
    dy = torch.randn(16, 96, dtype=torch.float16, device=DEVICE)
    try:
        unpatched = step(layer, x, dy)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes' 8-bit linear does not run on {DEVICE}: {error}")
    patch(nn.Sequential(layer))
    with lowrank.strict():
        ours = step(layer, x, dy)
    for name in ours:
        torch.testing.assert_close(ours[name], unpatched[name], rtol=1e-2, atol=1e-2)
