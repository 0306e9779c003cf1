"""SVF on whole models: adapt, experts, mixtures, files, Trainer."""

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowrank
from lowrank import SVFConfig
from lowrank._linears import dense_weight, exact_names
from lowrank.adapters.factor_files import load_factors, save_factors
from lowrank.adapters.svf_layers import saved_modules, svf_layers
from lowrank.nn import SVFLinear
from lowrank.testing import error

IDS = torch.arange(48).view(3, 16) * 7 % 100


def llama(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    sizes = dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_key_value_heads=2, **sizes)).to(dtype)


def adapted(dtype=torch.float32, experts=("default",), **config):
    model = lowrank.adapt(llama(dtype), SVFConfig(**{"k": 8} | config))
    for name in experts[1:]:
        model.add_expert(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".z." in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapt_starts_as_the_model_and_trains_one_vector_per_layer(dtype):
    plain, model = llama(dtype), lowrank.adapt(llama(dtype), SVFConfig(k=8))
    assert torch.equal(logits(model), logits(plain))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14
    assert {(p.shape, p.dtype) for p in trained.values()} == {((8,), torch.float32)}
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not isinstance(model.lm_head, SVFLinear)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("mode", ["auto", "delta", "merged", "activation"])
def test_every_mode_is_the_merged_model(mode, normalize):
    config = dict(k=8 if mode in ("auto", "delta") else None, mode=mode, normalize=normalize)
    model = adapted(**config)
    want = logits(model)
    merged = adapted(**config).merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert not svf_layers(merged)
    torch.testing.assert_close(logits(merged), want, rtol=1e-3, atol=1e-4)


def test_target_modules():
    model = lowrank.adapt(llama(), SVFConfig(k=4, target_modules=["q_proj", "down_proj"]))
    assert {name.rpartition(".")[2] for name in svf_layers(model)} == {"q_proj", "down_proj"}
    model = lowrank.adapt(llama(), SVFConfig(k=4, target_modules=r".*\.1\.mlp\..*_proj"))
    assert len(svf_layers(model)) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(k=33), "k: 33 is more than the 32 singular values of .*k_proj"),
        (dict(target_modules=["nothing"]), "target_modules"),
        (dict(parametrization="square"), "parametrization"),
        (dict(k=0), "k: expected"),
        (dict(factors_dtype="float99"), "factors_dtype"),
    ],
)
def test_adapt_refuses_and_leaves_the_model_alone(config, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        lowrank.adapt(model, SVFConfig(**config))
    assert not svf_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_adapt_twice_and_other_configs():
    model = adapted()
    with pytest.raises(ValueError, match="has SVF layers already"):
        lowrank.adapt(model, SVFConfig(k=8))
    with pytest.raises(TypeError, match=r"LoraConfig or a lowrank\.SVFConfig"):
        lowrank.adapt(llama(), {"k": 8})
    assert lowrank.adapt(llama(), SVFConfig(k=8), "math").active_expert == "math"


@pytest.mark.parametrize("mode", ["delta", "activation"])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_a_batch_of_mixtures_is_a_loop_over_them(mode, normalize):
    model = adapted(experts=("a", "b", "c"), k=8 if mode == "delta" else None, mode=mode, normalize=normalize)
    for layer in svf_layers(model).values():
        layer.rename_expert("default", "a")
    alpha = torch.tensor([[1.0, 0, 0], [0.2, 0.5, 0.3], [0, 0.9, 0.4]])
    with lowrank.expert_mix(model, alpha):
        together = logits(model)
    for i in range(3):
        with lowrank.expert_mix(model, alpha[i]):
            torch.testing.assert_close(logits(model, IDS[i : i + 1]), together[i : i + 1], rtol=1e-3, atol=1e-4)
    model.set_expert("a")
    torch.testing.assert_close(logits(model, IDS[:1]), together[:1], rtol=1e-3, atol=1e-4)
    per_token = alpha[:, None].expand(3, 16, 3).contiguous()
    with lowrank.expert_mix(model, per_token):
        torch.testing.assert_close(logits(model), together, rtol=1e-3, atol=1e-4)
    with lowrank.expert_mix(model, alpha[:, [2, 0]], experts=["c", "a"]):
        last = logits(model)[0]
    torch.testing.assert_close(last, together[0], rtol=1e-3, atol=1e-4)
    with lowrank.expert_mix(model, dict.fromkeys(svf_layers(model), alpha)):
        assert torch.equal(logits(model), together)
    model.set_expert("b")
    assert not torch.allclose(logits(model), together, atol=1e-3)


def test_mixing_weights_get_their_gradient():
    model = adapted(experts=("default", "b"))
    alpha = torch.full((3, 2), 0.5, requires_grad=True)
    with lowrank.expert_mix(model, alpha):
        loss = model(IDS, labels=IDS).loss
    (dalpha,) = torch.autograd.grad(loss, alpha)
    steps = torch.zeros_like(alpha)
    steps[1, 0] = 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            with lowrank.expert_mix(model, alpha.detach() + sign * steps):
                losses.append(float(model(IDS, labels=IDS).loss))
    assert float(dalpha[1, 0]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05)


def test_generate_under_a_mixture():
    model = adapted(experts=("default", "b"))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    with lowrank.expert_mix(model, torch.eye(2)):
        together = model.generate(IDS[:2], **options)
    for i, name in enumerate(("default", "b")):
        model.set_expert(name)
        assert torch.equal(model.generate(IDS[i : i + 1], **options)[0], together[i])


@pytest.mark.parametrize(
    ("alpha", "experts", "error", "message"),
    [
        (torch.ones(3, 3), None, ValueError, r"alpha: expected \[..., 2\]"),
        (torch.ones(3, 2).long(), None, TypeError, "alpha: expected a float tensor"),
        ([0.5, 0.5], None, TypeError, "alpha: expected a float tensor"),
        (torch.ones(3, 2), ["default", "z"], ValueError, "no expert 'z'"),
        ({"model.lm_head": torch.ones(2)}, None, ValueError, "is no SVF layer"),
        (torch.ones(2, 2), None, ValueError, r"alpha: \[2, 2\] does not fit a batch \[3, 16, 64\]"),
    ],
)
def test_mixtures_that_do_not_fit(alpha, experts, error, message):
    model = adapted(experts=("default", "b"))
    with pytest.raises(error, match=message), lowrank.expert_mix(model, alpha, experts):
        model(IDS)
    model(IDS)  # and nothing stays behind
    with pytest.raises(ValueError, match="no SVF layers"), lowrank.expert_mix(llama(), torch.ones(2)):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_a_reloaded_expert_gives_the_same_bits(tmp_path, dtype, normalize):
    model = adapted(dtype, normalize=normalize, parametrization="sigmoid")
    want = logits(model)
    lowrank.save_adapter(model, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size < 10_000
    again = lowrank.load_adapter(llama(dtype), tmp_path)
    assert torch.equal(logits(again), want)
    assert not any(p.requires_grad for p in again.parameters())
    added = lowrank.load_adapter(
        lowrank.adapt(llama(dtype), SVFConfig(k=8, normalize=normalize, parametrization="sigmoid")),
        tmp_path, "math", is_trainable=True,
    )  # fmt: skip
    assert torch.equal(logits(added), want)
    assert sum(p.requires_grad for p in added.parameters()) == 14
    added.set_expert("default")
    assert torch.equal(logits(added), logits(llama(dtype)))


def test_adapted_loaded_saved_and_merged_in_an_inference_mode_it_trains(tmp_path):
    with torch.inference_mode():
        lowrank.save_adapter(adapted(), tmp_path)
        model = lowrank.load_adapter(llama(), tmp_path, is_trainable=True)
        assert model.model.layers[0].mlp.up_proj.weight.is_inference()
        lowrank.save_adapter(model, tmp_path)
    plain = llama()
    with torch.inference_mode():
        model = lowrank.load_adapter(plain, tmp_path, is_trainable=True)
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.z["default"].grad.any() for layer in svf_layers(model).values())
    with torch.inference_mode():
        merged = model.merge_and_unload()
    merged.requires_grad_(True)(IDS, labels=IDS).loss.backward()
    assert merged.model.layers[0].mlp.up_proj.weight.grad.any()


def test_several_experts_in_a_file_and_one_of_them(tmp_path):
    model = adapted(experts=("default", "b"))
    lowrank.save_adapter(model, tmp_path / "both")
    lowrank.save_adapter(model, tmp_path / "one", adapter_name="b")
    again = lowrank.load_adapter(llama(), tmp_path / "both")
    assert again.active_expert == "default"
    for name in ("default", "b"):
        model.set_expert(name)
        again.set_expert(name)
        assert torch.equal(logits(again), logits(model))
    single = lowrank.load_adapter(llama(), tmp_path / "one", "math")
    assert torch.equal(logits(single), logits(model))
    assert single.active_expert == "math"
    with pytest.raises(ValueError, match="no expert 'c'"):
        lowrank.save_adapter(model, tmp_path / "one", adapter_name="c")


def test_files_say_what_they_are_of(tmp_path):
    lowrank.save_adapter(adapted(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["lowrank"])
    name = "model.layers.0.self_attn.q_proj"
    assert facts["layers"][name]["k"] == 8
    assert len(facts["layers"][name]["weight"]) == 64
    assert facts["order"] == "descending singular values"


def test_files_of_other_models_are_refused(tmp_path):
    lowrank.save_adapter(adapted(), tmp_path)
    for model in (llama(seed=1), llama(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"experts of another weight: model\.layers\.0"):
            lowrank.load_adapter(model, tmp_path)
        assert not svf_layers(model)
    with pytest.raises(ValueError, match="has k=8, free"):
        lowrank.load_adapter(lowrank.adapt(llama(), SVFConfig(k=4)), tmp_path)
    with pytest.raises(ValueError, match="on one side only"):
        lowrank.load_adapter(lowrank.adapt(llama(), SVFConfig(k=8, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ValueError, match="target_modules"):
        lowrank.load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lowrank.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_exported_as_the_lora_it_is(tmp_path, normalize):
    peft = pytest.importorskip("peft")
    model = adapted(normalize=normalize, experts=("default", "b"), target_modules=["q_proj", "gate_proj"])
    want = logits(model)
    lowrank.save_adapter(model, tmp_path, format="lora")
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(lowrank.load_adapter(llama(), tmp_path)), want, rtol=1e-4, atol=1e-5)
    full = adapted(k=None, normalize=normalize)
    lowrank.save_adapter(full, tmp_path, format="lora", adapter_name="default")
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(plain), logits(full), rtol=1e-3, atol=1e-4)


def stored(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        stored,
        *(lambda m, protocol=protocol: pickle.loads(pickle.dumps(m, protocol)) for protocol in (0, 2, 5)),
        lambda m: pickle.loads(ForkingPickler.dumps(m)),  # how another process is given it
    ],
    ids=["deepcopy", "torch.save", "pickle 0", "pickle 2", "pickle 5", "multiprocessing"],
)
def test_copies_and_pickles_are_models_with_experts(copied, tmp_path):
    model = adapted(experts=("default", "b"), k=None, mode="merged")
    want = logits(model)
    model.save_pretrained(tmp_path / "original")  # and with what has been computed for it
    with lowrank.expert_mix(model, torch.ones(2)):
        other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(logits(other), want)
    assert other.active_expert == "b"
    with torch.no_grad():
        for layer in svf_layers(other).values():
            layer.z["b"].mul_(2)
            layer.base_layer.weight.mul_(1.01)
    shared = all(map(torch.equal, model.parameters(), other.parameters()))  # a process gets the same memory
    assert torch.equal(logits(model), logits(other) if shared else want)
    assert not torch.equal(logits(other), want)
    other.set_expert("default")
    other(IDS, labels=IDS).loss.backward()
    assert all(layer.z["default"].grad.any() for layer in svf_layers(other).values())
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="experts of another weight"):
        lowrank.load_adapter(llama(), tmp_path / "other")
    assert type(other.merge_and_unload()) is LlamaForCausalLM


@pytest.mark.parametrize("name", ["a.b", "", 3, "keys", "training", "type", "setdefault"])
def test_a_name_that_cannot_be_an_experts_changes_nothing(tmp_path, name):
    model, fresh = adapted(), llama()
    model.save_pretrained(tmp_path)
    first = next(iter(svf_layers(model).values()))
    trained = [p.requires_grad for p in fresh.parameters()]
    for call in (
        lambda: model.add_expert(name),
        lambda: first.rename_expert("default", name),
        lambda: lowrank.adapt(fresh, SVFConfig(), name),
        lambda: lowrank.load_adapter(fresh, tmp_path, name),
        lambda: lowrank.load_adapter(model, tmp_path, name),
    ):
        with pytest.raises((ValueError, TypeError), match="name: "):
            call()
    assert {tuple(layer.experts) for layer in svf_layers(model).values()} == {("default",)}
    assert not svf_layers(fresh)
    assert trained == [p.requires_grad for p in fresh.parameters()]
    first.add_expert("b")
    with pytest.raises(ValueError, match="there is an expert 'b'"):
        model.add_expert("b")
    assert sum("b" in layer.z for layer in svf_layers(model).values()) == 1


def test_a_file_says_which_weights_the_experts_are_of_when_it_is_written(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "before")
    for layer in svf_layers(model).values():
        layer.base_layer.weight.data = layer.base_layer.weight * 1.01
    model.save_pretrained(tmp_path / "after")
    with pytest.raises(ValueError, match="experts of another weight"):
        lowrank.load_adapter(llama(), tmp_path / "after")
    with pytest.raises(ValueError, match="experts of another weight"):
        lowrank.load_adapter(model, tmp_path / "before")


def test_another_process_loads_a_pickle_by_names_it_can_import(tmp_path):
    models = lowrank.adapt(nn.Sequential(nn.Linear(8, 8)), SVFConfig()), nn.Sequential(SVFLinear(8, 8))
    x = torch.randn(3, 8)
    torch.save([(m, x, m(x).detach()) for m in models], tmp_path / "models.pt")
    load = (
        "import sys, torch; assert all(torch.equal(m(x), y) for m, x, y in torch.load(sys.argv[1], weights_only=False))"
    )
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "models.pt")], check=True)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(16) * (i % 3 + 3) + i) % 100
        return {"input_ids": ids, "labels": ids}


