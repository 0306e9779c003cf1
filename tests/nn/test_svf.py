import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.nn import SVFLinear, defer_projection
from lowrank.testing import error

MODES = ["delta", "activation", "merged"]


def layer(K=40, N=30, k=None, dtype=torch.float32, **options):
    return SVFLinear(K, N, k, dtype=dtype, **options)


def trained(svf, scale=0.3):
    with torch.no_grad():
        for p in svf.z.values():
            p.add_(scale * torch.randn_like(p))
    return svf


@pytest.mark.parametrize("parametrization", ["free", "sigmoid", "exp"])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_starts_as_the_linear_it_was_made_from_bit_for_bit(parametrization, normalize, dtype):
    linear = torch.nn.Linear(40, 30, dtype=dtype)
    x = torch.randn(7, 5, 40).to(dtype)
    y = linear(x)
    svf = SVFLinear.from_linear(linear, 8, parametrization=parametrization, normalize=normalize)
    assert torch.equal(svf(x), y)
    assert torch.equal(svf.values(), torch.ones(8))
    assert [name for name, p in svf.named_parameters() if p.requires_grad] == ["z.default"]
    assert svf.weight is linear.weight


@pytest.mark.parametrize("k", [8, None])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("parametrization", ["free", "sigmoid", "exp"])
def test_every_mode_against_the_composed_weight(k, mode, normalize, parametrization):
    if k and mode == "activation":
        pytest.skip("needs every direction")
    svf = trained(layer(k=k, mode=mode, normalize=normalize, parametrization=parametrization, dtype=torch.float64))
    svf.S = svf.S.double()
    x, dy = torch.randn(50, 40, dtype=torch.float64, requires_grad=True), torch.randn(50, 30, dtype=torch.float64)
    y = svf(x)
    dx, dp = torch.autograd.grad(y, (x, svf.z["default"]), dy)
    p = svf.z["default"].detach().double().requires_grad_()
    z = {"free": lambda: p, "sigmoid": lambda: 2 * torch.sigmoid(p), "exp": lambda: torch.exp(p)}[parametrization]()
    z = z if normalize is None else z * svf.S.sum() / (z * svf.S).sum()
    W = svf.weight + (svf.U * (svf.S * (z - 1))) @ svf.Vh
    truth = torch.nn.functional.linear(x, W, svf.bias)
    for name, ours, true in zip(
        ("y", "dx", "dp"), (y, dx, dp), (truth, *torch.autograd.grad(truth, (x, p), dy)), strict=True
    ):
        assert error(ours, true) < 1e-5, name


def test_merged_mode_keeps_one_weight_per_version_of_z(monkeypatch):
    from lowrank.nn import svf as module

    svf, calls = layer(mode="merged"), []
    monkeypatch.setattr(module, "materialize", lambda *a, f=module.materialize: calls.append(1) or f(*a))
    x = torch.randn(9, 40)
    with torch.no_grad():
        first, second = svf(x), svf(x)
    assert torch.equal(first, second)
    assert len(calls) == 1
    trained(svf)
    with torch.no_grad():
        assert not torch.allclose(svf(x), first)
    assert len(calls) == 2
    svf(x).sum().backward()
    svf.z["default"].data.mul_(2)  # no new version: the backward before it dropped W'
    with torch.no_grad():
        torch.testing.assert_close(svf(x), x @ (svf.weight + svf.get_delta_weight()).mT + svf.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deferred_projection_is_the_sum_of_the_backwards(dtype):
    svf = trained(layer(mode="merged", dtype=dtype))
    xs = [torch.randn(9, 40).to(dtype) for _ in range(3)]
    for x in xs:
        svf(x).square().sum().backward()
    expected, svf.z["default"].grad = svf.z["default"].grad, None
    model = torch.nn.Sequential(svf)
    with defer_projection(model):
        for x in xs[:-1]:
            model(x).square().sum().backward()
            assert not svf.z["default"].grad.any()
    (dW,) = svf._sums.over.values()
    assert (dW.shape, dW.dtype) == (svf.weight.shape, torch.float32)
    model(xs[-1]).square().sum().backward()
    torch.testing.assert_close(svf.z["default"].grad, expected, rtol=1e-4, atol=1e-4)
    assert not svf._sums.over


def dz_of(svf, *xs):
    """The gradient of z that a fresh layer gives."""
    fresh = copy.deepcopy(svf)
    fresh.z[fresh.active_expert].grad = None
    for x in xs:
        fresh(x).square().sum().backward()
    return fresh.z[fresh.active_expert].grad


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", ["grad", "inputs", "an error on the way"])
def test_a_backward_that_is_not_for_z_adds_nothing_to_the_next_one(mode, backward):
    svf, x = trained(layer(40, 40, mode=mode)), torch.randn(9, 40)
    expected, seen = dz_of(svf, x), x.clone().requires_grad_()
    if backward == "grad":
        torch.autograd.grad(svf(seen).square().sum(), seen)
    elif backward == "inputs":
        svf(seen).square().sum().backward(inputs=[seen])
    else:

        def fail(grad):
            raise OSError("on the way")

        inner = svf(x)
        inner.register_hook(fail)  # after one of the layer's two calls has had its backward
        with pytest.raises(OSError, match="on the way"):
            svf(torch.tanh(inner)).square().sum().backward()
    assert svf.z["default"].grad is None
    svf(x).square().sum().backward()
    close(svf.z["default"].grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_some_inputs_and_of_graphs_that_are_kept(mode):
    svf, x = trained(layer(40, 40, mode=mode)), torch.randn(9, 40, requires_grad=True)
    z = svf.z["default"]
    expected = dz_of(svf, x.detach())
    loss, other = svf(x).square().sum(), svf(x.detach()).square().sum()
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], expected)
    both = torch.autograd.grad(loss, (x, z), retain_graph=True)
    close(both, (dx, expected))
    loss.backward()
    other.backward()  # a second graph, after the first freed its own
    close((x.grad, z.grad), (dx, 2 * expected))


