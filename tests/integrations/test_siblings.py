"""q/k/v and gate/up computed together, and every reason not to."""

import copy
import gc
import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_peft import IDS, agree, llama, peft_llama, step

import lowrank
from lowrank import _stats
from lowrank.integrations import siblings
from lowrank.integrations.peft import patch, unpatch
from lowrank.ops import lora


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    yield
    lowrank.strict(False)


@pytest.fixture
def calls(monkeypatch):
    """How many projections each call of the op computed."""
    made = []

    def counted(original):
        def run(x, projections, *rest):
            ys = original(x, projections, *rest)
            if ys is not None:
                made.append(len(projections))
            return ys

        return run

    for form in ("linears", "general"):
        monkeypatch.setattr(lora, form, counted(getattr(lora, form)))
    return made


def block(**config):
    """One patched attention of a small Llama and an input for it."""
    model = patch(peft_llama(**config))
    return model.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 64, requires_grad=True)


def shared():
    return lowrank.stats()["shared"]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_one_call_per_group_and_the_same_numbers(targets, calls):
    model = patch(peft_llama(target_modules=targets))
    ours = step(model)
    assert calls == ([3, 1, 2, 1] if targets == "all-linear" else [2]) * 2
    assert lowrank.stats(model)["shared"] == (6 if targets == "all-linear" else 2)
    calls.clear()
    patch(model, siblings=False)
    apart = step(model)
    assert set(calls) == {1}
    unpatch(model)
    agree(ours, step(model))
    agree(apart, step(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing(reentrant, p):
    model = patch(peft_llama(lora_dropout=p)).train()
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        runs.append(step(model))
    assert lowrank.stats(model)["shared"] == 6 + 12
    agree(*runs)


@pytest.mark.parametrize("why", ["copy", "in place", "view"])
def test_another_input_is_computed_alone(why, calls):
    attention, x = block()
    x = x.detach()
    attention.q_proj(x)
    if why == "in place":
        x.mul_(2)
    other = {"copy": x.clone, "view": lambda: x.view(2, 5, 64), "in place": lambda: x}[why]()
    y = attention.k_proj(other)
    assert calls == [3, 1]
    assert shared() == 0
    unpatch(attention)
    torch.testing.assert_close(y, attention.k_proj(other))


def change_scaling(layer):
    layer.scaling["default"] *= 2


def change_weights(layer):
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)


def replace_data(layer):
    weight = layer.lora_B["default"].weight
    weight.data = weight.data * 2


def change_adapter(layer):
    layer.update_layer("second", r=4, lora_alpha=8, config=layer_config())
    layer.set_adapter("second")


def layer_config():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)


def disable(layer):
    layer.enable_adapters(False)


def change_dropout(layer):
    layer.lora_dropout["default"] = torch.nn.Dropout(1.0)


@pytest.mark.parametrize(
    "change", [change_scaling, change_weights, replace_data, change_adapter, disable, change_dropout]
)
def test_changed_adapters_are_computed_anew(change):
    attention, x = block()
    attention.train()
    attention.q_proj(x)
    change(attention.k_proj)
    y = attention.k_proj(x)
    assert shared() == 0
    unpatch(attention)
    torch.testing.assert_close(y, attention.k_proj(x))


def test_an_input_whose_data_is_replaced_is_another():
    attention, x = block()
    with torch.no_grad():
        attention.q_proj(x)
        x.data = x.data * 2
        y = attention.k_proj(x)
        assert shared() == 0
        unpatch(attention)
        torch.testing.assert_close(y, attention.k_proj(x))


def test_modes_are_part_of_the_call():
    attention, x = block()
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    attention.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.v_proj(x).dtype is torch.bfloat16
    assert shared() == 0
    with torch.inference_mode():
        seen = torch.randn(2, 5, 64)
        attention.q_proj(seen), attention.k_proj(seen)
    assert shared() == 0
    with torch.no_grad():
        attention.q_proj(x), attention.k_proj(x)
    assert shared() == 1


def test_a_disabled_or_merged_sibling_is_left_out(calls):
    attention, x = block()
    attention.k_proj.merge()
    attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    assert calls == [2]
    attention.k_proj.unmerge()
    calls.clear()
    attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    assert calls == [3]