def trainer(model, out, steps, **options):
    arguments = dict(
        max_steps=steps, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True, seed=3,
        save_steps=4, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
    ) | options  # fmt: skip
    arguments = TrainingArguments(str(out), **arguments)
    return Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data())


def test_trainer_saves_resumes_and_reloads_the_best(tmp_path):
    whole = adapted()
    trainer(whole, tmp_path / "a", 8).train()
    assert not (tmp_path / "a/checkpoint-4/config.json").exists()
    assert (tmp_path / "a/checkpoint-4/model.safetensors").stat().st_size < 10_000
    resumed = adapted()
    trainer(resumed, tmp_path / "b", 8).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert torch.equal(logits(resumed), logits(whole))
    best = adapted()
    options = dict(eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, learning_rate=3.0)
    run = trainer(best, tmp_path / "c", 8, **options)
    run.train()
    best_step = run.state.best_model_checkpoint
    assert torch.equal(logits(best), logits(lowrank.load_adapter(llama(), best_step)))


def test_save_pretrained_and_state_dicts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    other, z = lowrank.adapt(llama(), SVFConfig(k=8)), {k: v for k, v in model.state_dict().items() if ".z." in k}
    found = other.load_state_dict(z)
    assert not found.missing_keys
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(dict(list(z.items())[:3]))
    other.load_state_dict(model.state_dict())


