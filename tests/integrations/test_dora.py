"""PEFT's DoRA layers under the patch: PEFT's function, its gradients, its files; what is not covered falls back by name."""

import copy
import functools

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora.layer import Linear as PeftLinear
from test_peft import IDS, agree, as_right_as_peft, clean, fallback, llama, peft_llama, step  # noqa: F401

import lowrank
from lowrank.integrations.peft import patch, unpatch
from lowrank.ops import dropout


def dora_llama(*args, **config):
    """Magnitudes away from the norms, where DoRA is no longer LoRA."""
    model = peft_llama(*args, use_dora=True, **config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.randn_like(p))
    return model


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, PeftLinear)]


@pytest.mark.parametrize(
    "case", [{}, {"use_rslora": True, "lora_alpha": 3}, {"target_modules": ["q_proj", "down_proj"]}], ids=str
)
def test_logits_and_every_gradient_are_pefts(case):
    unpatched, ours = step(dora_llama(**case)), patch(dora_llama(**case))
    grads = step(ours)
    agree(grads, unpatched)
    assert sum("magnitude" in name for name in grads) == len(layers(ours))
    counted = lowrank.stats(ours)
    assert counted["fused"] == len(layers(ours))
    assert not counted["fallback"]


@pytest.mark.parametrize("adapters", ["bf16", "fp32"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_is_as_right_as_peft(adapters, autocast):
    as_right_as_peft(
        functools.partial(dora_llama, torch.bfloat16, adapters == "fp32"),
        patch,
        lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ("logits", "lora_A", "lora_B", "magnitude"),
    )


def test_a_bf16_norm_is_worse_than_ours():
    """PEFT rounds W + s B A and its norm to x's dtype; ours is fp32 whatever x is."""
    layer = layers(dora_llama(torch.bfloat16, False))[0]
    W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    truth = (W.double() + layer.scaling["default"] * B.double() @ A.double()).norm(dim=1)
    unpatched = layer.lora_magnitude_vector["default"].get_weight_norm(W, B @ A, layer.scaling["default"])
    ours = torch.ops.lowrank.dora_norm(W, A, B.float() * layer.scaling["default"])
    assert (ours - truth).norm() < 0.01 * (unpatched - truth).norm()


class Line(nn.Module):
    def __init__(self, dtype=torch.float32, bias=True):
        super().__init__()
        self.proj = nn.Linear(1000, 70, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


def start(dtype, fp32_adapters, bias=True, **config):
    """(a DoRA layer as it starts, an input, the base's output)."""
    torch.manual_seed(4)
    base, x = Line(dtype, bias), torch.randn(3, 40, 1000).to(dtype)
    y = base(x)
    config = LoraConfig(r=4, target_modules=["proj"], use_dora=True, **config)
    return get_peft_model(base, config, autocast_adapter_dtype=fp32_adapters), x, y


@pytest.mark.parametrize("fp32_adapters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"lora_dropout": 0.4}, {"bias": False}, {"use_rslora": True, "lora_alpha": 3}], ids=str
)
def test_at_its_start_a_layer_is_nowhere_farther_from_the_base_than_pefts(dtype, fp32_adapters, how):
    """Where PEFT's is the base bit for bit, so is ours; elsewhere (a magnitude PEFT rounded to 16 bits) it is PEFT's."""
    model, x, y = start(dtype, fp32_adapters, **how)
    model.train(bool(how.get("lora_dropout")))
    off = []
    for each in (model, patch(copy.deepcopy(model))):
        off.append(float((each(x).double() - y.double()).norm().detach()))
    unpatched, ours = off
    assert ours <= unpatched
    assert (unpatched == 0) == (dtype is torch.float32 or not fp32_adapters)


def test_a_weight_replaced_cast_or_written_to_starts_anew():
    """Nothing of the weight outlives a call."""
    model, x, _ = start(torch.float32, False)
    layer = layers(patch(model))[0]
    vector, weight = layer.lora_magnitude_vector["default"], layer.base_layer.weight

    def is_base():
        fresh = torch.linalg.norm(layer.base_layer.weight, dim=1)
        vector.weight.data = fresh.to(vector.weight.dtype)
        return torch.equal(model(x), layer.base_layer(x))

    assert is_base()
    weight.data.mul_(1.7)  # unseen by its version
    assert is_base()
    weight.data = torch.randn_like(weight)
    assert is_base()
    layer.base_layer.weight = nn.Parameter(torch.randn_like(weight), requires_grad=False)
    assert is_base()
    model.to(torch.bfloat16)
    x = x.bfloat16()
    assert is_base()


def test_the_first_step_is_no_jump():
    """bf16: a little of B moves the layer by as little, though the magnitude was rounded."""
    model, x, y = start(torch.bfloat16, False)
    layer = layers(patch(model))[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1e-6)
        assert (model(x).double() - y.double()).norm() < 3e-4 * y.double().norm()


@pytest.fixture
def norms(monkeypatch):
    """How many norms were computed."""
    from lowrank.ops import dora_impl

    made, norm = [], dora_impl.norm
    monkeypatch.setattr(dora_impl, "norm", lambda *args: made.append(args) or norm(*args))
    return made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_dora_caching_computes_each_norm_once(mode, norms):
    model = patch(dora_llama(target_modules=["q_proj", "v_proj"])).eval()
    with mode():
        want = model(IDS).logits
        norms.clear()
        with DoraCaching():
            for _ in range(3):
                assert torch.equal(model(IDS).logits, want)
        assert len(norms) == len(layers(model))
        assert torch.equal(model(IDS).logits, want)
    assert len(norms) == 2 * len(layers(model))
    assert not any(layer.lora_magnitude_vector["default"]._dora_cache for layer in layers(model))


def kept(layer):
    return layer.lora_magnitude_vector["default"]._dora_cache


@pytest.mark.parametrize("how", ["train", "off", "merge", "twin"])
def test_what_dora_caching_keeps_is_dropped_as_pefts(how):
    model = patch(dora_llama(target_modules=["q_proj"])).eval()
    layer = layers(model)[0]
    with DoraCaching(), torch.no_grad():
        model(IDS)
        assert list(kept(layer)) == ["weight-norm-default"]
        layer.lora_B["default"].weight.mul_(2)
        if how == "train":
            model.train().eval()
        elif how == "off":
            with DoraCaching(False):
                model(IDS)
        elif how == "merge":
            model.merge_adapter()
            model.unmerge_adapter()
        else:
            model = copy.deepcopy(model).train().eval()
            assert kept(layer)
            layer = layers(model)[0]
        assert not kept(layer)
        logits = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, unpatch(model)(IDS).logits, rtol=1e-4, atol=1e-5)


def test_dora_caching_is_not_for_training(norms):
    model = patch(dora_llama(target_modules=["q_proj"])).train()
    with DoraCaching():
        for _ in range(2):
            model(IDS)
    assert len(norms) == 2 * len(layers(model))


def test_dora_caching_shares_what_peft_kept_and_the_other_way_round(norms):
    model = dora_llama(target_modules=["q_proj"]).eval()
    with torch.no_grad(), DoraCaching():
        want = model(IDS).logits
        torch.testing.assert_close(patch(model)(IDS).logits, want)
        assert not norms
        model.train().eval()
        model(IDS)
        assert len(norms) == len(layers(model))
        torch.testing.assert_close(unpatch(model)(IDS).logits, want)


@pytest.mark.parametrize("patched", [True, False])
def test_what_dora_caching_kept_in_inference_mode_can_train(patched):
    model = dora_llama(target_modules=["q_proj"]).eval()
    model = patch(model) if patched else model
    with DoraCaching():
        with torch.inference_mode():
            model(IDS)
        model = patch(model)
        grads = step(model)  # in evaluation, with gradients
    agree(grads, step(unpatch(dora_llama(target_modules=["q_proj"]).eval())))


@pytest.mark.parametrize("base_dropout", [True, False])
def test_dropout_by_pefts_formula_with_the_mask_it_drew(base_dropout, monkeypatch):
    """PEFT's own layer, handed our mask; without base_dropout, its base's term as in evaluation."""
    p, x = 0.3, torch.randn(3, 5, 64, requires_grad=True)
    layer = layers(dora_llama(lora_dropout=p))[0].train()
    keep = next(dropout.draw(torch.tensor(11), 15, 64, dropout.threshold(p)))[1][:, :64].view(x.shape)
    monkeypatch.setattr(dropout, "draw_seeds", lambda n, device: torch.tensor([11]))
    monkeypatch.setattr(
        nn.Dropout, "forward", lambda self, t: torch.where(keep, t, 0) * dropout.keep_scale(dropout.drawable(p))
    )
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    dy = torch.randn(3, 5, 64)

    def run(layer):
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    if base_dropout:
        unpatched = run(layer)
    else:
        magnitude, scaling = layer.lora_magnitude_vector["default"], layer.scaling["default"]
        W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        g = magnitude.weight / magnitude.get_weight_norm(W, (B @ A).detach(), scaling)
        y = g * (x @ W.mT + scaling * layer.lora_dropout["default"](x) @ A.mT @ B.mT)
        unpatched = [y, *torch.autograd.grad(y, leaves, dy)]
    patch(holder := nn.ModuleList([layer]), dora_base_dropout=base_dropout)
    torch.testing.assert_close(run(layer), unpatched)
    assert not lowrank.stats(holder)["fallback"]
    assert torch.equal(layer.eval()(x), copy.deepcopy(layer).eval()(x))


def test_process_wide_without_base_dropout(monkeypatch):
    monkeypatch.setattr(dropout, "draw_seeds", lambda n, device: torch.tensor([11]))
    model, x = dora_llama(lora_dropout=0.4), torch.randn(7, 64)
    layer = layers(model)[0].train()
    patch(dora_base_dropout=False)
    one = layer(x)
    unpatch()
    patch()
    assert not torch.allclose(one, layer(x))
    unpatch()
    patch(model, dora_base_dropout=False)
    assert torch.equal(one, layer(x))
    patch(model)
    assert not torch.allclose(one, layer(x))


def test_gradient_checkpointing_with_dropout():
    model = patch(dora_llama(lora_dropout=0.2)).train()
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        runs.append(step(model))
    agree(*runs)


def test_training_and_files_are_pefts(tmp_path):
    """Ten steps of AdamW, saved by the patched model and loaded by a plain one; merging is PEFT's own."""
    finals = []
    for make in (patch, lambda model: model):
        model = make(dora_llama())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(10):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(model.eval())
    ours, unpatched = finals
    with torch.no_grad():
        logits = ours(IDS).logits
        torch.testing.assert_close(logits, unpatched(IDS).logits, rtol=1e-3, atol=1e-4)
        ours.save_pretrained(tmp_path)
        torch.testing.assert_close(
            PeftModel.from_pretrained(llama(), tmp_path).eval()(IDS).logits, logits, rtol=1e-4, atol=1e-5
        )
        with ours.disable_adapter():
            torch.testing.assert_close(ours(IDS).logits, llama()(IDS).logits)
        ours.merge_adapter()
        torch.testing.assert_close(ours(IDS).logits, logits, rtol=1e-4, atol=1e-5)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert not lowrank.stats(ours)["fallback"]


def test_adapt_and_compile():
    model = lowrank.adapt(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True))
    eager = model(IDS).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits, eager)
    assert lowrank.stats(model)["fused"] == 4


