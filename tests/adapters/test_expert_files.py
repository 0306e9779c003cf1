import json

import pytest
import torch

pytest.importorskip("peft")
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.adapters.expert_files import turn

IDS = torch.arange(24).view(2, 12) * 7 % 50
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def moe(hidden=32, inner=24, cls="Qwen3Moe"):
    sizes = dict(vocab_size=50, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    if cls == "GptOss":
        config = transformers.GptOssConfig(
            **sizes, intermediate_size=inner, num_local_experts=4, num_experts_per_tok=2, head_dim=16
        )
    else:
        config = transformers.Qwen3MoeConfig(
            **sizes,
            intermediate_size=inner,
            moe_intermediate_size=inner,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        )
    torch.manual_seed(0)
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def written(path, version=None, turned=False, r=3, targets=TARGETS, **sizes):
    """PEFT's files, as another version would have written them; and the model's logits."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=6, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(moe(**sizes), config)
    model.save_pretrained(path)
    settings = json.loads((path / "adapter_config.json").read_text())
    settings.pop("peft_version")
    settings |= {"peft_version": version} if version else {}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    if turned:
        tensors = load_file(path / "adapter_model.safetensors")
        for key in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
            names = [f"{key}.lora_{factor}.weight" for factor in "AB"]
            tensors |= zip(names, (t.contiguous() for t in turn(*(tensors[name] for name in names), 4)), strict=True)
        save_file(tensors, path / "adapter_model.safetensors")
    return model(input_ids=IDS).logits


def test_turning_changes_no_update_and_turns_back():
    E, r, N, K = 4, 3, 5, 7
    A, B = torch.randn(E * r, N), torch.randn(K, r * E)  # as PEFT 0.18 read them: e i o
    old = torch.einsum("ore,eri->eio", B.view(K, r, E), A.view(E, r, N))
    new_A, new_B = turn(A, B, E)
    new = torch.einsum("ore,eri->eoi", new_B.view(N, r, E), new_A.view(E, r, K))
    torch.testing.assert_close(new, old)
    assert all(torch.equal(a, b) for a, b in zip(turn(new_A, new_B, E), (A, B), strict=True))


@pytest.mark.parametrize(
    ("version", "turned"), [("0.18.1", True), ("0.17.0", True), ("0.19.0", False), ("0.21.2", False)]
)
@pytest.mark.parametrize("sizes", [{}, dict(hidden=32, inner=32, r=4)], ids=["ragged", "square"])
def test_files_of_every_version(tmp_path, version, turned, sizes):
    expected = written(tmp_path, version, turned, **sizes)
    before = (tmp_path / "adapter_config.json").read_text()
    model = lowrank.load_adapter(moe(**{k: v for k, v in sizes.items() if k != "r"}), tmp_path)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "adapter_config.json").read_text() == before
    again = lowrank.load_adapter(model, tmp_path)  # into a PeftModel
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned", [True, False])
def test_without_a_version_shapes_decide(tmp_path, turned):
    expected = written(tmp_path, None, turned)
    torch.testing.assert_close(
        lowrank.load_adapter(moe(), tmp_path)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_without_a_version_and_square_it_is_refused(tmp_path):
    written(tmp_path, None, False, targets=TARGETS[1:], hidden=32, inner=32)
    with pytest.raises(ValueError, match=r'mlp\.experts could be of PEFT 0\.19 .* has no "peft_version"'):
        lowrank.load_adapter(moe(hidden=32, inner=32), tmp_path)


def test_stacks_stored_the_other_way_round_were_never_turned(tmp_path):
    expected = written(tmp_path, "0.18.0", False, cls="GptOss", hidden=32, inner=32)
    model = lowrank.load_adapter(moe(cls="GptOss", hidden=32, inner=32), tmp_path)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_between_two_releases_is_read_by_its_shapes(tmp_path):
    for turned in (True, False):
        expected = written(tmp_path / str(turned), "0.18.2.dev0@abc", turned)
        model = lowrank.load_adapter(moe(), tmp_path / str(turned))
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    written(tmp_path / "square", "0.19.0.dev0", False, targets=TARGETS[1:], hidden=32, inner=32)
    with pytest.raises(ValueError, match="of a release"):
        lowrank.load_adapter(moe(hidden=32, inner=32), tmp_path / "square")


def test_old_files_of_renamed_layers_are_refused(tmp_path):
    written(tmp_path, "0.18.1", True)
    model = moe()
    model._checkpoint_conversion_mapping = {"^language_model": "model"}
    with pytest.raises(ValueError, match=r"PEFT 0\.18\.1 wrote it, for a model whose layers have other names now"):
        lowrank.load_adapter(model, tmp_path)
