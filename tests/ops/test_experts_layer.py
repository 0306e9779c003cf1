import itertools
import warnings

import pytest
import torch
from right import INTERPRETED, PAIRS, in_the_mean, within
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.measure.saved import SavedActivations
from lowrank.ops import activations
from lowrank.ops.activations import Activation
from lowrank.ops.experts_layer import Experts, experts_layer
from lowrank.ops.linear import Adapter, Projection

NAMES = ("out", "dx", "dweights", "dW1", "db1", "dW2", "db2", "dA1", "dB1", "dA2", "dB2")
SILU = Activation("silu")
ACTIVATIONS = [
    SILU,
    Activation("gelu"),
    Activation("gelu_tanh", interleaved=True),
    Activation("relu2", gated=False),
    Activation("silu", gated=False),
    Activation("clamped", interleaved=True, alpha=1.702, limit=0.6),
]


def tensors(T=12, k=2, E=5, H=32, I=24, r=3, dtype=torch.float32, factors=None, act=SILU, grad=True):  # noqa: E741
    """x, routing weights, W1, b1, W2, b2, A1, B1, A2, B2, the factors in PEFT's layout; and the index [T,k]."""
    factors, N = factors or dtype, 2 * I if act.gated else I
    index = torch.zeros(T, k, dtype=torch.int64)
    for t in range(T):
        index[t] = torch.randperm(E - 1)[:k]  # the last expert has no row
    weights = torch.rand(T, k).to(dtype)
    stacks = [
        torch.randn(E, N, H) / H**0.5,
        torch.randn(E, N) / 4,
        torch.randn(E, H, I) / I**0.5,
        torch.randn(E, H) / 4,
    ]
    thin = [torch.randn(E * r, H) / H**0.5, torch.randn(N, r * E) / (4 * r**0.5)]
    thin += [torch.randn(E * r, I) / I**0.5, torch.randn(H, r * E) / (4 * r**0.5)]
    ts = [torch.randn(T, H).to(dtype), weights, *(t.to(dtype) for t in stacks), *(t.to(factors) for t in thin)]
    return [t.requires_grad_(grad) for t in ts], index


def layer_of(W1, b1, W2, b2, A1, B1, A2, B2, act=SILU, p=0.0, full=True, scaling=0.7):
    E = len(W1)

    def projection(W, b, A, B):
        adapter = Adapter(A.view(E, -1, A.shape[1]), B.view(len(B), -1, E).permute(2, 0, 1), scaling, None, p)
        return Projection(W, b, (adapter,))

    return Experts(projection(W1, b1, A1, B1), projection(W2, b2, A2, B2), act, full)


def call(index, x, weights, *rest, **options):
    return experts_layer(x, index, weights, layer_of(*rest, **options))


def formula(index, x, weights, W1, b1, W2, b2, A1, B1, A2, B2, act=SILU, full=True):
    """transformers' loop over experts, with PEFT's layer in the place of each linear."""
    E, out = len(W1), torch.zeros_like(x)

    def linear(x, e, W, b, A, B):
        A, B = A.view(E, -1, A.shape[1])[e], B.view(len(B), -1, E)[:, :, e]
        y = torch.nn.functional.linear(x, W[e], b[e])
        thin = torch.nn.functional.linear(torch.nn.functional.linear(x.to(A.dtype), A), B)
        return (y + thin * 0.7).to(y.dtype)

    for e in range(E):
        token, choice = torch.where(index == e)
        h = activations.differentiable(linear(x[token], e, W1, b1, A1, B1), act)
        z = linear(h, e, W2, b2, A2, B2) * weights[token, choice, None]
        out = out.index_add(0, token, z)
    return out


def grads(f, index, ts, dy, **options):
    y = f(index, *ts, **options)
    return [y, *torch.autograd.grad(y, ts, dy.to(y.dtype))]


def wide(ts):
    return [t.detach().double().requires_grad_() for t in ts]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: f"{act.name}-{act.gated}")