def test_nothing_is_held_once_all_have_theirs():
    attention, _ = block()
    x = torch.randn(2, 5, 64)
    ref = weakref.ref(x)
    with torch.no_grad():
        attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    del x
    gc.collect()
    assert ref() is None
    assert not attention.q_proj.__dict__["_lowrank_siblings"]._kept.results


@pytest.fixture
def inside(monkeypatch):
    """A list of functions, of which each call for a whole group takes one to run while it computes."""
    waiting, original = [], siblings.lora_projections

    def slow(*args, **options):
        ys = original(*args, **options)
        if waiting:
            waiting.pop(0)()
        return ys

    monkeypatch.setattr(siblings, "lora_projections", slow)
    return waiting


@pytest.mark.parametrize("grad", [False, True])
def test_each_thread_is_handed_its_own(grad, inside, calls):
    """The other thread leads its group while this one computes, and asks for the rest after this one is done."""
    attention, x_here = block()
    x_there = torch.randn(2, 5, 64)
    names = ("q_proj", "k_proj", "v_proj")
    unpatch(attention)
    want = {id(x): [attention.get_submodule(name)(x) for name in names] for x in (x_here, x_there)}
    patch(attention)

    def ask(name, x):
        with torch.set_grad_enabled(grad):
            return attention.get_submodule(name)(x)

    with ThreadPoolExecutor(1) as other:
        there = []
        inside.append(lambda: there.append(other.submit(ask, "q_proj", x_there).result()))
        here = [ask("q_proj", x_here)]
        for name in names[1:]:
            there.append(other.submit(ask, name, x_there).result())
            here.append(ask(name, x_here))
    torch.testing.assert_close(here, want[id(x_here)])
    torch.testing.assert_close(there, want[id(x_there)])
    assert calls == [3, 3]
    assert shared() == 4


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter serves one thread at a time"
)
def test_many_threads_at_once():
    model = patch(peft_llama())
    inputs = [torch.randint(0, 100, (1, 4 + i)) for i in range(6)]
    with torch.no_grad():
        want = [model(ids).logits for ids in inputs]
        start = threading.Barrier(len(inputs))

        def run(ids):
            start.wait()
            with torch.no_grad():
                return [model(ids).logits for _ in range(4)]

        with ThreadPoolExecutor(len(inputs)) as threads:
            results = list(threads.map(run, inputs))
    for logits, runs in zip(want, results, strict=True):
        torch.testing.assert_close(runs, [logits] * 4)


def test_one_tensor_in_two_threads_and_two_modes():
    attention, x = block()
    with ThreadPoolExecutor(1) as other:
        with torch.no_grad():
            attention.q_proj(x)
        y = other.submit(attention.k_proj, x).result()  # grad mode is per thread
        with torch.no_grad():
            assert not attention.k_proj(x).requires_grad
    assert y.requires_grad
    assert shared() == 1


@pytest.fixture
def results(monkeypatch):
    """Weak references to what calls for a whole group made."""
    refs, original = [], siblings.lora_projections

    def seen(*args, **options):
        ys = original(*args, **options)
        refs.extend(weakref.ref(y) for y in ys)
        return ys

    monkeypatch.setattr(siblings, "lora_projections", seen)
    return refs


def alive(refs):
    gc.collect()
    return sum(ref() is not None for ref in refs)


def test_what_waits_goes_with_its_thread(results):
    attention, x = block()
    ended = threading.Thread(target=attention.q_proj, args=[x])
    ended.start()
    ended.join()
    assert len(results) == 3
    assert not alive(results)


def test_what_waits_goes_with_the_model(results):
    attention, x = block()
    attention.q_proj(x)
    assert alive(results) == 2
    del attention
    assert not alive(results)


def test_copies_and_pickles_leave_what_waits_behind(calls):
    attention, x = block()
    x = torch.randn(100, 64)
    size = len(pickle.dumps(attention))
    y = attention.q_proj(x)
    twins = copy.deepcopy(attention), copy.copy(attention.v_proj), pickle.loads(pickle.dumps(attention))
    assert len(pickle.dumps(attention)) == size
    for twin in twins:
        assert not any("_lowrank_siblings" in layer.__dict__ for layer in twin.modules())
    attention.k_proj(x), attention.v_proj(x)
    assert shared() == 2
    torch.testing.assert_close(twin.q_proj(x), y)
    assert calls == [3, 1]