def test_layers_put_in_by_hand(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    plain = [m for m in model if isinstance(m, nn.Linear)]
    model[0] = SVFLinear.from_linear(plain[0], 3)
    with torch.no_grad():
        model[0].z["default"].mul_(2)
    x = torch.randn(5, 8)
    want = model(x)
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(nn.Sequential(plain[0], nn.ReLU(), plain[1]), tmp_path)
    assert torch.equal(again(x), want)


SMALL = dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0)


def classifier(seed=0, labels=3, cls="LlamaForSequenceClassification"):
    torch.manual_seed(0)
    model = getattr(transformers, cls)(LlamaConfig(hidden_size=64, num_key_value_heads=2, num_labels=labels, **SMALL))
    torch.manual_seed(seed)  # the head is new in every process
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def trained_classifier(experts=("default",), **options):
    model = lowrank.adapt(classifier(**options), SVFConfig(k=8))
    for name in experts[1:]:
        model.add_expert(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".z." in name or ".modules_to_save." in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("cls", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_new_head_is_trained_saved_and_loaded_where_another_was_made(tmp_path, cls):
    plain = classifier(cls=cls)
    model = lowrank.adapt(plain, SVFConfig(k=8))
    assert torch.equal(logits(model), logits(classifier(cls=cls)))
    model(IDS, labels=torch.ones(IDS.shape[: 1 if "Sequence" in cls else 2]).long()).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    head = {name for name, _ in plain.named_parameters() if name.startswith("score.modules_to_save.default.")}
    assert got == {f"{name}.z.default" for name in svf_layers(model)} | head
    assert len(svf_layers(model)) == 14
    assert isinstance(model.score.weight, nn.Parameter)
    model = trained_classifier(cls=cls)
    want = logits(model)
    model.save_pretrained(tmp_path)
    other = lowrank.load_adapter(classifier(5, cls=cls), tmp_path, "mine")
    assert torch.equal(logits(other), want)
    assert not any(p.requires_grad for p in other.parameters())
    again = lowrank.load_adapter(
        lowrank.adapt(classifier(6, cls=cls), SVFConfig(k=8)), tmp_path, "mine", is_trainable=True
    )
    assert torch.equal(logits(again), want)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name.replace("default", "mine") for name in got
    }
    again.set_expert("default")
    assert torch.equal(logits(again), logits(classifier(6, cls=cls)))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(classifier(6, cls=cls)))


