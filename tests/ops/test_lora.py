import contextlib
import itertools
import warnings

import pytest
import torch
from right import PAIRS, in_the_mean, within
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.measure.saved import SavedActivations
from lowrank.ops.lora import Adapter, Projection, lora_projections

NAMES = ("y", "dx", "dW", "dA", "dB", "db", "dlb")
SHAPES = [
    (1, 8, 8, 1),
    (2, 33, 65, 3),
    (7, 64, 100, 8),
    (16, 257, 129, 24),
    (33, 130, 66, 64),
    (133, 300, 77, 100),
    (256, 96, 513, 16),
]


def tensors(M, K, N, r, dtype, adapter_dtype=None, grad=True):
    adapter_dtype = adapter_dtype or dtype
    x, W = torch.randn(M, K, dtype=dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    # a quarter of the base term, as adapters are; test_a_thin_term_larger_than_the_base is about the other case
    A, B = (torch.randn(r, K) / K**0.5).to(adapter_dtype), (torch.randn(N, r) / (4 * r**0.5)).to(adapter_dtype)
    b, lb = (torch.randn(N) / 4).to(dtype), (torch.randn(N) / 4).to(adapter_dtype)
    return [t.requires_grad_(grad) for t in (x, W, A, B, b, lb)]


def formula(x, W, A, B, b, lb, scaling=0.7, keep=None, inv_keep=1.0):
    """The equation, as PEFT writes it in PyTorch: the base result, then the adapter added to it, then one cast."""
    dropped = x if keep is None else torch.where(keep, x, 0) * inv_keep
    y = torch.nn.functional.linear(x, W, b)
    thin = torch.nn.functional.linear(dropped.to(A.dtype), A)
    return (y + torch.nn.functional.linear(thin, B, lb) * scaling).to(y.dtype)


def call(x, W, A, B, b, lb):
    return lowrank.lora_linear(x, W, A, B, 0.7, bias=b, lora_bias=lb)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Under any dispatch mode the ops are called as ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def absolutes(ts):
    return [None if t is None else t.detach().double().abs().requires_grad_() for t in ts]


def wide(ts):
    return [None if t is None else t.detach().double().requires_grad_() for t in ts]


def grads(f, ts, dy):
    y = f(*ts)
    return [y, *torch.autograd.grad(y, [t for t in ts if t is not None and t.requires_grad], dy.to(y.dtype))]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, adapter_dtype):
    ts = tensors(*shape, dtype, adapter_dtype)
    dy = torch.randn(shape[0], shape[2], dtype=dtype)
    within(
        grads(call, ts, dy),
        grads(formula, wide(ts), dy.double()),
        grads(formula, absolutes(ts), dy.double().abs()),
        NAMES,
    )


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
def test_as_right_as_eager(dtype, adapter_dtype):
    def draw():
        ts, dy = tensors(33, 130, 66, 16, dtype, adapter_dtype), torch.randn(33, 66)
        return (
            grads(call, ts, dy.to(dtype)),
            grads(formula, ts, dy.to(dtype)),
            grads(formula, wide(ts), dy.to(dtype).double()),
        )

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_narrow_or_foreign_adapters_lose_nothing(dtype, adapter_dtype):
    def draw():
        ts, dy = tensors(33, 96, 80, 8, dtype, adapter_dtype), torch.randn(33, 80, dtype=dtype)
        eager = grads(formula, [t.detach().to(dtype).requires_grad_() for t in ts], dy)
        return grads(call, ts, dy), eager, grads(formula, wide(ts), dy.double())

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
def test_dropout_with_the_mask_it_drew(dtype, adapter_dtype, monkeypatch):
    M, K, N, r, p = 33, 130, 70, 16, 0.3
    seeds = torch.tensor([1234567])
    monkeypatch.setattr("lowrank.ops.dropout.draw_seeds", lambda n, device: seeds)
    keep = torch.cat([m for _, m in lowrank.ops.dropout.draw(seeds[0], M, K, lowrank.ops.dropout.threshold(p))])[:, :K]
    inv_keep = lowrank.ops.dropout.keep_scale(lowrank.ops.dropout.drawable(p))

    def ours(x, W, A, B, b, lb):
        return lowrank.lora_linear(x, W, A, B, 0.7, bias=b, lora_bias=lb, dropout_p=p)

    def dropped(*ts):
        return formula(*ts, keep=keep, inv_keep=inv_keep)

    def draw():
        ts = tensors(M, K, N, r, dtype, adapter_dtype)
        dy = torch.randn(M, N, dtype=dtype)
        exact = grads(dropped, wide(ts), dy.double())
        within(grads(ours, ts, dy), exact, grads(dropped, absolutes(ts), dy.double().abs()), NAMES)
        return grads(ours, ts, dy), grads(dropped, ts, dy), exact

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    ts = tensors(6, 9, 7, 4, torch.float64)

    def f(x, W, A, B, b, lb):
        torch.manual_seed(1)
        return lowrank.lora_linear(x.view(2, 3, 9), W, A, B, 0.7, bias=b, lora_bias=lb, dropout_p=p)

    assert torch.autograd.gradcheck(f, ts)


