"""transformers' Trainer and TRL's SFTTrainer with a PEFT model: PatchCallback's run is the unpatched run, step by step."""

import functools
import logging
import re
import tempfile
import types

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch._dynamo.utils import counters
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowrank
from lowrank import bits
from lowrank.integrations.peft import is_patched
from lowrank.integrations.transformers import PatchCallback
from lowrank.optim import AdamW

STEPS = 32
KINDS = ["Trainer", "SFTTrainer"]


@pytest.fixture(autouse=True)
def one_thread():
    """Of a model this small: more of them wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(hidden=32):
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def peft_model(model=None, **options):
    torch.manual_seed(1)
    config = dict(r=4, lora_alpha=8, target_modules="all-linear") | options
    return get_peft_model(model or llama(), LoraConfig(task_type="CAUSAL_LM", **config))


def blocks():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(64, (256, 1), generator=generator) + torch.arange(16) * torch.randint(
        1, 4, (256, 1), generator=generator
    )
    return [{"input_ids": row, "labels": row} for row in rows % 8]


def made(kind, folder, callbacks=(), model=None, peft=None, **options):
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", seed=3, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    settings |= dict(output_dir=str(folder)) | options
    model, rows, callbacks = model or peft_model(), blocks(), list(callbacks)
    if kind == "Trainer":
        arguments = TrainingArguments(**settings)
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:16], callbacks=callbacks)
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows])
    return trl.SFTTrainer(
        model, args=trl.SFTConfig(**settings), train_dataset=data, eval_dataset=data.select(range(16)),
        processing_class=tokenizer(), peft_config=peft, callbacks=callbacks,
    )  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(64)}, unk_token="61"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="61", eos_token="62", pad_token="63")


def train(folder, callbacks=(), model=None, resume=None, kind="Trainer", **options):
    """(losses of each step, the trainer)."""
    trainer = made(kind, folder, callbacks, model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer), trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters(trainer):
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def outcome(steps, trainer):
    """Of one run in fp64: the loss of every step, the model's logits, every adapter's weight."""
    ids = torch.stack([one["input_ids"] for one in blocks()[:4]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits
    values = {"losses": torch.tensor(steps), "logits": logits} | adapters(trainer)
    return {name: value.double() for name, value in values.items()}


CASES = {
    "plain": {},
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "accumulation": dict(gradient_accumulation_steps=2),
    "bf16": dict(bf16=True),
}


@functools.cache
def exact(kind, accumulation=1):
    """The same run in fp64, unpatched; checkpointing and autocast are no part of what it computes."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(*train(folder, (), peft_model().double(), kind=kind, gradient_accumulation_steps=accumulation))


def as_right(ours, unpatched, right):
    """Ours is at most three times as far from fp64 as theirs, in losses, in logits and in the median adapter weight.

    A run's distance is a sum of roundings, so those of two runs scatter: over eight seeds of these runs the logarithm of
    their ratio had a deviation of at most 0.22, and 3 is five of them.  Losses come in fp32, so its last place is allowed.
    Of weights the norm would be that of one or two: Adam divides a gradient near zero by its own size.
    """
    assert ours.keys() == unpatched.keys() == right.keys()
    weights = [name for name in right if name not in ("losses", "logits")]
    for what, names in (("losses", ["losses"]), ("logits", ["logits"]), ("weights", weights)):
        own, reference, exact = (torch.cat([run[name].flatten() for name in names]) for run in (ours, unpatched, right))
        size = (lambda t: t.abs().median()) if what == "weights" else torch.linalg.vector_norm
        own, reference, room = size(own - exact), size(reference - exact), torch.finfo(torch.float32).eps * size(exact)
        assert own <= max(3 * reference, room), f"{what}: {own:.2e} from fp64, unpatched {reference:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_unpatched_runs(tmp_path, kind, case):
    unpatched = outcome(*train(tmp_path, kind=kind, **CASES[case]))
    steps, trainer = train(tmp_path, [PatchCallback()], kind=kind, **CASES[case])
    counts = lowrank.stats(trainer.model)
    assert counts["fused"] > 0
    assert counts["fallback"] == counts["untouched"] == {}
    assert len(steps) == STEPS
    assert steps[-1] < steps[0] - 0.1
    as_right(outcome(steps, trainer), unpatched, exact(kind, CASES[case].get("gradient_accumulation_steps", 1)))


