"""transformers' Trainer with a PEFT model: PatchCallback's run is the unpatched run, step by step."""

import logging

import pytest
import torch

pytest.importorskip("peft")

import lowrank
from lowrank.integrations.peft import is_patched
from lowrank.integrations.transformers import PatchCallback

STEPS = 32


def peft_model(**options):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    return get_peft_model(model, LoraConfig(**dict(r=4, lora_alpha=8, target_modules="all-linear") | options))


def blocks():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(64, (256, 1), generator=generator) + torch.arange(16) * torch.randint(
        1, 4, (256, 1), generator=generator
    )
    return [{"input_ids": row, "labels": row} for row in rows % 8]


def train(folder, callbacks=(), model=None, resume=None, **options):
    """(losses of each step, the trainer)."""
    from transformers import Trainer, TrainingArguments

    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    arguments = TrainingArguments(folder, **settings | options)
    trainer = Trainer(
        model or peft_model(), arguments, train_dataset=blocks(), eval_dataset=blocks()[:16], callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def adapters(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


CASES = {
    "plain": {},
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "accumulation": dict(gradient_accumulation_steps=2),
    "bf16": dict(bf16=True),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_unpatched_runs(tmp_path, case):
    """32 steps: losses, the model's logits and all adapter weights.  bf16 autocast rounds elsewhere, so it gets bf16's room."""
    theirs, reference = train(tmp_path / "theirs", **CASES[case])
    ours, trainer = train(tmp_path / "ours", [PatchCallback()], **CASES[case])
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < theirs[0] - 0.1
    room = 3e-2 if case == "bf16" else 1e-4
    assert ours == pytest.approx(theirs, rel=room, abs=2e-4)  # the log has four digits
    found = lowrank.stats(trainer.model)
    assert found["fused"] > 0
    assert found["fallback"] == found["untouched"] == {}
    assert not any(is_patched(m) for m in reference.model.modules())
    for name, value in adapters(reference).items():
        mine = adapters(trainer)[name]
        assert (mine - value).norm() <= (0.2 if case == "bf16" else 2e-3) * value.norm(), name
    ids = torch.stack([one["input_ids"] for one in blocks()[:4]])
    with torch.no_grad():
        logits = [t.model.eval()(input_ids=ids).logits for t in (trainer, reference)]
    assert (logits[0] - logits[1]).norm() <= (0.1 if case == "bf16" else 1e-3) * logits[1].norm()


def test_resumed_half_way_it_ends_the_same(tmp_path):
    options = dict(save_strategy="steps", save_steps=STEPS // 2, lr_scheduler_type="constant")
    _, trainer = train(tmp_path / "whole", [PatchCallback()], **options)
    _, resumed = train(
        tmp_path / "whole", [PatchCallback()], resume=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"), **options
    )
    for name, value in adapters(trainer).items():
        torch.testing.assert_close(adapters(resumed)[name], value, rtol=0, atol=0, msg=name)


def test_the_best_model_is_loaded(tmp_path):
    """It stays patched, and is the checkpoint of the lowest loss."""
    options = dict(
        eval_strategy="steps", eval_steps=8, save_strategy="steps", save_steps=8, load_best_model_at_end=True
    )
    _, trainer = train(tmp_path, [PatchCallback()], learning_rate=0.3, **options)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_metric == min(losses.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert any(is_patched(m) for m in trainer.model.modules())


def test_says_once_what_ran(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lowrank")
    train(tmp_path, [PatchCallback()], max_steps=3)
    said = [record for record in caplog.records if record.name == "lowrank"]
    assert len(said) == 1
    assert said[0].levelno == logging.INFO
    assert "'fallback': {}" in said[0].getMessage()
    assert "'fused': 14" in said[0].getMessage()


def test_a_fallback_is_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lowrank")
    model = peft_model()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="falls back"):
        train(tmp_path, [PatchCallback()], model, max_steps=2)
    said = [record for record in caplog.records if record.name == "lowrank"]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert "hook" in said[0].getMessage()


def test_a_model_without_adapters_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    with pytest.raises(ValueError, match="found no LoRA layer to patch"):
        train(tmp_path, [PatchCallback()], LlamaForCausalLM(LlamaConfig(**sizes)), max_steps=1)
