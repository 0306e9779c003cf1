"""Models that change a layer's input in place after they have called it: PEFT has a copy of its own, lowrank has not."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch, unpatch

REASON = "the input is changed in place after the call: copy_inputs would save a copy of it"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        h += torch.tanh(self.fc(h))
        return h


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        y = self.q_proj(h) + self.k_proj(h) * self.v_proj(h)
        return h.view(-1).add_(y.view(-1)).view(h.shape)


def make(base=Block, dtype=torch.bfloat16, **config):
    torch.manual_seed(0)
    config = dict(r=2, init_lora_weights=False, target_modules="all-linear") | config
    return get_peft_model(base().to(dtype), LoraConfig(**config)).train()


X = torch.linspace(-2, 2, 24).view(3, 8).sin()


def step(model, run=lambda model, x: model(x)):
    """Every gradient of the adapters."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    run(model, X.to(dtype).requires_grad_()).float().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    yield
    unpatch()
    lowrank.strict(False)


@pytest.mark.filterwarnings("ignore:lowrank falls back")
@pytest.mark.parametrize("dora", [False, True])
def test_the_error_names_the_layer_and_the_cure_and_peft_takes_over(dora):
    model = make(use_dora=dora)
    unpatched = step(model)
    patch(model)
    with pytest.raises(
        RuntimeError, match=r"^base_model.model.fc: the input was changed in place.*copy_inputs=\['base"
    ):
        step(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model), unpatched, strict=True))
    assert lowrank.stats(model)["fallback"] == {REASON: 1}
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match="copy_inputs"):
        step(model)


@pytest.mark.filterwarnings("ignore:lowrank falls back")
def test_siblings_are_all_handed_over():
    model = make(Attention)
    unpatched = step(model)
    patch(model)
    with pytest.raises(RuntimeError, match=r"q_proj, base_model.model.k_proj, base_model.model.v_proj: the input"):
        step(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model), unpatched, strict=True))
    assert lowrank.stats(model)["fallback"] == {REASON: 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("copies", [True, ["fc"], ["base_model.model.fc"]], ids=str)
def test_copied_inputs(copies, p, dtype):
    """fp32 without dropout is the case that PEFT fails as well."""
    model = patch(make(dtype=dtype, lora_dropout=p), copy_inputs=copies)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with lowrank.strict():
            step(other)
        assert lowrank.stats(other)["fused"] == 1


@pytest.mark.parametrize("base", [Block, Attention])
@pytest.mark.parametrize("dora", [False, True])
def test_copied_inputs_give_the_gradients_of_inputs_left_alone(base, dora):
    model = make(base, torch.float64, use_dora=dora).double()
    ours = patch(copy.deepcopy(model), copy_inputs=True)
    for module in model.modules():
        if module.__class__.__name__ == "LayerNorm":
            module.register_forward_hook(lambda module, args, y: y * 1)
        if hasattr(module, "lora_A"):  # what the layer sees and keeps is a copy here, PEFT's own
            module.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with lowrank.strict():
        torch.testing.assert_close(step(ours), step(model), rtol=1e-9, atol=1e-9)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def with_hooks(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return model(x)


@pytest.mark.filterwarnings("ignore:lowrank falls back")
@pytest.mark.parametrize("run", [checkpointed, with_hooks], ids=lambda run: run.__name__)
def test_where_autograd_itself_does_not_look(run):
    """Checkpointing and other hooks on what is saved: without an error the gradient would be of another input."""
    model = patch(make(lambda: nn.Sequential(Block(), Block())))
    for _ in range(2 if run is with_hooks else 1):
        with pytest.raises(RuntimeError, match="fc: the input was changed in place"):
            step(model, run)
    step(model, run)
    unpatch(model)
    patch(model, copy_inputs=True)
    with lowrank.strict():
        step(model, run)


def test_inputs_left_alone_are_not_complained_of():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x))

    model = patch(make(Plain))
    for hooks in (
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    ):
        with hooks():
            step(model)
            step(model, checkpointed)
    assert lowrank.stats(model)["fallback"] == {}


def test_another_tensor_changed_in_place_is_autograds_error():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x)

    model = patch(make(Plain))
    y = model(X.to(torch.bfloat16).requires_grad_())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="one of the variables needed for gradient computation"):
        y.sum().backward()
    step(model)
    assert lowrank.stats(model)["fallback"] == {}


@pytest.mark.filterwarnings("ignore:lowrank falls back")
def test_what_was_learned_is_the_models_in_every_thread_and_copy():
    model, errors = patch(make()), []
    with pytest.raises(RuntimeError, match="copy_inputs"):
        step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step(other)
        assert lowrank.stats(other)["fallback"] == {REASON: 1}

    def train():
        try:
            step(copy.deepcopy(model))
            model(X.to(torch.bfloat16))
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    patch(model)  # as a trainer's callback does
    step(model)
    assert lowrank.stats(model)["fused"] == 1
    with lowrank.strict():
        step(patch(model, copy_inputs=["fc"]))
    unpatch(model)
    assert not any("lowrank" in key for module in model.modules() for key in module.__dict__)


@pytest.mark.filterwarnings("ignore:lowrank falls back")
def test_a_patched_process():
    patch()
    model = make()
    with pytest.raises(RuntimeError, match=r"a LoRA layer: the input was changed.*copy_inputs=True"):
        step(model)
    step(model)
    assert lowrank.stats(model)["fallback"] == {REASON: 1}


def test_refuses():
    for wrong in ("fc", 3, [3], [""], None):
        with pytest.raises(TypeError, match="copy_inputs: expected True, False or a list of layer names"):
            patch(make(), copy_inputs=wrong)
    model = make()
    with pytest.raises(ValueError, match=r"copy_inputs: no LoRA layer 'nope'; there is 'base_model\.model\.fc'"):
        patch(model, copy_inputs=["fc", "nope"])
    assert lowrank.stats(model)["untouched"] == {"lora.Linear": 1}
    with pytest.raises(ValueError, match="copy_inputs: expected a model beside it"):
        patch(copy_inputs=True)