@pytest.mark.parametrize(
    "cls",
    [
        "DistilBertForSequenceClassification",
        "BertForTokenClassification",
        "RobertaForSequenceClassification",
        "BertForQuestionAnswering",
    ],
)
def test_the_heads_are_those_that_peft_trains(cls):
    peft = pytest.importorskip("peft")
    make = getattr(transformers, cls)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    if "Distil" in cls:
        sizes = dict(dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    model = make(make.config_class(vocab_size=100, **sizes))
    task = {"Seq": "SEQ_CLS", "Tok": "TOKEN_CLS", "Que": "QUESTION_ANS"}[cls.partition("For")[2][:3]]
    by_peft = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(task_type=task, target_modules=["query", "q_lin"])
    )
    mark = ".modules_to_save."
    expected = {name.removeprefix("base_model.model.") for name, _ in by_peft.named_parameters() if mark in name}
    ours = lowrank.adapt(model, SVFConfig(k=2))
    assert {name for name, _ in ours.named_parameters() if mark in name} == expected
    assert not any(name.startswith(("classifier", "pre_classifier", "qa_outputs")) for name in svf_layers(ours))


def test_modules_to_save_by_name(tmp_path):
    model = lowrank.adapt(llama(), SVFConfig(k=4, modules_to_save=["embed_tokens", "1.mlp"]))
    assert set(saved_modules(model)) == {"model.embed_tokens", "model.layers.1.mlp"}
    assert len(svf_layers(model)) == 11
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.any()
    assert model.get_input_embeddings().weight.grad.any()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    want = logits(model)
    lowrank.save_adapter(model, tmp_path)
    assert torch.equal(logits(lowrank.load_adapter(llama(), tmp_path)), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)
    with pytest.raises(ValueError, match="trained as a whole on one side only"):
        lowrank.load_adapter(
            lowrank.adapt(llama(), SVFConfig(k=4, target_modules=exact_names(svf_layers(model)))), tmp_path
        )
    merged = model.merge_and_unload()
    assert type(merged.model.layers[1].mlp).__name__ == "LlamaMLP"
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    without = lowrank.adapt(classifier(), SVFConfig(k=3, modules_to_save=[]))
    assert isinstance(without.score, SVFLinear)
    both = lowrank.adapt(classifier(), SVFConfig(k=4, modules_to_save=["embed_tokens"]))
    assert set(saved_modules(both)) == {"model.embed_tokens", "score"}
    plain = llama()
    for names, kind, message in (
        (["nothing"], ValueError, "modules_to_save: no module of LlamaForCausalLM is called 'nothing'"),
        ("score", TypeError, "modules_to_save: expected None or a list of names"),
        ([3], TypeError, "modules_to_save: expected None or a list of names"),
        (["layers"], ValueError, "matches nothing outside modules_to_save"),
    ):
        with pytest.raises(kind, match=message):
            lowrank.adapt(plain, SVFConfig(k=4, modules_to_save=names))
    assert all(p.requires_grad for p in plain.parameters())


