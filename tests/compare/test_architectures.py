"""Models with experts, without attention, with linears of their own class: every one ends with a report."""

import json

import pytest
import torch

from lowrank.cli import compare
from lowrank.compare.costs import linear_weights, weight_changes
from lowrank.compare.methods import METHODS
from lowrank.compare.settings import Adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

SIZES = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
DEEPSEEK = {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
MODELS = {
    "Mixtral": lambda: transformers.MixtralConfig(**EXPERTS, num_local_experts=3),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(
        **EXPERTS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
    "DeepseekV3": lambda: transformers.DeepseekV3Config(**{**EXPERTS, **DEEPSEEK}),
    "GptOss": lambda: transformers.GptOssConfig(**EXPERTS, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "Mamba": lambda: transformers.MambaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=2, max_position_embeddings=32
    ),
    "GPT2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32),  # dropout
    "Falcon": lambda: transformers.FalconConfig(**SIZES, max_position_embeddings=32),
}


def build(name):
    return transformers.AutoModelForCausalLM.from_config(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_a_report_for_every_architecture(parse, save_tokenizer, tmp_path, name):
    build(name).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow: größer, schöner.\n" * 130)
    methods = ("full", "lora", "lora-attention", "svf")
    files = ("--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--general-data", tmp_path / "text.txt")
    options = ("--methods", ",".join(methods), "--steps", 6, "--rank", 2, "--device", "cpu", "--out", tmp_path / "out")
    options += ("--dtype", "float32", *(x for method in methods for x in ("--rates", f"{method}=0.001")))
    assert compare.main(parse(*files, *options)) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    missing = {"lora", "lora-attention"} if name == "Mamba" else set()
    assert result["not_done"].keys() == missing
    assert result["methods"].keys() == set(methods) - missing
    assert result["complete"]
    text = (tmp_path / "out" / "compare.md").read_text()
    experts = name in ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss")
    assert ("lora: lowrank LoRA on all linear layers and on the experts' stacks." in text) == experts
    for method in missing:
        assert f"- {method} was not done: " in text
    for method in result["tasks"]["text"]["methods"].values():
        assert method["changes"]["share_changed"] > 0
    for method in result["methods"].values():
        assert method["latency"]["merged"] is not None or method["not_measured"] or method is result["methods"]["full"]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss"])
@pytest.mark.parametrize("method", ["lora", "lora-mlp", "peft-lora"])
def test_experts_are_adapted_too(name, method):
    model = METHODS[method].phases[0].prepare(build(name), Adapter(2))
    adapted = {m.parameter_name for m in model.modules() if hasattr(m, "parameter_name")}
    assert adapted - {"weight"} == {"gate_up_proj", "down_proj"}  # PEFT's all-linear has routers, too
    named = METHODS[method].phases[0].prepare(build(name), Adapter(2, targets=("q_proj", "o_proj")))
    assert method == "lora-mlp" or not any(hasattr(m, "parameter_name") for m in named.modules())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Mamba"])
def test_weight_changes_are_those_of_the_merged_model(name):
    """Adapters on single linears and, nested, on the stacks of experts."""
    base, model = build(name), build(name)
    model.load_state_dict(base.state_dict())
    model = METHODS["lora"].phases[0].prepare(model, Adapter(2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    weights = dict(linear_weights(model))
    plain = dict(linear_weights(base))
    assert weights.keys() == plain.keys()
    share = weight_changes(base, model)["share_changed"]
    merged = dict(model.merge_and_unload().named_parameters(remove_duplicate=False))
    for key, weight in weights.items():
        torch.testing.assert_close(weight, merged[key].float(), rtol=0, atol=1e-5)
    changed = sum(int((merged[key] != plain[key]).sum()) for key in plain)
    assert share == pytest.approx(changed / sum(w.numel() for w in plain.values()), abs=1e-3)


def test_a_convolution_is_no_stack_of_experts():
    names = dict(linear_weights(build("Mamba")))
    assert not any("conv1d" in name for name in names)
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    experts = dict(linear_weights(build("Mixtral")))
    assert experts["model.layers.0.mlp.experts.down_proj"].shape == (3, 16, 24)
