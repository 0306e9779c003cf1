"""patch(model, dropout_stream="torch"): nn.Dropout's masks, drawn where PEFT draws them, and all that follows from them."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from test_peft import IDS, agree, peft_llama, step
from torch import nn

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch, unpatch
from lowrank.ops import dropout
from lowrank.ops._choice import forced

KEY = "_lowrank_torch_masks"


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    yield
    lowrank.strict(False)


def second(model):
    """Another adapter beside the first, with another dropout."""
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=4, lora_dropout=0.4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.second" in name:
                p.normal_(std=0.1)
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


KINDS = {
    "plain": lambda **more: peft_llama(lora_dropout=0.1, **more),
    "two adapters": lambda **more: second(peft_llama(lora_dropout=0.1, **more)),
    "DoRA": lambda **more: peft_llama(lora_dropout=0.1, use_dora=True, **more),
}


def both(kind, **options):
    """(PEFT's model, the same one patched), in training."""
    unpatched = KINDS[kind]().train()
    return unpatched, patch(copy.deepcopy(unpatched), dropout_stream="torch", **options)


def watched(model):
    """What the generator's state is after each call of a LoRA layer."""
    states = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda *_: states.append(torch.get_rng_state()))
    return states


@pytest.mark.parametrize("checkpointed", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_follows_pefts_step_by_step(kind, checkpointed):
    runs = []
    for model in both(kind):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointed == "reentrant"})
            model.enable_input_require_grads()
        states, losses = watched(model), []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        torch.manual_seed(5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        runs.append((losses, torch.stack(states)))
    (unpatched, their_states), (ours, our_states) = runs
    assert torch.equal(our_states, their_states)
    assert len({tuple(state.tolist()) for state in their_states}) > 14  # they do draw
    assert unpatched[0] - unpatched[-1] > 0.01  # and learn
    torch.testing.assert_close(ours, unpatched, rtol=1e-5, atol=0)
    assert lowrank.stats(model)["fallback"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_pefts(kind):
    runs = []
    for model in both(kind):
        torch.manual_seed(5)
        runs.append(step(model))
    agree(*runs[::-1])


def layer(p=0.1, dtype=torch.float64, base=None, **config):
    torch.manual_seed(0)
    model = nn.Sequential(base or nn.Linear(70, 24)).to(dtype)
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=p, init_lora_weights=False, **config)
    return get_peft_model(model, config).base_model.model[0].train()


def run(layer, x, **autocast):
    """(result and gradients, the generator's state) of a call with dropout."""
    x = x.detach().requires_grad_()  # with its strides
    torch.manual_seed(11)
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        y = layer(x)
    state = torch.get_rng_state()
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trained])], state


INPUTS = {
    "dense": lambda: torch.randn(6, 5, 70),
    "transposed": lambda: torch.randn(5, 6, 70).transpose(0, 1),
    "last dim first": lambda: torch.randn(70, 6).mT,
    "a slice": lambda: torch.randn(6, 5, 140)[..., ::2],
    "expanded": lambda: torch.randn(5, 70).expand(6, 5, 70),
    "one row": lambda: torch.randn(1, 70),
}


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
def test_every_layout_of_x(which, config, cast, backend):
    """In fp64, where a factor of 1 / (1 - p) for the p of 16 bits would show.  cast: the adapters are wider than x.

    backend: without csrc/.
    """
    unpatched = layer(**config)
    x = INPUTS[which]().double()
    if cast:
        unpatched.base_layer.float()
        x = x.float()
    want, state = run(unpatched, x)
    with forced(backend) if backend else contextlib.nullcontext():
        got, our_state = run(patch(copy.deepcopy(unpatched), dropout_stream="torch"), x)
    assert torch.equal(our_state, state)
    torch.testing.assert_close(got, want, rtol=1e-9 if not cast else 1e-4, atol=1e-9 if not cast else 1e-4)