def quantized(folder):
    """A 4-bit Llama as QLoRA trains it (Dettmers et al. 2023), loaded from a file."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(model)


def dequantized(model):
    """The same weights in fp64."""
    from bitsandbytes.functional import dequantize_4bit

    state = {}
    for name, p in model.state_dict(keep_vars=True).items():
        if name in dict(model.named_parameters()):
            state[name] = dequantize_4bit(p.data, p.quant_state) if hasattr(p, "quant_state") else p.data
    plain = llama(64).double()
    plain.load_state_dict({name: value.double() for name, value in state.items()})
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_4_bit_base(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    llama(64).save_pretrained(tmp_path)  # whole blocks of 64
    right = peft_model(dequantized(quantized(tmp_path)))
    for p in right.parameters():
        if p.requires_grad and kind == "SFTTrainer":  # it rounds those of a quantized model
            p.data = p.data.bfloat16().double()
    right = outcome(*train(tmp_path, (), right, kind=kind))
    unpatched = outcome(*train(tmp_path, (), peft_model(quantized(tmp_path)), kind=kind, bf16=True))
    steps, trainer = train(tmp_path, [PatchCallback()], peft_model(quantized(tmp_path)), kind=kind, bf16=True)
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
    assert (type(layer).__name__, type(layer.base_layer).__name__) == ("Linear4bit", "Linear4bit")
    counts = lowrank.stats(trainer.model)
    assert counts["fused"] == 14 * STEPS * 2  # checkpointed
    assert counts["fallback"] == counts["untouched"] == {}
    assert steps[-1] < steps[0] - 0.1
    as_right(outcome(steps, trainer), unpatched, right)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_half_way_it_ends_the_same(tmp_path, kind):
    options = dict(save_strategy="steps", save_steps=STEPS // 2, lr_scheduler_type="constant", kind=kind)
    _, trainer = train(tmp_path, [PatchCallback()], **options)
    _, resumed = train(tmp_path, [PatchCallback()], resume=str(tmp_path / f"checkpoint-{STEPS // 2}"), **options)
    for name, value in adapters(trainer).items():
        torch.testing.assert_close(adapters(resumed)[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded(tmp_path, kind):
    """It stays patched, and is the checkpoint of the lowest loss."""
    options = dict(
        eval_strategy="steps", eval_steps=8, save_strategy="steps", save_steps=8, load_best_model_at_end=True, kind=kind
    )
    _, trainer = train(tmp_path, [PatchCallback()], learning_rate=0.3, **options)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_metric == min(losses.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert any(is_patched(m) for m in trainer.model.modules())


def said(caplog):
    """(level, text) of what the callback logged."""
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "lowrank"]


def test_says_what_ran_once_for_each_train(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lowrank")
    _, trainer = train(tmp_path, [PatchCallback()], max_steps=3)
    want = "first step: {'fused': 14, 'shared': 6, 'fallback': {}, 'untouched': {}}"
    assert said(caplog) == [(logging.INFO, want)]
    trainer.train()
    assert said(caplog) == [(logging.INFO, want)] * 2


def test_a_fallback_is_a_warning(tmp_path, caplog):
    lowrank._stats.reset()
    model = peft_model()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="falls back"):
        train(tmp_path, [PatchCallback()], model, max_steps=2)
    [(level, text)] = said(caplog)
    assert level == logging.WARNING
    assert "'fused': 13" in text
    assert "'hooks on lora_A': 1" in text


def test_layers_that_are_not_covered_are_a_warning(tmp_path, caplog):
    train(tmp_path, [PatchCallback()], peft_model(target_modules=["q_proj", "embed_tokens"]), max_steps=2)
    [(level, text)] = said(caplog)
    assert level == logging.WARNING
    assert "'fused': 2, 'shared': 0, 'fallback': {}, 'untouched': {'lora.Embedding': 1}" in text


def test_adapters_that_do_not_run_are_a_warning(tmp_path, caplog):
    model = peft_model(target_modules=["q_proj"])
    model.base_model.disable_adapter_layers()
    model.get_input_embeddings().weight.requires_grad_(True)
    train(tmp_path, [PatchCallback()], model, max_steps=2)
    assert said(caplog) == [(logging.WARNING, "first step: {'fused': 0, 'shared': 0, 'fallback': {}, 'untouched': {}}")]


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no LoRA layer to patch"):
        train(tmp_path, [PatchCallback()], llama(), max_steps=1)


def test_evaluation_alone_is_patched(tmp_path):
    trainer = made("Trainer", tmp_path, [PatchCallback()])
    assert all(is_patched(m) for m in trainer.model.modules() if hasattr(m, "lora_A"))
    trainer.evaluate()
    assert lowrank.stats(trainer.model)["fused"] == 14 * 2


def test_a_model_that_trl_adapts_is_patched(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = made("SFTTrainer", tmp_path, [PatchCallback()], llama(), peft=config, max_steps=1)
    assert sum(map(is_patched, trainer.model.modules())) == 14


def test_models_and_callbacks_that_come_later(tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(
        None, arguments, train_dataset=blocks(), model_init=lambda: peft_model(), callbacks=[PatchCallback()]
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert lowrank.stats(trainer.model)["fused"] == 14
    trainer = made("Trainer", tmp_path, max_steps=1)
    trainer.add_callback(PatchCallback(siblings=False))
    trainer.train()
    assert lowrank.stats(trainer.model) == {"fused": 14, "shared": 0, "fallback": {}, "untouched": {}}


def hooks(callback, model, main=True):
    """The trainer's calls, around one forward, in a process that is its machine's first or not."""
    arguments, state = types.SimpleNamespace(torch_compile=False), types.SimpleNamespace(is_local_process_zero=main)
    callback.on_init_end(arguments, state, None, model)
    yield
    callback.on_train_begin(arguments, state, None, model)
    model(input_ids=blocks()[0]["input_ids"][None])
    callback.on_step_end(arguments, state, None, model)


def test_other_processes_say_nothing(caplog):
    caplog.set_level(logging.INFO, "lowrank")
    for main in (False, True):
        list(hooks(PatchCallback(), peft_model(), main))
        assert len(said(caplog)) == main


def test_layers_of_another_class_by_then(caplog):
    """fully_shard puts a subclass in the place of each module it is given, between the two."""
    caplog.set_level(logging.INFO, "lowrank")
    model = peft_model(target_modules=["q_proj"])
    run = hooks(PatchCallback(), model)
    next(run)
    for layer in [m for m in model.modules() if is_patched(m)]:
        layer.__class__ = type("FSDPLinear", (type(layer),), {})
    list(run)
    assert said(caplog) == [(logging.INFO, "first step: {'fused': 2, 'shared': 0, 'fallback': {}, 'untouched': {}}")]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_the_trainer(tmp_path, caplog, kind):
    """Patched before the model is compiled; a second train() runs the same graph and is no reason to warn."""
    caplog.set_level(logging.INFO, "lowrank")
    torch._dynamo.reset()
    counters.clear()
    options = dict(kind=kind, max_steps=3)
    model = functools.partial(peft_model, target_modules=["q_proj", "up_proj"])
    unpatched, reference = train(tmp_path, (), model(), **options)
    ours, trainer = train(
        tmp_path, [PatchCallback()], model(), torch_compile=True, torch_compile_backend="aot_eager", **options
    )
    assert ours == pytest.approx(unpatched, rel=1e-6)
    for name, value in adapters(reference).items():
        torch.testing.assert_close(adapters(trainer)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    graphs = counters["stats"]["unique_graphs"]
    trainer.train()
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert lowrank.stats(trainer.model) == {"fused": 0, "shared": 0, "fallback": {}, "untouched": {}}
    (first, text), (second, again) = said(caplog)
    assert first == second == logging.INFO
    assert re.search(r"'fused': [1-9]\d*, 'shared': 0, 'fallback': {}", text)  # TRL's graph breaks trace some twice
    assert "'fused': 0, 'shared': 0, 'fallback': {}" in again


def test_a_run_of_our_optimizer_resumes_bit_for_bit(tmp_path):
    """bf16 weights, masters, masks and maps: six steps, or three, a checkpoint and three more in new objects."""

    def run(resume=None):
        model = llama().bfloat16()
        masks = {"model.embed_tokens.weight": bits.pack(torch.arange(64 * 32) % 11 == 0)}
        optimizer = AdamW(model.named_parameters(), lr=1e-3, masks=masks, master_weights=True, track_changes=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, seed=3,
            save_strategy="steps", save_steps=3, disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=blocks(), optimizers=(optimizer, None)).train(resume)
        return model, optimizer

    (whole, first), (resumed, second) = run(), run(str(tmp_path / "checkpoint-3"))
    masks = list(second.masks.values())
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert all(torch.equal(t, second.state[q][key]) for key, t in first.state[p].items()), name
    assert len(masks) == 1
    changed = bits.unpack(first.changes()[whole.model.embed_tokens.weight], (64 * 32,))
    assert changed.any()
    assert not changed[torch.arange(64 * 32) % 11 != 0].any()
