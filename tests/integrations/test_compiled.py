"""torch.compile and torch.export of patched models: one graph for every batch, length and adapter, and the same numbers."""

import cProfile

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch
from lowrank.integrations.peft_layer import WRITTEN
from lowrank.ops.node import CHANGED

TARGETS = ["q_proj", "k_proj", "up_proj"]


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    counters.clear()
    _stats.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    lowrank.strict(False)


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes))


def peft_llama(seed=1, **config):
    torch.manual_seed(seed)
    return get_peft_model(llama(), LoraConfig(**dict(r=4, target_modules=TARGETS, init_lora_weights=False) | config))


def tokens(batch, length):
    return torch.arange(batch * length).view(batch, length) * 7 % 61


def step(model, ids):
    """Loss, logits and every gradient of one step, its dropout drawn anew from one seed."""
    torch.manual_seed(3)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(ours, unpatched):
    torch.testing.assert_close(ours, unpatched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_and_evaluation(backend):
    """As PEFT uncompiled, in one graph each."""
    model, ids = peft_llama(lora_alpha=3), tokens(2, 16)
    unpatched, quiet = step(model, ids), model.eval()(ids).logits.detach()
    compiled = torch.compile(patch(model), fullgraph=True, backend=backend)
    with lowrank.strict():
        same(step(compiled.train(), ids), unpatched)
        with torch.no_grad():
            same(compiled.eval()(ids).logits, quiet)
    assert counters["stats"]["unique_graphs"] == 2


SHAPES = ((2, 16), (2, 17), (3, 17), (5, 9), (4, 31))


@pytest.mark.parametrize(("way", "p"), [("dynamic=True", 0.3), ("mark_dynamic", 0.0), ("mark_dynamic", 0.3)])
def test_one_graph_for_every_batch_and_length(way, p):
    model = patch(peft_llama(lora_alpha=3, lora_dropout=p))
    wants = [step(model, tokens(*shape)) for shape in SHAPES]
    compiled = torch.compile(
        model, fullgraph=True, backend="aot_eager", dynamic=True if way == "dynamic=True" else None
    )
    with lowrank.strict(), torch._dynamo.config.patch(error_on_recompile=True):
        for shape, want in zip(SHAPES, wants, strict=True):
            ids = tokens(*shape)
            if way == "mark_dynamic":
                for dim in (0, 1):
                    torch._dynamo.mark_dynamic(ids, dim)
            same(step(compiled, ids), want)


def test_what_is_traced_is_counted_and_eager_calls_cost_no_recompilation():
    model, ids = patch(peft_llama()), tokens(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = step(compiled, ids)
        assert lowrank.stats() == {"fused": 3, "shared": 0, "fallback": {}, "untouched": {}}
        assert lowrank.stats(model)["fused"] == 0
        for _ in range(2):
            same(step(model, ids), first)  # its siblings count what they share
            same(step(compiled, ids), first)
    assert lowrank.stats() == {"fused": 9, "shared": 2, "fallback": {}, "untouched": {}}


def test_layers_of_one_graph_stay_of_one_graph():
    """Compiled one by one, as regional compilation does: what is counted must not tell them apart."""
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
    model = patch(get_peft_model(base, LoraConfig(r=2, target_modules=["0.0", "1.0", "2.0"])))
    for block in model.base_model.model:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert counters["stats"]["unique_graphs"] == 1
    assert lowrank.stats()["fused"] == 1


def test_a_fallback_is_told_while_it_is_traced():
    model, ids = peft_llama(), tokens(2, 16)
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].register_forward_hook(
        lambda m, a, out: out * 2
    )
    unpatched = step(model, ids)
    compiled = torch.compile(patch(model), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="falls back to PEFT's own code.*hooks on lora_A"):
        same(step(compiled, ids), unpatched)
    assert lowrank.stats() == {"fused": 2, "shared": 0, "fallback": {"hooks on lora_A": 1}, "untouched": {}}
    torch._dynamo.reset()
    with lowrank.strict(), pytest.raises(Exception, match=r"FallbackError.*hooks on lora_A"):
        step(compiled, ids)


def test_adapters_are_swapped_without_recompiling(tmp_path):
    """PEFT's compiled hot-swap, to other ranks and scalings and back."""
    ids, wants = tokens(2, 16), {}
    for seed, (name, config) in enumerate(
        {"a": dict(r=4, lora_alpha=8), "b": dict(r=2, lora_alpha=6), "c": dict(r=8, lora_alpha=3)}.items()
    ):
        peft_llama(seed, **config).save_pretrained(tmp_path / name)
        wants[name] = step(PeftModel.from_pretrained(llama(), tmp_path / name, is_trainable=True), ids)[:2]
    assert (wants["a"][1] - wants["b"][1]).abs().max() > 1e-2
    model = patch(PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with lowrank.strict(), torch._dynamo.config.patch(error_on_recompile=True):
        same(step(compiled, ids)[:2], wants["a"])
        for name in ("b", "c", "a"):
            hotswap_adapter(compiled, tmp_path / name, adapter_name="default")
            same(step(compiled, ids)[:2], wants[name])


def linears(n=1, width=8, dtype=torch.float32, **config):
    """Seeded: n linears, each with an adapter, for PEFT or patched."""
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(width, width) for _ in range(n)]).to(dtype)
    settings = dict(r=2, target_modules=[str(i) for i in range(n)], init_lora_weights=False) | config
    return get_peft_model(base, LoraConfig(**settings))


