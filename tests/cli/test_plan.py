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
from lowrank.compare import methods
from lowrank.compare.settings import Adapter
from lowrank.measure import estimate as estimates

MEASURED = ["full", "lora", "lora-attention", "lora-mlp", "peft-lora"]
TARGETS = {
    "lora-attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora-mlp": ["gate_proj", "up_proj", "down_proj"],
}


def tiny(**changes):
    from transformers import LlamaConfig

    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaConfig(**{**shape, **heads, **changes})


def setting(**changes):
    return estimates.Setting(**{"batch": 2, "seq": 64, "rank": 8, "dtype": "float32", "device": "cpu", **changes})


def estimate(config, name, s):
    return estimates.estimate(config, estimates.row_of(name), s)


def build(config, method, s):
    """The method on a real model, built without any of plan's code."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    import lowrank

    model = LlamaForCausalLM(config).train()
    if method != "full":
        targets = TARGETS.get(method, "all-linear")
        lora = peft.LoraConfig(r=s.rank, lora_dropout=s.dropout, target_modules=targets, task_type="CAUSAL_LM")
        model = (peft.get_peft_model if method == "peft-lora" else lowrank.adapt)(model, lora)
    return model


def loss_and_saved_bytes(model, s, vocabulary=256):
    """A forward pass and the bytes of the distinct storages that autograd keeps for its backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
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
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        "activations": activations,
    }
    measured["total"] = sum(measured.values())
    predicted = estimate(tiny(), method, s)
    assert {name: getattr(predicted, name) for name in measured} == pytest.approx(measured, rel=0.01)  # promised: 0.1


def counted_by_compare(config, name, s):
    """compare's costs.memory of the second step, of the phase that needs most."""
    from transformers import LlamaForCausalLM

    from lowrank import analysis
    from lowrank.compare import costs, train
    from lowrank.measure.saved import SavedActivations

    def steps(model, count, masks=None):
        optimizer, _ = train.optimizer_and_schedule(model, 1e-3, 9, masks, s.in_place)
        for _ in range(count):
            tokens = torch.randint(0, 256, (s.batch, s.seq))
            with SavedActivations((*model.parameters(), *model.buffers())) as saved:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            counted = costs.memory(model, optimizer, saved.bytes, torch.device("cpu"))
            optimizer.step()
            optimizer.zero_grad()
        return counted

    model, masks, counted = LlamaForCausalLM(config).to(getattr(torch, s.dtype)).train(), None, []
    if (share := methods.METHODS[name].subnetwork) is not None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps(model, 1)
        masks = analysis.topk_mask((before, {name: p.detach() for name, p in model.named_parameters()}), share)
    for phase in methods.METHODS[name].phases:
        model = phase.prepare(model, Adapter(s.rank))
        counted.append(steps(model, 2, masks))
    return max(counted, key=lambda memory: memory.total).as_dict()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "in_place"),
    [("float32", False), ("bfloat16", False), ("bfloat16", True)],
    ids=["fp32", "bf16", "bf16-in-place"],
)
@pytest.mark.parametrize("name", methods.METHODS)
def test_memory_is_what_compare_counts(name, dtype, in_place):
    pytest.importorskip("peft")
    s = setting(dtype=dtype, in_place=in_place)
    counted = counted_by_compare(tiny(), name, s)
    predicted = estimate(tiny(), name, s)
    assert {part: getattr(predicted, part) for part in counted} == pytest.approx(counted, rel=0.02)  # promised: 0.1


def test_rows_are_the_methods_that_compare_trains():
    assert methods.METHODS.keys() == estimates.METHODS.keys() - {"qlora"}
    assert [name for name in estimates.ROWS if "+" not in name] == [*estimates.METHODS]


def test_a_row_has_a_rank_of_its_own():
    assert estimate(tiny(), "lora:4", setting(rank=8)).trainable * 2 == estimate(tiny(), "lora", setting()).trainable
    assert estimates.row_of("full-lora:4+checkpointing").name == "full→lora:4+checkpointing"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("lora,dora", "unknown method 'dora'; expected some of full, full-masked, lora"),
        ("svf:4", "'svf:4': expected a method alone, or a LoRA method and its rank, as in lora:64"),
        ("lora:", "'lora:': expected"),
        ("lora:0", "'lora:0': expected"),
        ("+checkpointing", "unknown method"),
        (",", "no method"),
    ],
)
def test_methods_that_are_none(methods, message, capsys):
    assert cli.main(["plan", "llama-3.2-1b", "--methods", methods]) == 2
    assert f"--methods {methods!r}: {message}" in capsys.readouterr().err


