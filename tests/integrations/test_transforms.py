"""What PEFT's layers do beside a first gradient, patched ones do as well, with PEFT's numbers: transforms and tracers."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import _stats
from lowrank.integrations.peft import patch, unpatch

pytestmark = pytest.mark.filterwarnings("ignore")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, n, bias=False) for n in (2, 2, 1))

    def forward(self, x):
        return torch.softmax(self.q_proj(x) @ self.k_proj(x).transpose(-1, -2), -1) @ torch.tanh(self.v_proj(x))


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, x):
        return torch.tanh(self.fc(x))


KINDS = {
    "q/k/v": (Attention, {}),
    "biases": (lambda: One(nn.Linear(6, 3)), dict(lora_bias=True)),
    "two adapters": (lambda: One(nn.Linear(6, 3)), {}),
    "conv1d": (lambda: One(Conv1D(3, 6)), dict(fan_in_fan_out=True)),
    "dora": (lambda: One(nn.Linear(6, 3)), dict(use_dora=True)),
    "dora, trained bias": (lambda: One(nn.Linear(6, 3)), dict(use_dora=True, bias="all")),
    "frozen lora_A": (Attention, {}),
}


def make(kind, dtype=torch.float64, **config):
    base, more = KINDS[kind]
    torch.manual_seed(0)
    config = (
        dict(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "fc"]) | config
    )
    model = get_peft_model(base().to(dtype), LoraConfig(**config, **more))
    if kind == "two adapters":
        model.add_adapter("second", LoraConfig(r=1, target_modules=["fc"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    if kind == "frozen lora_A":
        for name, p in model.named_parameters():
            p.requires_grad_("lora_B" in name)
    return model.to(dtype).eval()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).sin()
ad, func = torch.autograd.functional, torch.func


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model):
    return {name: p.detach() for name, p in trained(model).items()}


def leaf(model):
    x = X.clone().requires_grad_()
    return x, [x, *trained(model).values()]


def square(model):
    return lambda x: model(x).square().sum()


def on_parameters(model):
    return lambda p, x: func.functional_call(model, p, (x,)).square().sum()


def rows_of(y):
    return torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)


def nth_derivatives(model, n):
    x, ts = leaf(model)
    grads = torch.autograd.grad(square(model)(x), ts, create_graph=True)
    for _ in range(n - 1):
        grads = torch.autograd.grad(sum(t.square().sum() for t in grads), ts, create_graph=True)
    return grads


def of_parameters_alone(model):
    ts = list(trained(model).values())
    grads = torch.autograd.grad(square(model)(X), ts, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in grads), ts)


def batched(model, create_graph=False):
    x, ts = leaf(model)
    y = model(x)
    grads = torch.autograd.grad(y, ts, rows_of(y), is_grads_batched=True, create_graph=create_graph)
    return torch.autograd.grad(sum(t.square().sum() for t in grads), ts) if create_graph else grads


def vmapped_backward(model):
    x, ts = leaf(model)
    y = model(x)
    return func.vmap(lambda dy: torch.autograd.grad(y, ts, dy, retain_graph=True))(rows_of(y))


def unused_allowed(model):
    x, ts = leaf(model)
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return [torch.zeros(()) if t is None else t for t in torch.autograd.grad(dx.sum(), ts, allow_unused=True)]


def penalty(model):
    x, ts = leaf(model)
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.square().sum() + (dx.norm(dim=-1) - 1).square().sum()).backward()
    return [t.grad for t in ts]


def checkpointed(model):
    x, ts = leaf(model)
    (dx,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), ts)


def dual_gradient(model):
    x, ts = leaf(model)
    y = model(x)
    with forward_ad.dual_level():
        duals = torch.autograd.grad(y, ts, forward_ad.make_dual(torch.ones_like(y), y.detach()))
        return [t for pair in map(forward_ad.unpack_dual, duals) for t in pair if t is not None]


def vmapped_backward_of_checkpointed(model):
    x, ts = leaf(model)
    y = checkpoint(model, x, use_reentrant=False)
    return func.vmap(lambda dy: torch.autograd.grad(y, ts, dy, retain_graph=True))(rows_of(y))


def dual_gradient_of_checkpointed(model):
    x, ts = leaf(model)
    y = checkpoint(model, x, use_reentrant=False)
    with forward_ad.dual_level():
        duals = torch.autograd.grad(y, ts, forward_ad.make_dual(torch.ones_like(y), y.detach()))
        return [t for pair in map(forward_ad.unpack_dual, duals) for t in pair if t is not None]


def traced(model):
    other = torch.cat([X, X.flip(0), X])
    run = torch.jit.trace(model.base_model.model, (X,))
    return run(other), model(other), torch.jit.trace(model.base_model.model, (X[None],))(other.view(2, 6, 6))


IN_BACKWARD = {
    "hessian": lambda m: ad.hessian(square(m), X),
    "hessian, vectorized": lambda m: ad.hessian(square(m), X, vectorize=True),
    "hvp": lambda m: ad.hvp(square(m), X, X + 1),
    "vhp": lambda m: ad.vhp(square(m), X, X + 1),
    "functional.jvp": lambda m: ad.jvp(m, X, X + 1),
    "jacobian": lambda m: ad.jacobian(m, X, create_graph=True),
    "jacobian, vectorized": lambda m: ad.jacobian(m, X, vectorize=True),
    "second": lambda m: nth_derivatives(m, 2),
    "third": lambda m: nth_derivatives(m, 3),
    "second, of parameters alone": of_parameters_alone,
    "batched": batched,
    "batched, then another": lambda m: batched(m, True),
    "vmap of grad": vmapped_backward,
    "allow_unused": unused_allowed,
    "penalty": penalty,
    "checkpoint": checkpointed,
    "dual gradient": dual_gradient,
    "vmap of grad, checkpoint": vmapped_backward_of_checkpointed,
    "dual gradient, checkpoint": dual_gradient_of_checkpointed,
}
IN_FORWARD = {
    "functional.jacobian, forward": lambda m: ad.jacobian(m, X, vectorize=True, strategy="forward-mode"),
    "grad": lambda m: func.grad(on_parameters(m))(values(m), X),
    "vmap": lambda m: func.vmap(m)(X[:, None]),
    "jvp": lambda m: func.jvp(m, (X,), (X,)),
    "vjp": lambda m: func.vjp(m, X)[1](m(X)),
    "jacrev": lambda m: func.jacrev(m)(X),
    "jacfwd": lambda m: func.jacfwd(m)(X),
    "hessian": lambda m: func.hessian(on_parameters(m))(values(m), X),
    "linearize": lambda m: func.linearize(m, X)[1](X),
    "per sample": lambda m: func.vmap(func.grad(on_parameters(m)), (None, 0))(values(m), X[:, None]),
    "ensemble": lambda m: func.vmap(lambda p: on_parameters(m)(p, X))(
        {name: torch.stack([p, 2 * p]) for name, p in values(m).items()}
    ),
    "trace": traced,
}  # fmt: skip


def leaves_of(results):
    if isinstance(results, dict):
        results = [results[name] for name in sorted(results)]
    return (
        [results.detach()]
        if isinstance(results, torch.Tensor)
        else [t for result in results for t in leaves_of(result)]
    )


@pytest.fixture(autouse=True)
def clean():
    _stats.reset()
    yield
    unpatch()
    lowrank.strict(False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_derivative_is_pefts(kind):
    model = make(kind)
    ours = patch(copy.deepcopy(model))
    for name, how in (IN_BACKWARD | IN_FORWARD).items():
        want, got = leaves_of(how(model)), leaves_of(how(ours))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    assert len(lowrank.stats(ours)["fallback"]) == 4


@pytest.mark.parametrize("how", IN_FORWARD)
def test_what_forward_can_know_is_handed_to_peft_and_counted(how):
    model = patch(make("q/k/v"))
    with pytest.warns(UserWarning, match="lowrank falls back to PEFT"):
        IN_FORWARD[how](model)
    assert sum(lowrank.stats(model)["fallback"].values()) >= 3
    with lowrank.strict(), pytest.raises(lowrank.FallbackError):
        IN_FORWARD[how](model)


@pytest.mark.parametrize("how", IN_BACKWARD)
def test_what_backward_alone_can_know_is_counted_and_stays_fused(how):
    model = patch(make("q/k/v"))
    IN_BACKWARD[how](model)
    counts = lowrank.stats(model)
    assert counts["fused"] % 3 == 0
    assert counts["fused"] > 0
    assert list(counts["fallback"]) == [
        "create_graph, or a batched or dual gradient: backward in differentiable operations"
    ]
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match="create_graph"):
        IN_BACKWARD[how](model)


def test_forward_mode_follows_what_has_a_tangent_alone():
    model = make("q/k/v")
    ours = patch(copy.deepcopy(model))
    with forward_ad.dual_level():
        want, got = nth_derivatives(model, 1), nth_derivatives(ours, 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert lowrank.stats(ours)["fused"] == 3
        name, p = next(iter(trained(model).items()))
        dual = {name: forward_ad.make_dual(p, torch.ones_like(p))}
        want, got = (forward_ad.unpack_dual(func.functional_call(m, dual, (X,))).tangent for m in (model, ours))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert lowrank.stats(ours)["fallback"]["forward-mode differentiation"] == 1


@pytest.mark.parametrize("mode", ["merged", "activation", "delta"])
@pytest.mark.parametrize("how", [vmapped_backward_of_checkpointed, dual_gradient_of_checkpointed])
def test_an_svf_layer_is_repeated_as_it_was(mode, how):
    torch.manual_seed(0)
    layer = lowrank.nn.SVFLinear.from_linear(nn.Linear(6, 6).double(), mode=mode)
    got = how(layer)
    x, ts = leaf(layer)
    y, rows = layer(x), rows_of(layer(x))
    if how is vmapped_backward_of_checkpointed:
        by_row = [torch.autograd.grad(y, ts, dy, retain_graph=True) for dy in rows]
        want = [torch.stack(of_tensor) for of_tensor in zip(*by_row, strict=True)]
        torch.testing.assert_close(list(got), want, rtol=1e-6, atol=1e-6)
    else:
        assert len(got) > len(ts)


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives_in_mixed_precision(autocast):
    """fp32 adapters over bf16, and autocast: as right as PEFT's, against fp64."""
    model = make("q/k/v", torch.float32 if autocast else torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.float()

    def second(model, x):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype is not torch.float64):
            y = model(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return torch.cat(
            [t.double().flatten() for t in torch.autograd.grad(dx.square().sum(), [*trained(model).values()])]
        )

    oracle = second(copy.deepcopy(model).double(), X)
    x = X.to(torch.float32 if autocast else torch.bfloat16)
    unpatched = (second(model, x) - oracle).norm()
    assert (second(patch(model), x) - oracle).norm() <= 1.5 * unpatched


def test_merged_and_disabled_layers_are_no_fallback_under_transforms():
    model = patch(make("q/k/v"))
    with lowrank.strict(), model.disable_adapter():
        func.vmap(model)(X[:, None])
    model.merge_adapter()
    with lowrank.strict():
        func.vmap(model)(X[:, None])


def test_onnx():
    pytest.importorskip("onnx")
    for dynamo in (False, True):
        if dynamo:
            pytest.importorskip("onnxscript")
        model, file = patch(make("two adapters", torch.float32)), io.BytesIO()
        torch.onnx.export(model.base_model.model, (X.float(),), file, dynamo=dynamo)
        assert b"lowrank" not in file.getvalue()


def test_an_input_of_inference_mode_trains_the_adapters():
    model = make("q/k/v", torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora" in name:
            p.data = p.data.float()
    with torch.inference_mode():
        x = X.to(torch.bfloat16)
    for each in (model, patch(copy.deepcopy(model))):
        each(x).sum().backward()
        assert all(p.grad is not None for p in trained(each).values())
