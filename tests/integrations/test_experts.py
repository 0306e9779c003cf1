"""PEFT's LoRA over expert parameters on lowrank, in every family of transformers' that has them."""

import copy
import io
import json
import pickle
import re
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import lowrank
from lowrank.integrations import experts as implementation
from lowrank.integrations.peft import patch, unpatch
from lowrank.nn import _experts as experts

IDS = torch.arange(40).view(2, 20) * 7 % 100
SIZES = dict(vocab_size=100, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOP = dict(moe_intermediate_size=40, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=6, num_experts_per_tok=2)
SHARED = dict(**TOP, num_experts=6, shared_expert_intermediate_size=32, decoder_sparse_step=1)
GROUPS = dict(**TOP, n_routed_experts=6, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1)
MLA = dict(**GROUPS, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
MLA |= dict(num_key_value_heads=4)
DELTA = dict(**SHARED, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8)
DELTA |= dict(linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
FAMILIES = {
    "Qwen2Moe": SHARED,
    "Qwen3Moe": dict(**TOP, num_experts=6, decoder_sparse_step=1, head_dim=16),
    "Qwen3Next": DELTA,
    "Qwen3_5Moe": DELTA,
    "Mixtral": LOCAL,
    "Olmoe": dict(num_experts=6, num_experts_per_tok=2),
    "DeepseekV2": dict(**MLA, topk_method="greedy"),
    "DeepseekV3": MLA,
    "Glm4Moe": dict(**GROUPS, head_dim=16),
    "GptOss": dict(**LOCAL, head_dim=16, layer_types=["full_attention", "sliding_attention"], sliding_window=8),
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
    "Jamba": dict(
        num_experts=6,
        num_experts_per_tok=2,
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=1,
        attn_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "NemotronH": dict(
        **{key: value for key, value in GROUPS.items() if key != "first_k_dense_replace"},
        moe_shared_expert_intermediate_size=32,
        head_dim=16,
        layers_block_type=["attention", "moe"],
    ),
}


def moe(family="Qwen3Moe", dtype=torch.float32, **changes):
    text = "Text" if family == "Qwen3_5Moe" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def stacks(model):
    """The names of its expert parameters, as target_parameters takes them."""
    names = [name for name, module in model.named_modules() if hasattr(module, "is_transposed")]
    return sorted(
        {".".join([*name.split(".")[-2:], p]) for name in names for p in experts.names_of(model.get_submodule(name))}
    )


def adapted(family="Qwen3Moe", dtype=torch.float32, model=None, adapters=("default",), r=3, **config):
    model = model or moe(family, dtype)
    config = {"target_modules": [], "target_parameters": stacks(model), "init_lora_weights": False, **config}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, **config), adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, LoraConfig(r=r + 2, lora_alpha=3, **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
    return model


def step(model, **inputs):
    """{"logits", every gradient by name} of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(5)  # some routers draw noise
    out = model(input_ids=IDS, labels=IDS, use_cache=False, **inputs)
    out.loss.backward()
    return {
        "logits": out.logits.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def agree(ours, expected, tolerance=2e-6):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = (ours[name] - value).norm() / value.norm()
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_unpatched(family, implementation):
    """E is not r, and in is not out but where a family is square; every factor gets a gradient."""
    model = adapted(family)
    model.base_model.model.set_experts_implementation(implementation)
    expected = step(model)
    patch(model)
    with lowrank.strict():
        ours = step(model)
    agree(ours, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(ours) - 1
    assert all(ours[name].abs().sum() > 0 for name in trained)
    stats = lowrank.stats(model)
    assert stats["fused"] == len(trained) // 2
    assert not stats["fallback"]
    assert not stats["untouched"]
    unpatch(model)
    assert torch.equal(step(model)["logits"], expected["logits"])


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_square_stacks_of_each_layout(family):
    """in = out = r = E: what is told from shapes alone would be wrong here."""
    sizes = dict(hidden_size=48, intermediate_size=48, moe_intermediate_size=48, head_dim=16)
    model = adapted(model=moe(family, **sizes), r=6)
    expected = step(model)
    patch(model)
    agree(step(model), expected)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected["logits"], rtol=1e-4, atol=1e-5)


def test_llama4_is_pefts_and_counted():
    config = transformers.Llama4TextConfig(
        **SIZES,
        num_local_experts=6,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        head_dim=16,
        interleave_moe_layer_step=1,
    )
    model = transformers.Llama4ForCausalLM(config)
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    expected = step(model)
    patch(model)
    lowrank._stats.reset()
    with pytest.warns(UserWarning, match="Llama4TextExperts's forward is its own"):
        ours = step(model)
    agree(ours, expected, 0)
    assert sum(lowrank.stats(model)["fallback"].values()) == 4  # two layers of two wrappers, one in the other
    with lowrank.strict(), pytest.raises(lowrank.FallbackError):
        step(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_no_farther_from_fp64_than_peft(dtype):
    """PEFT rounds W + BA to 16 bits, all of it; here the base's product stays what it is."""
    model = adapted(dtype=dtype, model=moe(dtype=dtype))
    double = copy.deepcopy(model).double()
    double.base_model.model.set_experts_implementation("eager")  # grouped_mm has no fp64
    oracle = step(double)
    peft = step(model)
    patch(model)
    ours = step(model)
    for name in ("logits", *(n for n in oracle if "lora_" in n)):
        truth = oracle[name].double()
        assert (ours[name].double() - truth).norm() <= 1.15 * (peft[name].double() - truth).norm(), name


def test_several_adapters_disabled_merged_and_back():
    model = adapted(adapters=("default", "second"))
    states = []
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        states.append((names, step(model)))
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    patch(model)
    for names, expected in states:
        model.base_model.set_adapter(names)
        with lowrank.strict():
            agree(step(model), expected)
    with model.disable_adapter(), lowrank.strict():
        assert torch.equal(model(input_ids=IDS).logits, off)
    fused = lowrank.stats(model)["fused"]
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, states[2][1]["logits"], rtol=1e-4, atol=1e-5)
    assert lowrank.stats(model)["fused"] == fused
    model.unmerge_adapter()
    agree(step(model), states[2][1], 1e-5)
    chain = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    chain.merge()  # one of two, merged alone
    agree(step(model), {k: v for k, v in states[2][1].items() if k in step(model)}, 1e-5)


def test_checkpointing_accumulation_and_generation():
    model = adapted()
    expected = step(model)
    torch.manual_seed(0)
    text = model.generate(input_ids=IDS[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    patch(model)
    with lowrank.strict():
        assert torch.equal(
            model.generate(input_ids=IDS[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0), text
        )
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    agree(step(model), expected)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * expected[name], rtol=1e-4, atol=1e-6)


def test_autocast():
    model = adapted(dtype=torch.bfloat16, model=moe(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        patch(model)
        with lowrank.strict():
            ours = step(model)
    agree(ours, expected, 0.05)
    assert ours["logits"].dtype is expected["logits"].dtype


def test_compile_breaks_no_more_than_unpatched():
    def breaks(model):
        torch._dynamo.reset()
        return torch._dynamo.explain(model)(input_ids=IDS, use_cache=False).graph_break_count

    model = adapted()
    bare = breaks(moe())
    patch(model)
    assert breaks(model) <= bare
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    agree(dict(zip(plain := step(model), step(compiled).values(), strict=True)), plain)


def test_copies_threads_and_the_whole_process():
    model = adapted()
    expected = step(model)
    patch(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = lowrank.stats(clone)["fused"]
        agree(step(clone), expected)
        assert lowrank.stats(clone)["fused"] > before
    seen = [None] * 4

    def run(i):
        with torch.no_grad():
            seen[i] = model(input_ids=IDS[i % 2 :]).logits

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in enumerate(seen):
        torch.testing.assert_close(logits, expected["logits"][i % 2 :])
    unpatch(model)
    patch()
    try:
        fused = lowrank.stats()["fused"]
        agree(step(model), expected)
        assert lowrank.stats()["fused"] == fused + 4
    finally:
        unpatch()


def test_a_failed_call_leaves_nothing_behind():
    model = adapted()
    expected = step(model)
    patch(model)
    block = next(m for m in model.modules() if hasattr(m, "parameter_name")).get_base_layer()
    act, block.act_fn = block.act_fn, nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        step(model)
    block.act_fn = act
    agree(step(model), expected)


def _hook(model):
    base(model).register_forward_hook(lambda *_: None)


def _inner_hook(model):
    next(m for m in model.modules() if hasattr(m, "parameter_name")).base_layer.register_forward_pre_hook(
        lambda *_: None
    )


def _factor_hook(model):
    next(m for m in model.modules() if hasattr(m, "parameter_name")).lora_A["default"].register_forward_hook(
        lambda *_: None
    )


def _norm(model):
    base(model).has_post_expert_norm = True
    base(model).post_expert_norm = nn.Identity()


def _implementation(model):
    implementation.moe.ALL_EXPERTS_FUNCTIONS.register("another", implementation.moe.grouped_mm_experts_forward)
    model.base_model.model.set_experts_implementation("another")


def _double(model):
    model.double().base_model.model.set_experts_implementation("eager")


def _scaling(model):
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    wrapper.scaling["default"] = torch.tensor(wrapper.scaling["default"])


def _replaced_function(model):
    model.base_model.model.set_experts_implementation("batched_mm")
    own = implementation.moe.batched_mm_experts_forward
    implementation.moe.ALL_EXPERTS_FUNCTIONS.register("batched_mm", lambda *args: own(*args) * 2)


def base(model):
    return next(m for m in model.modules() if hasattr(m, "parameter_name")).get_base_layer()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "hooks on the experts"),
        (_inner_hook, "hooks on a layer inside"),
        (_factor_hook, "hooks"),
        (_norm, "a norm behind the experts"),
        (_implementation, "the experts implementation 'another'"),
        (_scaling, "a scaling that is no finite number"),
        (_replaced_function, "the experts implementation 'batched_mm'"),
        (_double, r"Parameter of torch\.float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_pefts(change, reason, monkeypatch):
    functions = dict(implementation.moe.ALL_EXPERTS_FUNCTIONS._global_mapping)
    monkeypatch.setattr(type(implementation.moe.ALL_EXPERTS_FUNCTIONS), "_global_mapping", functions)
    model = adapted(model=moe(num_hidden_layers=1))
    change(model)
    expected = step(model)
    patch(model)
    lowrank._stats.reset()
    with pytest.warns(UserWarning, match=reason):
        ours = step(model)
    agree(ours, expected, 0)
    assert any(re.search(reason, why) for why in lowrank.stats(model)["fallback"])
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=reason):
        step(model)


def test_a_bias_and_a_router_are_pefts():
    for target in ("mlp.experts.gate_up_proj_bias", "mlp.router.weight"):
        model = adapted("GptOss", target_parameters=[target])
        expected = step(model)
        patch(model)
        agree(step(model), expected, 0)
        assert lowrank.stats(model)["fallback"]


def test_one_of_two_stacks():
    for target in stacks(moe()):
        model = adapted(target_parameters=[target])
        expected = step(model)
        patch(model)
        with lowrank.strict():
            agree(step(model), expected)


@pytest.mark.parametrize("copied", [False, True])
def test_inputs_changed_in_place(copied):
    model = adapted(model=moe(num_hidden_layers=1))
    patch(model, copy_inputs=copied)
    block = next(m for m in model.modules() if hasattr(m, "experts"))
    forward = block.forward

    def changing(hidden_states):
        out = forward(hidden_states)
        hidden_states.view(-1)[:1].detach().add_(1.0)
        return out

    block.forward = changing
    if copied:
        step(model)
        assert not lowrank.stats(model)["fallback"]
        return
    with pytest.raises(RuntimeError, match=r"mlp\.experts: the input was changed in place"):
        step(model)
    step(model)  # PEFT's from now on
    assert any("changed in place" in why for why in lowrank.stats(model)["fallback"])


def test_no_tokens_and_hooks_on_everything():
    model = adapted(model=moe(num_hidden_layers=1))
    patch(model)
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    x = torch.zeros(0, 64, requires_grad=True)
    y = wrapper(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        step(model)
    finally:
        hook.remove()
    assert any("hooks on the experts" in why for why in lowrank.stats(model)["fallback"])


def test_a_gate_that_was_replaced_is_the_models_own(monkeypatch):
    model = adapted(model=moe(num_hidden_layers=1))
    patch(model)
    before = step(model)
    monkeypatch.setattr(type(base(model)), "_apply_gate", lambda self, G: G.chunk(2, -1)[1].tanh())
    assert not torch.allclose(step(model)["logits"], before["logits"])


def test_dropout_is_refused_as_peft_does():
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted(lora_dropout=0.1)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "NemotronH", "DeepseekV3"])
def test_the_experts_implementation(family):
    """set_experts_implementation("lowrank"), no adapter: as transformers' own, every weight's gradient too."""
    model = moe(family)
    model.set_experts_implementation("eager")
    expected = step(model)
    model.set_experts_implementation("lowrank")
    seen = []
    function = experts.experts_layer
    experts.experts_layer = lambda *args: seen.append(1) or function(*args)
    try:
        agree(step(model), expected)
    finally:
        experts.experts_layer = function
    assert seen


def test_an_activation_that_is_not_known_is_the_models_own():
    model = adapted()
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.act_fn = nn.Softplus()
    expected = step(model)
    patch(model)
    with lowrank.strict():
        agree(step(model), expected)


def test_files_are_pefts_byte_for_byte(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text()) == json.loads(
        (tmp_path / "patched" / "adapter_config.json").read_text()
    )
    again = patch(PeftModel.from_pretrained(moe(), tmp_path / "patched", is_trainable=True))
    agree(step(again), step(model))
    torch.save(model.state_dict(), buffer := io.BytesIO())
    assert buffer.tell()


def test_adapt_and_load_adapter(tmp_path):
    base = moe()
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=stacks(base), init_lora_weights=False)
    model = lowrank.adapt(base, config)
    with lowrank.strict():
        expected = step(model)
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(moe(), tmp_path, is_trainable=True)
    with lowrank.strict():
        agree(step(again), expected)


def test_what_matches_nothing_and_another_number_of_experts(tmp_path):
    for others in ([], ["q_proj"]):
        with pytest.raises(ValueError, match=r"target_parameters: Qwen3MoeForCausalLM has no 'experts\.nope'"):
            lowrank.adapt(moe(), LoraConfig(r=3, target_modules=others, target_parameters=["experts.nope"]))
    lowrank.save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match="is of 6 experts, the model has 7"):
        lowrank.load_adapter(moe(num_experts=7), tmp_path)
