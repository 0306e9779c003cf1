"""TRL's own trainers, a few real steps each on a tiny Llama, against TRL alone and against full logits through PEFT's layer."""

import copy
import functools
import itertools
import types

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
trl = pytest.importorskip("trl")
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from right import in_the_mean
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer, sft_trainer, utils
from trl.trainer.utils import FusedCausalLMOutput

import lowrank
from lowrank import _stats
from lowrank.integrations import peft as peft_integration
from lowrank.integrations.trl import patch, unpatch
from lowrank.testing import error

TEXT = ["one two three four", "two three one", "four one two two three", "three two"]
HEAD = dict(r=4, lora_alpha=12, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
ALL = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # TRL's buffers are its own
    yield
    torch.set_num_threads(threads)
    unpatch()
    peft_integration.unpatch()
    lowrank.strict(False)


@functools.cache
def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=64, special_tokens=["<s>", "</s>", "<pad>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama(dtype=torch.float32, seed=0, **kwargs):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    torch.manual_seed(seed)
    config = LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.2, **kwargs)
    return LlamaForCausalLM(config).to(dtype)


def tuned(model=None, **config):
    torch.manual_seed(1)
    model = get_peft_model(model or llama(), LoraConfig(task_type="CAUSAL_LM", **(HEAD | config)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.3)
    return model


COMMON = dict(
    max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
    save_strategy="no", disable_tqdm=True, seed=3, lr_scheduler_type="constant",
)  # fmt: skip


def reward(completions, **_):
    return [float(len(set(text))) for text in completions]


def grpo(model, folder, **options):
    config = dict(num_generations=4, max_completion_length=6, temperature=0.7, beta=0.05) | options
    return made(trl.GRPOTrainer, trl.GRPOConfig, model, folder, {"prompt": TEXT}, config, reward_funcs=reward)


def rloo(model, folder, **options):
    config = dict(num_generations=4, max_completion_length=6, temperature=0.7, beta=0.05) | options
    return made(trl.RLOOTrainer, trl.RLOOConfig, model, folder, {"prompt": TEXT}, config, reward_funcs=reward)


def sft(model, folder, **options):
    data = {"prompt": [t[:4] for t in TEXT], "completion": [t[4:] for t in TEXT]}
    return made(trl.SFTTrainer, trl.SFTConfig, model, folder, data, dict(max_length=32) | options)


def dpo(model, folder, **options):
    data = {"prompt": TEXT, "chosen": TEXT[::-1], "rejected": [t[::-1] for t in TEXT]}
    return made(trl.DPOTrainer, trl.DPOConfig, model, folder, data, dict(max_length=32) | options)


def kto(model, folder, **options):
    data = {"prompt": TEXT, "completion": TEXT[::-1], "label": [True, False] * 2}
    return made(trl.KTOTrainer, trl.KTOConfig, model, folder, data, dict(max_length=32) | options)


def made(trainer, config, model, folder, data, options, **more):
    args = config(output_dir=str(folder), **(COMMON | options))
    data = Dataset.from_dict(data)
    return trainer(model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


TRAINERS = {"grpo": grpo, "sft": sft, "dpo": dpo, "rloo": rloo, "kto": kto}
MODULES = {"grpo": grpo_trainer, "sft": sft_trainer, "dpo": dpo_trainer, "rloo": rloo_trainer, "kto": kto_trainer}
MEASURED = (
    "loss", "grad_norm", "entropy", "kl", "mean_token_accuracy", "reward", "rewards/chosen", "logits/chosen",
    "logits/rejected", "logps/chosen",
)  # fmt: skip


def trained(make, model, folder, **options):
    """(what was logged, step by step; every trained weight)."""
    trainer = make(model, folder, **options)
    trainer.train()
    log = [[entry[k] for k in MEASURED if k in entry] for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == trainer.args.max_steps
    return torch.tensor(log), {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def agree(ours, trl_run):
    (log, weights), (their_log, their_weights) = ours, trl_run
    torch.testing.assert_close(log, their_log, rtol=1e-4, atol=2e-5)
    assert weights.keys() == their_weights.keys()
    for name, weight in weights.items():  # Adam divides by the gradient's size: a gradient of rounding moves it whole
        close = torch.isclose(weight, their_weights[name], rtol=1e-4, atol=1e-4)
        assert close.double().mean() > 0.995, name


def full_logits(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    """add_fused_lm_head by way of all logits, as the model's own forward makes them."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            return original(*args, **kwargs)
        config, z = self.config, original(*args, **kwargs).logits
        if shift_labels is None:
            z, shift_labels = z[:, :-1], labels[:, 1:]
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * (getattr(config, "logit_scale", None) or 1.0)
        if getattr(config, "final_logit_softcapping", None):
            z = (z / config.final_logit_softcapping).tanh() * config.final_logit_softcapping
        z, mask = z / temperature, shift_labels != -100
        logp, targets = z.log_softmax(-1), shift_labels.clamp(min=0)
        outs = {
            "log_probs": logp.gather(-1, targets[..., None])[..., 0],
            "entropy": -(logp.exp() * logp).sum(-1),
            "mean_logits": z.detach().mean(-1),
            "is_top1": z.argmax(-1) == targets,
        }
        outs = {name: x.masked_fill(~mask, 0) for name, x in outs.items() if name in outputs}
        items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-outs["log_probs"].sum() / items, label_mask=mask, **outs)

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("lora", [False, True])
def test_a_trainer_as_without_the_patch(name, lora, tmp_path):
    llama(tie_word_embeddings=name == "sft").save_pretrained(tmp_path)  # where TRL finds the reference model

    def make():
        model = LlamaForCausalLM.from_pretrained(tmp_path)
        return tuned(model, target_modules=["q_proj", "up_proj"]) if lora else model

    trl_run = trained(TRAINERS[name], make(), tmp_path)
    patch()
    with lowrank.strict():
        ours = trained(TRAINERS[name], make(), tmp_path)
    agree(ours, trl_run)
    assert lowrank.stats()["fused"] >= 3
    assert lowrank.stats()["fallback"] == {}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_lora_on_the_head_trains(name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        TRAINERS[name](tuned(), tmp_path)
    patch()
    with lowrank.strict():
        ours = trained(TRAINERS[name], tuned(), tmp_path)
    assert lowrank.stats()["fused"] >= 3
    before = dict(tuned().named_parameters())
    head = [n for n in ours[1] if "lm_head" in n]
    assert len(head) == 2
    assert all((ours[1][n] - before[n]).abs().max() > 1e-3 for n in head)
    monkeypatch.setattr(MODULES[name], "add_fused_lm_head", full_logits)
    agree(ours, trained(TRAINERS[name], tuned(), tmp_path))


def test_beside_pefts_patch(tmp_path):
    patch()
    trl_run = trained(sft, tuned(), tmp_path)
    peft_integration.patch()
    model = tuned()
    agree(trained(sft, model, tmp_path), trl_run)
    head = model.get_output_embeddings()
    assert lowrank.stats(head)["fused"] == 3
    assert lowrank.stats(model)["fused"] == 3 + 3 * 2 * 2  # and q_proj of two layers, computed again for backward


IDS = torch.arange(24).view(2, 12) * 7 % 61 + 3
LABELS = IDS.masked_fill(torch.arange(12) % 5 == 2, -100)


def called(model, add, outputs=ALL, autocast=False, shift=False, **options):
    """Outputs and gradients by name, of one forward and backward of a copy with a head fused by ``add``."""
    model = copy.deepcopy(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add(base, outputs=outputs, **options)
    labels = {"shift_labels": LABELS} if shift else {"labels": LABELS}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=IDS, fused_lm_head=True, **labels)
    loss = out.loss + (torch.linspace(0.5, 1, out.log_probs.numel()) * out.log_probs.flatten()).sum()
    if out.entropy is not None:
        loss = loss + 0.3 * out.entropy.square().sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    outs = {k: out[k] for k in ("loss", *outputs, "label_mask")}
    return {k: v.detach() for k, v in outs.items() if v is not None}, grads


def same(ours, trl_run, bound=1e-5):
    """In norm, tensor by tensor; fp32 rounds at 6e-8, and softmax's gradient amplifies it."""
    for own, reference in zip(ours, trl_run, strict=True):
        assert own.keys() == reference.keys()
        for name in own:
            if own[name].dtype is torch.bool:
                assert torch.equal(own[name], reference[name]), name
            else:
                assert error(own[name], reference[name].double()) <= bound, name


def fuse():
    patch()
    return sft_trainer.add_fused_lm_head


MODELS = {
    "frozen head": lambda: tuned(target_modules=["q_proj"]),
    "trained head": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "scaled and capped": lambda: tuned(llama(logit_scale=0.4, final_logit_softcapping=3.0), target_modules=["q_proj"]),
    "modules_to_save": lambda: tuned(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_a_plain_head_as_trl_has_it(model, temperature, shift, cast):
    outputs = ("log_probs", "entropy", "is_top1") if model == "scaled and capped" else ALL
    options = dict(outputs=outputs, temperature=temperature, shift=shift, cast_lm_head_to_fp32=cast)
    model = MODELS[model]()
    trl_run = called(model, utils.add_fused_lm_head, **options)
    with lowrank.strict():
        same(called(model, fuse(), **options), trl_run)
    assert lowrank.stats()["fused"] == 1


def two_adapters():
    model = tuned()
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def other_adapter():
    model = two_adapters()
    model.set_adapter("second")
    return model


def disabled():
    model = tuned()
    model.base_model.disable_adapter_layers()
    return model.requires_grad_(True)


def merged():
    model = tuned()
    model.merge_adapter()
    return model.requires_grad_(True)


LORAS = {
    "plain": tuned,
    "rslora": lambda: tuned(use_rslora=True),
    "bias": lambda: tuned(lora_bias=True),
    "tied": lambda: tuned(llama(tie_word_embeddings=True)),
    "scaled and capped": lambda: tuned(llama(logit_scale=0.4, final_logit_softcapping=3.0)),
    "two adapters": two_adapters,
    "another adapter": other_adapter,
    "disabled": disabled,
    "merged": merged,
    "patched": lambda: peft_integration.patch(tuned()),
}


@pytest.mark.parametrize("model", LORAS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_lora_on_the_head_is_as_full_logits(model, temperature):
    outputs = ("log_probs", "entropy", "is_top1") if model == "scaled and capped" else ALL
    model, options = LORAS[model]().double(), dict(temperature=temperature, outputs=outputs)
    trl_run = called(model, full_logits, **options)
    with lowrank.strict():
        same(called(model, fuse(), **options), trl_run, 1e-12)


def test_adapters_are_looked_up_at_each_call():
    model = two_adapters()
    fuse()(model.get_base_model(), outputs=ALL)

    def logp(model):
        with torch.no_grad():
            out = model(input_ids=IDS, labels=IDS, fused_lm_head=True)
            h = (
                model.get_base_model().model(input_ids=IDS).last_hidden_state
            )  # a copy's plain forward is the original's
            z = model.get_output_embeddings()(h)[:, :-1].log_softmax(-1)
        torch.testing.assert_close(out.log_probs, z.gather(2, IDS[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-5)
        return out.log_probs

    both = logp(model)
    model.set_adapter("default")
    assert not torch.allclose(logp(model), both)
    with model.disable_adapter():
        base = logp(model)
    model.get_output_embeddings().set_scale("default", 9.0)
    assert not torch.allclose(logp(model), base)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().lora_A["default"].weight.zero_()
    assert not torch.allclose(logp(other), logp(model))


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_is_as_right_as_full_logits(autocast):
    """fp32 adapters over bf16: where PEFT's layer rounds the logits to bf16, ours does not."""
    seeds, add = itertools.count(), fuse()

    def draw():
        model = tuned(llama(torch.float32 if autocast else torch.bfloat16, next(seeds)))
        runs = called(model, add, autocast=autocast), called(model, full_logits, autocast=autocast)
        runs = [values | grads for values, grads in (*runs, called(copy.deepcopy(model).double(), full_logits))]
        return [[of[name] for name in names] for of in runs]

    values, grads = called(tuned(), add)
    names = [name for name in values | grads if name in ("log_probs", "entropy") or "lm_head" in name]
    assert len(names) == 4
    in_the_mean(draw, names, 48)  # of 22 log-probabilities each


def test_rows_that_count_alone(monkeypatch):
    """As on a GPU, where TRL hands over only those; none of them too."""
    model = tuned()
    trl_run = called(model, full_logits)
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    same(called(model, fuse()), trl_run)
    monkeypatch.setattr(f"{__name__}.LABELS", torch.full_like(LABELS, -100))
    out, grads = called(model, fuse())
    assert out["loss"] == 0
    assert all(g.abs().max() == 0 for g in grads.values())


def test_top1_of_ties():
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    trl_run = called(model, utils.add_fused_lm_head)[0]["is_top1"]
    assert not trl_run.any()  # the first of the tied is token 0, which no label is
    assert torch.equal(called(model, fuse())[0]["is_top1"], LABELS[:, 1:] != -100)


def test_what_is_not_computed_falls_back():
    capped = llama(logit_scale=0.4, final_logit_softcapping=3.0)
    for model, outputs, reason in (
        (llama(), (*ALL, "log_sum_sq_probs"), "the output log_sum_sq_probs"),
        (capped, ALL, "mean_logits of capped logits"),
    ):
        trl_run = called(model, utils.add_fused_lm_head, outputs)
        with pytest.warns(UserWarning, match=f"lowrank falls back to TRL's own code.*{reason}"):
            ours = called(model, fuse(), outputs)
        for own, reference in zip(ours, trl_run, strict=True):
            assert all(torch.equal(own[name], reference[name]) for name in reference)
        assert lowrank.stats()["fallback"][reason] == 1
        with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=reason):
            called(model, fuse(), outputs)
        unpatch()
        with pytest.raises(ValueError, match=f"lm_head: its LoRA cannot be applied by TRL's own.*{reason}"):
            called(tuned(model), fuse(), outputs)
        unpatch()


def test_a_head_sharded_by_deepspeed_falls_back():
    model = tuned(target_modules=["q_proj"])
    fuse()(model.get_base_model())
    model.get_output_embeddings().weight.ds_id = 0  # what DeepSpeed's partitioned parameters have
    with pytest.warns(UserWarning, match="falls back to TRL's own code.*ZeRO-3"):
        model(input_ids=IDS, labels=LABELS, fused_lm_head=True).loss.backward()
    assert lowrank.stats(model)["fused"] == 0


def test_refuses(tmp_path):
    patch()
    with pytest.raises(ValueError, match="lm_head: dropout on its LoRA is not supported"):
        sft(tuned(lora_dropout=0.1), tmp_path)
    grpo(tuned(lora_dropout=0.1), tmp_path, disable_dropout=True)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32: not supported with a LoRA on lm_head"):
        grpo(tuned(), tmp_path, cast_lm_head_to_fp32=True)
    with pytest.raises(ValueError, match=r"lm_head: its LoRA cannot be applied by the fused head.*DoraLinearVariant"):
        sft(tuned(use_dora=True), tmp_path)
    other = get_peft_model(llama(), IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        sft(other, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head: ia3.Linear cannot be applied by the fused head"):
        sft_trainer.add_fused_lm_head(other.get_base_model())
    model = tuned()
    fuse()(model.get_base_model())
    model.get_output_embeddings().lora_A["default"].register_forward_hook(lambda m, args, out: out * 2)
    with pytest.raises(ValueError, match=r"lm_head: its LoRA cannot be applied.*hooks on lora_A"):
        model(input_ids=IDS, labels=IDS, fused_lm_head=True)


def test_unpatch_restores(tmp_path):
    before = [(m, m.add_fused_lm_head, m.BaseTunerLayer) for m in MODULES.values()]
    original = utils.add_fused_lm_head
    patch()
    patch()
    assert all(m.add_fused_lm_head is not add for m, add, _ in before)
    trainer = sft(tuned(), tmp_path)
    unpatch()
    unpatch()
    assert all((m.add_fused_lm_head, m.BaseTunerLayer) == (add, layer) for m, add, layer in before)
    assert utils.add_fused_lm_head is original
    trainer.train()  # a trainer made in between keeps its head
    assert lowrank.stats()["fused"] == 3
    with pytest.raises(ValueError, match="Applying a PEFT adapter"):
        sft(tuned(), tmp_path)
    assert PeftLinear.forward.__qualname__ == "Linear.forward"


def test_an_unknown_trl_is_refused(monkeypatch):
    monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", None)
    with pytest.raises(
        RuntimeError, match=r"lacks trl.trainer.dpo_trainer.add_fused_lm_head: .* tested with TRL 1\.16"
    ):
        patch()
    assert sft_trainer.add_fused_lm_head is utils.add_fused_lm_head
    monkeypatch.undo()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", nn.Identity)
    with pytest.raises(RuntimeError, match=r"lacks trl.trainer.utils._ChunkedLogProbFunction"):
        patch()
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(RuntimeError, match=r"lacks trl.trainer.utils.add_fused_lm_head"):
        patch()
