import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowrank import cli
from lowrank.cli import plan
from lowrank.compare.settings import Adapter
from lowrank.measure import estimate as estimates

METHODS = {method.name: method for method in estimates.METHODS}
MEASURED = [name for name, method in METHODS.items() if not method.nf4]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(**changes):
    from transformers import LlamaConfig

    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaConfig(**{**shape, **heads, **changes})


def setting(**changes):
    return estimates.Setting(**{"batch": 2, "seq": 64, "rank": 8, "dtype": "float32", "device": "cpu", **changes})


def build(config, method, s):
    """The method on a real model, built without any of plan's code."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    import lowrank

    model = LlamaForCausalLM(config).train()
    if method != "full":
        targets = ATTENTION if method == "lora-attention" else "all-linear"
        lora = peft.LoraConfig(r=s.rank, lora_dropout=s.dropout, target_modules=targets, task_type="CAUSAL_LM")
        model = (peft.get_peft_model if method == "peft-lora" else lowrank.adapt)(model, lora)
    return model


def loss_and_saved_bytes(model, s, vocabulary=256):
    """A forward pass and the bytes of the distinct storages that autograd keeps for its backward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, vocabulary, (s.batch, s.seq))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss, sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", MEASURED)
def test_memory_is_what_a_real_training_step_keeps(method, dropout):
    s = setting(dropout=dropout)
    model = build(tiny(), method, s)
    loss, activations = loss_and_saved_bytes(model, s)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss.backward()
    optimizer.step()
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        "activations": activations,
    }
    measured["total"] = sum(measured.values())
    predicted = estimates.estimate(tiny(), METHODS[method], s)
    assert {name: getattr(predicted, name) for name in measured} == pytest.approx(measured, rel=0.01)  # promised: 0.1