@pytest.mark.parametrize("shared_mask", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_siblings_gradcheck(p, shared_mask):
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    sets = [tensors(5, 9, N, r, torch.float64)[1:5] for N, r in ((7, 4), (3, 2), (11, 1))]

    def f(x, *flat):
        torch.manual_seed(1)
        Ws, As, Bs, bs = (list(flat[i::4]) for i in range(4))
        return lowrank.lora_linears(x, Ws, As, Bs, [0.5, 1.0, 2.0], biases=bs, dropout_p=p, shared_mask=shared_mask)

    assert torch.autograd.gradcheck(f, (x, *itertools.chain(*sets)))


def test_siblings_equal_separate_layers():
    x, *_ = tensors(33, 40, 1, 1, torch.float32)
    sets = [tensors(33, 40, N, r, torch.float32)[1:5] for N, r in ((24, 8), (8, 4))]
    Ws, As, Bs, bs = zip(*sets, strict=True)
    together = lowrank.lora_linears(x, Ws, As, Bs, [2.0, 0.5], biases=bs)
    for y, W, A, B, b, s in zip(together, Ws, As, Bs, bs, [2.0, 0.5], strict=True):
        torch.testing.assert_close(y, lowrank.lora_linear(x, W, A, B, s, bias=b))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2], [1, 2]], ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "dropout", "shared mask", "frozen x", "frozen factors", "base outputs", "opaque"]
)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_projections_whose_result_is_not_used_get_none(used, kind, adapter_dtype):
    """What they are made of gets gradient None, and the others get what they get beside gradients of zero."""
    x, *_ = tensors(33, 40, 1, 1, torch.float32, grad=kind != "frozen x")
    sets = [tensors(33, 40, N, r, torch.float32, adapter_dtype) for N, r in ((24, 8), (8, 4), (9, 3))]
    projections, owned = [], []
    for i, (_, W, A, B, b, lb) in enumerate(sets):
        A, B = (t.requires_grad_(kind != "frozen factors") for t in (A, B))
        p = 0.3 if kind in ("dropout", "shared mask") else 0.0
        adapters = () if i == 1 and kind == "plain" else (Adapter(A, B, 0.5, lb, p), Adapter(B=B, A=A, scaling=2.0))
        if kind == "base outputs":
            base = torch.randn(33, B.shape[0], dtype=torch.float32, requires_grad=True)
            projections.append(Projection(None, None, adapters, base))
            owned.append([A, B, lb, base])
        else:
            projections.append(Projection(W, b, adapters))
            owned.append([W, b, *([A, B, lb] if adapters else [])])
    leaves = [*([x] if x.requires_grad else []), *(t for ts in owned for t in ts if t.requires_grad)]
    with Seen() if kind == "opaque" else contextlib.nullcontext():  # torch.ops.lowrank.lora_linears_backward itself
        ys = lora_projections(x, tuple(projections), shared_mask=kind == "shared mask")
        grads = torch.autograd.grad([ys[i].sum() for i in used], leaves, allow_unused=True, retain_graph=True)
    zeros = torch.autograd.grad([y.sum() if i in used else y.sum() * 0 for i, y in enumerate(ys)], leaves)
    gone = {id(t) for i, ts in enumerate(owned) for t in ts if i not in used}
    for leaf, grad, beside_zeros in zip(leaves, grads, zeros, strict=True):
        assert (grad is None) == (id(leaf) in gone)
        if grad is not None:
            torch.testing.assert_close(grad, beside_zeros)