def test_every_expert_has_a_head_of_its_own(tmp_path):
    model = trained_classifier(("default", "b"))
    assert model.active_expert == "b"
    want = {}
    for name in ("default", "b"):
        model.set_expert(name)
        want[name] = logits(model)
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "score" in n} == {name}
    assert not torch.equal(want["default"], want["b"])
    lowrank.save_adapter(model, tmp_path / "both")
    lowrank.save_adapter(model, tmp_path / "one", adapter_name="default")
    both = lowrank.load_adapter(classifier(3), tmp_path / "both")
    for name in ("default", "b"):
        both.set_expert(name)
        assert torch.equal(logits(both), want[name])
    one = lowrank.load_adapter(classifier(4), tmp_path / "one", "math")
    assert torch.equal(logits(one), want["default"])
    one = lowrank.load_adapter(one, tmp_path / "both")
    assert sorted(one.score.modules_to_save) == ["b", "default", "math"]
    assert torch.equal(logits(one), want["default"])
    one.set_expert("b")
    assert torch.equal(logits(one), want["b"])
    assert list(lowrank.adapt(classifier(), SVFConfig(k=8), "math").score.modules_to_save) == ["math"]
    merged = both.merge_and_unload()
    assert type(merged.score) is nn.Linear
    torch.testing.assert_close(logits(merged), want["b"], rtol=1e-4, atol=1e-5)