def test_the_calls_of_one_backward_are_projected_once(monkeypatch):
    from lowrank.nn import _merged as module

    svf, seen = trained(layer(40, 40, mode="merged")), []
    backward = module._Handle.backward
    monkeypatch.setattr(module._Handle, "backward", lambda ctx, dW: seen.append(dW.shape) or backward(ctx, dW))
    xs = [torch.randn(9, 40) for _ in range(3)]
    expected = dz_of(svf, *xs)
    seen.clear()
    sum(svf(x).square().sum() for x in xs).backward()
    assert seen == [svf.weight.shape]
    close(svf.z["default"].grad, expected)


@pytest.mark.parametrize("deferred", [False, True])
def test_no_two_layers_dw_are_there_at_once(monkeypatch, deferred):
    from lowrank.nn import _merged as module

    model = torch.nn.Sequential(*(layer(40, 40, mode="merged") for _ in range(3)))
    x, order = torch.randn(9, 40), []
    model(x)  # graphs made before
    backward, outer = module._Handle.backward, module._outer
    monkeypatch.setattr(module._Handle, "backward", lambda *a: order.append("taken") or backward(*a))
    monkeypatch.setattr(module, "_outer", lambda *a: order.append("made") or outer(*a))
    with defer_projection(model) if deferred else contextlib.nullcontext():
        for _ in range(2):
            model(x).sum().backward()
    assert order == ["made", "taken"] * 6


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """How many elements each new tensor's memory has."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numels += [t.untyped_storage().nbytes() // 4 for t in [result] if isinstance(t, torch.Tensor)]
        return result


def test_dw_exists_only_where_z_is_asked_for():
    svf = trained(layer(300, 200, mode="merged"))
    x = torch.randn(2, 300, requires_grad=True)
    size = svf.weight.numel()

    def matrices(**backward):
        loss = svf(x).square().sum() + svf(x).sum()
        with Sizes() as sizes:
            loss.backward(**backward)
        return [n for n in sizes.numels if n >= size]

    svf(x)  # W' is there
    assert not matrices(inputs=[x])
    assert len(matrices(inputs=[svf.z["default"]])) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dw_is_summed_in_fp32_or_wider(dtype):
    svf, x = trained(layer(40, 40, mode="merged", dtype=dtype)), torch.randn(300, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        loss = svf(x).sum()
        loss.backward()  # in here too
    dW = torch.ones(40, 1).double() * (x.bfloat16() if dtype is torch.float32 else x).double().sum(0)
    truth = svf.S.double() * ((svf.U.double().mT @ dW) * svf.Vh.double()).sum(1)
    assert error(svf.z["default"].grad, truth) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_beside_calls_that_are_not(use_reentrant):
    svf, x = trained(layer(40, 40, mode="merged")), torch.randn(9, 40)
    expected, seen = dz_of(svf, x, 2 * x, 3 * x), x.clone().requires_grad_()
    torch.autograd.grad(svf(seen).sum(), seen)
    loss = svf(x).square().sum()
    loss = loss + checkpoint(lambda x: svf(2 * x), seen, use_reentrant=use_reentrant).square().sum()
    loss = loss + svf(3 * x).square().sum()
    svf._cache = None
    loss.backward()
    close(svf.z["default"].grad, expected)


def test_two_threads_train_one_layer():
    svf, x = trained(layer(40, 40, mode="merged")), torch.randn(9, 40)
    z, expected = svf.z["default"], dz_of(svf, x)
    wrong, start = [], threading.Barrier(2)

    def work(scale):
        start.wait()
        for _ in range(30):
            seen = x.clone().requires_grad_()
            torch.autograd.grad(svf(seen).square().sum(), seen)
            (dz,) = torch.autograd.grad(scale * svf(x).square().sum(), z)
            if error(dz, scale * expected) > 1e-5:
                wrong.append(error(dz, scale * expected))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("parametrization", ["free", "sigmoid", "exp"])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_second_derivatives_of_merged_mode(parametrization, normalize):
    svf = trained(
        layer(12, 10, mode="merged", parametrization=parametrization, normalize=normalize, dtype=torch.float64)
    )
    x, p = torch.randn(5, 12, dtype=torch.float64, requires_grad=True), svf.z["default"]

    def plain(x, p):
        z = {"free": p, "sigmoid": 2 * torch.sigmoid(p), "exp": torch.exp(p)}[parametrization]
        z = z if normalize is None else z * svf.S.sum() / (z * svf.S).sum()
        return torch.nn.functional.linear(x, svf.weight + (svf.U * (svf.S * (z - 1)).double()) @ svf.Vh, svf.bias)

    runs = []
    for f in (lambda x, p: svf(x), plain):
        gradients = torch.autograd.grad(f(x, p).pow(3).sum(), (x, p), create_graph=True)
        penalty = gradients[0].square().sum() + gradients[1].double().square().sum()
        runs.append((*gradients, *torch.autograd.grad(penalty, (x, p))))
        y = f(x, p)
        many = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
        runs[-1] += torch.autograd.grad(y, (x, p), many, is_grads_batched=True)
    for ours, true in zip(*runs, strict=True):
        assert error(ours, true) < 1e-5


def test_a_gradient_penalty_in_a_deferred_block_is_not_lost():
    svf, x = trained(layer(12, 12, mode="merged", parametrization="exp")), torch.randn(5, 12)
    z = svf.z["default"]
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(svf(x).square().sum(), z, create_graph=True)[0].square().sum(), z
    )
    with defer_projection(svf):
        (dz,) = torch.autograd.grad(svf(x).square().sum(), z, create_graph=True)
        assert dz.any()
        dz.square().sum().backward()
    svf(torch.zeros_like(x)).sum().backward()
    close(z.grad, expected)


def test_what_a_deferred_block_adds_up_is_its_own():
    svf = trained(layer(40, 40, mode="merged"))
    x, y, z = (torch.randn(9, 40) for _ in range(3))
    p, expected = svf.z["default"], dz_of(svf, x, z)

    def fail(error):
        svf(y).square().sum().backward()
        raise error

    with defer_projection(svf):
        svf(x).square().sum().backward()
        seen = y.clone().requires_grad_()
        torch.autograd.grad(svf(seen).square().sum(), seen)  # not z's: adds nothing
        with pytest.raises(OSError, match="inside"), defer_projection(svf):
            fail(OSError("inside"))  # dropped
        assert not p.grad.any()
        assert not copy.deepcopy(svf)._sums.blocks  # a copy is in no block
    with pytest.raises(KeyboardInterrupt), defer_projection(svf):
        fail(KeyboardInterrupt())
    torch.autograd.grad(svf(seen).square().sum(), seen)
    svf.add_expert("other")  # another expert's backward does not take it
    svf(x).square().sum().backward()
    close(svf.z["other"].grad, dz_of(svf, x))
    svf.set_expert("default")
    svf.rename_expert("default", "first")
    svf(z).square().sum().backward()
    close(p.grad, expected)
    p.grad = None
    svf(z).square().sum().backward()
    close(p.grad, dz_of(svf, z))


def test_deferred_blocks_of_two_threads_end_in_any_order():
    svf, x = trained(layer(40, 40, mode="merged")), torch.randn(9, 40)
    first, second = defer_projection(svf), defer_projection(svf)
    first.__enter__()
    second.__enter__()
    svf(x).square().sum().backward()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    svf(x).square().sum().backward()
    close(svf.z["default"].grad, dz_of(svf, x, x))


def inference(base, mode, **options):
    """A layer made, or made and its base too, in inference mode."""
    linear = None if base else torch.nn.Linear(40, 40)
    with torch.inference_mode():
        return SVFLinear.from_linear(linear or torch.nn.Linear(40, 40), mode=mode, **options)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_trains_after_an_inference_mode(mode):
    svf, x = trained(layer(40, 40, mode=mode)), torch.randn(300, 40)
    expected = dz_of(svf, x)
    with torch.inference_mode():
        y = svf(x)
    torch.testing.assert_close(svf(x), y, rtol=1e-4, atol=1e-4)
    svf(x.requires_grad_()).square().sum().backward()
    close(svf.z["default"].grad, expected)
    from_inference = inference(False, mode)
    from_inference.add_expert("other", torch.rand(40) + 0.5)
    from_inference(x).square().sum().backward()
    assert from_inference.z["other"].grad.any()


def test_a_rollout_composes_once_per_z_in_any_mode(monkeypatch):
    from lowrank.nn import svf as module

    svf, calls, x = trained(layer(mode="merged")), [], torch.randn(9, 40)
    monkeypatch.setattr(module, "materialize", lambda *a, f=module.materialize: calls.append(1) or f(*a))
    for step in range(1, 3):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                ys = [svf(x) for _ in range(3)]
        assert len(calls) == step
        with torch.inference_mode():
            svf.z["default"].mul_(1.5)
    with torch.inference_mode():
        torch.testing.assert_close(svf(x) - svf.base_layer(x), x @ svf.get_delta_weight().mT, rtol=1e-3, atol=1e-4)
    assert not torch.equal(svf(x), ys[0])


@pytest.mark.parametrize("mode", ["merged", "auto"])
def test_nothing_is_kept_of_a_weight_whose_changes_cannot_be_seen(mode):
    svf, x = inference(True, mode), torch.randn(300, 40)
    assert svf.weight.is_inference()
    for factor in (1.0, 2.0):
        with torch.inference_mode():
            svf.base_layer.weight.mul_(factor)
            want = svf.base_layer(x)
            torch.testing.assert_close(svf(x), want)
        torch.testing.assert_close(svf(x), want)
    svf(x).square().sum().backward()
    close(svf.z["default"].grad, dz_of(svf, x))


REPLACED = {
    "the base's weight": lambda svf: setattr(svf.base_layer, "weight", frozen(torch.randn(30, 40))),
    "its data": lambda svf: setattr(svf.base_layer.weight, "data", torch.randn(30, 40)),
    "z's data": lambda svf: setattr(svf.z["default"], "data", torch.rand(30)),
    "a factor": lambda svf: setattr(svf, "S", svf.S * 2),
    "a factor in place": lambda svf: svf.S.mul_(2),
}


def frozen(t):
    return torch.nn.Parameter(t, requires_grad=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("what", REPLACED)
def test_what_is_kept_goes_with_the_tensor_it_was_made_from(what, mode):
    svf, x = trained(layer(mode="merged")), torch.randn(9, 40)
    svf.base_layer.weight = frozen(torch.randn(30, 40))  # in the version that a new one has, too
    with mode():
        before = svf(x)
        REPLACED[what](svf)
        torch.testing.assert_close(svf(x) - svf.base_layer(x), x @ svf.get_delta_weight().mT, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(svf(x), before)


@pytest.mark.parametrize("make", [layer, lambda K, N: lowrank.nn.LoRALinear(K, N, 4)], ids=["svf", "lora"])
def test_merged_in_an_inference_mode_backward_goes_through(make):
    adapted, x = make(40, 30), torch.randn(9, 40, requires_grad=True)
    with torch.inference_mode():
        adapted.merge()
    adapted(x).sum().backward()
    torch.testing.assert_close(x.grad, adapted.weight.detach().sum(0).expand(9, 40))


def test_a_layer_that_ran_is_freed_at_once():
    gc.disable()
    try:
        svf = layer(mode="merged")
        svf(torch.randn(3, 40)).sum()
        gone = weakref.ref(svf)
        del svf
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_used_twice(mode, use_reentrant):
    svf = trained(layer(40, 40, mode=mode, bias=False))
    x = torch.randn(9, 40, requires_grad=True)

    def f(x):
        return svf(torch.tanh(svf(x)))

    plain = torch.autograd.grad(f(x).sum(), (x, svf.z["default"]))
    checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((x.grad, svf.z["default"].grad), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    svf = trained(layer(mode=mode))
    x = torch.randn(9, 40, requires_grad=True)
    truth = svf(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = svf(x)
    assert y.dtype is torch.bfloat16
    assert error(y, truth) < 2e-2
    y.float().sum().backward()
    assert (x.grad.dtype, svf.z["default"].grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_a_base_that_trains_gets_its_gradient(mode):
    svf = trained(layer(mode=mode))
    svf.base_layer.requires_grad_(True)
    svf(torch.randn(9, 40)).sum().backward()
    assert svf.weight.grad is not None
    torch.testing.assert_close(svf.bias.grad, torch.full((30,), 9.0))


def test_z_and_sigma_stay_fp32_wherever_the_model_goes():
    svf = trained(layer())
    z, S = svf.z["default"].detach().clone(), svf.S.clone()
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)):
        moved = move(copy.deepcopy(svf))
        assert torch.equal(moved.z["default"], z)
        assert torch.equal(moved.S, S)
        assert moved.weight.dtype is moved.U.dtype is not torch.float32
        assert moved(torch.randn(3, 40, dtype=moved.weight.dtype)).dtype is moved.weight.dtype
    assert moved.to("meta").z["default"].device.type == "meta"


def test_merged_weight_follows_a_parameter_that_is_replaced():
    svf = trained(layer(mode="merged"))
    x = torch.randn(9, 40)
    with torch.no_grad():
        first = svf(x)
        svf.z["default"] = torch.nn.Parameter(torch.ones(30))
        assert not torch.allclose(svf(x), first)
        torch.testing.assert_close(svf(x), svf.base_layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_compiles_to_one_graph(mode):
    svf = trained(layer(mode=mode))
    compiled = torch.compile(svf, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 7, 11):
        x = torch.randn(2, T, 40)
        torch.testing.assert_close(compiled(x), svf(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert svf.z["default"].grad.abs().sum() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_is_a_layer_of_its_own(copied, mode):
    svf, x = trained(layer(mode=mode)), torch.randn(9, 40)
    y, composed = svf(x), svf._cache
    svf._mix = torch.ones(1), ("default",)  # as in a block of expert_mix
    with defer_projection(svf):
        svf(x).sum().backward()
        copied_svf = copied(svf)
    assert svf._cache is composed  # what the original keeps is its own, and stays
    assert copied_svf._cache is None
    assert torch.equal(copied_svf(x), y)
    expected = dz_of(svf, x)
    copied_svf.z["default"].grad = None
    copied_svf(x).square().sum().backward()
    close(copied_svf.z["default"].grad, dz_of(copied_svf, x))
    with torch.no_grad():
        copied_svf.z["default"].mul_(2)
        assert not torch.allclose(copied_svf(x), y)
        svf._mix = None
        assert torch.equal(svf(x), y)
    close(dz_of(svf, x), expected)
    svf.merge()
    assert torch.equal(copied(svf)(x), svf(x))


@pytest.mark.parametrize("mode", ["delta", "activation", "auto", "merged"])
def test_experts_switch_without_touching_the_weight(mode):
    svf = layer(mode=mode)
    x, W = torch.randn(9, 40), svf.weight.detach().clone()
    plain = svf(x)
    svf.add_expert("loud", torch.full((30,), 2.0))
    assert svf.experts == ["default", "loud"]
    assert svf.active_expert == "loud"
    assert [name for name, p in svf.named_parameters() if p.requires_grad] == ["z.loud"]
    torch.testing.assert_close(svf(x) - svf.bias, 2 * (plain - svf.bias), rtol=1e-4, atol=1e-4)
    svf.set_expert("default")
    torch.testing.assert_close(svf(x), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(svf.weight, W)
    for bad in ("loud", "", "a.b"):
        with pytest.raises(ValueError, match="name"):
            svf.add_expert(bad)
    with pytest.raises(ValueError, match="no expert 'quiet'"):
        svf.set_expert("quiet")


@pytest.mark.parametrize("parametrization", ["free", "sigmoid", "exp"])
def test_an_expert_starts_at_the_z_it_is_given(parametrization):
    svf = layer(parametrization=parametrization)
    z = torch.rand(30) + 0.5
    svf.add_expert("given", z)
    torch.testing.assert_close(svf.values(), z)
    with pytest.raises(ValueError, match="z: expected"):
        svf.add_expert("short", z[:-1])
    with pytest.raises(ValueError, match="z: expected values"):
        svf.add_expert("nan", torch.full((30,), float("nan")))
    svf.rename_expert("given", "named")
    assert svf.experts == ["default", "named"]
    assert svf.active_expert == "named"
    torch.testing.assert_close(svf.values(), z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [8, None])
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype, k):
    svf = trained(layer(k=k, dtype=dtype))
    before, state = svf.weight.detach().clone(), {n: t.clone() for n, t in svf.state_dict().items()}
    A, m, B = svf.update()
    report = svf.merge()
    merged = (before.float() + (B.float() * m) @ A.float()).to(dtype)
    one_ulp = torch.finfo(dtype).eps * before.abs().max()
    assert torch.isclose(svf._merged_weight, merged, rtol=0, atol=float(one_ulp)).all()
    assert (svf._merged_weight == merged).float().mean() > 0.98  # elsewhere the order of the sum decides the rounding
    assert report.kept > 0.9
    assert report.numel == before.numel()
    assert report.changed == int((svf._merged_weight != before).sum())
    assert torch.equal(svf.weight, before)
    assert svf.state_dict().keys() == state.keys()
    x = torch.randn(5, 40).to(dtype)
    assert torch.equal(svf(x), torch.nn.functional.linear(x, svf._merged_weight, svf.bias))
    svf.unmerge()
    assert torch.equal(svf.weight.view(torch.uint8), before.view(torch.uint8))
    assert not svf.merged


def test_merging_says_what_rounding_lost():
    svf = layer(256, 256, dtype=torch.bfloat16)
    trained(svf, 1e-5)
    with pytest.warns(UserWarning, match=r"rounding to torch.bfloat16 keeps \d+% of the update"):
        report = svf.merge()
    assert report.kept < 0.5
    with lowrank.strict(), pytest.raises(ValueError, match="keeps"):
        svf.merge()
    lora = lowrank.nn.LoRALinear(256, 256, 4, dtype=torch.bfloat16)
    torch.nn.init.normal_(lora.lora_B["default"].weight, std=1e-6)
    with pytest.warns(UserWarning, match="keeps"):
        assert lora.merge().kept < 0.5
    with torch.no_grad():
        svf.z["default"][3] = float("nan")
    with pytest.raises(ValueError, match=r"z.default: holds NaN"):
        svf.merge()


def test_what_is_merged_goes_with_what_it_was_made_from():
    svf = trained(layer())
    state = layer().state_dict()
    svf.merge()
    svf.load_state_dict(state)
    assert not svf.merged
    svf.merge()
    svf.add_expert("other")
    assert not svf.merged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=31), "k"),
        (dict(k=0), "k"),
        (dict(mode="fast"), "mode: expected"),
        (dict(parametrization="cube"), "parametrization: expected"),
        (dict(normalize="max"), "normalize: expected"),
        (dict(k=8, mode="activation"), "needs all 30 directions"),
        (dict(factors=lowrank.svd_factors(torch.randn(30, 41))), "factors: expected"),
        (dict(k=8, factors=lowrank.svd_factors(torch.randn(30, 40))), "factors: expected"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_refuses_what_is_no_linear():
    with pytest.raises(TypeError, match=r"linear: expected an nn.Linear, got Conv1d"):
        SVFLinear.from_linear(torch.nn.Conv1d(3, 4, 1))
    with pytest.raises(TypeError, match="the base has its own dtype"):
        SVFLinear.from_linear(torch.nn.Linear(3, 4), dtype=torch.half)


def test_repr():
    assert "in_features=40, out_features=30, bias=True, k=8, mode=auto, experts=['default']" in repr(layer(k=8))


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_a_merged_layer_under_torch_func():
    """Transforms around the call take another form; gradients batched outside of it the differentiable backward."""
    runs = []
    for mode in ("delta", "merged"):
        torch.manual_seed(0)
        layer = SVFLinear.from_linear(torch.nn.Linear(6, 6).double(), mode=mode)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        p, y, eye = layer.z["default"], layer(x), torch.eye(24, dtype=torch.float64).view(24, 4, 6)
        runs.append(
            [
                *torch.func.vmap(lambda dy, y=y, ts=(x, p): torch.autograd.grad(y, ts, dy, retain_graph=True))(eye),
                torch.func.jacfwd(layer)(x.detach()),
                torch.func.vmap(layer)(x.detach()),
            ]
        )
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