def test_several_adapters_on_one_projection_round_once():
    def eager(x, W, b, A, B, lb, A2, B2):
        thin = torch.nn.functional.linear
        y = thin(x, W, b)
        xa = x.to(A.dtype)
        return (y + thin(thin(xa, A), B, lb) * 0.5 + thin(thin(xa, A2), B2) * 2.0).to(y.dtype)

    def ours(x, W, b, A, B, lb, A2, B2):
        adapters = (Adapter(A, B, 0.5, lb), Adapter(A2, B2, torch.tensor(2.0)))
        return lora_projections(x, (Projection(W, b, adapters),))[0]

    def draw():
        x, W, A, B, b, lb = tensors(33, 96, 80, 8, torch.bfloat16, torch.float32)
        *_, A2, B2, _, _ = tensors(33, 96, 80, 3, torch.bfloat16, torch.float32)
        ts, dy = (x, W, b, A, B, lb, A2, B2), torch.randn(33, 80).bfloat16()
        return grads(ours, ts, dy), grads(eager, ts, dy), grads(eager, wide(ts), dy)

    in_the_mean(draw, ("y", "dx", "dW", "db", "dA", "dB", "dlb", "dA2", "dB2"))


def test_a_thin_term_larger_than_the_base_costs_one_rounding_of_it():
    """What is rounded early is the thin term, in PEFT's order the base term: each pays for its own."""
    x, W, A, B, _, _ = tensors(64, 96, 80, 8, torch.bfloat16, torch.float32, grad=False)
    oracle = formula(*wide((x, W, A, B)), None, None, scaling=40.0)
    thin = 40 * x.double() @ A.double().mT @ B.double().mT
    rounding = 2**-8 / 3**0.5  # rms of rounding to bf16, relative to the worst of a binade
    budget = rounding * (thin.square().sum() + oracle.square().sum()).sqrt()
    assert (lowrank.lora_linear(x, W, A, B, 40.0).double() - oracle).norm() <= budget


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_thin_term_beyond_fp16_is_taken_back_by_the_base(adapters, p):
    """70000 - 30000, in y and in dx, of fp32 factors over fp16: exact by construction where nothing is dropped."""
    x, dy = torch.ones(3, 64, dtype=torch.float16, requires_grad=True), torch.full((3, 32), 2.0, dtype=torch.float16)
    W, b = torch.full((32, 64), -30000 / 64, dtype=torch.float16), torch.zeros(32, dtype=torch.float16)
    A, B = torch.ones(1, 64, requires_grad=True), torch.full((32, 1), 70000 / 64 / adapters, requires_grad=True)
    (y,) = lora_projections(x, (Projection(W, b, (Adapter(A, B, 1.0, None, p),) * adapters),))
    for create_graph in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy, retain_graph=True, create_graph=create_graph)
        assert all(torch.isfinite(t).all() for t in (y, dx, dA, dB))
        if not p:
            assert torch.equal(y, torch.full_like(y, 40000))
            assert torch.equal(dx, torch.full_like(dx, 40000))
        else:  # what is dropped is the base's -30000, what is kept 70000 * 4 / 3 more, rounded once
            values = [-30000 + 70000 * 4 / 3 / adapters * kept for kept in range(adapters + 1)]
            assert set(dx.flatten().tolist()) == set(torch.tensor(values).half().tolist())


@pytest.mark.parametrize(("adapters", "each", "bias"), [(1, 60000, 10000), (2, 30000, 10000), (2, 40000, None)])
def test_a_sum_beyond_fp16_of_terms_within_is_taken_back_by_the_base(adapters, each, bias):
    """Factors in fp16 too; the base's own term is -30000."""
    half = dict(dtype=torch.float16)
    x, W = torch.ones(3, 64, **half), torch.full((32, 64), -30000 / 64, **half)
    b = None if bias is None else torch.full((32,), bias, **half)
    A, B = torch.ones(1, 64, **half), torch.full((32, 1), each / 64, **half)
    (y,) = lora_projections(x, (Projection(W, b, (Adapter(A, B),) * adapters),))
    assert torch.isfinite(y).all()
    want = (x.double() @ W.double().mT) + adapters * (x.double() @ A.double().mT @ B.double().mT) + (bias or 0)
    torch.testing.assert_close(y.double(), want, rtol=2**-9, atol=0)