def test_a_head_of_another_size_is_refused_and_the_model_left_alone(tmp_path):
    lowrank.save_adapter(trained_classifier(), tmp_path)
    other = classifier(labels=5)
    with pytest.raises(
        ValueError, match=r"score\.modules_to_save\.default\.weight is \[3, 64\], the model's \[5, 64\]"
    ):
        lowrank.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="it has score, which LlamaForCausalLM lacks"):
        lowrank.load_adapter(llama(), tmp_path)
    assert not svf_layers(other)
    assert all(p.requires_grad for p in other.parameters())


def test_a_head_goes_along_into_a_lora_file(tmp_path):
    peft = pytest.importorskip("peft")
    model = trained_classifier(("default", "b"))
    want = logits(model)
    lowrank.save_adapter(model, tmp_path, format="lora")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(classifier(5), tmp_path)), want, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(logits(lowrank.load_adapter(classifier(6), tmp_path)), want, rtol=1e-4, atol=1e-5)


class Labelled(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"input_ids": (torch.arange(16) * (i % 3 + 3) + i) % 100, "labels": i % 3}


def test_trainer_resumes_a_head(tmp_path):
    def run(model, out, steps):
        run = trainer(model, out, steps)
        run.train_dataset = Labelled()
        return run

    whole = lowrank.adapt(classifier(), SVFConfig(k=8))
    run(whole, tmp_path / "a", 8).train()
    resumed = lowrank.adapt(classifier(), SVFConfig(k=8))
    run(resumed, tmp_path / "b", 8).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert torch.equal(logits(resumed), logits(whole))
    assert not torch.equal(resumed.score.weight, classifier().score.weight)
    found = lowrank.load_adapter(classifier(9), tmp_path / "a/checkpoint-8")
    assert torch.equal(logits(found), logits(whole))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=32, vocab_size=100, num_hidden_layers=2, state_size=4))


def fast_path():
    return nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval()


@pytest.mark.parametrize(
    ("make", "inputs", "names"),
    [
        (mamba, (IDS,), {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}),
        (lambda: nn.MultiheadAttention(16, 4), (torch.ones(3, 2, 16),) * 3, {"out_proj"}),
        (lambda: nn.TransformerEncoderLayer(16, 4, 32), (torch.ones(3, 2, 16),), {"self_attn.out_proj"}),
        (fast_path, (torch.ones(3, 2, 16),), {"0.self_attn.out_proj", "0.linear1", "0.linear2"}),
    ],
    ids=["mamba", "attention", "encoder", "fast path"],
)
def test_layers_whose_weight_is_read_are_named(make, inputs, names):
    torch.manual_seed(0)
    model = lowrank.adapt(make(), SVFConfig())
    with torch.no_grad(), pytest.warns(UserWarning, match="reads the weight of adapted layers") as said:
        model(*inputs)
    assert all(name in str(said[-1].message) for name in names)
    assert lowrank.stats(model)["untouched"] == {"nn.SVFLinear": len(names)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(*inputs)  # once
    other = pickle.loads(pickle.dumps(model))
    assert lowrank.stats(other)["untouched"] == {}
    with torch.no_grad(), pytest.warns(UserWarning, match="reads the weight of adapted layers"):
        other(*inputs)
    if make is fast_path:  # in training torch calls its linears
        model.train()(*inputs)
        assert lowrank.stats(model)["untouched"] == {"nn.SVFLinear": 1}
    merged = model.merge_and_unload()
    assert not merged._forward_hooks
    assert lowrank.stats(merged)["untouched"] == {}


def test_layers_whose_dtype_is_asked_are_not():
    from transformers import T5Config, T5ForConditionalGeneration

    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            y = self.proj(x)
            return y.to(self.proj.weight.dtype)

    sizes = dict(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=100, decoder_start_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lowrank.adapt(T5ForConditionalGeneration(T5Config(**sizes)), SVFConfig())
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            svf_layers(model)["encoder.block.0.layer.0.SelfAttention.q"].weight.norm()  # by a user
        after = lowrank.adapt(After(), SVFConfig())
        for _ in range(2):
            after(torch.ones(2, 8))
    assert lowrank.stats(model)["untouched"] == lowrank.stats(after)["untouched"] == {}


class Float(nn.Linear):
    pass


class OwnForward(nn.Linear):  # as FalconLinear
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x @ self.weight.T + self.bias


class Quantised(nn.Linear):  # HQQ's interface, as PEFT knows it
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter((self.weight.detach() * 99).round().to(torch.int8), requires_grad=False)
        self.W_q = None

    def dequantize(self):
        return self.weight.float() / 99

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


def scaled(*layers, **config):
    torch.manual_seed(0)
    model = lowrank.adapt(nn.Sequential(*(make(8, 8) for make in layers)), SVFConfig(**config))
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.z["default"].add_(0.3 * torch.randn_like(layer.z["default"]))
    return model


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("kind", [nn.Linear, Float, OwnForward])
def test_a_subclass_with_a_float_weight_is_no_quantised_one(kind, k):
    model, x = scaled(nn.Linear, kind, k=k), torch.randn(5, 8, requires_grad=True)
    want = model(x)
    want.sum().backward()
    assert all(layer.z["default"].grad.any() for layer in model)
    if kind is OwnForward:
        assert model[1].base_layer.calls == 1
    model[1].merge()
    torch.testing.assert_close(model(x), want)
    if kind is OwnForward:
        assert model[1].base_layer.calls == 2
    merged = model.merge_and_unload()
    assert [type(layer) for layer in merged] == [nn.Linear, kind]
    torch.testing.assert_close(merged(x), want)


def test_a_replaced_forward_is_called():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias) + 1
    x = torch.randn(5, 8)
    want = linear(x)
    torch.testing.assert_close(lowrank.adapt(nn.Sequential(linear), SVFConfig())(x), want)


@pytest.mark.parametrize("mode", ["merged", "activation"])
def test_a_forward_of_its_own_needs_mode_delta_and_the_model_is_left_alone(mode):
    model = nn.Sequential(nn.Linear(8, 8), OwnForward(8, 8))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=f"1: mode: '{mode}' needs .* over OwnForward use 'delta'"):
        lowrank.adapt(model, SVFConfig(mode=mode))
    assert [type(layer) for layer in model] == [nn.Linear, OwnForward]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_models_of_torch_merge():
    torch.manual_seed(0)
    model = lowrank.adapt(
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), SVFConfig(target_modules=["linear1", "linear2"])
    )
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.z["default"].mul_(1.5)
    x = torch.randn(5, 2, 16)
    want = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), want)
    model = lowrank.adapt(nn.TransformerEncoderLayer(16, 4, 32), SVFConfig())
    assert not svf_layers(model.merge_and_unload())