def test_files_are_what_compare_would_save(tmp_path):
    """Of a fifth changed, and of a model whose tensors outweigh the names in the files."""
    from lowrank.compare import costs, train

    s, config = setting(dtype="bfloat16"), tiny(vocab_size=4096)
    model = build(config, "full", s).to(torch.bfloat16)
    assert estimate(config, "full", s).checkpoint == pytest.approx(costs.checkpoint_bytes(model), rel=0.02)
    adapted = methods.METHODS["lora"].phases[0].prepare(build(config, "full", s).to(torch.bfloat16), Adapter(s.rank))
    assert estimate(config, "lora", s).checkpoint == pytest.approx(costs.checkpoint_bytes(adapted), rel=0.1)
    both = estimate(config, "full", s).checkpoint + estimate(config, "lora", s).checkpoint
    assert estimate(config, "full→lora", s).checkpoint == both
    changed = build(config, "full", s).to(torch.bfloat16)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in changed.parameters():
            p.copy_(torch.where(torch.rand(p.shape) < 0.2, p + 1, p))
    assert estimate(config, "full-masked", s).checkpoint == pytest.approx(train.delta_bytes(model, changed), rel=0.05)


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
            estimate(tiny(), method, setting(dropout=p, device=device)).activations for p in (0.1, 0.0)
        )
        return with_dropout - without

    inputs = 2 * 64 * (6 * 128 + 352) * 3  # elements that enter the seven adapters of each of three layers
    assert cost("lora", "cpu") == cost("lora", "cuda") == inputs // 8
    assert cost("peft-lora", "cpu") > cost("peft-lora", "cuda") > 8 * cost("lora", "cuda")


def test_adapters_in_fp32_under_autocast():
    """PEFT casts its input once per adapter: q, k and v keep three copies where one is enough, gate and up two."""
    s = {"dtype": "bfloat16", "device": "cuda", "autocast": True}
    peft, ours = (estimate(tiny(), name, setting(**s)) for name in ("peft-lora", "lora"))
    copies = 2 * 64 * 3 * 128 * 3 * torch.bfloat16.itemsize
    assert copies < peft.activations - ours.activations < 2 * copies  # fp32 copies would be more
    assert (peft.gradients, peft.optimizer) == (4 * peft.trainable, 8 * peft.trainable)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_keeps_block_inputs():
    wide = tiny(vocab_size=4096)  # the loss is the peak, so what a real forward keeps is all there is
    s = setting()
    model = build(wide, "full", s)
    model.gradient_checkpointing_enable()
    assert estimate(wide, "full+checkpointing", s).activations == loss_and_saved_bytes(model, s)[1]

    def activations(layers):  # with a small vocabulary one recomputed block is the peak
        return estimate(tiny(num_hidden_layers=layers, vocab_size=64), "full+checkpointing", s).activations

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
    predicted = estimate(tiny(), method, s).flops_per_token
    assert predicted - attention - skipped == counter.get_total_flops() / (2 * 64)


def test_flops_of_svf_are_of_the_modes_that_its_layers_take():
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (352, 128), (352, 128), (128, 352)] * 3

    def beside_the_weights(name, s):
        lora = estimate(tiny(), "lora", s)
        return estimate(tiny(), name, s).flops_per_token - (lora.flops_per_token - 6 * lora.trainable)

    assert beside_the_weights("svf", setting()) == sum(4 * 32 * (N + K) for N, K in shapes)
    activation = {(N, K): 4 * min(N, K) * (N + K) - 4 * N * K for N, K in shapes}
    assert beside_the_weights("svf-full", setting()) == sum(activation[shape] for shape in shapes)
    merged = {(128, 128): 2 * 128 * 128 + 4 * 128**3 // 1024}  # with enough rows
    many = setting(batch=16)
    assert beside_the_weights("svf-full", many) == sum(merged.get(shape, activation[shape]) for shape in shapes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merged_weights_of_svf_stay_beside_what_checkpointing_keeps():
    from lowrank.nn import SVFLinear

    config, s = tiny(vocab_size=4096, num_hidden_layers=1), setting(batch=16)
    model = methods.METHODS["svf-full"].phases[0].prepare(build(config, "full", s), Adapter(s.rank))
    loss, saved = loss_and_saved_bytes(model, s)
    assert estimate(config, "svf-full", s).activations == pytest.approx(saved, rel=1e-3)
    del loss
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _loss, saved = loss_and_saved_bytes(model, s)
    caches = [layer._cache for layer in model.modules() if isinstance(layer, SVFLinear) and layer._cache]
    assert len(caches) == 2  # q and o
    predicted = estimate(config, "svf-full+checkpointing", s).activations
    assert predicted == pytest.approx(saved + sum(cache.weight.nbytes for cache in caches), rel=1e-4)


def test_checkpointing_recomputes_the_blocks_but_not_the_head():
    once, twice = (estimate(tiny(), name, setting()).flops_per_token for name in ("full", "full+checkpointing"))
    linear = 3 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 352)
    assert twice - once == 2 * linear + 2 * 64 * 128 * 3


def test_nf4_weights():
    linear = 3 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 352)
    qlora, lora = (estimate(tiny(), name, setting(dtype="bfloat16")) for name in ("qlora", "peft-lora"))
    assert lora.weights - qlora.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-3)
    assert qlora.activations == lora.activations


