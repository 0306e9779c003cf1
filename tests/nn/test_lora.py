import pytest
import torch
from right import in_the_mean
from torch import nn

import lowrank
from lowrank.nn import LoRALinear


def layer(dtype=torch.float32, **options):
    linear = nn.Linear(24, 16, dtype=dtype)
    lora = LoRALinear.from_linear(linear, 4, lora_alpha=6, **options)
    nn.init.normal_(lora.lora_B["default"].weight, std=0.1)
    return linear, lora


def test_starts_as_the_linear_it_was_made_from():
    linear = nn.Linear(24, 16)
    lora, x = LoRALinear.from_linear(linear, 4), torch.randn(3, 5, 24)
    assert torch.equal(lora(x), linear(x))
    assert lora.weight is linear.weight
    assert lora.bias is linear.bias
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


def test_computes_the_formula_and_trains_the_adapter_only():
    linear, lora = layer(lora_bias=True)
    x = torch.randn(5, 24, requires_grad=True)
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"]
    want = linear(x) + 6 / 4 * (x @ A.mT @ B.weight.mT + B.bias)
    torch.testing.assert_close(lora(x), want)
    lora(x).sum().backward()
    assert A.grad is not None
    assert B.bias.grad is not None
    assert lora.weight.grad is None


def test_rslora_scales_by_the_root_of_the_rank():
    assert layer()[1].scaling == 6 / 4
    assert layer(use_rslora=True)[1].scaling == 6 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_and_unmerge_restore_every_bit(dtype):
    linear, lora = layer(dtype, lora_bias=True)
    bits, keys = linear.weight.detach().clone(), list(lora.state_dict())
    x = torch.randn(7, 24, dtype=dtype)
    unmerged = lora(x)
    lora.merge()
    assert lora.merged
    assert list(lora.state_dict()) == keys
    assert torch.equal(lora.state_dict()["base_layer.weight"], bits)
    weight = bits.double() + 1.5 * lora.lora_B["default"].weight.double() @ lora.lora_A["default"].weight.double()
    half_a_unit = torch.finfo(dtype).eps / 2  # one rounding of the sum, and fp32's own in it
    torch.testing.assert_close(lora._merged_weight.double(), weight, rtol=1.01 * half_a_unit, atol=2e-7)
    oracle = nn.functional.linear(x.double(), weight, linear.bias.double() + 1.5 * lora.lora_B["default"].bias.double())
    if dtype is torch.float32:
        torch.testing.assert_close(lora(x), oracle.float())
    else:
        assert (lora(x) - oracle).norm() <= 3 * (unmerged - oracle).norm()
    lora.unmerge()
    assert torch.equal(linear.weight, bits)
    assert torch.equal(lora(x), unmerged)


def test_state_dict_is_pefts():
    peft = pytest.importorskip("peft")
    linear, lora = layer(lora_bias=True)
    peft_model = peft.get_peft_model(
        nn.Sequential(linear), peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["0"])
    )
    inner = peft_model.base_model.model[0]
    assert inner.state_dict().keys() == lora.state_dict().keys()
    inner.load_state_dict(lora.state_dict())
    x = torch.randn(5, 24)
    torch.testing.assert_close(inner(x), lora(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapter_over_a_16_bit_base(dtype):
    linear, lora = layer(dtype)
    assert lora.lora_A["default"].weight.dtype is torch.float32
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight

    def draw():
        x = torch.randn(16, 24, dtype=dtype)
        eager = (linear(x) + x.float() @ A.mT @ B.mT * 1.5).to(dtype)
        oracle = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        return [lora(x)], [eager], [oracle + 1.5 * x.double() @ A.double().mT @ B.double().mT]

    in_the_mean(draw, ["y"])


def test_dropout_only_in_training():
    _, lora = layer(lora_dropout=0.5)
    x = torch.randn(5, 24)
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_repr_says_what_matters():
    assert "in_features=24, out_features=16, bias=True, r=4, scaling=1.5, lora_dropout=0.0, merged=False" in repr(
        layer()[1]
    )


def test_built_from_sizes():
    lora = LoRALinear(24, 16, 4, bias=False, dtype=torch.bfloat16)
    assert lora(torch.randn(2, 24, dtype=torch.bfloat16)).shape == (2, 16)
    assert lora.bias is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(r=0), "r: expected an integer of at least 1, got 0"),
        (dict(r=-1), "r: expected"),
        (dict(r=4, lora_alpha=float("nan")), "lora_alpha: expected a finite number, got nan"),
        (dict(r=4, lora_dropout=1.5), r"lora_dropout: expected a probability in \[0, 1\], got 1.5"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(4, 4), **change)


def test_refuses_what_is_no_linear():
    with pytest.raises(TypeError, match=r"linear: expected an nn.Linear, got Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(4, 4, 1), 2)
    assert issubclass(lowrank.nn.LoRALinear, nn.Module)


def test_loading_parameters_drops_a_merge():
    _, lora = layer()
    lora.merge()
    lora.load_state_dict(layer()[1].state_dict())
    assert not lora.merged


def test_from_linear_takes_no_options_of_the_base():
    with pytest.raises(TypeError, match="the base has its own bias, dtype"):
        LoRALinear.from_linear(nn.Linear(4, 4), 2, bias=False, dtype=torch.float16)
