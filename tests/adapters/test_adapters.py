import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import peft
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lowrank
from lowrank import _linears, adapters
from lowrank.nn import LoRALinear

IDS = torch.arange(32).view(2, 16) * 7 % 100


def llama(dtype=torch.float32, hidden=64):
    torch.manual_seed(0)
    sizes = dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, num_key_value_heads=2, **sizes)).to(dtype)


def adapted(dtype=torch.float32, **config):
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | config
    return lowrank.adapt(llama(dtype), LoraConfig(**config))


def by_hand():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model[0] = LoRALinear.from_linear(model[0], 3, lora_alpha=6)
    model[2] = LoRALinear.from_linear(model[2], 2)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B["default"].weight)
    return model


def test_adapt_is_a_peft_model_on_lowrank():
    model = adapted()
    assert isinstance(model, PeftModel)
    model(IDS)
    assert lowrank.stats(model) == {"fused": 14, "shared": 6, "fallback": {}, "untouched": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_pefts_both_ways(tmp_path, dtype):
    model = adapted(dtype)
    want = model(IDS).logits
    lowrank.save_adapter(model, tmp_path / "ours", format="lora")
    by_peft = PeftModel.from_pretrained(llama(dtype), tmp_path / "ours")
    assert by_peft.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(by_peft.state_dict().values(), model.state_dict().values(), strict=True)
    )
    if dtype is torch.float32:
        torch.testing.assert_close(by_peft(IDS).logits, want)
    by_peft.save_pretrained(tmp_path / "theirs")
    again = lowrank.load_adapter(llama(dtype), tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, want)
    assert lowrank.stats(again)["fused"] == 14


def test_bf16_base_keeps_its_bits_through_training_saving_and_merging(tmp_path):
    before = llama(torch.bfloat16).state_dict()
    model = adapted(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    lowrank.save_adapter(model, tmp_path / "a")
    model = lowrank.load_adapter(llama(torch.bfloat16), tmp_path / "a")
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): t
        for name, t in model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_second_adapter_is_added_and_active(tmp_path):
    lowrank.save_adapter(adapted(lora_alpha=9), tmp_path / "a")
    model = adapted()
    first = model(IDS).logits
    model = lowrank.load_adapter(model, tmp_path / "a", "second", is_trainable=True)
    assert model.active_adapter == "second"
    assert any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)


