"""What each of two processes runs for test_distributed.py: a patched model, split, against the whole batch in one process."""

import contextlib
import datetime
import os
import re
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch

IDS = torch.arange(64).view(4, 16) * 7 % 61  # two rows for each process
LAYERS = 2
FUSED, SHARED = 7 * LAYERS, 3 * LAYERS  # calls of one forward


def serve(rank: int, store: str, pipe) -> None:
    """Run the checks whose names come through ``pipe`` and answer each with None or a traceback."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    while (order := pipe.recv()) is not None:
        name, args, options = order
        try:
            _stats.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", ".*returned a view")  # then an in-place op would lose FSDP2's hook
                globals()[name](*args, **options)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
        lowrank.strict(False)
    dist.destroy_process_group()


def peft_model(dtype=torch.float32, autocast_adapter_dtype=True, tied=False, **config):
    """A Llama with random adapters, the same in every process."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=61)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **sizes)).to(dtype)
    config = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    with torch.no_grad():  # PEFT's random start of lora_B makes the adapter outweigh the base
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.2)
    return model


def decoders(model):
    return [m for m in model.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def own_rows(ids=IDS):
    return ids.chunk(2)[dist.get_rank()]


def backward(model, ids, scale=1.0):
    out = model(input_ids=ids, labels=ids)
    (out.loss * scale).backward()
    return out.logits.detach()


def gradients(model):
    """Every gradient by the name its parameter has in the PEFT model, gathered."""
    by_name = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"no gradient for {name}"
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            by_name[plain(name)] = grad.detach().clone()
    return by_name


def plain(name):
    for wrapper in ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.replace("base_model.model.", "")


def whole_batch(**config):
    """PEFT's own gradients of the whole batch in this process alone."""
    model = peft_model(**config)
    backward(model, IDS)
    return gradients(model)


def agree(ours, unpatched, oracle=None):
    """Equal; or, with an ``oracle``, at most twice as far from it as ``unpatched``: one draw of all lora_A, and of all lora_B.

    Whether ours is as right in the mean is asked where there is one process.
    """
    assert ours.keys() == unpatched.keys()
    if oracle is None:
        for name in ours:
            torch.testing.assert_close(
                ours[name], unpatched[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
        return
    for factor in ("lora_A", "lora_B"):
        runs = (torch.cat([run[n].flatten() for n in ours if factor in n]) for run in (ours, unpatched, oracle))
        own, reference, exact = (t.double() for t in runs)
        assert (own - exact).norm() <= 2 * (reference - exact).norm(), factor


def fused(model, calls=FUSED, shared=SHARED):
    """All of the calls so far were ours."""
    counts = lowrank.stats(model)
    assert counts == {"fused": calls, "shared": shared, "fallback": {}, "untouched": {}}, counts


def checkpointing(model, reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


# fully_shard


def shard(model, layout, policy=None, **options):
    """``model`` in FSDP2 units: decoder layers and the whole, or LoRA layers or their factors as well."""
    options |= {} if policy is None else {"mp_policy": policy}
    for layer in lora_layers(model):
        if layout == "factors":
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                fully_shard(factor, **options)
        elif layout == "pairs":
            for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                fully_shard([a, b], **options)
        elif layout == "layers":
            fully_shard(layer, **options)
    for layer in decoders(model) if layout != "whole" else ():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(layout, checkpointed, **options):
    model = patch(peft_model())
    if checkpointed:
        checkpointing(model)
    shard(model, layout, **options)
    together = SHARED if layout in ("whole", "decoders") else 0
    times = 2 if checkpointed else 1
    first, last = decoders(model)
    seen = []

    def look(grad):  # backward has left the last decoder
        seen.extend(type(p).__name__ for p in last.parameters())

    first.register_forward_hook(lambda _, __, y: y.register_hook(look) and None)
    for step in (1, 2):  # the second prefetches by the first's order
        model.zero_grad()
        backward(model, own_rows())
        if layout != "whole" and not checkpointed:
            assert set(seen) == {"DTensor"}
        fused(model, step * times * FUSED, step * times * together)
        assert all(type(p).__name__ == "DTensor" for p in model.parameters())
        agree(gradients(model), whole_batch())


def moe_model():
    """A Qwen3-MoE with random adapters on its experts, the same in every process."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=LAYERS, vocab_size=61
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.2)
    return model


def fsdp2_experts(checkpointed):
    model = moe_model()
    backward(model, IDS)
    expected = gradients(model)
    model = patch(moe_model())
    if checkpointed:
        checkpointing(model)
    for module in model.modules():
        if type(module).__name__.endswith("Qwen3MoeDecoderLayer"):
            fully_shard(module)
    fully_shard(model)
    for step in (1, 2):
        model.zero_grad()
        backward(model, own_rows())
        fused(model, step * (2 if checkpointed else 1) * 2 * LAYERS, 0)
        agree(gradients(model), expected)


def fsdp2_accumulation(layout):
    model = shard(patch(peft_model()), layout)
    for last, ids in enumerate(own_rows().chunk(2)):
        model.set_requires_gradient_sync(bool(last))
        backward(model, ids, 0.5)
    agree(gradients(model), whole_batch())


def fsdp2_dtypes(layout, base, policy, unit_policy="same"):
    """As right as PEFT in the same units, by fp64.  ``unit_policy``: of the factors' own units."""
    policy = MixedPrecisionPolicy(**policy)
    runs = []
    for patched in (False, True):
        model = peft_model(base)
        if patched:
            patch(model)
        if unit_policy != "same":
            for layer in lora_layers(model):
                for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                    fully_shard(factor, mp_policy=MixedPrecisionPolicy(**unit_policy))
        shard(model, layout, policy)
        backward(model, own_rows())
        runs.append(gradients(model))
    fused(model, shared=SHARED if layout == "decoders" and unit_policy == "same" else 0)
    oracle = peft_model(base).double()
    backward(oracle, IDS)
    agree(runs[1], runs[0], gradients(oracle))


def fsdp2_cast_away(factor, **policy):
    """A unit that hands its x on in fewer bits, or its result in others, is PEFT's to call."""
    runs = []
    for patched in (False, True):
        model = peft_model()
        for layer in lora_layers(patch(model) if patched else model):
            fully_shard(getattr(layer, factor)["default"], mp_policy=MixedPrecisionPolicy(**policy))
        shard(model, "decoders")
        backward(model, own_rows())
        runs.append(gradients(model))
    assert lowrank.stats(model)["fallback"] == {f"{factor} is a FSDPLinear": FUSED}
    agree(*runs)


def dropout(layout):
    """The masks of a recomputation are the forward's."""
    runs = []
    for checkpointed in (False, True):
        model = patch(peft_model(lora_dropout=0.3)).train()
        if checkpointed:
            checkpointing(model)
        shard(model, layout)
        torch.manual_seed(dist.get_rank())
        backward(model, own_rows())
        runs.append(gradients(model))
    assert lowrank.stats(model)["fallback"] == {}
    agree(*runs)
    without = whole_batch()
    assert any(not torch.allclose(grad, without[name], rtol=0.05) for name, grad in runs[0].items())


def dora(layout, reason=None):
    runs = []
    for sharded in (False, True):
        model = peft_model(use_dora=True)
        if sharded:
            shard(patch(model), layout)
        backward(model, own_rows() if sharded else IDS)
        runs.append(gradients(model))
    fallback = lowrank.stats(model)["fallback"]
    assert fallback == ({} if reason is None else {reason: FUSED}), fallback
    agree(*runs)


def in_place_on_a_result(layout):
    """What follows a layer may add to its result in place."""
    model = patch(peft_model())
    reference = peft_model()
    for m in (model, reference):
        for layer in decoders(m):
            layer.self_attn.o_proj.register_forward_hook(lambda _, __, y: y.mul_(2))
    shard(model, layout)
    backward(model, own_rows())
    backward(reference, IDS)
    agree(gradients(model), gradients(reference))


def several_adapters(layout):
    runs = []
    for sharded in (False, True):
        model = peft_model(lora_bias=True)
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        if sharded:
            shard(patch(model), layout)
        backward(model, own_rows() if sharded else IDS)
        runs.append(gradients(model))
    assert lowrank.stats(model)["fallback"] == {}
    agree(*runs)


def outside_its_unit():
    """A layer called while its weights are shards: an error that says so, and never a number."""
    model = shard(patch(peft_model()), "decoders")
    backward(model, own_rows())
    raises("DTensor", lora_layers(model)[0], torch.randn(2, 64))
    assert any("DTensor" in reason for reason in lowrank.stats(model)["fallback"])


def raises(text, call, *args, **kwargs):
    with pytest.raises(Exception, match=re.escape(text)):
        call(*args, **kwargs)


def tensor_parallel(sharded):
    """lora_A in columns over both processes, by torch's own hooks; with ``sharded`` a unit of FSDP2 as well."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = patch(peft_model())
    for layer in lora_layers(model):
        A = layer.lora_A["default"]
        parallelize_module(A, mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
        if sharded:
            fully_shard(A, mesh=mesh["data"])
    warnings.simplefilter("ignore")  # torch's own hooks return a view here
    backward(model, IDS)
    reason = "lora_A is a FSDPLinear" if sharded else "hooks on lora_A"
    assert lowrank.stats(model)["fallback"] == {reason: FUSED}
    agree(gradients(model), whole_batch())


# DistributedDataParallel


def ddp(checkpointed, accumulate, **options):
    model = patch(peft_model())
    if checkpointed:
        checkpointing(model)
    wrapped = DistributedDataParallel(model, **options)
    micro = own_rows().chunk(2) if accumulate else [own_rows()]
    for i, ids in enumerate(micro):
        with wrapped.no_sync() if i + 1 < len(micro) else contextlib.nullcontext():
            backward(wrapped, ids, 1 / len(micro))
    times = len(micro) * (2 if checkpointed else 1)
    fused(model, times * FUSED, times * SHARED)
    agree(gradients(model), whole_batch())


class Attention(torch.nn.Module):
    """q, k and v of one x; nothing is made of k."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        q, _, v = (part(x) for part in self.parts)
        return q.sum() + v.pow(2).sum()


def ddp_with_an_idle_sibling():
    """find_unused_parameters looks through the one node that q, k and v share."""
    runs, x = [], torch.linspace(-1, 1, 4 * 64).view(4, 64)
    for split in (False, True):
        model = peft_model()
        self_attn = decoders(patch(model) if split else model)[0].self_attn
        attention = Attention([self_attn.q_proj, self_attn.k_proj, self_attn.v_proj])
        if split:
            wrapped = DistributedDataParallel(attention, find_unused_parameters=True)
            (wrapped(x.chunk(2)[dist.get_rank()]) * 2).backward()  # a sum, which DDP averages
            assert lowrank.stats(attention)["shared"] == 2
        else:
            attention(x).backward()
        grads = {n: p.grad for n, p in attention.named_parameters() if p.requires_grad}
        assert all(grad is None for n, grad in grads.items() if ".1." in n)
        runs.append({n: grad for n, grad in grads.items() if ".1." not in n})
    agree(*runs)


# FullyShardedDataParallel


def fsdp1(policy, checkpointed, use_orig_params, bf16=False, strategy="FULL_SHARD"):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    runs = []
    for patched in (False, True):
        model = peft_model()
        if patched:
            patch(model)
        if checkpointed:
            checkpointing(model)
        wrap = {
            "peft": lambda model=model: fsdp_auto_wrap_policy(model),
            "decoders": lambda model=model: ModuleWrapPolicy({type(decoders(model)[0])}),
            "layers": lambda model=model: ModuleWrapPolicy({type(lora_layers(model)[0])}),
        }[policy]()
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=wrap,
            use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy[strategy],
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if bf16 else None,
        )
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
        before = fsdp1_factors(wrapped)
        for _ in range(2):  # the second prefetches by the first's order
            optimizer.zero_grad()
            # as accelerate does, or PEFT's fp32 x meets bf16 units
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                backward(wrapped, own_rows())
        optimizer.step()
        runs.append({name: before[name] - after for name, after in fsdp1_factors(wrapped).items()})
    times = 4 if checkpointed else 2
    fused(model, times * FUSED, times * SHARED if policy == "decoders" else 0)
    whole = whole_batch()
    if bf16:
        agree(runs[1], runs[0], whole)
    else:
        agree(runs[1], whole)


def fsdp1_factors(wrapped):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {plain(n): p.detach().clone() for n, p in wrapped.named_parameters() if ".lora_" in n}


# Files


def state_dicts(layout, folder):
    """A sharded model's state, gathered and in torch's distributed checkpoint, is the model's that was never split."""
    from safetensors.torch import load_file

    alone, model = peft_model(), shard(patch(peft_model()), layout)
    backward(model, own_rows())  # gathered once, sharded again
    keys = list(alone.state_dict())
    assert list(model.state_dict()) == keys
    sharded = get_model_state_dict(model)
    dcp.save(sharded, checkpoint_id=folder / "dcp")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert list(whole) == keys
        expected = get_peft_model_state_dict(alone)
        adapter = get_peft_model_state_dict(model, state_dict=whole)
        assert adapter.keys() == expected.keys()
        assert all(torch.equal(adapter[key], expected[key]) for key in expected)
        model.save_pretrained(folder / "adapter", state_dict=whole)
        alone.save_pretrained(folder / "alone")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / "adapter" / file).read_bytes() == (folder / "alone" / file).read_bytes(), file
        written = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(written[key], expected[key]) for key in expected)

    other = peft_model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    shard(patch(other), layout)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state)
    backward(other, own_rows())
    fused(other, shared=SHARED if layout == "decoders" else 0)
    agree(gradients(other), whole_batch())