def test_in_fp64_the_formula(act):
    ts, index = tensors(dtype=torch.float64, act=act)
    dy = torch.randn(12, 32).double()
    ours = grads(call, index, ts, dy, act=act)
    for name, out, expected in zip(NAMES, ours, grads(formula, index, ts, dy, act=act), strict=True):
        torch.testing.assert_close(out, expected, msg=lambda text, name=name: f"{name}: {text}")
    for t, out in zip(ts, ours[1:], strict=True):
        assert out.dtype is t.dtype
    with torch.no_grad():
        torch.testing.assert_close(call(index, *ts, act=act), ours[0].detach())


@pytest.mark.parametrize("act", [ACTIVATIONS[0], ACTIVATIONS[3], ACTIVATIONS[5]], ids=lambda act: act.name)
@pytest.mark.parametrize(("dtype", "factors"), PAIRS, ids=str)
def test_as_right_as_eager(dtype, factors, act):
    sizes = dict(T=24, k=3, E=6, H=64, I=48, r=16, act=act)

    def draw():
        ts, index = tensors(dtype=dtype, factors=factors, **sizes)
        dy = torch.randn(24, 64).to(dtype)
        oracle = grads(formula, index, wide(ts), dy.double(), act=act)
        return grads(call, index, ts, dy, act=act), grads(formula, index, ts, dy, act=act), oracle

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize(
    "sizes", [dict(T=1, k=1, E=2), dict(T=0), dict(T=3, k=4, E=9, H=33, I=17, r=5), dict(T=40, k=1, E=2)], ids=str
)
def test_ragged(sizes):
    ts, index = tensors(**sizes)
    dy = torch.randn(ts[0].shape)
    absolutes = [t.detach().double().abs().requires_grad_() for t in ts]
    within(
        grads(call, index, ts, dy),
        grads(formula, index, wide(ts), dy.double()),
        grads(formula, index, absolutes, dy.double().abs()),
        NAMES,
        roundings=6,  # two products, one behind the other
    )


@pytest.mark.parametrize("frozen", ["x", "weights", "W", "factors", "A", "B", "first"])
def test_only_the_gradients_that_are_asked_for(frozen):
    ts, index = tensors(dtype=torch.float64)
    groups = {
        "x": [0],
        "weights": [1],
        "W": [2, 3, 4, 5],
        "factors": [6, 7, 8, 9],
        "A": [6, 8],
        "B": [7, 9],
        "first": [6, 7],
    }
    whole = grads(call, index, ts, torch.ones(12, 32).double())[1:]
    for i in groups[frozen]:
        ts[i].requires_grad_(False)
    asked = [i for i, t in enumerate(ts) if t.requires_grad]
    out = call(index, *ts)
    for i, grad in zip(asked, torch.autograd.grad(out, [ts[i] for i in asked], torch.ones_like(out)), strict=True):
        torch.testing.assert_close(grad, whole[i])


def test_ids_of_experts_elsewhere_give_nothing():
    ts, index = tensors(dtype=torch.float64)
    index[::3, 0] = 5
    index[4] = 5
    dy = torch.randn(12, 32).double()
    for out, expected in zip(grads(call, index, ts, dy, full=False), grads(formula, index, ts, dy), strict=True):
        torch.testing.assert_close(out, expected)
    assert not call(index, *ts, full=False)[4].any()
    poisoned = torch.full((12, 32), float("nan")).double()
    poisoned[[i for i in range(12) if i != 4]] = 1
    for grad in grads(call, index, ts, poisoned, full=False)[2:]:
        assert grad.isfinite().all()


def test_dropout_is_the_masks():
    ts, index = tensors(T=6, E=4, H=8, I=8, r=2, dtype=torch.float64)

    def drawn(*ts):
        torch.manual_seed(3)
        return call(index, *ts, p=0.3)

    torch.autograd.gradcheck(drawn, ts, fast_mode=True)
    torch.autograd.gradgradcheck(drawn, ts, fast_mode=True)
    assert not torch.allclose(drawn(*ts), call(index, *ts))
    # keyed by token and choice: a token's choices in another place of the sort, the same masks
    shuffled = 3 - index
    x, w, W1, b1, W2, b2, *rest = (t.detach() for t in ts)
    flipped = [
        t.view(4, 2, -1).flip(0).reshape(8, -1)
        if i % 2 == 0
        else t.view(8 if len(t) == 8 else 16, 2, 4).flip(2).reshape(len(t), -1)
        for i, t in enumerate(rest)
    ]
    torch.manual_seed(3)
    mirrored = call(shuffled, x, w, W1.flip(0), b1.flip(0), W2.flip(0), b2.flip(0), *flipped, p=0.3)
    torch.testing.assert_close(mirrored, drawn(*ts).detach())