@pytest.mark.parametrize("casting", [True, False])
@pytest.mark.parametrize("which", INPUTS)
def test_torch_draws_for_what_pefts_dropout_is_given(which, casting, monkeypatch):
    """On a GPU the mask depends on dtype and strides; here, on neither.  Two adapters, of which the second is narrower."""
    model = nn.Sequential(nn.Linear(70, 24))
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.1)
    model = get_peft_model(model, config).train()
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    layer, x, seen = model.base_model.model[0], INPUTS[which](), []
    if casting:
        layer.lora_A["default"].double(), layer.lora_B["default"].double()
    else:
        x = x.bfloat16()

    def spy(original):
        return lambda x, *args: seen.append((x.dtype, x.shape, x.stride())) or original(x, *args)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=not casting)
    with autocast, disable_input_dtype_casting(model, active=not casting):
        monkeypatch.setattr(
            nn.functional, "dropout", lambda x, p, training, inplace: spy(torch.dropout)(x, p, training)
        )
        layer(x)
        monkeypatch.undo()
        want = seen[:]
        patch(model, dropout_stream="torch")
        seen.clear()
        monkeypatch.setattr(dropout, "as_torch", spy(dropout.as_torch))
        layer(x)
    assert len(want) == 2
    assert seen == want


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("p", [1e-6, 0.5, 1.0])
def test_every_p(p, config):
    unpatched = layer(p, **config)
    x = torch.randn(6, 70, dtype=torch.float64)
    want, state = run(unpatched, x)
    got, our_state = run(patch(copy.deepcopy(unpatched), dropout_stream="torch"), x)
    assert torch.equal(our_state, state)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_autocast():
    unpatched = layer(dtype=torch.float32)
    x = torch.randn(6, 70)
    want, state = run(unpatched, x, dtype=torch.bfloat16)
    got, our_state = run(patch(copy.deepcopy(unpatched), dropout_stream="torch"), x, dtype=torch.bfloat16)
    assert torch.equal(our_state, state)
    for ours, other in zip(got, want, strict=True):  # another mask: a third of its norm
        assert (ours.float() - other.float()).norm() < 0.03 * other.float().norm()


class Noisy(nn.Linear):
    """A base that draws, before dropout does."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


def test_a_base_that_draws_draws_first():
    unpatched = layer(base=Noisy(70, 24))
    x = torch.randn(6, 70, dtype=torch.float64)
    want, state = run(unpatched, x)
    got, our_state = run(patch(copy.deepcopy(unpatched), dropout_stream="torch"), x)
    assert torch.equal(our_state, state)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("whose", ["the layer's", "its dropout's"])
def test_whose_mode_says_whether_to_draw(whose, config):
    unpatched = layer(**config)
    (unpatched if whose == "the layer's" else unpatched.lora_dropout["default"]).training = False
    x = torch.randn(6, 70, dtype=torch.float64)
    want, state = run(unpatched, x)
    got, our_state = run(patch(copy.deepcopy(unpatched), dropout_stream="torch"), x)
    assert torch.equal(our_state, state)
    torch.testing.assert_close(got, want)


def test_dora_without_dropout_in_its_base_draws_the_same():
    ours = layer(use_dora=True)
    x = torch.randn(6, 70, dtype=torch.float64)
    _, state = run(ours, x)
    patch(ours, dropout_stream="torch", dora_base_dropout=False)
    assert torch.equal(run(ours, x)[1], state)


@pytest.mark.parametrize("why", ["evaluation", "no dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_nothing_is_drawn_and_siblings_share(kind, why):
    _, ours = both(kind)
    ours.eval()
    if why == "no dropout":
        ours.train()
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    state = torch.get_rng_state()
    step(ours)
    assert torch.equal(torch.get_rng_state(), state)
    assert lowrank.stats(ours)["shared"] == (0 if kind == "DoRA" else 6)


def test_siblings_with_dropout_compute_alone():
    _, ours = both("plain")
    attention, x = ours.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 64)
    attention.v_proj.lora_dropout["default"].p = 0.0
    attention.k_proj.lora_dropout["default"].p = 0.0
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer(x)
    assert lowrank.stats(ours)["shared"] == 1  # v, of k
    state = torch.get_rng_state()
    attention.k_proj(x)
    assert torch.equal(torch.get_rng_state(), state)  # q was not computed with it
    attention.q_proj(x), attention.v_proj(x)
    assert lowrank.stats(ours)["shared"] == 2


def test_copies_keep_it_and_unpatch_does_not():
    _, ours = both("plain")
    torch.manual_seed(5)
    want = step(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.manual_seed(5)
        agree(step(twin), want)
    torch.manual_seed(5)
    patch(ours)
    with pytest.raises(AssertionError):
        agree(step(ours), want)
    unpatch(ours)
    assert not any(KEY in module.__dict__ for module in ours.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_draws_the_same_masks(kind):
    _, ours = both(kind)
    attention, x = ours.base_model.model.model.layers[0].self_attn, torch.randn(2, 5, 64, requires_grad=True)

    def f(x):
        return attention.q_proj(x).sin() + attention.o_proj(x).cos()  # two masks for one x

    torch._dynamo.reset()
    runs = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        y = run(x)
        runs.append([y, torch.get_rng_state(), torch.autograd.grad(y.sum(), x)[0]])
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dropout_stream="cuda"), "dropout_stream: expected 'lowrank' or 'torch', got 'cuda'"),
        (dict(dropout_stream=None), "dropout_stream: expected 'lowrank' or 'torch', got None"),
        (dict(dropout_stream="torch"), "dropout_stream='torch': expected a model beside it, got none"),
        (dict(dropout_stream="torch", shared_mask=True), "shared_mask: expected False beside dropout_stream='torch'"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        patch(**arguments)
