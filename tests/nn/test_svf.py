import copy

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
    assert svf._dW.dtype is torch.float32
    model(xs[-1]).square().sum().backward()
    torch.testing.assert_close(svf.z["default"].grad, expected, rtol=1e-4, atol=1e-4)
    assert svf._dW is None


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