def killed_while_saving(folder):
    """DCP's directories, one a step: a process that dies in the second save leaves the first as it was."""
    model = shard(patch(peft_model()), "decoders")
    state = get_model_state_dict(model)
    dcp.save(state, checkpoint_id=folder / "1")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    if dist.get_rank() == 1:
        from torch.distributed.checkpoint import filesystem

        real = filesystem._write_item

        def write(*args, **kwargs):
            real(*args, **kwargs)
            os._exit(7)  # after the first of its tensors

        filesystem._write_item = write
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "2")


def loads_what_was_saved_before(folder):
    other = peft_model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(5)
    shard(patch(other), "decoders")
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "1")
    set_model_state_dict(other, state)
    backward(other, own_rows())
    agree(gradients(other), whole_batch())


def refuses_to_save_shards(kind, folder):
    model = patch(peft_model())
    if kind == "fsdp2":
        shard(model, "decoders")
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(decoders(model)[0])}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        ).module
    raises("is a shard", lowrank.save_adapter, model, folder / str(dist.get_rank()))
    assert not list(folder.glob("**/*.safetensors"))


# A model split over processes by layers


class Stage(torch.nn.Module):
    """Half of a Llama: the embedding and its first layers, or the last ones and the head."""

    def __init__(self, model, rank):
        super().__init__()
        whole = model.base_model.model
        self.embed = whole.model.embed_tokens if rank == 0 else None
        self.layers = torch.nn.ModuleList(whole.model.layers[rank : rank + 1])
        self.rotary = whole.model.rotary_emb
        self.norm, self.head = (whole.model.norm, whole.lm_head) if rank == 1 else (None, None)

    def forward(self, x):
        if self.embed is not None:
            x = self.embed(x)
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=positions, attention_mask=None)
        return x if self.head is None else self.head(self.norm(x))