def python_calls(model, grad):
    """Python's function calls in a compiled model's first step: what tracing costs, without a clock."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if grad else "eager")
    profile = cProfile.Profile()
    with torch.set_grad_enabled(grad), profile:
        y = compiled(torch.ones(2, 8, dtype=model.base_model.model[0].base_layer.weight.dtype))
        if grad:
            y.sum().backward()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("grad", [False, True], ids=["eager, no grad", "aot_eager, grad"])
@pytest.mark.parametrize("config", [{}, dict(dtype=torch.bfloat16), dict(lora_dropout=0.1, lora_bias=True)], ids=str)
def test_a_layer_costs_dynamo_what_peft_s_costs(config, grad):
    """Per layer, of those that come after the first."""
    cost = []
    for change in (lambda model: model, patch):
        python_calls(change(linears(1, **config)), grad)  # torch's own caches
        few, many = (python_calls(change(linears(n, **config)), grad) for n in (2, 5))
        cost.append((many - few) / 3)
    unpatched, ours = cost
    assert ours <= 1.1 * unpatched, (ours, unpatched)


def bare(layer):
    layer.base_layer.bias = None


def tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(0.7)


PLAIN = {
    "plain": ({}, None),
    "no bias": ({}, bare),
    "lora_bias": (dict(lora_bias=True), None),
    "dropout": (dict(lora_dropout=0.4), None),
    "rslora": (dict(use_rslora=True, lora_alpha=3), None),
    "scaling as a tensor": ({}, tensor_scaling),
    "fp32 adapters on bf16": (dict(dtype=torch.bfloat16), None),
    "bf16": (dict(dtype=torch.bfloat16), lambda layer: layer.to(torch.bfloat16)),
    "autocast": ({}, None),
    "inference_mode": (dict(lora_dropout=0.4), None),
    "copy_inputs": ({}, None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_layer_is_one_op_in_the_graph(name):
    """And has the uncompiled layer's bits, forward and every gradient."""
    config, change = PLAIN[name]
    model = linears(**config)
    layer = model.base_model.model[0]
    if change is not None:
        change(layer)
    patch(model, copy_inputs=name == "copy_inputs")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 5, 8).to(layer.base_layer.weight.dtype)

    def run(f):
        torch.manual_seed(5)
        model.zero_grad()
        with torch.inference_mode(name == "inference_mode"), torch.autocast("cpu", enabled=name == "autocast"):
            given = x.clone().requires_grad_(name != "inference_mode")
            y = f(given)
        if name == "inference_mode":
            return [y]
        y.float().square().sum().backward()
        return [y.detach(), given.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    with lowrank.strict():
        wants, outputs = run(layer), run(compiled)
    assert len(wants) == (1 if name == "inference_mode" else 5 if "lora_bias" in config else 4)
    torch.testing.assert_close(outputs, wants, rtol=0, atol=0)
    (graph,) = graphs
    (call,) = (node for node in graph.graph.nodes if node.op not in ("placeholder", "output"))
    assert call.target is torch.ops.lowrank.lora_linear.default
    # the version is for the key of torch's caches of compiled graphs, which hold what came of the op's body
    assert call.args[-2:] == (name == "copy_inputs", lowrank.__version__)


def hooked(part):
    def change(layer, part=part):
        getattr(layer, part)["default"].register_forward_hook(lambda m, a, out: out * 2)

    return change


def replaced(layer):
    module = layer.lora_B["default"]
    module.forward = lambda x: nn.Linear.forward(module, x) * 2


def base_replaced(layer):
    module = layer.base_layer
    module.forward = lambda x: nn.Linear.forward(module, x) * 2


def two(layer):
    layer.update_layer("b", 3, lora_alpha=1, config=LoraConfig(r=3, init_lora_weights=False))
    layer.set_adapter(["default", "b"])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(layer):
    layer.lora_A["default"].__class__ = Doubled


class Weight(nn.Parameter):
    pass


def of_another_type(layer):
    module = layer.lora_A["default"]
    module.weight = Weight(module.weight.detach() * 2)


def odd_scaling(layer):
    layer.scaling["default"] = torch.full((8,), 0.5)


OTHER = {
    "hooks on lora_A": hooked("lora_A"),
    "hooks on lora_B": hooked("lora_B"),
    "hooks on lora_dropout": hooked("lora_dropout"),
    "hooks on the base": lambda layer: layer.base_layer.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "lora_B's forward replaced": replaced,
    "the base's forward replaced": base_replaced,
    "a subclass of nn.Linear": of_another_class,
    "a subclass of nn.Parameter": of_another_type,
    "two adapters": two,
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "no adapter": lambda layer: setattr(layer, "_active_adapter", []),
    "another's adapter": lambda layer: setattr(layer, "_active_adapter", "elsewhere"),
    "scaling by column": odd_scaling,
    "its input was changed in place": lambda layer: layer.__dict__.update({CHANGED: True}),
    "global hooks": lambda layer: None,
}


@pytest.mark.filterwarnings("ignore:lowrank falls back")
@pytest.mark.parametrize("name", OTHER)
def test_any_other_layer_is_traced_as_it_is_called(name):
    """The uncompiled layer's numbers, counted as it is counted."""
    layer, x = patch(linears()).base_model.model[0], torch.randn(3, 8)
    plain = layer(x).detach()
    OTHER[name](layer)
    hook = nn.modules.module.register_module_forward_hook(lambda m, a, out: out * 2) if name == "global hooks" else None
    try:
        runs = []
        for f in (layer, torch.compile(lambda x: layer(x), fullgraph=True, backend="eager")):
            _stats.reset()
            runs.append((f(x).detach(), lowrank.stats()["fused"], lowrank.stats()["fallback"]))
    finally:
        if hook is not None:
            hook.remove()
    (want, *counted), (y, *traced) = runs
    same(y, want)
    assert traced == counted
    assert bool(counted[1]) is (name not in FUSED | UNADAPTED)
    if name not in ("merged", "its input was changed in place"):
        assert (want - plain).abs().max() > 1e-2


FUSED = {"hooks on the base", "the base's forward replaced", "two adapters"}
UNADAPTED = {"disabled", "merged", "no adapter", "another's adapter"}


def test_dtypes_that_nobody_casts_are_peft_s_error():
    layer = patch(linears(dtype=torch.bfloat16)).base_model.model[0]
    layer.cast_input_dtype_enabled = False
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    for f in (layer, torch.compile(layer, backend="eager")):
        with (
            pytest.warns(UserWarning, match="cast_input_dtype_enabled=False"),
            pytest.raises(RuntimeError, match="dtype"),
        ):
            f(x)
        _stats.reset()


def test_what_changes_between_calls_is_noticed():
    model, x = patch(linears(2, lora_dropout=0.5)).eval(), torch.randn(3, 8)
    layers = list(model.base_model.model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def both():
        torch.manual_seed(2)
        want = model(x)
        torch.manual_seed(2)
        same(compiled(x), want)
        return want

    seen = [both()]
    model.train()
    seen.append(both())
    model.eval()
    for layer in layers:
        layer.scaling["default"] = 0.25
    seen.append(both())
    with model.disable_adapter():
        seen.append(both())
    layers[0].__dict__[CHANGED] = True
    with pytest.warns(UserWarning, match="changed in place"):
        both()
    for i, y in enumerate(seen):
        assert all((y - other).abs().max() > 1e-2 for other in seen[:i])
    assert lowrank.stats()["fallback"][WRITTEN] == 2  # called, and traced


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def ops(program):
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("merged", "strict"), [(False, False), (False, True), (True, False)])
def test_an_exported_model_needs_no_lowrank(merged, strict):
    """Merged or not it is PEFT's own ops, which a machine without lowrank runs; for any batch and length."""
    model = patch(peft_llama(lora_alpha=3)).eval()
    with torch.no_grad():
        want, other = (model(tokens(*shape)).logits for shape in ((2, 16), (3, 11)))
    model = model.merge_and_unload() if merged else model
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    with lowrank.strict():
        program = torch.export.export(Logits(model), (tokens(2, 16),), dynamic_shapes=(dims,), strict=strict)
    assert not any("lowrank" in op for op in ops(program))
    with torch.no_grad():
        same(program.module()(tokens(2, 16)), want)
        same(program.module()(tokens(3, 11)), other)


@pytest.mark.parametrize("merged", [False, True])
def test_an_exported_layer(merged):
    """lowrank.nn.LoRALinear keeps its op, and none of it once merged."""
    layer = lowrank.nn.LoRALinear.from_linear(nn.Linear(8, 6), r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    x, other = torch.randn(3, 5, 8), torch.randn(2, 7, 8)
    wants = layer(x), layer(other)
    if merged:
        layer.merge()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
    assert any("lowrank" in op for op in ops(program)) is not merged
    for given, want in zip((x, other), wants, strict=True):
        same(program.module()(given), want)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f: torch.func.jacfwd(f),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum()),
}


@pytest.mark.filterwarnings("ignore:lowrank")
@pytest.mark.parametrize("how", TRANSFORMS)
def test_transforms_inside_a_graph(how):
    """torch.func within what is compiled: PEFT's numbers, of a patched layer and of the op."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model, x = get_peft_model(nn.Sequential(nn.Linear(8, 3)), config).eval(), torch.randn(4, 8)
    want = TRANSFORMS[how](model)(x)
    layer = patch(model).base_model.model[0]
    W, A, B = (m.weight for m in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))

    def op(x):
        return lowrank.lora_linear(x, W, A, B, layer.scaling["default"], bias=layer.base_layer.bias)

    for f in (model, op):
        compiled = torch.compile(TRANSFORMS[how](f), fullgraph=True, backend="aot_eager")
        same(compiled(x), want)
    assert counters["stats"]["unique_graphs"] == 2