@pytest.mark.parametrize("what", ["x", "lora_A", "lora_B"])
def test_what_asks_for_a_gradient_is_part_of_the_call(what):
    """Frozen when the first was called, trained when the next one is."""
    attention, _ = block()
    x = torch.randn(2, 5, 64)
    t = x if what == "x" else getattr(attention.k_proj, what)["default"].weight
    t.requires_grad_(False)
    attention.q_proj(x)
    t.requires_grad_()
    y = attention.k_proj(x)
    assert torch.autograd.grad(y.sum(), t)[0].any()
    attention.v_proj(x)
    assert shared() == (0 if what == "x" else 1)


def test_weights_whose_changes_cannot_be_seen_are_left_out(calls):
    attention, x = block()
    with torch.inference_mode():
        layer = attention.k_proj.lora_B["default"]
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        attention.q_proj(x)
        layer.weight.mul_(2)
        y = attention.k_proj(x)
        assert calls == [2, 1]
        unpatch(attention)
        torch.testing.assert_close(y, attention.k_proj(x))


def test_what_inference_mode_made_stays_there():
    attention, x = block()
    with torch.inference_mode():
        attention.q_proj(x)
    with torch.no_grad():
        assert not attention.k_proj(x).is_inference()


NEXT = {
    "the same layer": lambda attention, x: attention.q_proj(x),
    "another model's": lambda attention, x: block(target_modules=["o_proj"])[0].o_proj(x),
    "one without a group": lambda attention, x: attention.o_proj(x),
    "one that falls back": lambda attention, x: patched_conv1d()(x),
    "a DoRA": lambda attention, x: block(target_modules=["o_proj"], use_dora=True)[0].o_proj(x),
    "merged": lambda attention, x: (attention.o_proj.merge(), attention.o_proj(x)),
    "disabled": lambda attention, x: (attention.q_proj.enable_adapters(False), attention.q_proj(x)),
    "in inference mode": lambda attention, x: in_inference_mode(attention.q_proj),
    "refused": lambda attention, x: fails(ValueError, attention.o_proj, torch.randn(2, 3)),
    "with a strict fallback": lambda attention, x: fails(lowrank.FallbackError, attention.o_proj, x, 1),
    "a copy": lambda attention, x: copy.deepcopy(attention).k_proj(x),
    "a replica": lambda attention, x: attention.k_proj._replicate_for_data_parallel()(x),
    "unpatch": lambda attention, x: unpatch(attention),
    "unpatch of one": lambda attention, x: unpatch(attention.k_proj),
    "unpatch in another thread": lambda attention, x: in_a_thread(unpatch, attention),
    "patch": lambda attention, x: patch(attention),
    "patch of one": lambda attention, x: patch(attention.v_proj),
}


def fails(error, layer, *args):
    with pytest.raises(error), lowrank.strict():
        layer(*args)


def in_inference_mode(layer):
    with torch.inference_mode():
        layer(torch.randn(2, 5, 64))


def in_a_thread(f, *args):
    with ThreadPoolExecutor(1) as other:
        return other.submit(f, *args).result()


def patched_conv1d():
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Sequential(Conv1D(8, 64))
    return patch(get_peft_model(model, LoraConfig(target_modules=["0"], fan_in_fan_out=True)))