def test_an_svf_term_beyond_fp16_is_taken_back_by_the_base():
    x, W = torch.ones(3, 64, dtype=torch.float16, requires_grad=True), torch.full((32, 64), -30000 / 64).half()
    factors = lowrank.SVDFactors(torch.ones(32, 1), torch.ones(1), torch.ones(1, 64))
    z = torch.tensor([1 + 70000 / 64], requires_grad=True)
    y = lowrank.svf_linear(x, W, factors, z, mode="delta")
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2))
    assert torch.equal(y, torch.full_like(y, 40000))
    assert torch.equal(dx, torch.full_like(dx, 40000))


def test_base_output_is_added_to_and_not_written():
    x, W, A, B, _, lb = tensors(4, 12, 10, 3, torch.float64)
    base = (x @ W.mT).detach().requires_grad_()
    before = base.clone()
    assert torch.autograd.gradcheck(
        lambda x, base, A, B, lb: lora_projections(x, (Projection(None, None, (Adapter(A, B, 0.5, lb),), base),))[0],
        (x, base, A, B, lb),
    )
    assert torch.equal(base, before)


def test_a_projection_without_an_adapter_trains_fully():
    x, W, _, _, b, _ = tensors(5, 9, 7, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda x, W, b: lora_projections(x, (Projection(W, b, ()),))[0], (x, W, b))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_needs_a_gradient_gets_one(needed):
    ts = tensors(6, 9, 7, 4, torch.float32)[:4]
    for t, need in zip(ts, needed, strict=True):
        t.requires_grad_(need)
    y = lowrank.lora_linear(*ts, 0.7, dropout_p=0.2)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.sum().backward()
    for t, need in zip(ts, needed, strict=True):
        assert (t.grad is not None) == need


def saved_bytes(f, ignore):
    """Bytes of distinct storages that autograd holds between forward and backward, parameters not counted."""
    with SavedActivations(ignore) as saved:
        out = f()
    del out
    return saved.bytes