@pytest.mark.parametrize("why", ["quantised", "nan", "strict", "parametrized"])
def test_merging_is_all_or_nothing(why):
    pytest.importorskip("peft")
    model, x = scaled(nn.Linear, Float, Quantised if why == "quantised" else nn.Linear), torch.randn(5, 8)
    context, last = contextlib.nullcontext(), model[2]
    if why == "nan":
        with torch.no_grad():
            last.z["default"][1] = torch.nan
    elif why == "strict":
        context = lowrank.strict()
        model.bfloat16()
        with torch.no_grad():
            last.z["default"].fill_(1 + 1e-6)
        x = x.bfloat16()
    elif why == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(last.base_layer)
        last.base_layer.requires_grad_(False)
    weights = [layer.base_layer.weight.clone() for layer in model]
    y = model(x) if why != "nan" else None
    with context, pytest.raises(ValueError, match=r"^2: "):
        model.merge_and_unload()
    assert len(svf_layers(model)) == 3
    assert not any(layer.merged for layer in svf_layers(model).values())
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(model, weights, strict=True))
    assert model.active_expert == "default"
    if why != "nan":
        assert torch.equal(model(x), y)


@pytest.mark.slow
def test_a_4_bit_base():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4"))
    model[0].weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    model = model.to("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    plain = model(x)
    adapted = lowrank.adapt(model, SVFConfig(k=8))
    torch.testing.assert_close(adapted(x), plain)
    with torch.no_grad():
        adapted[0].z["default"].mul_(1.5)
    dense = dense_weight(adapted[0].base_layer, exact=True)
    want = torch.nn.functional.linear(x, dense + adapted[0].get_delta_weight(), adapted[0].bias)
    torch.testing.assert_close(adapted(x), want, rtol=1e-3, atol=1e-3)
    adapted(x).sum().backward()
    assert adapted[0].z["default"].grad is not None
    with pytest.raises(ValueError, match="requantising"):
        adapted[0].merge()


def four_bit(bnb, nested, dtype=torch.float32, storage=torch.uint8, kind="nf4"):
    torch.manual_seed(0)
    options = dict(quant_type=kind, compress_statistics=nested, quant_storage=storage)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, **options)
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128, dtype=dtype), requires_grad=False, module=layer, **options)
    return nn.Sequential(layer).to("cpu").eval()