@pytest.mark.parametrize("method", MEASURED)
def test_memory_of_the_embedded_model_is_what_compare_measures(method):
    from transformers import LlamaForCausalLM

    from lowrank.compare import costs, data, methods
    from lowrank.measure.saved import SavedActivations

    config, s = data.embedded_config(), setting(batch=8, seq=128)
    model = methods.METHODS[method].phases[0].prepare(LlamaForCausalLM(config).train(), Adapter(s.rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.randint(0, 256, (s.batch, s.seq))
    with SavedActivations((*model.parameters(), *model.buffers())) as saved:
        loss = model(input_ids=tokens, labels=tokens).loss
    activations = saved.bytes
    loss.backward()
    optimizer.step()
    measured = costs.memory(model, optimizer, activations, torch.device("cpu")).as_dict()
    predicted = estimates.estimate(config, METHODS[method], s)
    assert {name: getattr(predicted, name) for name in measured} == pytest.approx(measured, rel=0.1)


def test_built_in_shapes_have_the_published_sizes():
    published = {
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "qwen2.5-7b": 7_615_616_512,
        "mistral-7b": 7_248_023_552,
    }
    from lowrank.measure import meta_forward

    models = {name: meta_forward.build(plan.load_config(name), torch.bfloat16) for name in plan.BUILT_IN}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == published


def test_dropout_costs_one_bit_per_element_here_and_whole_copies_in_peft():
    def cost(method, device):
        with_dropout, without = (
            estimates.estimate(tiny(), METHODS[method], setting(dropout=p, device=device)).activations
            for p in (0.1, 0.0)
        )
        return with_dropout - without

    inputs = 2 * 64 * (6 * 128 + 352) * 3  # elements that enter the seven adapters of each of three layers
    assert cost("lora", "cpu") == cost("lora", "cuda") == inputs // 8
    assert cost("peft-lora", "cpu") > cost("peft-lora", "cuda") > 8 * cost("lora", "cuda")


def test_adapters_in_fp32_under_autocast():
    """PEFT casts its input once per adapter: q, k and v keep three copies where one is enough, gate and up two."""
    s = {"dtype": "bfloat16", "device": "cuda"}
    peft, ours = (estimates.estimate(tiny(), METHODS[name], setting(**s)) for name in ("peft-lora", "lora"))
    copies = 2 * 64 * 3 * 128 * 3 * torch.bfloat16.itemsize
    assert copies < peft.activations - ours.activations < 2 * copies  # fp32 copies would be more
    assert (peft.gradients, peft.optimizer) == (4 * peft.trainable, 8 * peft.trainable)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_keeps_block_inputs():
    wide = tiny(vocab_size=4096)  # the loss is the peak, so what a real forward keeps is all there is
    s = setting(gradient_checkpointing=True)
    model = build(wide, "full", s)
    model.gradient_checkpointing_enable()
    assert estimates.estimate(wide, METHODS["full"], s).activations == loss_and_saved_bytes(model, s)[1]

    def activations(layers):  # with a small vocabulary one recomputed block is the peak
        return estimates.estimate(tiny(num_hidden_layers=layers, vocab_size=64), METHODS["full"], s).activations

    assert activations(5) - activations(4) == 2 * 64 * 128 * 4
    assert activations(4) > 5 * 2 * 64 * 128 * 4


@pytest.mark.parametrize("method", ["full", "peft-lora"])
def test_flops_are_those_that_pytorch_counts(method):
    s = setting()
    model = build(tiny(), method, s)
    with FlopCounterMode(display=False) as counter:
        loss_and_saved_bytes(model, s)[0].backward()
    attention = 6 * 64 * 128 * 3  # not counted by PyTorch for its CPU kernel
    # with frozen embeddings nobody asks for the input gradients of the first q, k, v and of their adapters
    skipped = 0 if method == "full" else 2 * 128 * (128 + 64 + 64) + 3 * 2 * 8 * 128
    predicted = estimates.estimate(tiny(), METHODS[method], s).flops_per_token
    assert predicted - attention - skipped == counter.get_total_flops() / (2 * 64)


def test_checkpointing_recomputes_the_blocks_but_not_the_head():
    once, twice = (
        estimates.estimate(tiny(), METHODS["full"], setting(gradient_checkpointing=on)).flops_per_token
        for on in (False, True)
    )
    linear = 3 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 352)
    assert twice - once == 2 * linear + 2 * 64 * 128 * 3


def test_nf4_weights():
    linear = 3 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 352)
    qlora, lora = (
        estimates.estimate(tiny(), METHODS[name], setting(dtype="bfloat16")) for name in ("qlora", "peft-lora")
    )
    assert lora.weights - qlora.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-3)
    assert qlora.activations == lora.activations


def test_cards_and_master_weights():
    estimate = estimates.estimate(tiny(), METHODS["full"], setting(dtype="bfloat16"))
    assert estimate.optimizer == 12 * estimate.parameters
    in_place = estimates.estimate(tiny(), METHODS["full"], setting(dtype="bfloat16", in_place=True))
    assert in_place.optimizer == 8 * estimate.parameters
    fp32 = estimates.estimate(tiny(), METHODS["full"], setting(dtype="float32"))
    assert fp32.optimizer == 8 * estimate.parameters
    huge = dataclasses.replace(estimate, weights=100 * 2**30, gradients=0, optimizer=0, activations=0)
    assert huge.gpus() == {"24 GB": math.ceil(100 / 21.24), "80 GB": 2, "141 GB": 1}


@pytest.mark.parametrize("option", ["batch", "seq", "rank"])
def test_sizes_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be a positive integer, got 0"):
        setting(**{option: 0})


def test_dropout_must_be_a_probability():
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        setting(dropout=1.0)


SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OTHERS = {
    "Gemma2": HEADS,
    "GptOss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {**SMALL, "state_size": 4},
    "Mixtral": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def other(name):
    import transformers

    return getattr(transformers, f"{name}Config")(**OTHERS[name])


@pytest.mark.parametrize("method", ["full", "lora", "lora-attention", "peft-lora"])
@pytest.mark.parametrize("name", OTHERS)
def test_memory_without_fused_attention_and_with_experts(name, method):
    from transformers import AutoModelForCausalLM

    from lowrank.compare import methods

    s = setting(seq=24, rank=2)
    if method != "full" and (name == "Mamba" or (name == "Mixtral" and method != "lora-attention")):
        reason = {"Mamba": "incompatible with Mamba|no linear layer", "Mixtral": "experts' weights too: not computed"}
        with pytest.raises(ValueError, match=reason[name]):
            estimates.estimate(other(name), METHODS[method], s)
        return
    model = (
        methods.METHODS[method]
        .phases[0]
        .prepare(AutoModelForCausalLM.from_config(other(name)).train(), Adapter(s.rank))
    )
    _, activations = loss_and_saved_bytes(model, s, vocabulary=128)
    predicted = estimates.estimate(other(name), METHODS[method], s)
    assert predicted.activations == pytest.approx(activations, rel=1e-3)
    assert predicted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted.weights == sum(p.nbytes for p in model.parameters())


def test_flops_of_attention_that_is_not_fused_are_those_that_pytorch_counts():
    from transformers import AutoModelForCausalLM

    s = setting(seq=24)
    with FlopCounterMode(display=False) as counter:
        loss_and_saved_bytes(AutoModelForCausalLM.from_config(other("Gemma2")), s, vocabulary=128)[0].backward()
    predicted = estimates.estimate(other("Gemma2"), METHODS["full"], s)
    assert not predicted.fused
    assert predicted.flops_per_token == pytest.approx(counter.get_total_flops() / (2 * 24), rel=1e-3)


def test_a_token_visits_some_experts():
    def flops(k):
        config = other("Mixtral")
        config.num_experts_per_tok = k
        return estimates.estimate(config, METHODS["full"], setting(seq=24)).flops_per_token

    assert flops(2) - flops(1) == 6 * 3 * 32 * 48 * 2
    from lowrank.measure import meta_forward

    model = meta_forward.build(other("Mixtral"), torch.float32)
    model.config = tiny()
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has weights of more than two dimensions, and its config"):
        meta_forward.macs_per_token(model)


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Mamba"])
def test_command_for_models_without_fused_attention(name, tmp_path, capsys):
    other(name).save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--seq", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    missing = {"lora", "lora-attention", "peft-lora", "qlora"} if name == "Mamba" else set()
    assert result["not_done"].keys() == missing
    assert result["methods"].keys() == METHODS.keys() - missing
    assert any("no fused attention" in note for note in result["notes"])


def test_models_that_are_no_causal_language_model_are_refused():
    from transformers import T5Config

    with pytest.raises(ValueError, match="no causal language model"):
        estimates.estimate(T5Config(), METHODS["full"], setting())


def test_unknown_model_names_what_was_tried(monkeypatch):
    from transformers import AutoConfig

    def unreachable(*_, **__):
        raise OSError("no network\nmany more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"'lama-8b': not built in \(llama-3.2-1b, .*no such path.*hub.*: no network$"):
        plan.load_config("lama-8b")


def test_without_peft_the_error_is_one_line(monkeypatch, tmp_path, capsys):
    tiny().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["plan", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'lowrank-kernels[peft]'" in error
    assert error.count("\n") == 1


def test_table_and_json(tmp_path, capsys):
    tiny().save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--batch", "2", "--seq", "64", "--rank", "8", "--gradient-checkpointing"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert all(method in table for method in METHODS)
    assert "Computed, not measured" in table
    assert "…" not in table
    assert max(len(line) for line in table.splitlines()[1:]) <= 120  # the first line holds the path

    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["setting"]["seq"] == 64
    lora = result["methods"]["lora"]
    assert lora["total"] == sum(lora[part] for part in ("weights", "gradients", "optimizer", "activations"))
    assert lora["checkpoint"] == 4 * lora["trainable"]


def test_importing_the_commands_is_cheap():
    heavy = ("transformers", "peft", "rich", "triton")
    code = f"import sys, lowrank.cli.plan, lowrank.cli.doctor; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