def test_hand_made_models_save_and_load_pefts_files(tmp_path):
    torch.manual_seed(0)
    model, x = by_hand(), torch.randn(5, 8)
    want = model(x)
    lowrank.save_adapter(model, tmp_path / "a")
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    plain[0].load_state_dict(model[0].base_layer.state_dict())
    plain[2].load_state_dict(model[2].base_layer.state_dict())
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path / "a")(x), want)
    other = by_hand()
    for mine, its in ((other[0], model[0]), (other[2], model[2])):
        mine.base_layer.load_state_dict(its.base_layer.state_dict())
    other[0].lora_alpha = 99
    lowrank.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x), want)


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a"
    lowrank.save_adapter(by_hand(), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(LoraConfig, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lowrank.save_adapter(by_hand(), path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
from test_adapters import by_hand
import lowrank
from lowrank import adapters
torch.set_num_threads(1)

def save(path, scale, other, kill_at=None):
    real, calls = adapters.publish, []

    def publish(*args):
        calls.append(args)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    adapters.publish = publish
    model = by_hand()
    with torch.no_grad():
        model[0].lora_A["default"].weight.fill_(scale)
        model[0].lora_alpha = 6 * scale if other else 6
    lowrank.save_adapter(model, path)

for other in (False, True):
    outcomes = []
    for call in (1, 2, 3):
        path = f"{out}/{{other}}{{call}}"
        save(path, 1.0, other)
        if (child := os.fork()) == 0:
            save(path, 2.0, other, call)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        model = by_hand()
        try:
            lowrank.load_adapter(model, path)
            found = float(model[0].lora_A["default"].weight.mean())
            assert model[0].lora_alpha in (6, 6 * found if other else 6)
        except FileNotFoundError:
            found = None
        outcomes.append((bool(os.WIFSIGNALED(status)), found))
    print(outcomes)
"""


def test_killed_while_saving(tmp_path):
    """The adapter that was there, or the new one; between two that differ in their configuration, none."""
    code = KILLED.format(path=[str(Path(__file__).parent)], out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-2:] == [
        str([(True, 1.0), (False, 2.0), (False, 2.0)]),  # the weights alone are published
        str([(True, None), (True, None), (False, 2.0)]),  # another alpha: never one's weights under the other's
    ]


def test_the_old_adapter_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    """Also where another process wrote it, in which PEFT's set of names had another order."""
    model, path, scales = adapted(), tmp_path / "a", []
    lowrank.save_adapter(model, path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["target_modules"].reverse()
    (path / "adapter_config.json").write_text(json.dumps(config))
    name, p = next((name, p) for name, p in model.named_parameters() if p.requires_grad)
    start = p.detach().clone()
    with torch.no_grad():
        p.mul_(2)
    real = adapters.publish

    def scale():
        return float((lowrank.load_adapter(llama(), path).get_parameter(name) / start).mean())

    def publish(*args):  # whoever is killed finds what is there before or after
        scales.append(scale())
        real(*args)
        scales.append(scale())

    monkeypatch.setattr(adapters, "publish", publish)
    lowrank.save_adapter(model, path)
    assert len(scales) > 1
    assert set(scales) == {1.0, 2.0}
    assert scales == sorted(scales)


def test_trainer_saves_resumes_and_reloads_the_best(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8

    def arguments(**more):
        return TrainingArguments(
            tmp_path / "run", per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **more,
        )  # fmt: skip

    def train(model, resume=None):
        Trainer(model, arguments(), train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    torch.manual_seed(5)
    whole = train(adapted())
    torch.manual_seed(5)
    resumed = train(adapted(), resume=str(tmp_path / "run" / "checkpoint-2"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name

    keep_best = arguments(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    best = Trainer(adapted(), keep_best, train_dataset=data, eval_dataset=data)
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-4")
    from_file = lowrank.load_adapter(llama(), best.state.best_model_checkpoint)
    assert torch.equal(from_file(IDS).logits, best.model(IDS).logits)
    assert lowrank.stats(best.model)["fallback"] == {}


def test_adapt_refuses():
    with pytest.raises(TypeError, match=r"config: expected a peft.LoraConfig or a lowrank.SVFConfig, got dict"):
        lowrank.adapt(llama(), {})
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        lowrank.adapt("llama", LoraConfig())
    with pytest.raises(ValueError, match="nothing_like_this"):
        lowrank.adapt(llama(), LoraConfig(target_modules=["nothing_like_this"]))
    with pytest.raises(ValueError, match=r"model: Sequential has no nn.Linear layer to adapt"):
        lowrank.adapt(nn.Sequential(nn.Conv1d(2, 2, 1)), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="positive integer"):
        lowrank.adapt(llama(), LoraConfig(r=0, target_modules="all-linear"))


def test_save_refuses(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        lowrank.save_adapter(3, tmp_path)
    with pytest.raises(ValueError, match=r"format: expected None or 'lora', got 'svf'"):
        lowrank.save_adapter(adapted(), tmp_path / "a", format="svf")
    with pytest.raises(ValueError, match="expected a PeftModel or a model with LoRALinear layers, got Linear"):
        lowrank.save_adapter(nn.Linear(2, 2), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_before_it_changes_anything(tmp_path):
    path = lowrank.save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"expected an adapter directory .* no adapter_config.json"):
        lowrank.load_adapter(llama(), tmp_path / "none")

    def untouched(model, kind, message):
        before = str(model)
        with pytest.raises(kind, match=message):
            lowrank.load_adapter(model, path)
        assert str(model) == before

    untouched(llama(hidden=32), ValueError, r"an adapter of another model: .* is \[.*\], .* has (in|out)_features=32")
    untouched(nn.Sequential(nn.Linear(2, 2)), ValueError, "an adapter of another model: it has model.layers.0")
    untouched(by_hand(), ValueError, "an adapter of another model: .* tensors on one side only")

    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    untouched(llama(), ValueError, "not a whole safetensors file")


def test_hand_made_layers_that_one_file_cannot_hold(tmp_path):
    model = by_hand()
    model[0].use_rslora = True
    with pytest.raises(ValueError, match="one use_rslora and one lora_bias for all layers"):
        lowrank.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    lowrank.save_adapter(by_hand(), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"] == {"^2": 2}


class Nested(nn.Module):
    """Two layers of one name, one inside the other's."""

    def __init__(self):
        super().__init__()
        self.fc, self.block = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x):
        return self.fc(self.block["fc"](x))


def test_names_that_end_alike_keep_their_own_rank_and_alpha(tmp_path):
    torch.manual_seed(0)
    model, plain, x = Nested(), Nested(), torch.randn(4, 6)
    plain.load_state_dict(model.state_dict())
    model.block["fc"] = LoRALinear.from_linear(model.block["fc"], 2, lora_alpha=4)
    model.fc = LoRALinear.from_linear(model.fc, 3, lora_alpha=40)
    for layer in (model.fc, model.block["fc"]):
        nn.init.normal_(layer.lora_B["default"].weight)
    want = model(x)
    lowrank.save_adapter(model, tmp_path / "a")
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path / "a")(x), want)
    model.fc.lora_alpha = model.block["fc"].lora_alpha = 1
    assert torch.equal(lowrank.load_adapter(model, tmp_path / "a")(x), want)


def test_named_adapters_and_frozen_ones(tmp_path):
    model = lowrank.adapt(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "foo")
    want = model(IDS).logits
    lowrank.save_adapter(model, tmp_path / "a")
    assert torch.equal(lowrank.load_adapter(llama(), tmp_path / "a", "foo")(IDS).logits, want)
    other = lowrank.load_adapter(adapted(target_modules=["q_proj"]), tmp_path / "a" / "foo", "two")
    assert not any(p.requires_grad for name, p in other.named_parameters() if ".two." in name)


def test_a_rank_that_the_configuration_denies(tmp_path):
    path = lowrank.save_adapter(adapted(), tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    model = llama()
    before = str(model)
    with pytest.raises(ValueError, match=r"has rank 4, adapter_config\.json says 3"):
        lowrank.load_adapter(model, path)
    assert str(model) == before


def test_adapt_without_a_layer_for_lowrank():
    model = lowrank.adapt(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert lowrank.stats(model)["untouched"] == {"lora.Embedding": 1}


def started(init, **options):
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12))
    torch.manual_seed(5)
    for linear in (model[0], model[2]):
        nn.init.normal_(linear.weight)
    plain = [m.weight.detach().clone() for m in (model[0], model[2])]
    model[0] = LoRALinear.from_linear(model[0], 3, lora_alpha=6, init=init, **options)
    model[2] = LoRALinear.from_linear(model[2], 2, init=init, **options)
    return model, plain


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_start_as_the_linear_and_export_as_plain_lora(tmp_path, init, rslora):
    model, weights = started(init, use_rslora=rslora)
    x = torch.randn(5, 24)
    for layer, W in zip((model[0], model[2]), weights, strict=True):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(layer.weight + layer.scaling * B @ A, W, rtol=1e-5, atol=1e-5)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        if init == "pissa":
            torch.testing.assert_close(layer.scaling * B @ A, (U[:, : layer.r] * S[: layer.r]) @ Vh[: layer.r])
        else:
            Q, _ = torch.linalg.qr(W)
            torch.testing.assert_close(B, Q[:, : layer.r])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    want = model(x)
    lowrank.save_adapter(model, tmp_path / "own")
    lowrank.save_adapter(model, tmp_path / "plain", format="lora")
    again, _ = started(init, use_rslora=rslora)
    lowrank.load_adapter(again, tmp_path / "own")
    again[0].base_layer.bias, again[2].base_layer.bias = model[0].bias, model[2].bias
    assert torch.equal(again(x), want)

    def original():
        plain = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12))
        for i, W in zip((0, 2), weights, strict=True):
            plain[i].weight, plain[i].bias = nn.Parameter(W.clone()), model[i].bias
        return plain

    torch.testing.assert_close(PeftModel.from_pretrained(original(), tmp_path / "plain")(x), want, rtol=1e-4, atol=1e-4)
    default, _ = started("default", use_rslora=rslora)
    with pytest.raises(ValueError, match=f"trained from init='{init}'"):
        lowrank.load_adapter(default, tmp_path / "own")


def scaled(init, **options):
    torch.manual_seed(0)
    return nn.Sequential(LoRALinear.from_linear(nn.Linear(24, 16), 4, init=init, **options))


@pytest.mark.parametrize("options", [dict(lora_alpha=12), dict(lora_alpha=4, use_rslora=True)], ids=["alpha", "rsLoRA"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_any_scaling_is_pefts(tmp_path, init, options):
    model, x = scaled(init, **options), torch.randn(5, 24)
    with torch.no_grad():
        model[0].lora_B["default"].weight.add_(0.1)
    want = model(x)
    for form in (None, "lora"):
        lowrank.save_adapter(model, tmp_path, form)
        torch.manual_seed(0)
        plain = PeftModel.from_pretrained(nn.Sequential(nn.Linear(24, 16)), tmp_path)
        torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-4)
    lowrank.save_adapter(model, tmp_path)
    other = scaled(init, lora_alpha=7)
    if init == "olora":
        with pytest.raises(ValueError, match="make it with lora_alpha="):
            lowrank.load_adapter(other, tmp_path)
        assert other[0].lora_alpha == 7
        return
    torch.testing.assert_close(lowrank.load_adapter(other, tmp_path)(x), want)  # and what it exports is its own
    lowrank.save_adapter(other, tmp_path, "lora")
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(nn.Sequential(nn.Linear(24, 16)), tmp_path)
    torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_own_starts_export_as_plain_lora(tmp_path, init, rslora):
    model = adapted(init_lora_weights=init, use_rslora=rslora, rank_pattern={"q_proj": 2})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    want = model(IDS).logits
    lowrank.save_adapter(model, tmp_path, format="lora")
    torch.testing.assert_close(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, want, rtol=1e-4, atol=1e-4)
    del model.__dict__["_lowrank_initial"]
    with pytest.raises(ValueError, match="needs the factors"):
        lowrank.save_adapter(model, tmp_path, format="lora")


def tiny(tie=False, **config):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tie, **config)).eval()


def trained(model, config, **options):
    model = lowrank.adapt(model, config, **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def off(got, want):
    with torch.no_grad():
        want = want(IDS).logits.double()
        return float((got.eval()(IDS).logits.double() - want).norm() / want.norm())


STARTS = {
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "head by a pattern": dict(target_modules=r".*(up_proj|lm_head)"),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "both, rsLoRA, ranks and alphas of their own": dict(
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        use_rslora=True,
        rank_pattern={"embed_tokens": 2, "lm_head": 6},
        alpha_pattern={"lm_head": 3},
    ),
    "DoRA": dict(target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True),
    "modules_to_save": dict(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens", "norm", "mlp"]),
    "biases": dict(target_modules=["q_proj", "lm_head"], bias="all"),
    "tokens": dict(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5]),
    "a parameter": dict(target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
    "more than the rank of a weight": dict(target_modules=["q_proj", "k_proj", "embed_tokens"], r=40),
    "that and rsLoRA": dict(target_modules=["q_proj", "k_proj"], r=40, use_rslora=True, rank_pattern={"q_proj": 4}),
    "that and OLoRA": dict(target_modules=["q_proj", "k_proj"], r=40, init_lora_weights="olora"),
    "a spelling": dict(target_modules=["q_proj", "lm_head"], init_lora_weights="OLoRA"),
}


@pytest.mark.parametrize("case", STARTS)
def test_what_a_file_holds_beside_the_factors_is_converted_too(tmp_path, case):
    """A start that changed the base, exported as a plain LoRA: plain PEFT has the trained function on a fresh base."""
    biases = dict(attention_bias=True) if case == "biases" else {}
    model = trained(tiny(**biases), LoraConfig(**({"r": 4, "init_lora_weights": "pissa"} | STARTS[case])))
    lowrank.save_adapter(model, tmp_path, format="lora")
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("base_layer.weight")]
    assert off(PeftModel.from_pretrained(tiny(**biases), tmp_path), model) < 1e-5


def test_other_starts_that_change_the_base_export_as_plain_lora(tmp_path):
    from peft.tuners.lora import corda, loraga
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    targets = dict(r=4, target_modules=["q_proj", "lm_head"])
    config = LoraConfig(**targets, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    base = tiny()
    corda.preprocess_corda(base, config, run_model=lambda: [base((IDS[:1] + i) % 100) for i in range(8)])
    model = trained(base, config)
    lowrank.save_adapter(model, tmp_path / "corda", format="lora")
    assert off(PeftModel.from_pretrained(tiny(), tmp_path / "corda"), model) < 1e-5

    config = LoraConfig(**targets, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    base = tiny()
    loraga.preprocess_loraga(base, config, lambda: base(IDS, labels=IDS).loss.backward())
    model = trained(base, config)
    lowrank.save_adapter(model, tmp_path / "ga", format="lora")
    assert off(PeftModel.from_pretrained(tiny(), tmp_path / "ga"), model) < 1e-5


def test_a_resized_vocabulary_keeps_its_rows_as_they_were(tmp_path):
    tiny().save_pretrained(tmp_path / "base")

    def grown(seed):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(103)
        torch.manual_seed(seed)
        with torch.no_grad():
            for table in (model.lm_head, model.model.embed_tokens):
                table.weight[100:].normal_()
        return model.eval()

    model = trained(grown(1), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["embed_tokens", "lm_head"]))
    lowrank.save_adapter(model, tmp_path / "a", format="lora")
    assert off(PeftModel.from_pretrained(grown(2), tmp_path / "a"), model) < 1e-5  # the new rows are the file's


def test_factors_rounded_after_the_start_still_cancel_it(tmp_path):
    model = trained(tiny(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.bfloat16()
    lowrank.save_adapter(model, tmp_path, format="lora")
    for p in model.parameters():
        p.data = p.float()
    assert off(PeftModel.from_pretrained(tiny(), tmp_path), model) < 1e-5


@pytest.mark.parametrize(
    ("tie", "config", "message"),
    [
        (True, dict(target_modules=["q_proj", "lm_head"]), "lm_head: its weight is shared: model.embed_tokens.weight"),
        (False, dict(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), "its weight is shared"),
        (False, dict(target_modules=["q_proj"], alora_invocation_tokens=[5]), "it is a ALoraLinearVariant"),
    ],
    ids=["a tied head", "replicated layers", "aLoRA"],
)
def test_a_start_that_is_no_lora_of_the_original_is_refused(tmp_path, tie, config, message):
    model = lowrank.adapt(tiny(tie), LoraConfig(r=4, init_lora_weights="pissa", **config))
    with pytest.raises(ValueError, match=f"format: 'lora' of init_lora_weights='pissa': .*{message}"):
        lowrank.save_adapter(model, tmp_path / "a", format="lora")
    assert not (tmp_path / "a").exists()


def test_a_base_that_a_start_changed_is_no_other_adapters(tmp_path):
    pissa = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    model = lowrank.adapt(tiny(), pissa)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter("second")
    for left in ("default, second", "second", "second, default"):
        with pytest.raises(ValueError, match=f"format: 'lora' of {left}: one start changed the base"):
            lowrank.save_adapter(model, tmp_path / "a", format="lora")
        if left == "default, second":
            model.delete_adapter("default")
        elif left == "second":
            model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj"]))

    model = lowrank.adapt(tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["default"].init_lora_weights = "loftq"  # PEFT's LoftQ needs a GPU
    with pytest.raises(ValueError, match="format: 'lora' of init_lora_weights='loftq', whose base is no W - s B A"):
        lowrank.save_adapter(model, tmp_path / "a", format="lora")
    model = lowrank.adapt(tiny(), AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10))
    with pytest.raises(ValueError, match="format: 'lora' of 'default', which is ADALORA"):
        lowrank.save_adapter(model, tmp_path / "a", format="lora")


@pytest.mark.parametrize("format", [None, "lora"])
def test_a_merged_head_is_not_saved_beside_its_adapter(tmp_path, format):
    model = trained(tiny(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight would be saved with an adapter merged into it"):
        lowrank.save_adapter(model, tmp_path / "a", format=format)
    model.unmerge_adapter()
    lowrank.save_adapter(model, tmp_path / "a", format=format)
    assert off(PeftModel.from_pretrained(tiny(), tmp_path / "a"), model) < 1e-5


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.line, self.fc = nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.line(self.grouped(self.conv(x)).flatten(2)).mean(2))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100)).eval()


def mixtral():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=2)).eval()


def llava():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    text = LlamaConfig(**sizes, vocab_size=100)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    return LlavaForConditionalGeneration(config).eval()


def run(model):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(x) if isinstance(getattr(model, "base_model", model).model, Convolutions) else model(IDS).logits


def written_by_peft(path, model, config):
    """A trained adapter in PEFT's files, and what the model computes with it."""
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(path)
    return run(model)


def rewrite(path, change, **config):
    weights, described = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors = {key: t.contiguous() for key, t in change(load_file(weights)).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    described.write_text(json.dumps(json.loads(described.read_text()) | config))


WRITTEN = {
    "convolutions": (Convolutions, dict(target_modules=["conv", "grouped", "line", "fc"])),
    "embedding and head": (tiny, dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "Conv1D and embedding": (gpt2, dict(target_modules=["c_attn", "wte"])),
    "replicated layers": (tiny, dict(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])),
    "stacked experts": (mixtral, dict(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])),
    "a parameter": (tiny, dict(target_modules=[], target_parameters=["up_proj.weight"])),
    "tokens": (tiny, dict(target_modules=["q_proj"], trainable_token_indices=[3, 5])),
    "biases": (tiny, dict(target_modules=["q_proj"], bias="all")),
    "modules_to_save": (tiny, dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "DoRA, ranks of their own": (tiny, dict(target_modules="all-linear", use_dora=True, rank_pattern={"q_proj": 2})),
    "PiSSA": (tiny, dict(target_modules=["q_proj"], init_lora_weights="pissa")),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_loads_what_peft_wrote(tmp_path, case):
    make, config = WRITTEN[case]
    want = written_by_peft(tmp_path, make(), LoraConfig(r=4, **config))
    torch.testing.assert_close(run(lowrank.load_adapter(make(), tmp_path).eval()), want)


def test_loads_a_pickled_file_of_tensors_and_runs_nothing_in_it(tmp_path):
    want = written_by_peft(tmp_path, tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    weights, pickled = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_model.bin"
    torch.save(load_file(weights), pickled)
    weights.unlink()
    torch.testing.assert_close(run(lowrank.load_adapter(tiny(), tmp_path).eval()), want)

    whole, ran = pickled.read_bytes(), tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (Path.touch, (ran,))

    model = tiny()
    before = str(model)
    torch.save({"a": Code()}, pickled)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: no whole file of tensors alone"):
        lowrank.load_adapter(model, tmp_path)
    assert not ran.exists()
    for content in (whole[:-200], b""):
        pickled.write_bytes(content)
        with pytest.raises(ValueError, match="no whole file of tensors alone"):
            lowrank.load_adapter(model, tmp_path)
    torch.save([1, 2], pickled)
    with pytest.raises(ValueError, match="expected a dict of tensors"):
        lowrank.load_adapter(model, tmp_path)
    assert str(model) == before


def test_loads_the_names_of_older_transformers(tmp_path):
    want = written_by_peft(tmp_path, llava(), LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))

    def older(tensors):
        new, old = "model.model.language_model.", "model.language_model.model."
        assert all(new in key for key in tensors)
        return {key.replace(new, old): t for key, t in tensors.items()}

    rewrite(tmp_path, older)
    torch.testing.assert_close(run(lowrank.load_adapter(llava(), tmp_path).eval()), want)


def a_linear_per_expert(tensors):
    """Transformers 4's Mixtral: a linear layer for each of w1, w2, w3 of each expert."""
    torch.manual_seed(3)
    for layer, expert in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for name, (K, N) in dict(w1=(32, 48), w2=(48, 32), w3=(32, 48)).items():
            key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora_"
            tensors |= {key + "A.weight": torch.randn(4, K), key + "B.weight": 0.1 * torch.randn(N, 4)}
    return tensors


def test_loads_a_linear_per_expert(tmp_path):
    plain = written_by_peft(tmp_path, mixtral(), LoraConfig(r=4, target_modules=["q_proj"]))
    rewrite(tmp_path, a_linear_per_expert, target_modules=["q_proj", "w1", "w2", "w3"])
    want = run(PeftModel.from_pretrained(mixtral(), tmp_path).eval())
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(run(lowrank.load_adapter(mixtral(), tmp_path).eval()), want)


def without(part):
    return lambda tensors: {key: t for key, t in tensors.items() if part not in key}


def repeated(part, other):
    return lambda tensors: tensors | {key.replace(part, other): t.clone() for key, t in tensors.items() if part in key}


MISFITS = {  # what PEFT loads with a warning or without, or finds when the model is changed already
    "a layer missing": (tiny, {}, without("layers.1"), {}, r"part of one: it lacks model\.layers\.1\.\S*lora_A"),
    "a factor missing": (tiny, {}, without("layers.1.self_attn.q_proj.lora_B"), {}, "lacks model.layers.1.*lora_B"),
    "a magnitude missing": (tiny, dict(use_dora=True), without("magnitude"), {}, "lacks .*lora_magnitude_vector"),
    "a head missing": (tiny, dict(modules_to_save=["lm_head"]), without("lm_head"), {}, "it lacks .*lm_head"),
    "a layer too many": (
        tiny,
        {},
        repeated("layers.1", "layers.2"),
        {},
        r"it has model\.layers\.2\.self_attn\.q_proj,",
    ),
    "a layer not targeted": (
        tiny,
        {},
        repeated("q_proj", "k_proj"),
        {},
        r"it has model\.layers\.0\.self_attn\.k_proj,",
    ),
    "no replication": (
        tiny,
        dict(layer_replication=[[0, 2], [1, 2]]),
        without("none"),
        dict(layer_replication=None),
        r"it has model\.layers\.2",
    ),
    "another kernel": (
        Convolutions,
        dict(target_modules=["conv"]),
        lambda tensors: {key: t[..., :2] if t.shape[-1] == 3 else t for key, t in tensors.items()},
        {},
        r"conv\.lora_A\.weight is \[4, 3, 3, 2\], the model's is \[4, 3, 3, 3\]",
    ),
    "an expert missing": (
        mixtral,
        {},
        lambda tensors: without("experts.1.w2")(a_linear_per_expert(tensors)),
        dict(target_modules=["q_proj", "w1", "w2", "w3"]),
        r"experts\.lora_A\.weight has rank 4, adapter_config\.json says 8",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_before_the_model_is_touched(tmp_path, case):
    make, options, change, described, message = MISFITS[case]
    written_by_peft(tmp_path, make(), LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options)))
    rewrite(tmp_path, change, **described)

    def facts(model):
        config = getattr(model, "config", None)
        tensors = [(name, p.data_ptr(), p._version, p.requires_grad) for name, p in model.named_parameters()]
        return str(model), tensors, config and config.to_dict(), [sorted(module.__dict__) for module in model.modules()]

    model = make()
    before = facts(model)
    with pytest.raises(ValueError, match=message):
        lowrank.load_adapter(model, tmp_path)
    assert facts(model) == before
    model = lowrank.adapt(make(), LoraConfig(r=2, target_modules=options.get("target_modules", ["v_proj"])))
    before = facts(model)
    with pytest.raises(ValueError, match=message):
        lowrank.load_adapter(model, tmp_path, "second")
    assert facts(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_alpha=9), "has a scaling of 2.0, .* 2.25"),
        (dict(use_dora=True), "has a variant .*NoneType.*Dora"),
        (dict(target_modules=["q_proj", "v_proj"]), "has no model.layers.0.self_attn.v_proj"),
        (dict(init_lora_weights="pissa"), "is from init_lora_weights=True, .* from 'pissa'"),
    ],
)
def test_an_adapter_is_not_overwritten_by_one_of_another_configuration(tmp_path, options, message):
    """PEFT would run the file's tensors as the model's configuration says."""
    config = dict(r=4, target_modules=["q_proj"])
    written_by_peft(tmp_path / "other", tiny(), LoraConfig(**(config | options)))
    want = written_by_peft(tmp_path / "same", tiny(), LoraConfig(**config))
    model = lowrank.adapt(tiny(), LoraConfig(**config)).eval()
    with pytest.raises(ValueError, match=f"adapter_name: .*{message}"):
        lowrank.load_adapter(model, tmp_path / "other")
    torch.testing.assert_close(run(lowrank.load_adapter(model, tmp_path / "same")), want)


def test_adapts_a_model_of_conv1d_alone():
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100))
    model = lowrank.adapt(base, LoraConfig(target_modules="all-linear"))
    model(IDS)
    assert lowrank.stats(model)["fused"] == 4


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)


def qwen3_moe():
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, num_key_value_heads=2, head_dim=8)).eval()