def pipeline():
    """lm_head, tied to the embedding and adapted, on another process than the embedding."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    def make():
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        return peft_model(target_modules=targets, tied=True)

    def loss(logits, ids):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    reference = make()
    loss(reference(IDS).logits, IDS).backward()
    unpatched = gradients(reference)
    model, rank = patch(make()), dist.get_rank()
    stage = Stage(model, rank)
    schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu")), n_microbatches=2, loss_fn=loss)
    schedule.step(*([IDS] if rank == 0 else []), **({"target": IDS} if rank == 1 else {}))
    assert lowrank.stats(model)["fallback"] == {}
    assert lowrank.stats(model)["fused"] == 3 * (7 + rank)  # two micro-batches, and torch asks for the shapes first
    parts = {id(p): n for n, p in model.named_parameters()}
    ours = {plain(parts[id(p)]): p.grad for p in stage.parameters() if p.requires_grad}
    agree(ours, {name: unpatched[name] for name in ours})
    assert len(ours) == 2 * (7 + rank)


# DeepSpeed


def zero3(checkpointed, bf16=False):
    import deepspeed

    runs = []
    for patched in (False, True):
        model = peft_model()
        if patched:
            patch(model)
        if checkpointed:
            checkpointing(model)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16},
        }
        factors = {plain(n): p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(factors.values(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(3):  # the first is recorded, the others follow the record
            engine.backward(engine(input_ids=own_rows(), labels=own_rows()).loss)
            runs.append({n: deepspeed.utils.safe_get_full_grad(p).clone() for n, p in factors.items()})
            engine.step()
    for unpatched, ours in zip(runs[:3], runs[3:], strict=True):
        agree(ours, unpatched, whole_batch() if bf16 else None)
    times = 6 if checkpointed else 3
    fused(model, times * FUSED, 0)