def test_derivatives_of_every_order():
    ts, index = tensors(T=4, E=3, H=4, I=4, r=2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *ts: call(index, *ts), ts, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *ts: call(index, *ts), ts, fast_mode=True)
    plain = [t.detach() for t in ts]
    got = torch.func.grad(lambda A: call(index, *plain[:6], A, *plain[7:]).square().sum())(plain[6])
    leaf = ts[6]
    torch.testing.assert_close(got, torch.autograd.grad(call(index, *ts).square().sum(), leaf)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    ts, index = tensors()
    dy = torch.randn(12, 32)

    def again(index, *ts):
        return checkpoint(lambda *ts: call(index, *ts, p=0.25), *ts, use_reentrant=reentrant)

    torch.manual_seed(1)
    plain = grads(lambda index, *ts: call(index, *ts, p=0.25), index, ts, dy)
    torch.manual_seed(1)
    y = again(index, *ts)
    y.backward(dy)
    for grad, t in zip(plain[1:], ts, strict=True):
        torch.testing.assert_close(t.grad, grad)


def test_nothing_of_the_stacks_size_and_what_is_saved():
    ts, index = tensors(T=16, k=2, E=9, H=256, I=256, r=4)
    for t in ts[2:6]:
        t.requires_grad_(False)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            tree = torch.utils._pytree.tree_leaves
            owned = {t.untyped_storage().data_ptr() for t in tree(args) if torch.is_tensor(t)}
            for t in tree(out):
                if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in owned:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Sizes():
        call(index, *ts).sum().backward()
    assert 0 < largest < ts[2].nbytes / 16  # a factor
    with SavedActivations(ts) as saved:
        y = call(index, *ts)
    S = 32
    assert (
        saved.bytes <= S * 512 * 4 + 2 * S * 4 * 4 + 2 * S * 8 + 9 * 4 + S * 4
    )  # G, S1, S2, order and place, ends, weights
    del y


def test_opcheck_and_compile():
    ts, index = tensors(grad=False)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(index, *ts), call(index, *ts))
    for t in ts:
        t.requires_grad_()
    dy = torch.randn(12, 32)
    for out, expected in zip(grads(compiled, index, ts, dy), grads(call, index, ts, dy), strict=True):
        torch.testing.assert_close(out, expected)
    x, w, W1, b1, W2, b2, *factors = (t.detach() for t in ts)
    _, (up, down) = None, layer_of(W1, b1, W2, b2, *factors)[:2]
    adapters = [*up.adapters, *down.adapters]
    rest = [[a.A for a in adapters], [a.B for a in adapters]]
    act, seeds = ("silu", True, False, [1.0, 0.0]), torch.tensor([1, 2])
    for grad, ps in ((True, [0.0, 0.0]), (False, [0.0, 0.0]), (True, [0.25, 0.25])):
        arguments = (
            x,
            index,
            w,
            W1,
            b1,
            W2,
            b2,
            *rest,
            1,
            [0.7, 0.7],
            ps,
            seeds,
            True,
            grad,
            *act,
            torch.float32,
            False,
        )
        torch.library.opcheck(torch.ops.lowrank.experts_layer.default, arguments)
    _, G, order, place, ends, Ss, keeps = torch.ops.lowrank.experts_layer.default(*arguments)
    arguments = (
        dy,
        x,
        w,
        W1,
        b1,
        W2,
        b2,
        *rest,
        G,
        order,
        place,
        ends,
        Ss,
        keeps,
        1,
        [0.7, 0.7],
        ps,
        True,
        *act,
        torch.float32,
        False,
    )
    torch.library.opcheck(torch.ops.lowrank.experts_layer_backward.default, (*arguments, [True] * 10))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a.update(x=a["x"][None]), ValueError, r"x: expected \[T, H\]"),
        (lambda a: a.update(index=a["index"][:5]), ValueError, r"index: expected \[12, k\]"),
        (lambda a: a.update(index=a["index"].float()), TypeError, "index: expected torch.int32"),
        (lambda a: a.update(weights=a["weights"][:, :1]), ValueError, "weights: expected floats"),
        (lambda a: a["ts"].__setitem__(0, a["ts"][0][:, :-1]), ValueError, "weights: expected"),
        (lambda a: a["ts"].__setitem__(1, a["ts"][1][:, :-1]), ValueError, "bias: expected"),
        (lambda a: a["ts"].__setitem__(2, a["ts"][2].double()), TypeError, "down weight: expected the first's"),
        (lambda a: a["ts"].__setitem__(4, a["ts"][4][:, :-1]), ValueError, "lora_A: expected"),
    ],
)
def test_bad_input(change, error, match):
    (x, weights, *ts), index = tensors(grad=False)
    given = dict(x=x, index=index, weights=weights, ts=ts)
    change(given)
    with pytest.raises(error, match=match):
        call(given["index"], given["x"], given["weights"], *given["ts"])