@pytest.mark.parametrize(
    ("p", "shared_mask", "limit"), [(0.0, False, 1.06), (0.05, False, 1.22), (0.05, True, 1.15)], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_saved_for_backward_in_a_llama_block(p, shared_mask, limit, autocast):
    """The seven projections of a decoder block, fp32 adapters over bf16: distinct inputs are what any method keeps."""
    H, F, r, M = 256, 896, 4, 64  # Llama-8B's proportions; r/H as r=16 at 1024
    xs = {
        name: torch.randn(M, F if name == "down" else H, dtype=torch.bfloat16, requires_grad=True)
        for name in ("attn", "o", "mlp", "down")
    }
    groups = {"attn": [H, H // 4, H // 4], "o": [H], "mlp": [F, F], "down": [H]}
    parameters, calls = [], []
    for name, Ns in groups.items():
        sets = [tensors(1, xs[name].shape[1], N, r, torch.bfloat16, torch.float32)[1:4] for N in Ns]
        for W, _, _ in sets:
            W.requires_grad_(False)
        parameters += itertools.chain(*sets)
        calls.append((xs[name], *map(list, zip(*sets, strict=True))))

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [
                lowrank.lora_linears(x, Ws, As, Bs, [2.0] * len(Ws), dropout_p=p, shared_mask=shared_mask)
                for x, Ws, As, Bs in calls
            ]

    ratio = saved_bytes(run, parameters) / sum(x.nbytes for x in xs.values())
    assert 1.0 < ratio <= limit


def test_never_saves_a_cast_copy_of_x():
    x, W, A, B, _, _ = tensors(64, 128, 32, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        extra = saved_bytes(lambda: lowrank.lora_linear(x, W, A, B), [x, W, A, B])
    assert extra == 64 * 4 * 2  # S in bf16, nothing else


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant):
    x, W, A, B, _, _ = tensors(16, 64, 32, 4, torch.float32)

    def f(x):
        return lowrank.lora_linear(
            torch.tanh(lowrank.lora_linear(x, W, A, B, dropout_p=0.5)), W.mT, B.mT, A.mT, dropout_p=0.5
        )

    results = []
    for run in (f, lambda x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        y = run(x)
        results.append(
            [y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y))] if not reentrant else backward_into(y, x, A, B)
        )
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def backward_into(y, *leaves):
    for leaf in leaves:
        leaf.grad = None
    y.backward(torch.ones_like(y))
    return [y, *[leaf.grad for leaf in leaves]]


def test_the_mask_follows_torchs_seed():
    x, W, A, B, _, _ = tensors(16, 64, 32, 4, torch.float32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(lowrank.lora_linear(x, W, A, B, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_dropout_is_unbiased():
    x, W, A, B, _, _ = tensors(4, 512, 8, 4, torch.float64, grad=False)
    mean = sum(lowrank.lora_linear(x, W, A, B, dropout_p=0.3) for _ in range(3000)) / 3000
    spread = (lowrank.lora_linear(x, W, A, B, dropout_p=0.3) - lowrank.lora_linear(x, W, A, B)).abs().mean()
    assert (mean - lowrank.lora_linear(x, W, A, B)).abs().mean() < 4 * spread / 3000**0.5


def test_strides_ties_and_expanded_gradients():
    x, W, A, B, b, lb = tensors(12, 16, 16, 4, torch.float64)
    want = grads(formula, [x, W, A, B, b, lb], torch.ones(12, 16, dtype=torch.float64))

    def strided(t):
        big = torch.zeros(t.shape[0], 2 * t.shape[1], dtype=t.dtype)
        big[:, ::2] = t.detach()
        return big[:, ::2].requires_grad_()

    def transposed(t):
        return t.detach().t().contiguous().t().requires_grad_()

    for change in (strided, transposed):
        x2, W2, A2, B2 = map(change, (x, W, A, B))
        y = lowrank.lora_linear(x2, W2, A2, B2, 0.7, bias=b, lora_bias=lb)
        y.sum().backward()  # a gradient with strides (0, 0)
        torch.testing.assert_close([y, x2.grad, W2.grad, A2.grad, B2.grad], want[:5])

    tied = A.detach().clone().requires_grad_()
    y = lowrank.lora_linear(x, W, tied, tied.mT, 0.7)
    (got,) = torch.autograd.grad(y.sum(), tied)
    same = torch.nn.functional.linear(x, W) + 0.7 * x @ tied.mT @ tied
    torch.testing.assert_close(got, torch.autograd.grad(same.sum(), tied)[0])


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (3,), (2, 3)], ids=str)
def test_leading_shapes(leading):
    _, W, A, B, b, lb = tensors(1, 12, 10, 3, torch.float32)
    x = torch.randn(*leading, 12, requires_grad=True)
    y = lowrank.lora_linear(x, W, A, B, 0.7, bias=b, lora_bias=lb, dropout_p=0.1)
    assert y.shape == (*leading, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert A.grad.shape == A.shape


def test_scaling_as_a_tensor():
    x, W, A, B, b, lb = tensors(12, 16, 16, 4, torch.float32)
    runs = []
    for scaling in (0.7, torch.tensor(0.7)):
        y = lowrank.lora_linear(x, W, A, B, scaling, bias=b, lora_bias=lb)
        runs.append([y, *torch.autograd.grad(y.sum(), (x, A, B, lb))])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype):
    def draw():
        x, W, A, B, b, _ = ts = tensors(33, 96, 80, 8, base_dtype, torch.float32)
        dy = torch.randn(33, 80, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            ours = lowrank.lora_linear(x, W, A, B, 0.7, bias=b)
            eager = torch.nn.functional.linear(x, W, b)
            eager = eager + torch.nn.functional.linear(torch.nn.functional.linear(x.to(A.dtype), A), B) * 0.7
        assert ours.dtype is torch.bfloat16
        oracle = grads(lambda x, W, A, B, b: formula(x, W, A, B, b, None), wide(ts[:5]), dy.double())
        return *([y, *torch.autograd.grad(y, ts[:5], dy)] for y in (ours, eager)), oracle

    in_the_mean(draw, NAMES[:6])


def test_autocast_still_on_in_backward_changes_nothing():
    x, W, A, B, _, _ = tensors(8, 16, 12, 4, torch.float32)
    y = lowrank.lora_linear(x, W, A, B)
    want = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_result_may_be_written_to():
    x, W, A, B, _, _ = tensors(2, 12, 10, 3, torch.float32)
    y = lowrank.lora_linear(x.view(1, 2, 12), W, A, B)
    y += 1  # PEFT's AdaLoRA does this
    y.sum().backward()


def test_inputs_are_never_written_to():
    ts = tensors(6, 9, 7, 4, torch.float32)
    before = [t.detach().clone() for t in ts]
    x, W, A, B, b, lb = ts
    lowrank.lora_linear(x, W, A, B, 0.7, bias=b, lora_bias=lb, dropout_p=0.3).sum().backward()
    assert all(torch.equal(t, c) for t, c in zip(ts, before, strict=True))


# which of x, W, A and B are trained: all, a plain LoRA, LoRA-FA (S is kept, x is not), W beside B, x alone, B alone
TRAINED = ["xWAB", "xAB", "xB", "WB", "x", "B"]


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives(p, trained):
    x, W, A, B, b, lb = tensors(4, 5, 3, 2, torch.float64)
    for name, t in zip("xWAB", (x, W, A, B), strict=True):
        t.requires_grad_(name in trained)

    def f(x, W, A, B, b, lb):
        torch.manual_seed(1)
        return lowrank.lora_linear(x.view(2, 2, 5), W, A, B, 0.7, bias=b, lora_bias=lb, dropout_p=p)

    assert torch.autograd.gradcheck(f, (x, W, A, B, b, lb), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x, W, A, B, b, lb), check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
@pytest.mark.parametrize("frozen_A", [False, True])
@pytest.mark.parametrize("used", [(0, 1), (1,)], ids=str)
def test_second_derivatives_of_siblings(used, frozen_A):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    sets = [tensors(4, 5, N, r, torch.float64)[1:4] for N, r in ((3, 2), (2, 1))]
    Ws, As, Bs = zip(*sets, strict=True)
    for frozen in (*Ws, *(As if frozen_A else ())):
        frozen.requires_grad_(False)

    def f(x, *factors):
        torch.manual_seed(1)
        ys = lowrank.lora_linears(x, Ws, factors[:2], factors[2:], [0.5, torch.tensor(2.0)], dropout_p=0.3)
        return [ys[i] for i in used]

    assert torch.autograd.gradgradcheck(f, (x, *As, *Bs))


def test_a_gradient_penalty_uses_the_mask_that_was_drawn():
    """Penalty and loss in one graph, in the formula's dropped x."""
    x, W, A, B, _, _ = tensors(8, 64, 5, 3, torch.float64)
    seeds = torch.tensor([99])
    keep = torch.cat([m for _, m in lowrank.ops.dropout.draw(seeds[0], 8, 64, lowrank.ops.dropout.threshold(0.5))])

    def penalty(f):
        y = f(x, W, A, B)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + dx.square().sum(), (x, W, A, B))

    want = penalty(lambda *ts: formula(*ts, None, None, keep=keep[:, :64], inv_keep=2.0))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("lowrank.ops.dropout.draw_seeds", lambda n, device: seeds)
        got = penalty(lambda *ts: lowrank.lora_linear(*ts, 0.7, dropout_p=0.5))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_differentiable_backward_is_as_right(autocast):
    """Narrow activations, wide factors and autocast: eager's dtypes, and gradients as exact."""
    names = NAMES[1:]

    def draw():
        ts = tensors(33, 40, 70, 8, torch.float32 if autocast else torch.bfloat16, torch.float32)
        dy = torch.randn(33, 70, dtype=torch.bfloat16)

        def run(f, create_graph=False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = f(*ts)
            return torch.autograd.grad(y, ts, dy, create_graph=create_graph)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            followed = run(call, True)
        assert all(out.requires_grad or name in ("db", "dlb") for name, out in zip(names, followed, strict=True))
        assert [out.dtype for out in followed] == [out.dtype for out in run(call)]
        return followed, run(formula), grads(formula, wide(ts), dy.double())[1:]

    in_the_mean(draw, names)


def test_following_is_counted_and_refused_under_strict():
    x, W, A, B, _, _ = tensors(2, 12, 10, 3, torch.float32)
    lowrank._stats.reset()
    y = lowrank.lora_linear(x, W, A, B)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert lowrank.stats()["fallback"] == {}
    with pytest.warns(UserWarning, match="create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert list(lowrank.stats()["fallback"].values()) == [1]
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match="create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with lowrank.strict(), pytest.raises(lowrank.FallbackError, match="torch"):
        torch.func.vmap(lambda x: lowrank.lora_linear(x, W, A, B))(x)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p):
    x, W, A, B, b, lb = (t.detach() for t in tensors(6, 40, 7, 4, torch.bfloat16, torch.float32))
    masks, ps, seeds = ([0], [p], torch.tensor([7])) if p else ([-1], [], None)
    forward = (x, [W], [b], [None], [A], [B], [lb], [None], [0.7], [1], masks, ps, seeds, x.dtype, A.dtype)
    torch.library.opcheck(torch.ops.lowrank.lora_linears.default, forward)
    whole = (x, W, b, A, B, lb, 0.7, None, 0.0, True, lowrank.__version__)
    torch.library.opcheck(torch.ops.lowrank.lora_linear.default, whole)
    (y,), S, keeps = torch.ops.lowrank.lora_linears.default(*forward)
    backward = ([y], x, [W], [A], [B], [None], S, keeps, [0.7], [1], masks, ps, x.dtype, A.dtype, [True] * 6)
    torch.library.opcheck(torch.ops.lowrank.lora_linears_backward.default, backward)
    needs = [True] + [True, False] * 5
    twice = ([y, None], x, [W, W], [A, A], [B, B], [None] * 2, S.repeat(1, 2), keeps, [0.7] * 2, [1, 1], masks * 2, ps)
    torch.library.opcheck(torch.ops.lowrank.lora_linears_backward.default, (*twice, x.dtype, A.dtype, needs))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compile_fullgraph(backend, p):
    sets = [tensors(6, 40, N, 4, torch.float32)[1:4] for N in (7, 9, 5)]  # nothing comes of the last
    Ws, As, Bs = map(list, zip(*sets, strict=True))

    def f(x):
        a, b, _ = lowrank.lora_linears(x, Ws, As, Bs, [0.5, 2.0, 1.0], dropout_p=p)
        return a.sin().sum(-1) + b.cos().sum(-1)

    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for M in (6, 11, 5, 9):
        x = torch.randn(M, 40, requires_grad=True)
        runs = []
        for run in (f, compiled):
            torch.manual_seed(3)
            y = run(x)
            runs.append([y, *torch.autograd.grad(y.sum(), (x, *As[:2], *Bs[:2]))])
        if backend == "inductor" and p:  # inductor draws its seeds from a stream of its own
            assert all(torch.isfinite(t).all() for t in runs[1])
        else:
            torch.testing.assert_close(*runs)
    assert counters["stats"]["unique_graphs"] == 2  # the first length, then any length


BAD = {
    "x": (dict(x=torch.ones(2, 5, dtype=torch.int64)), TypeError, "x: expected one of .* got torch.int64"),
    "x scalar": (dict(x=torch.tensor(1.0)), ValueError, r"x: expected \[..., K\]"),
    "weight shape": (dict(weight=torch.randn(7, 6)), ValueError, r"weight: expected \[N, 5\] for x \[2, 5\], got \[7, 6\]"),
    "weight dtype": (dict(weight=torch.randn(7, 5).half()), TypeError, "weight: expected x's dtype .*32, got .*16"),
    "weight type": (dict(weight=[1.0]), TypeError, "weight: expected a tensor, got list"),
    "A": (dict(lora_A=torch.randn(3, 6)), ValueError, r"lora_A: expected \[r, 5\] for x \[2, 5\], got \[3, 6\]"),
    "rank 0": (dict(lora_A=torch.randn(0, 5), lora_B=torch.randn(7, 0)), ValueError, "lora_A: the rank must be at least 1"),
    "B": (dict(lora_B=torch.randn(7, 4)), ValueError, r"lora_B: expected \[7, 3\] beside lora_A \[3, 5\], got \[7, 4\]"),
    "bias": (dict(bias=torch.randn(6)), ValueError, r"bias: expected \[7\], got \[6\]"),
    "lora_bias": (dict(lora_bias=torch.randn(7, 1)), ValueError, r"lora_bias: expected \[7\], got \[7, 1\]"),
    "nan scaling": (dict(scaling=float("nan")), ValueError, "scaling: expected a finite number, got nan"),
    "scaling type": (dict(scaling="2"), TypeError, "scaling: expected a float or a 0-d tensor, got str"),
    "scaling shape": (dict(scaling=torch.ones(2)), ValueError, r"scaling: .* got a torch.float32 tensor \[2\]"),
    "dropout": (dict(dropout_p=1.5), ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
    "device": (dict(weight=torch.randn(7, 5, device="meta")), ValueError, "weight: expected x's device cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    change, kind, message = BAD[case]
    arguments = dict(x=torch.randn(2, 5), weight=torch.randn(7, 5), lora_A=torch.randn(3, 5), lora_B=torch.randn(7, 3))
    with pytest.raises(kind, match=message):
        lowrank.lora_linear(**(arguments | change))


def test_siblings_refuse_unequal_lists():
    with pytest.raises(ValueError, match="lora_As has 1 entries; weights has 2"):
        lowrank.lora_linears(
            torch.randn(2, 5), [torch.randn(7, 5)] * 2, [torch.randn(3, 5)], [torch.randn(7, 3)] * 2, [1.0] * 2
        )


def test_meta_tensors_trace():
    x, W, A, B, _, _ = (t.to("meta") for t in tensors(6, 9, 7, 4, torch.float32))
    assert lowrank.lora_linear(x, W, A, B, dropout_p=0.1).shape == (6, 7)


FOLLOWERS = {
    "vmap": lambda f, ts: torch.func.vmap(f, (0, *[None] * 5))(ts[0], *ts[1:]),
    "jvp": lambda f, ts: torch.func.jvp(f, ts, ts)[1],
    "vjp": lambda f, ts: torch.func.vjp(f, *ts)[1](torch.ones(4, 3, dtype=torch.float64)),
    "jacrev": lambda f, ts: torch.func.jacrev(f, tuple(range(6)))(*ts),
    "jacfwd": lambda f, ts: torch.func.jacfwd(f, tuple(range(6)))(*ts),
    "hessian": lambda f, ts: torch.func.hessian(lambda *ts: f(*ts).square().sum())(*ts),
    "per sample": lambda f, ts: torch.func.vmap(
        torch.func.grad(lambda x, *ts: f(x, *ts).square().sum(), (1, 2, 3)), (0, *[None] * 5)
    )(*ts),
    "trace": lambda f, ts: torch.jit.trace(f, ts)(torch.cat([ts[0], ts[0]]), *ts[1:]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", FOLLOWERS)
def test_transforms_forward_mode_and_tracing(how):
    ts = tuple(t.detach() for t in tensors(4, 5, 3, 2, torch.float64))

    def ours(x, W, A, B, b, lb):
        return lowrank.lora_linear(x, W, A, B, 0.7, bias=b, lora_bias=lb)

    torch.testing.assert_close(FOLLOWERS[how](ours, ts), FOLLOWERS[how](formula, ts), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_gradients_batched_by_torch_func_outside_the_call():
    x, W, A, B, _, _ = tensors(4, 5, 3, 2, torch.float64)
    eye = torch.eye(12, dtype=torch.float64).view(12, 4, 3)

    def rows(y):
        return torch.func.vmap(lambda dy: torch.autograd.grad(y, (x, W, A, B), dy, retain_graph=True))(eye)

    want = rows(formula(x, W, A, B, None, None))
    torch.testing.assert_close(rows(lowrank.lora_linear(x, W, A, B, 0.7)), want, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_dropout_under_vmap_is_torchs():
    x, W, A, B, _, _ = (t.detach() for t in tensors(4, 512, 3, 2, torch.float64))

    def f(x):
        return lowrank.lora_linear(x, torch.zeros_like(W), A, B, dropout_p=0.5)

    same = x[:1].expand(4, -1)
    assert len(torch.func.vmap(f, randomness="different")(same).unique(dim=0)) == 4
    assert len(torch.func.vmap(f, randomness="same")(same).unique(dim=0)) == 1


def test_an_empty_batch_onto_a_base():
    _, _, A, B, _, _ = tensors(1, 12, 10, 3, torch.float32)
    (y,) = lora_projections(torch.empty(0, 12), (Projection(None, None, (Adapter(A, B),), torch.empty(0, 10)),))
    assert y.shape == (0, 10)
    y.sum().backward()


def test_a_scaling_tensor_of_a_narrow_dtype_loses_nothing():
    x, W, A, B, _, _ = tensors(8, 64, 32, 4, torch.float32)
    runs = []
    for scaling in (2.0, torch.tensor(2.0, dtype=torch.bfloat16)):
        torch.manual_seed(1)
        runs.append(lowrank.lora_linear(x, W, A, B, scaling, dropout_p=0.1))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


def test_nothing_to_compute_is_refused():
    for projection in (Projection(None, None, ()), Projection(None, None, (), torch.randn(2, 3))):
        with pytest.raises(ValueError, match="weight: expected a tensor"):
            lora_projections(torch.randn(2, 5), (projection,))
    with pytest.raises(ValueError, match="weight: expected"):
        lora_projections(torch.randn(2, 5), (Projection(torch.tensor(1.0), None, ()),))