def repack(bnb, model):
    """What bitsandbytes does at the first inference on a CPU that has instructions for bfloat16."""
    weight = model[0].weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        packed = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        weight.data, weight.quant_state = packed
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_4_bit_weight_is_the_same_before_and_after_it_is_repacked(tmp_path, nested, kind, storage, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    make = lambda: four_bit(bnb, nested, dtype, storage, kind)  # noqa: E731
    plain = make()
    before, exact = dense_weight(plain[0]), dense_weight(plain[0], exact=True)
    assert before.dtype is exact.dtype is dtype
    assert error(before, exact) < 4e-3  # two roundings to 8 bits
    assert torch.equal(dense_weight(repack(bnb, make())[0]), before)
    with pytest.raises(ValueError, match="bitsandbytes has repacked its weight"):
        dense_weight(repack(bnb, make())[0], exact=True)
    model = lowrank.adapt(make(), SVFConfig(k=8))
    with torch.no_grad():
        model[0].z["default"].mul_(1.5)
    lowrank.save_adapter(model, tmp_path / "before")
    save_factors(make(), tmp_path / "factors", progress=False)
    again = lowrank.load_adapter(repack(bnb, make()), tmp_path / "before")  # after, from before
    for a, b in zip(again[0].factors, model[0].factors, strict=True):
        assert torch.equal(a, b)
        assert a.dtype is b.dtype
    lowrank.save_adapter(again, tmp_path / "after")
    lowrank.load_adapter(make(), tmp_path / "after")
    lowrank.load_adapter(model, tmp_path / "after", "other")
    load_factors(tmp_path / "factors", repack(bnb, make()))
    repack(bnb, nn.Sequential(model[0].base_layer))
    x = torch.randn(5, 128, dtype=dtype)
    if again[0].base_layer.support_avx512bf16_for_cpu:
        assert torch.equal(again(x), model(x))
    model[0].base_layer.state_dict()  # bitsandbytes packs back here, which need not give the same scales
    lowrank.save_adapter(model, tmp_path / "stored")
    lowrank.load_adapter(make(), tmp_path / "stored")


def test_files_of_the_exact_4_bit_weight_load(tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    from lowrank.nn import svf as module

    with monkeypatch.context() as old:  # what lowrank 0.1 wrote
        old.setattr(module, "dense_weight", lambda layer: dense_weight(layer, exact=True))
        model = lowrank.adapt(four_bit(bnb, True), SVFConfig(k=8))
    with torch.no_grad():
        model[0].z["default"].mul_(1.5)
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(four_bit(bnb, True), tmp_path)
    assert torch.equal(again[0].U, model[0].U)
    lowrank.save_adapter(again, tmp_path)
    lowrank.load_adapter(four_bit(bnb, True), tmp_path)
    with pytest.raises(ValueError, match="experts of another weight"):
        lowrank.load_adapter(repack(bnb, four_bit(bnb, True)), tmp_path)


def test_conv1d_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    plain = GPT2LMHeadModel(config).eval()
    want = logits(plain)
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    model = lowrank.adapt(plain, SVFConfig(k=8))
    assert torch.equal(logits(model), want)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.z["default"].mul_(1.5)
    tuned = logits(model)
    assert not torch.allclose(tuned, want, atol=1e-3)
    lowrank.save_adapter(model, tmp_path)
    other = GPT2LMHeadModel(config).eval()
    other.load_state_dict(state)
    assert torch.equal(logits(lowrank.load_adapter(other, tmp_path)), tuned)
    torch.testing.assert_close(logits(model.merge_and_unload()), tuned, rtol=1e-3, atol=1e-4)


def test_factors_from_a_file(tmp_path):
    file = tmp_path / "factors.safetensors"
    save_factors(llama(), file, progress=False)
    model = lowrank.adapt(llama(), SVFConfig(k=8, factors=str(file)))
    S = lowrank.svd_factors(llama().model.layers[0].mlp.up_proj.weight).S
    assert torch.equal(model.model.layers[0].mlp.up_proj.S, S[:8])
    with pytest.raises(ValueError, match="factors of another weight"):
        lowrank.adapt(llama(seed=1), SVFConfig(k=8, factors=str(file)))
    save_factors(llama(), file, k=4, target_modules=["q_proj"], progress=False)
    with pytest.raises(ValueError, match="has none for"):
        lowrank.adapt(llama(), SVFConfig(k=4, factors=str(file)))
    with pytest.raises(ValueError, match=r"has 4 directions of .*, 8 are asked"):
        lowrank.adapt(llama(), SVFConfig(k=8, target_modules=["q_proj"], factors=str(file)))