@pytest.mark.parametrize("what", NEXT)
def test_what_a_failed_forward_left_is_dropped_by_what_comes_next(what, results):
    """The first of three was called, then its model raised; the results' own graph holds x."""
    attention, x = block(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    attention.q_proj(x)
    left = results[:]
    assert sum(ref() is not None for ref in left) == 2
    NEXT[what](attention, x.detach())
    assert not alive(left)


def test_siblings_in_between_are_still_waited_for(calls):
    """A member that computes alone, by its own choice, ends nothing."""
    attention, x = block()
    attention.k_proj.enable_adapters(False)
    attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    assert calls == [2]
    assert shared() == 1


@pytest.mark.parametrize("used", [["q_proj"], ["k_proj", "v_proj"], ["v_proj"]], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_members_whose_result_is_not_used_get_no_gradient(used, p):
    """As without the patch, so that an optimizer leaves them where they are; a hook that is called finds None."""
    attention, x = block(lora_dropout=p)
    attention.train()
    trained = {name: w for name, w in attention.named_parameters() if w.requires_grad}
    hooked = []
    for name, weight in trained.items():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: hooked.append((name, w.grad is None)))
    torch.manual_seed(3)
    ys = {name: attention.get_submodule(name)(x) for name in ("q_proj", *used)}
    torch.autograd.backward([ys[name].sum() for name in used], retain_graph=True)
    trained_names = {name for name in trained if name.startswith(tuple(used))}
    assert {name for name, is_none in hooked if not is_none} == trained_names
    assert {name for name, weight in trained.items() if weight.grad is not None} == trained_names
    grads = [x.grad.clone(), *(trained[name].grad.clone() for name in sorted(trained_names))]
    rest = [y.sum() * 0 for name, y in ys.items() if name not in used]  # now with gradients of zero for the others
    x.grad = None
    for weight in trained.values():
        weight.grad = None
    torch.autograd.backward([ys[name].sum() for name in used] + rest)
    torch.testing.assert_close([x.grad, *(trained[name].grad for name in sorted(trained_names))], grads)

    before = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    attention.q_proj(x)
    sum(attention.get_submodule(name)(x).sum() for name in used).backward()
    optimizer.step()
    assert {name for name, weight in trained.items() if not torch.equal(weight, before[name])} <= trained_names


def test_results_that_nobody_takes_are_pointed_out():
    attention, x = block()
    with pytest.warns(UserWarning, match="siblings=False"):
        [attention.q_proj(x) for _ in range(20)]


def test_one_mask_for_siblings_is_an_option():
    kept = []
    for shared_mask in (False, True):
        model = patch(peft_llama(lora_dropout=0.5), shared_mask=shared_mask).train()
        attention, x = model.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 64, requires_grad=True)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        kept.append(sum(t.dtype is torch.int32 for t in seen))
    assert kept == [3, 1]


def test_cross_attention_is_no_group(calls):
    from peft import LoraConfig, get_peft_model
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50)
    bart = BartForConditionalGeneration(BartConfig(encoder_attention_heads=2, decoder_attention_heads=2, **sizes))
    model = patch(
        get_peft_model(bart, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False))
    )
    model.eval()
    ids = torch.arange(12).view(2, 6)
    ours = model(input_ids=ids, decoder_input_ids=ids).logits
    assert sorted(calls) == [1, 1, 1, 3, 3]
    unpatch(model)
    torch.testing.assert_close(ours, model(input_ids=ids, decoder_input_ids=ids).logits, rtol=1e-4, atol=1e-5)


# Model, configuration beside what all have, and the groups of its first layers: names, which the model calls with one tensor.
SIZES = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4)
LINEAR = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=1, linear_num_value_heads=1)
MLA = dict(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1)
KIMI = dict(linear_head_dim=16, linear_num_heads=1, mlp_layer_types=["dense"], num_local_experts=4, pad_token_id=0)
TODAY = {
    "Qwen3.5": (
        ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
        dict(LINEAR, layer_types=["linear_attention"]),
        ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"],
    ),
    "Qwen3-Next": (
        ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
        dict(LINEAR, layer_types=["linear_attention"], mlp_only_layers=[0]),
        ["in_proj_qkvz", "in_proj_ba"],
    ),
    "DeepSeek-V3": (
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        dict(MLA, q_lora_rank=24),
        ["q_a_proj", "kv_a_proj_with_mqa"],
    ),
    "DeepSeek-V3 without q_a_proj": (
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        dict(MLA, q_lora_rank=None),
        ["q_proj", "kv_a_proj_with_mqa"],
    ),
    "Kimi Linear": (
        ("KimiLinearConfig", "KimiLinearForCausalLM"),
        dict(KIMI, layer_types=["linear_attention"]),
        ["q_proj", "k_proj", "v_proj", "f_a_proj", "b_proj", "g_a_proj"],
    ),
}