def test_cards_and_master_weights():
    full = estimate(tiny(), "full", setting(dtype="bfloat16"))
    assert full.optimizer == 12 * full.parameters
    in_place = estimate(tiny(), "full", setting(dtype="bfloat16", in_place=True))
    assert in_place.optimizer == 8 * full.parameters
    fp32 = estimate(tiny(), "full", setting(dtype="float32"))
    assert fp32.optimizer == 8 * full.parameters
    huge = dataclasses.replace(full, weights=100 * 2**30, gradients=0, optimizer=0, activations=0)
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


@pytest.mark.parametrize("method", ["full", "lora", "lora-attention", "lora-mlp", "peft-lora", "svf"])
@pytest.mark.parametrize("name", OTHERS)
def test_memory_without_fused_attention_and_with_experts(name, method):
    from transformers import AutoModelForCausalLM

    s = setting(seq=24, rank=8)  # of experts other ranks may be padded, on a GPU always
    if "lora" in method and name == "Mamba":
        with pytest.raises(ValueError, match=r"incompatible with Mamba|no linear layer"):
            estimate(other(name), method, s)
        return
    model = (
        methods.METHODS[method]
        .phases[0]
        .prepare(AutoModelForCausalLM.from_config(other(name)).train(), Adapter(s.rank))
    )
    _, activations = loss_and_saved_bytes(model, s, vocabulary=128)
    predicted = estimate(other(name), method, s)
    assert predicted.activations == pytest.approx(activations, rel=1e-3)
    assert predicted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_flops_of_attention_that_is_not_fused_are_those_that_pytorch_counts():
    from transformers import AutoModelForCausalLM

    s = setting(seq=24)
    with FlopCounterMode(display=False) as counter:
        loss_and_saved_bytes(AutoModelForCausalLM.from_config(other("Gemma2")), s, vocabulary=128)[0].backward()
    predicted = estimate(other("Gemma2"), "full", s)
    assert not predicted.fused
    assert predicted.flops_per_token == pytest.approx(counter.get_total_flops() / (2 * 24), rel=1e-3)


def test_a_token_visits_some_experts():
    def flops(k):
        config = other("Mixtral")
        config.num_experts_per_tok = k
        return estimate(config, "full", setting(seq=24)).flops_per_token

    assert flops(2) - flops(1) == 6 * 3 * 32 * 48 * 2
    from lowrank.measure import meta_forward

    model = meta_forward.build(other("Mixtral"), torch.float32)
    model.config = tiny()
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has weights of more than two dimensions, and its config"):
        meta_forward.macs_per_token(model)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_by_peft_keep_a_second_copy_of_every_stack(name):
    s = setting(seq=24, rank=2, in_place=True)
    ours, peft = (estimate(other(name), method, s) for method in ("lora", "peft-lora"))
    assert ours.trainable == peft.trainable
    stacks = 2 * 4 * 3 * 32 * 48 * 4  # layers, experts, gate, up and down, fp32
    assert peft.activations - ours.activations > 0.9 * stacks
    assert ours.flops_per_token == peft.flops_per_token


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "Mamba"])
def test_command_for_models_without_fused_attention(name, tmp_path, capsys):
    other(name).save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--seq", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    missing = {row for row in estimates.ROWS if "lora" in row and name == "Mamba"}
    assert result["not_done"].keys() == missing
    assert result["methods"].keys() == set(estimates.ROWS) - missing
    assert any("no fused attention" in note for note in result["notes"])


def test_models_that_are_no_causal_language_model_are_refused():
    from transformers import T5Config

    with pytest.raises(ValueError, match="no causal language model"):
        estimate(T5Config(), "full", setting())


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
    command = ["plan", str(tmp_path), "--batch", "2", "--seq", "64", "--rank", "8"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    rows = table[table.index("─") :].partition("\n")[2].partition("Computed")[0].split("\n")
    names = [row.strip().partition("  ")[0].replace(" ", "") for row in rows if row.strip()]
    assert names == [*estimates.ROWS]
    assert "Computed, not measured" in table
    assert "…" not in table
    assert max(len(line) for line in table.splitlines()[1:]) <= 112  # the first line holds the path

    assert cli.main([*command, "--methods", "full, lora-attention:1024 +checkpointing"]) == 0
    assert "…" not in capsys.readouterr().out

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