def deepseek():
    """A dense layer, then one with a shared expert: gate_proj, up_proj and down_proj in both."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
    ranks = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    groups = dict(n_shared_experts=1, n_group=1, topk_group=1, num_key_value_heads=4)
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **experts, **ranks, **groups)).eval()


LAYERS = {
    "dense and stacked experts": (qwen3_moe, "all-linear"),
    "a shared expert": (deepseek, "all-linear"),
    "one of the fused": (deepseek, ["gate_proj"]),
    "one layer of two": (mixtral, r".*layers\.0\..*_proj"),
}


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, lowrank.load_adapter], ids=["PEFT", "lowrank"])
@pytest.mark.parametrize("case", LAYERS)
def test_an_svf_expert_of_a_model_with_experts_comes_back_whole_from_a_lora(tmp_path, case, load):
    make, target_modules = LAYERS[case]
    model = lowrank.adapt(make(), lowrank.SVFConfig(target_modules=target_modules))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".z." in name:
                p.fill_(1.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PEFT does not load")
        lowrank.save_adapter(model, tmp_path, format="lora")
    base, want, got = (m(IDS).logits.double() for m in (make(), model, load(make(), tmp_path).eval()))
    assert float((got - want).norm() / (want - base).norm()) < 1e-4


def test_layers_composed_by_hand_beside_experts_come_back_whole(tmp_path):
    model = qwen3_moe()
    for i, (name, linear) in enumerate(list(model.named_modules())):
        if type(linear) is nn.Linear and name != "lm_head":
            new = LoRALinear.from_linear(linear, 2 + i % 2, lora_alpha=3, lora_dropout=0.1)
            nn.init.normal_(new.lora_B["default"].weight, std=0.1)
            model.set_submodule(name, new)
    lowrank.save_adapter(model.eval(), tmp_path)
    assert off(PeftModel.from_pretrained(qwen3_moe(), tmp_path), model) < 1e-5
    want = model(IDS).logits
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.zero_()
    assert torch.equal(lowrank.load_adapter(model, tmp_path)(IDS).logits, want)


def test_layers_that_peft_would_drop_are_named(tmp_path):
    """A file with a pattern of names, as it was written for models without experts."""
    model = lowrank.adapt(qwen3_moe(), lowrank.SVFConfig(k=4))
    lowrank.save_adapter(model, tmp_path, format="lora")
    layers = [name for name, module in model.named_modules() if isinstance(module, lowrank.nn.SVFLinear)]
    rewrite(tmp_path, dict, target_modules=_linears.exact_names(layers), target_parameters=None)
    model = qwen3_moe()
    before = str(model)
    message = r"it has model\.layers\.0\.mlp\.\w+_proj, which Qwen3MoeForCausalLM has, but PEFT does not adapt it"
    with pytest.raises(ValueError, match=message):
        lowrank.load_adapter(model, tmp_path)
    assert str(model) == before


def test_warns_of_an_expert_that_peft_does_not_load(tmp_path):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100, state_size=4))
    model = lowrank.adapt(model, lowrank.SVFConfig(target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match="PEFT does not load all of this into a MambaForCausalLM: .*out_proj"):
        lowrank.save_adapter(model, tmp_path, format="lora")
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_refuses_starts_that_cannot_be():
    with pytest.raises(ValueError, match="init: expected one of default, pissa, olora"):
        LoRALinear(8, 8, 2, init="gaussian")
    with pytest.raises(ValueError, match="needs at most min"):
        LoRALinear(8, 4, 5, init="pissa")
    with pytest.raises(ValueError, match="needs a positive one"):
        LoRALinear(8, 4, 2, lora_alpha=0, init="olora")