def test_the_package_says_why_torch_func_runs_elsewhere():
    ts, index = tensors(T=4, E=3, H=4, I=4, r=2, dtype=torch.float64, grad=False)
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=r"torch\.func"):
        torch.func.grad(lambda A: call(index, *ts[:6], A, *ts[7:]).sum())(ts[6])


def peak(step):
    """Bytes of all tensors that are there at once in a step, by the allocations and releases that the profiler sees."""
    step()
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.skipif(INTERPRETED, reason="of PyTorch's own operations, and minutes there")
def test_the_peak_of_a_step_is_the_frozen_layers_and_the_adapters_gradients():
    """Of transformers' own grouped_mm, at sizes where the stacks are most of all."""
    moe = pytest.importorskip("transformers.integrations.moe")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8)
    (x, weights, W1, _, W2, _, *factors), index = tensors(T=256, k=8, E=64, H=512, I=384, r=16)
    module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(t.detach(), False) for t in (W1, W2))
    dy = torch.randn(256, 512)

    def layer():
        made = layer_of(W1.detach(), None, W2.detach(), None, *factors)
        return experts_layer(x, index, weights, made)

    def step(forward):
        torch.autograd.grad(forward(), (x, weights, *(factors if forward is layer else ())), dy)

    frozen = peak(lambda: step(lambda: moe.grouped_mm_experts_forward(module, x, index, weights)))
    ours = peak(lambda: step(layer))
    assert ours <= 1.15 * frozen + sum(t.nbytes for t in factors)


def test_weights_that_are_a_column_or_written_to_later():
    ts, index = tensors(k=1)
    wide = torch.rand(12, 2)
    ts[1] = wide[:, :1].requires_grad_()
    expected = grads(formula, index, ts, torch.ones(12, 32))
    weights = ts[1].detach().clone().requires_grad_()
    inner = weights * 1.0
    out = call(index, ts[0], inner, *ts[2:])
    with torch.no_grad():
        inner.zero_()
    got = torch.autograd.grad(out, [ts[0], weights, *ts[2:]], torch.ones_like(out))
    for name, grad, truth in zip(NAMES[1:], got, expected[1:], strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():  # a view whose rows are apart
        torch.testing.assert_close(call(index, ts[0], ts[1], *ts[2:]), expected[0].detach())


def test_traced_with_one_routing_it_runs_with_another():
    ts, index = tensors(grad=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda index, x: call(index, x, *ts[1:]), (index, ts[0]), check_trace=False)
        other = index.flip(0)
        torch.testing.assert_close(traced(other, ts[0]), call(other, *ts))


def test_what_inference_mode_made_can_be_trained_behind():
    ts, index = tensors()
    with torch.inference_mode():
        x, weights = ts[0].detach().clone(), ts[1].detach().clone()
    out = call(index, x, weights, *ts[2:])
    assert torch.autograd.grad(out.sum(), ts[6])[0].abs().sum() > 0