@pytest.mark.filterwarnings("error:lowrank computes")
@pytest.mark.parametrize("targets", ["the attention's linears", "those alone"])
@pytest.mark.parametrize("which", TODAY)
def test_todays_models(which, targets, calls):
    """One head each where a projection has an output per head: some are 1 or 2 wide."""
    transformers = pytest.importorskip("transformers")
    (config, model), more, group = TODAY[which]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**SIZES, num_hidden_layers=1, **more))
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "_attn." in n]
    model = patch(peft_llama(model=model, target_modules=group if targets == "those alone" else linears))
    ours = step(model, use_cache=False)
    assert [n for n in calls if n > 1] == [len(group)]
    assert lowrank.stats(model)["shared"] == len(group) - 1
    assert lowrank.stats(model)["fallback"] == {}
    unpatch(model)
    agree(ours, step(model, use_cache=False))


class Block(torch.nn.Module):
    def __init__(self, **widths):
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, torch.nn.Linear(width, 8))


@pytest.mark.parametrize(
    ("block", "want"),
    [
        (dict(q_proj=8, v_proj=8), ["q_proj v_proj"]),
        (dict(q_proj=8, k_proj=8, v_proj=8, b_proj=8), ["q_proj k_proj v_proj b_proj"]),
        (dict(q_proj=8, k_proj=8, v_proj=8, b_proj=4), ["q_proj k_proj v_proj"]),
        (dict(q_proj=8, kv_a_proj_with_mqa=8, k_proj=8), ["q_proj k_proj"]),
        (dict(q_proj=8, kv_a_proj_with_mqa=8, q_a_proj=8), ["q_a_proj kv_a_proj_with_mqa"]),
        (dict(q_proj=8, kv_a_proj_with_mqa=8, g_proj=8), ["q_proj kv_a_proj_with_mqa"]),
        (dict(g_proj=8, gate_proj=8, up_proj=8), ["gate_proj up_proj"]),
        (dict(in_proj_b=8, in_proj_a=8, gate_proj=8, up_proj=8), ["in_proj_b in_proj_a", "gate_proj up_proj"]),
    ],
    ids=str,
)
def test_a_layer_is_in_the_group_of_which_most_are_there(block, want):
    model = torch.nn.Sequential(Block(**block))
    names = {layer: name for name, layer in model[0].named_children()}
    groups = [group for group, _ in siblings.find(model, names.__contains__)]
    assert [" ".join(names[layer] for layer in group) for group in groups] == want


def test_a_layer_of_two_modules_is_in_one_group():
    model = torch.nn.ModuleList([Block(q_proj=8, k_proj=8), Block(v_proj=8, q_proj=8)])
    model[1].q_proj = model[0].q_proj
    model[0].v_proj = model[0].k_proj
    groups = [group for group, _ in siblings.find(model, lambda layer: isinstance(layer, torch.nn.Linear))]
    assert groups == [[model[0].q_proj, model[0].k_proj]]


def test_compile_fullgraph():
    attention, x = block()
    torch._dynamo.reset()

    def f(x):
        return attention.q_proj(x).sin().sum() + attention.k_proj(x).cos().sum() + attention.v_proj(x).sum()

    want = torch.autograd.grad(f(x), x)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)


def test_copies_and_pickles_compute_alone(calls):
    model = patch(peft_llama())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.testing.assert_close(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert 3 in calls  # the original's
        assert calls[:14] == [1] * 14
    assert not any("_lowrank_siblings" in layer.__dict__ for layer in unpatch(model).modules())


def test_replicas_compute_alone(calls):
    """What nn.DataParallel calls, one per device and in threads: shallow copies, with their originals' __dict__."""
    attention, x = block()
    want = attention.q_proj(x)
    replicas = [layer._replicate_for_data_parallel() for layer in (attention.q_proj, attention.k_proj)]
    calls.clear()
    torch.testing.assert_close(replicas[0](x), want)  # alone, a kernel may be cut another way
    replicas[1](x)
    assert calls == [1, 1]


def test_adapt_shares_too(calls):
    from peft import LoraConfig

    model = lowrank.adapt(llama(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model(input_ids=IDS)
    assert calls == [3, 1, 2, 1] * 2
