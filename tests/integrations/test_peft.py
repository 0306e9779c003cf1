import contextlib
import copy
import functools
import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as PeftLinear
from right import in_the_mean
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch, register, unpatch

IDS = torch.arange(32).view(2, 16) * 7 % 100


def llama(dtype=torch.float32, seed=0, **kwargs):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **kwargs)).to(dtype)


def peft_llama(dtype=torch.float32, autocast_adapter_dtype=True, model=None, seed=0, **config):
    model = model or llama(dtype, seed)
    torch.manual_seed(seed + 1)
    config = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    with torch.no_grad():  # PEFT's random start of lora_B makes the adapter outweigh the base
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.2)
    return model


def step(model, **inputs):
    """[logits, every gradient by name] of one forward and backward."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def agree(ours, unpatched):
    assert ours.keys() == unpatched.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], unpatched[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def as_right_as_peft(make, patched, context=contextlib.nullcontext, kinds=("logits", "lora_A", "lora_B")):
    """Logits and gradients of models ``make(seed=...)``, each kind of parameter as one."""
    seeds = itertools.count()

    def draw():
        model = make(seed=next(seeds))
        oracle = step(copy.deepcopy(model).double())
        with context():
            unpatched = step(model)
            ours = step(patched(model))
        assert ours.keys() == unpatched.keys() == oracle.keys()
        # by its own norm: of a kind, each layer counts as much as another
        parts = {kind: [(n, oracle[n].norm()) for n in oracle if kind in n] for kind in kinds}
        return [
            [torch.cat([of[n].flatten() / norm for n, norm in parts[kind]]) for kind in kinds]
            for of in (ours, unpatched, oracle)
        ]

    in_the_mean(draw, kinds)


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    yield
    unpatch()
    lowrank.strict(False)


WAYS = {
    "process, before": lambda make: (patch(), make())[1],
    "process, after": lambda make: (make(), patch())[0],
    "model": lambda make: patch(make()),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_patching(way):
    model = WAYS[way](peft_llama)
    keys = list(model.state_dict())
    ours = step(model)
    shared = 6 if way == "model" else 0  # two layers of q/k/v and gate/up; patching the process knows no siblings
    assert lowrank.stats(model) == {"fused": 14, "shared": shared, "fallback": {}, "untouched": {}}
    assert "lora.Linear(" in repr(model)
    unpatch(model)
    unpatch()
    agree(ours, step(model))
    assert lowrank.stats(model) == {"fused": 14, "shared": shared, "fallback": {}, "untouched": {"lora.Linear": 14}}
    assert list(model.state_dict()) == keys
    assert PeftLinear.forward.__qualname__ == "Linear.forward"


def test_register_is_pefts_own_hook(tmp_path):
    config = register(LoraConfig(r=4, target_modules="all-linear"))
    model = get_peft_model(llama(), config)
    step(model)
    assert lowrank.stats(model)["fused"] == 14
    model.save_pretrained(tmp_path)
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(llama(), tmp_path, config=register(LoraConfig.from_pretrained(tmp_path)))
    again(IDS)
    assert lowrank.stats(again)["fused"] == 14


CASES = {
    "rslora": dict(use_rslora=True, lora_alpha=3),
    "patterns": dict(rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 40}),
    "lm_head": dict(target_modules=["q_proj", "lm_head"]),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
}


@pytest.mark.parametrize("case", CASES)
def test_configurations(case):
    model = peft_llama(**CASES[case])
    unpatched = step(model)
    patch(model)
    with lowrank.strict():
        agree(step(model), unpatched)


def test_lora_bias_and_base_bias():
    def make():
        return peft_llama(model=llama(attention_bias=True), lora_bias=True, target_modules=["q_proj", "o_proj"])

    model = make()
    unpatched = step(model)
    with lowrank.strict():
        agree(step(patch(model)), unpatched)


@pytest.mark.parametrize("adapters", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_is_as_right_as_peft(adapters, autocast):
    kwargs = dict(autocast_adapter_dtype=adapters == "fp32", target_modules=["q_proj"])
    with lowrank.strict():
        as_right_as_peft(
            functools.partial(peft_llama, torch.bfloat16, **kwargs),
            patch,
            lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        )


def test_fp32_base_under_autocast():
    with lowrank.strict():
        as_right_as_peft(
            functools.partial(peft_llama, target_modules=["v_proj"]),
            patch,
            lambda: torch.autocast("cpu", torch.bfloat16),
        )


def test_two_active_adapters():
    model = peft_llama()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    unpatched = step(model)
    patch(model)
    with lowrank.strict():
        agree(step(model), unpatched)


def test_dropout_in_training_and_evaluation():
    model = patch(peft_llama(lora_dropout=0.5))
    with lowrank.strict(), torch.no_grad():
        model.train()
        torch.manual_seed(3)
        first = model(IDS).logits
        torch.manual_seed(3)
        assert torch.equal(model(IDS).logits, first)
        assert not torch.equal(model(IDS).logits, first)
        model.eval()
        quiet = model(IDS).logits
    unpatch(model)
    torch.testing.assert_close(quiet, model(IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(reentrant):
    model = patch(peft_llama(lora_dropout=0.3)).train()
    torch.manual_seed(3)
    plain = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    agree(step(model), plain)
    assert lowrank.stats(model)["fused"] == 14 * 3  # the recomputation calls every layer again


def test_compile_fullgraph():
    model = peft_llama(lora_alpha=3)
    unpatched = step(model)
    patch(model)
    torch._dynamo.reset()
    agree(
        step(torch.compile(model, fullgraph=True, backend="aot_eager")),
        {f"_orig_mod.{k}" if "." in k else k: v for k, v in unpatched.items()},
    )


def test_a_compiled_hotswap_scaling():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = patch(peft_llama(lora_alpha=3))
    plain = step(model)["logits"]
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.scaling["default"], torch.Tensor)
    with lowrank.strict():
        torch.testing.assert_close(model(IDS).logits, plain)


def fallback(model, reason, run=step):
    """The call falls back with this one reason, warns once, raises under strict, and gives what PEFT gives."""
    unpatched = run(model)
    patch(model)
    with pytest.warns(UserWarning, match=f"lowrank falls back to PEFT.*{reason}") as caught:
        ours = run(model)
    assert len([w for w in caught if "lowrank" in str(w.message)]) == 1
    for name in unpatched:
        assert torch.equal(ours[name], unpatched[name])
    reasons = lowrank.stats(model)["fallback"]
    assert len(reasons) == 1
    assert reason in next(iter(reasons))
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=reason):
        run(model)


def test_variants_fall_back():
    fallback(peft_llama(init_lora_weights="mica"), "variant MiCALinearVariant")


def test_adapter_names_fall_back():
    def run(model):
        model.eval()
        with torch.no_grad():
            return {"logits": model(IDS, adapter_names=["default", "__base__"]).logits}

    fallback(peft_llama(), "adapter_names", run)


@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
def test_hooks_fall_back(where):
    model = peft_llama(target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            getattr(layer, where)["default"].register_forward_hook(lambda m, args, out: out * 2)
    fallback(model, f"hooks on {where}")


def test_another_class_of_factor_falls_back():
    class FSDPLinear(nn.Linear):  # what fully_shard makes of a module
        pass

    model = peft_llama(target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.lora_A["default"].__class__ = FSDPLinear
    fallback(model, "lora_A is a FSDPLinear")


def test_a_tensor_subclass_as_a_factor_falls_back():
    from torch.testing._internal.two_tensor import TwoTensor

    model = peft_llama(target_modules=["q_proj"])
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            A = layer.lora_A["default"]
            A.weight = nn.Parameter(TwoTensor(A.weight.data, A.weight.data.clone()))
    patch(model)
    with pytest.warns(UserWarning, match="lora_A's weight is a TwoTensor"):
        model(IDS)


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("what", ["in another order", "beside another", "in the dict"])
def test_parameters_of_a_factor_are_told_by_name(what, lora_bias):
    model = peft_llama(target_modules=["q_proj"], lora_bias=lora_bias)
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            B = layer.lora_B["default"]
            if what == "in another order":  # what pruning and parametrizations leave once they are removed
                weight = B.weight
                del B.weight
                B.weight = weight
            elif what == "beside another":
                B.register_parameter("another", nn.Parameter(torch.ones(1)))
            else:
                B.__dict__["weight"] = B._parameters.pop("weight")
    unpatched = step(model)
    with lowrank.strict():
        agree(step(patch(model)), unpatched)


def test_disabled_casting_keeps_its_meaning():
    model = patch(peft_llama(torch.bfloat16))
    with disable_input_dtype_casting(model):
        with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="cast_input_dtype_enabled"):
            model(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS)


def test_disabled_and_merged_adapters_run_the_base_alone():
    model = peft_llama()
    with torch.no_grad():
        base, tuned = llama()(IDS).logits, model(IDS).logits
        patch(model)
        with lowrank.strict(), model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, base)
        model.merge_adapter()
        with lowrank.strict():
            torch.testing.assert_close(model(IDS).logits, tuned, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert lowrank.stats(model)["fused"] == 0
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, tuned, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_base_still_run():
    model = peft_llama(target_modules=["q_proj"])
    seen = []
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(1) or out + 1)
    unpatched = step(model)
    with lowrank.strict():
        agree(step(patch(model)), unpatched)
    assert len(seen) == 4


def test_conv1d_base():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = Conv1D(24, 16)

        def forward(self, x):
            return self.c_attn(x)

    x = torch.randn(3, 5, 16)
    model = get_peft_model(
        Block(), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    )
    unpatched = model(x)
    with lowrank.strict():
        torch.testing.assert_close(patch(model)(x), unpatched)


def test_tied_adapters():
    model = llama(tie_word_embeddings=True)
    config = LoraConfig(
        r=8, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, init_lora_weights=False
    )
    model = get_peft_model(model, config)
    with torch.no_grad():  # logits of 300 make softmax's gradient amplify every rounding
        model.base_model.model.model.embed_tokens.lora_embedding_A["default"].mul_(0.05)
    unpatched = step(model)
    patch(model)
    ours = step(model)
    head = model.base_model.model.lm_head
    assert not head.lora_A["default"].weight.is_contiguous()
    assert lowrank.stats(model)["fused"] == 1
    assert lowrank.stats(model)["untouched"] == {"lora.Embedding": 1}
    agree(ours, unpatched)


def test_expert_parameters_of_somebody_else_fall_back_and_say_so():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.gate = nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.gate(x) @ self.w[0]

    model = nn.Sequential(Experts())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["gate"], target_parameters=["0.w"]))
    expected = model(torch.ones(2, 8))
    _stats.reset()
    with pytest.warns(UserWarning, match="Experts's forward is its own"):
        assert torch.equal(patch(model)(torch.ones(2, 8)), expected)
    assert lowrank.stats(model)["untouched"] == {}
    assert lowrank.stats(model)["fallback"] == {"Experts's forward is its own": 1}


def test_copies_and_pickles_stay_patched():
    model = patch(peft_llama(target_modules=["q_proj"]))
    want = model(IDS).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(IDS).logits, want)
        assert lowrank.stats(other)["fused"] == 2
        assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_changing_adapters():
    model = patch(peft_llama(target_modules=["q_proj"]))
    first = model(IDS).logits
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.set_adapter("second")
    second = model(IDS).logits
    assert lowrank.stats(model)["untouched"] == {"lora.Linear": 2}  # k_proj came after the patch
    patch(model)
    torch.testing.assert_close(model(IDS).logits, second)  # k_proj's PEFT ran before
    assert lowrank.stats(model)["untouched"] == {}
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
    assert not torch.equal(model(IDS).logits, first)


def test_warns_once_per_reason_and_counts_every_call():
    model = patch(peft_llama(init_lora_weights="mica", target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="MiCA"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    assert list(lowrank.stats()["fallback"].values()) == [4]


def test_refuses():
    with pytest.raises(ValueError, match="found no LoRA layer to patch; call this after get_peft_model"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        patch("model")
    with pytest.raises(TypeError, match=r"config: expected a peft.LoraConfig, got dict"):
        register({})
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        lowrank.stats(3)


@pytest.mark.slow
def test_pefts_own_suite_agrees():
    """Every LoRA test of PEFT's suite on models made on the spot: the same outcome, on the fused path."""
    path = Path(__file__).parent / "peft_suite.py"
    # half of it is collecting the suite, which every worker does
    done = subprocess.run([sys.executable, path, "--workers", "0"], capture_output=True, text=True)
    if "could not download" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    stats = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert stats["fused"] > 500
    assert int(re.search(r"with the patch: {'passed': (\d+)", done.stdout)[1]) > 1000
