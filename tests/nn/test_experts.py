import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lowrank.nn import LoRAExperts

SIZES = dict(hidden_size=32, intermediate_size=24, num_experts_per_tok=2)


def qwen(dtype=torch.float32):
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=5)
    return filled(Qwen3MoeExperts(config), dtype)


def gpt_oss(dtype=torch.float32):
    return filled(GptOssExperts(transformers.GptOssConfig(**SIZES, num_local_experts=5)), dtype)


def nemotron(dtype=torch.float32):
    config = transformers.NemotronHConfig(**SIZES, moe_intermediate_size=24, n_routed_experts=5)
    return filled(NemotronHExperts(config), dtype)


def filled(module, dtype):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    module.config._experts_implementation = "eager"
    return module.to(dtype)


def inputs(dtype=torch.float32, tokens=12):
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 32).to(dtype), index, torch.rand(tokens, 2).to(dtype)


def adapted(module, **options):
    layer = LoRAExperts.from_experts(module, r=3, lora_alpha=6, **options)
    with torch.no_grad():
        for B in layer.lora_B.values():
            B.normal_(std=0.1)
    return layer


@pytest.mark.parametrize("make", [qwen, gpt_oss, nemotron])
def test_starts_as_the_experts_and_merges_into_them(make):
    module, (x, index, weights) = make(), inputs()
    expected = module(x, index, weights)
    layer = LoRAExperts.from_experts(module, r=3)
    torch.testing.assert_close(layer(x, index, weights), expected)
    assert not any(p.requires_grad for p in module.parameters())
    layer = adapted(module)
    unmerged = layer(x, index, weights)
    assert not torch.allclose(unmerged, expected)
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x, index, weights), unmerged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x, index, weights), expected)
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())
    layer.unmerge()
    assert torch.equal(layer(x, index, weights), unmerged)


@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_the_parameters_are_pefts(make):
    from peft import LoraConfig, inject_adapter_in_model

    module, (x, index, weights) = make(), inputs()
    layer = adapted(copy.deepcopy(module))
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    wrapper = inject_adapter_in_model(config, torch.nn.ModuleDict({"experts": module}))["experts"]
    chain = [wrapper, wrapper.base_layer]
    with torch.no_grad():
        for one in chain:
            one.lora_A["default"].weight.copy_(layer.lora_A[one.parameter_name])
            one.lora_B["default"].weight.copy_(layer.lora_B[one.parameter_name])
    expected, ours = wrapper(x, index, weights), layer(x, index, weights)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    ours.backward(dy)
    for one in chain:
        torch.testing.assert_close(layer.lora_A[one.parameter_name].grad, one.lora_A["default"].weight.grad)
        torch.testing.assert_close(layer.lora_B[one.parameter_name].grad, one.lora_B["default"].weight.grad)


def test_dropout_in_training_alone():
    layer, (x, index, weights) = adapted(qwen(), lora_dropout=0.5), inputs()
    torch.manual_seed(0)
    first, second = layer(x, index, weights), layer(x, index, weights)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(layer(x, index, weights), first)
    layer.eval()
    assert torch.equal(layer(x, index, weights), layer(x, index, weights))
    mean = torch.stack([layer.train()(x, index, weights) for _ in range(400)]).mean(0)
    base = layer.base_layer(x, index, weights)
    effect = layer.eval()(x, index, weights) - base
    assert (mean - base - effect).norm() < 0.3 * effect.norm()


def test_one_stack_copies_and_precision():
    layer, (x, index, weights) = adapted(qwen(torch.bfloat16), targets=("down_proj",)), inputs(torch.bfloat16)
    assert list(layer.lora_A) == ["down_proj"]
    assert layer.lora_A["down_proj"].dtype is torch.float32
    y = layer(x, index, weights)
    assert y.dtype is torch.bfloat16
    assert torch.equal(copy.deepcopy(layer)(x, index, weights), y)
    layer.merge()
    assert layer(x, index, weights).dtype is torch.bfloat16
    assert torch.equal(copy.deepcopy(layer)(x, index, weights), layer(x, index, weights))
    assert "r=3, scaling=2" in repr(layer)


def test_merged_stacks_go_where_the_layer_goes():
    layer, (x, index, weights) = adapted(qwen()), inputs()
    layer.merge()
    before = layer(x, index, weights)
    layer.bfloat16()
    assert {p.dtype for p in layer._merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(layer(*inputs(torch.bfloat16)).float(), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(r=0), ValueError, "r: expected an integer of at least 1, got 0"),
        (dict(r=2, lora_alpha=float("inf")), ValueError, "lora_alpha: expected a finite number"),
        (dict(r=2, lora_dropout=2), ValueError, "lora_dropout: expected a probability"),
        (dict(r=2, targets=("up_proj",)), ValueError, "targets: expected some of gate_up_proj, down_proj, got up_proj"),
        (dict(r=2, targets=()), ValueError, "targets: expected some of gate_up_proj, down_proj, got none"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        LoRAExperts.from_experts(qwen(), **options)


def test_another_module():
    with pytest.raises(TypeError, match="expected a module of transformers' experts, got Linear"):
        LoRAExperts.from_experts(torch.nn.Linear(2, 2), r=2)