def test_beside_another_adapter_it_falls_back():
    model = dora_llama(target_modules=["q_proj"])
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "plain"])
    fallback(model, "variant DoraLinearVariant")
    patch(model)
    lowrank.strict()
    model.base_model.set_adapter(["plain"])
    assert torch.isfinite(model(IDS).logits).all()


def test_hooks_on_the_magnitude_fall_back():
    model = dora_llama(target_modules=["q_proj"])
    for layer in layers(model):
        layer.lora_magnitude_vector["default"].register_forward_hook(lambda m, args, out: out * 2)
    fallback(model, "hooks on lora_magnitude_vector")


def test_a_trained_weight_falls_back():
    model = dora_llama(target_modules=["q_proj"])
    layers(model)[0].base_layer.weight.requires_grad_()
    layers(model)[1].base_layer.weight.requires_grad_()
    fallback(model, "a weight that is trained")


def test_a_base_that_is_no_plain_linear_falls_back():
    model = dora_llama(target_modules=["q_proj"])
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda m, args, out: out * 2)
    fallback(model, "DoRA over Linear: the norm needs a plain nn.Linear's weight")


def test_copies_keep_their_choice():
    model = patch(dora_llama(lora_dropout=0.3), dora_base_dropout=False).train()
    runs = []
    for each in (model, copy.deepcopy(model)):
        torch.manual_seed(3)
        runs.append(each(IDS).logits)
    assert torch.equal(*runs)


def test_bnb_falls_back():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)

        def forward(self, input_ids):
            return self.proj(input_ids)

    model = get_peft_model(Net().to("cpu"), LoraConfig(r=4, target_modules=["proj"], use_dora=True))
    fallback(model, "DoRA over Linear4bit", lambda m: {"y": m(torch.ones(3, 64))})
