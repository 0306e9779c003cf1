import contextlib
import math

import pytest
import torch
from right import INTERPRETED, PAIRS, in_the_mean, within
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.measure.saved import SavedActivations
from lowrank.ops import dropout
from lowrank.testing import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 33, 65, 3), (7, 64, 100, 8), (33, 130, 66, 64), (133, 300, 77, 100), (256, 96, 513, 16)]
NAMES = ("y", "dx", "dA", "dB", "dm", "db")


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Under any dispatch mode the ops are called as ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def tensors(M, K, N, r, dtype, adapter_dtype=None):
    """x, A, B, magnitude and bias, and a frozen weight."""
    adapter_dtype = adapter_dtype or dtype
    x, W = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    A, B = (torch.randn(r, K) / K**0.5).to(adapter_dtype), (torch.randn(N, r) / (4 * r**0.5)).to(adapter_dtype)
    m = (W.float().norm(dim=1) * (1 + 0.1 * torch.randn(N))).to(adapter_dtype)
    return [t.requires_grad_() for t in (x, A, B, m, (torch.randn(N) / 4).to(dtype))], W


def formula(x, A, B, m, b, W, scaling=0.7, keep=None, inv_keep=1.0, base_dropout=True):
    """DoRA as PEFT writes it: the base's result, then what the adapter adds to it, then one cast."""
    result = torch.nn.functional.linear(x, W, b)
    thin = x.to(A.dtype)
    if keep is not None:
        thin = torch.where(keep, thin, 0) * inv_keep
    norm = torch.linalg.norm(W.to(thin.dtype) + scaling * (B @ A).detach().to(thin.dtype), dim=1).to(thin.dtype)
    g = (m / norm).view(1, -1)
    # the base's output has x's dtype, as without dropout; PEFT upcasts x and W to the adapters', two copies and a wider GEMM
    base = torch.nn.functional.linear(thin.to(x.dtype), W) if keep is not None and base_dropout else result - b
    lora = torch.nn.functional.linear(torch.nn.functional.linear(thin, A), B)
    return (result + (g - 1) * base + g * lora * scaling).to(x.dtype)


def call(x, A, B, m, b, W, **options):
    return lowrank.dora_linear(x, W, A, B, m, 0.7, bias=b, **options)


def run(f, leaves, W, dy, **options):
    y = f(*leaves, W, **options)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def exact(leaves, W, dy, **reference):
    return run(formula, [t.detach().double().requires_grad_() for t in leaves], W.double(), dy.double(), **reference)


def bounds(leaves, W, dy, keep=None, inv_keep=1.0, base_dropout=True):
    """f(|inputs|), over the norm of the weight that there is.  dm is a sum over base outputs, which x's dtype has rounded."""
    _, A, B, m, _ = leaves
    norm = torch.linalg.norm(W.double() + 0.7 * B.detach().double() @ A.detach().double(), dim=1)

    def upper(x, A, B, m, b, W):
        linear, dropped = torch.nn.functional.linear, x if keep is None else torch.where(keep, x, 0) * inv_keep
        gain = m / norm
        base = gain * linear(x, W)
        if keep is not None and base_dropout:
            base = linear(x, W) + (gain + 1) * linear(dropped, W)
        return base + gain * linear(linear(dropped, A), B) * 0.7 + b

    scales = run(
        upper, [t.detach().double().abs().requires_grad_() for t in leaves], W.double().abs(), dy.double().abs()
    )
    scales[NAMES.index("dm")] *= torch.finfo(dy.dtype).eps / torch.finfo(m.dtype).eps
    return scales


def compare(draw, ours, reference_of=formula, unit=None, **reference):
    def once():
        leaves, W, dy = draw()
        oracle = exact(leaves, W, dy, **reference)
        within(run(ours, leaves, W, dy), oracle, bounds(leaves, W, dy, **reference), NAMES, unit=unit)
        return run(ours, leaves, W, dy), run(reference_of, leaves, W, dy, **reference), oracle

    in_the_mean(once, NAMES)


def draws(shape, dtype, adapter_dtype):
    leaves, W = tensors(*shape, dtype, adapter_dtype)
    return leaves, W, torch.randn(shape[0], shape[2]).to(dtype)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, adapter_dtype):
    leaves, W, dy = draws(shape, dtype, adapter_dtype)
    within(run(call, leaves, W, dy), exact(leaves, W, dy), bounds(leaves, W, dy), NAMES)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
def test_as_right_as_peft(dtype, adapter_dtype):
    compare(lambda: draws((33, 130, 66, 16), dtype, adapter_dtype), call)


def kept(monkeypatch, M, K, p):
    """The mask that a call draws from now on, and its scale."""
    seeds = torch.tensor([1234567])
    monkeypatch.setattr(dropout, "draw_seeds", lambda n, device: seeds)
    keep = torch.cat([m for _, m in dropout.draw(seeds[0], M, K, dropout.threshold(p))])[:, :K]
    return dict(keep=keep, inv_keep=dropout.keep_scale(dropout.drawable(p)))


@pytest.mark.parametrize("base_dropout", [True, False])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), PAIRS, ids=str)
def test_dropout_with_the_mask_it_drew(dtype, adapter_dtype, base_dropout, monkeypatch):
    how = dict(base_dropout=base_dropout)
    compare(
        lambda: draws((33, 130, 70, 8), dtype, adapter_dtype),
        lambda *ts: call(*ts, dropout_p=0.3, **how),
        **kept(monkeypatch, 33, 130, 0.3),
        **how,
    )


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(base, p, monkeypatch):
    def draw():
        leaves, W, dy = draws((33, 96, 80, 8), base, torch.float32)
        return leaves, W, dy.bfloat16()

    def autocast(*ts):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*ts, dropout_p=p)
        assert y.dtype is torch.bfloat16
        return y

    def reference(x, *ts, **options):
        if x.dtype is torch.float64:
            return formula(x, *ts, **options)
        with torch.autocast("cpu", torch.bfloat16):
            return formula(x, *ts, **options).bfloat16()

    compare(draw, autocast, reference, torch.bfloat16, **(kept(monkeypatch, 33, 96, p) if p else {}))


@pytest.mark.parametrize("base_dropout", [True, False])
def test_everything_dropped_leaves_the_base(base_dropout):
    leaves, W = tensors(6, 40, 7, 4, torch.float32)
    x, A, B, m, b = leaves
    y, dx, dA, dB, dm, _ = run(call, leaves, W, torch.ones(6, 7), dropout_p=1.0, base_dropout=base_dropout)
    g = 1 if base_dropout else m / torch.linalg.norm(W + 0.7 * B @ A, dim=1)
    torch.testing.assert_close(y, g * (x @ W.mT) + b)
    torch.testing.assert_close(dx, (g * torch.ones(6, 7)) @ W)
    assert not dA.any()
    assert not dB.any()
    assert bool(dm.any()) != base_dropout


def test_a_unit_gain_is_the_lora_linear():
    """magnitude = the norm: PEFT's start, where DoRA is LoRA."""
    (x, A, B, _, b), W = tensors(33, 64, 48, 8, torch.float64)
    norm = torch.linalg.norm(W + 2 * B @ A, dim=1)
    torch.testing.assert_close(
        lowrank.dora_linear(x, W, A, B, norm, 2.0, bias=b), lowrank.lora_linear(x, W, A, B, 2.0, bias=b)
    )


@pytest.mark.parametrize("shape", [(65, 33, 3), (512, 300, 16), (70, 40, 100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_as_right_as_the_whole_matrix(shape, dtype):
    """Where B A cancels most of W too: what is left is small, and the norm is of that."""
    N, K, r = shape
    W, A, B = torch.randn(N, K).to(dtype), torch.randn(r, K).to(dtype), (torch.randn(N, r) / r**0.5).to(dtype)
    norm = torch.ops.lowrank.dora_norm(W, A, B.float())
    truth = torch.linalg.norm(W.double() + B.double() @ A.double(), dim=1)
    assert_within(norm, truth, truth, "norm")
    assert norm.dtype is torch.float32


def started(M, K, N, r, dtype, adapter_dtype, biased=True):
    """A layer as it starts: B = 0, and torch's own norm of the weight as the magnitude."""
    (x, A, B, _, b), W = tensors(M, K, N, r, dtype, adapter_dtype)
    m = torch.linalg.norm(W.to(adapter_dtype), dim=1).to(adapter_dtype).requires_grad_()
    return x, W, A, torch.zeros_like(B, requires_grad=True), m, b if biased else None


STARTS = PAIRS + [(torch.float32, d) for d in DTYPES[1:]]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), STARTS, ids=str)
@pytest.mark.parametrize("how", ["evaluation", "dropout", "no base dropout", "no bias", "no grad", "autocast", "op"])
def test_at_its_start_a_layer_is_the_base_bit_for_bit(dtype, adapter_dtype, how):
    x, W, A, B, m, b = started(2 * 17, 300, 70, 8, dtype, adapter_dtype, how != "no bias")
    x = x.view(2, 17, 300)
    p = 0.4 if "dropout" in how else 0.0
    with (
        torch.set_grad_enabled(how != "no grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        Seen() if how == "op" else contextlib.nullcontext(),
    ):
        base = torch.nn.functional.linear(x, W, b)
        y = lowrank.dora_linear(x, W, A, B, m, 0.7, bias=b, dropout_p=p, base_dropout=how != "no base dropout")
    assert y.dtype is base.dtype
    assert torch.equal(y, base)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), STARTS, ids=str)
@pytest.mark.parametrize("K", [33, 1000] if INTERPRETED else [33, 1000, 4099])
def test_the_norm_starts_as_torchs_and_moves_as_the_exact_one(dtype, adapter_dtype, K):
    """A constant factor of each row, within the rounding of the adapters' dtype, and exact to fp32 beside it."""
    _, W, A, B, m, _ = started(1, K, 70, 8, dtype, adapter_dtype)
    B = B.detach().float()

    def norm(B, **how):
        return torch.ops.lowrank.dora_norm(W, A, B, **how)

    start = norm(B, start=adapter_dtype)
    assert torch.equal(start, m.float())
    assert torch.equal(norm(B), norm(B, start=None))
    unit = torch.finfo(adapter_dtype).eps
    torch.testing.assert_close(start, norm(B), rtol=max(unit, 1e-5), atol=0)
    for size in (1e-6, 1e-3, 1.0, 1e3):
        B = size * torch.randn_like(B)
        truth = torch.linalg.norm(W.double() + B.double() @ A.double(), dim=1) / torch.linalg.norm(W.double(), dim=1)
        torch.testing.assert_close((norm(B, start=adapter_dtype) / start).double(), truth, rtol=2e-6, atol=0)


def test_rows_that_16_bits_cannot_give_a_norm_have_ours():
    W = torch.zeros(4, 9000, dtype=torch.float16)
    W[1], W[2], W[3, 0] = 1000, 6e-8, 1  # a norm of 9.5e4, one of 5.7e-6, one of 1
    A, B = torch.randn(2, 9000).half(), torch.zeros(4, 2)
    norm = torch.ops.lowrank.dora_norm(W, A, B, start=torch.float16)
    torch.testing.assert_close(norm.double(), W.double().norm(dim=1), rtol=5e-2, atol=0)
    B[0] = 1
    assert torch.ops.lowrank.dora_norm(W, A, B, start=torch.float16)[0] > 1


def test_a_large_bias_costs_the_magnitudes_gradient_nothing():
    """What is kept for it has the bias in it; PEFT takes it off element by element."""
    compare(lambda: large_bias(draws((33, 64, 70, 4), torch.float32, torch.float32)), call)


def large_bias(drawn):
    leaves, W, dy = drawn
    leaves[4] = (leaves[4].detach() * 100).requires_grad_()
    return leaves, W, dy


def test_rows_that_cancel_have_norm_zero_and_not_nan():
    A, B = torch.randn(3, 40), torch.randn(6, 3)
    norm = torch.ops.lowrank.dora_norm(-(B @ A), A, B)
    assert torch.isfinite(norm).all()
    assert float(norm.max()) < 0.02 * float((B @ A).norm(dim=1).min())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's own memory")
def test_nothing_of_the_weights_size_is_allocated():
    """Peak of one forward and backward: activations alone, where PEFT forms W + s B A (and the identity times A)."""
    from torch.profiler import ProfilerActivity, profile

    (x, A, B, m, b), W = tensors(8, 2048, 2048, 4, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(call, [x, A, B, m, b], W, torch.randn(8, 2048))
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    assert largest < W.numel() * 4 / 3


@pytest.mark.parametrize("needed", ["x", "A", "B", "m", "b"])
def test_only_what_needs_a_gradient_gets_one(needed):
    leaves, W = tensors(9, 40, 7, 4, torch.float32)
    for name, t in zip("xABmb", leaves, strict=True):
        t.requires_grad_(name == needed)
    y = call(*leaves, W)
    (grad,) = torch.autograd.grad(y.sum(), [t for t in leaves if t.requires_grad])
    everything, W2 = [t.detach().requires_grad_() for t in leaves], W
    full = torch.autograd.grad(call(*everything, W2).sum(), everything)
    torch.testing.assert_close(grad, full["xABmb".index(needed)])


def test_saved_for_backward():
    """x, S, v, W, the factors and, under dropout, a bit per element of x."""
    leaves, W = tensors(512, 256, 256, 8, torch.bfloat16, torch.float32)
    with SavedActivations((*leaves, W), hold=True) as saved:
        call(*leaves, W, dropout_p=0.1)
    assert saved.bytes < 512 * (2 * 256 + 4 * 8 + 256 / 8) + 5 * 4 * 256 * (8 + 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant):
    leaves, W = tensors(33, 64, 48, 8, torch.float32)
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        f = lambda *ts: call(*ts, W, dropout_p=0.4)  # noqa: E731
        y = checkpoint(f, *leaves, use_reentrant=reentrant) if checkpointed else f(*leaves)
        for t in leaves:
            t.grad = None
        y.sum().backward()
        runs.append([y, *(t.grad for t in leaves)])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_strides_leading_dims_scalars_and_empty_batches():
    leaves, W = tensors(24, 40, 33, 4, torch.float32)
    x, A, B, m, b = leaves
    y = call(*leaves, W)
    torch.testing.assert_close(call(x.view(2, 3, 4, 40), A, B, m, b, W), y.view(2, 3, 4, 33))
    torch.testing.assert_close(call(x.T.contiguous().T, A.T.contiguous().T, B.T.contiguous().T, m, b, W), y)
    wide = torch.zeros(33, 80)
    wide[:, ::2] = W
    torch.testing.assert_close(call(x, A, B, m, b, wide[:, ::2]), y)
    torch.testing.assert_close(lowrank.dora_linear(x, W, A, B, m, torch.tensor(0.7), bias=b), y)
    torch.testing.assert_close(lowrank.dora_linear(x, W, A, B, m, 0.7), y - b)
    grads = torch.autograd.grad(call(*leaves, W).sum(), leaves)  # dY of stride 0
    torch.testing.assert_close(grads, torch.autograd.grad(call(*leaves, W), leaves, torch.ones(24, 33)))
    for p in (0.0, 0.5):
        empty = torch.empty(0, 40, requires_grad=True)
        out = call(empty, A, B, m, b, W, dropout_p=p)
        assert out.shape == (0, 33)
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), [empty, *leaves[1:]]))


def test_the_callers_tensors_are_untouched_and_the_result_may_be_added_to():
    leaves, W = tensors(24, 40, 33, 4, torch.float32)
    before = [t.detach().clone() for t in (*leaves, W)]
    y = call(*leaves, W, dropout_p=0.2)
    y += 1
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, W), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(p):
    leaves, W = tensors(6, 40, 7, 4, torch.bfloat16)
    x, A, B, m, b = (t.detach() for t in leaves)
    B, gain = B.float(), m.float()
    torch.library.opcheck(torch.ops.lowrank.dora_norm.default, (W, A, B))
    torch.library.opcheck(torch.ops.lowrank.dora_norm.default, (W, A, B, torch.bfloat16))
    forward = (x, W, b, A, B, gain, p, torch.tensor([7]) if p else None, p > 0, x.dtype)
    torch.library.opcheck(torch.ops.lowrank.dora_linear.default, forward)
    y, S, v, keeps = torch.ops.lowrank.dora_linear.default(*forward)
    backward = (y, x, W, A, B, gain, S, v, keeps, p > 0, x.dtype, [True] * 5)
    torch.library.opcheck(torch.ops.lowrank.dora_linear_backward.default, backward)
    torch.library.opcheck(torch.ops.lowrank.dora_linear_backward.default, (*backward, b))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_to_one_graph_for_any_length(p):
    leaves, W = tensors(6, 40, 33, 4, torch.float32)

    def f(x):
        return call(x, *leaves[1:], W, dropout_p=p).sin()

    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for M in (6, 11, 5, 9):
        x = torch.randn(M, 40, requires_grad=True)
        runs = []
        for function in (f, compiled):
            torch.manual_seed(3)
            y = function(x)
            runs.append([y, *torch.autograd.grad(y.sum(), (x, *leaves[1:]))])
        torch.testing.assert_close(*runs)
    assert counters["stats"]["unique_graphs"] == 2  # the first length, then any length


BAD = {
    "weight": (lambda: dict(weight=torch.randn(7, 6)), ValueError, r"weight: expected \[N, 5\] for x \[2, 5\], got \[7, 6\]"),
    "trained": (lambda: dict(weight=torch.randn(7, 5, requires_grad=True)), ValueError, "weight: expected a frozen tensor"),
    "magnitude": (lambda: dict(magnitude=torch.ones(7, 1)), ValueError, r"magnitude: expected \[7\], got \[7, 1\]"),
    "no magnitude": (lambda: dict(magnitude=None), TypeError, "magnitude: expected a tensor, got NoneType"),
    "integers": (lambda: dict(magnitude=torch.ones(7).long()), TypeError, "magnitude: expected one of .*, got torch.int64"),
    "device": (lambda: dict(magnitude=torch.ones(7, device="meta")), ValueError, "magnitude: expected x's device cpu"),
    "B": (lambda: dict(lora_B=torch.randn(7, 4)), ValueError, r"lora_B: expected \[7, 3\]"),
    "scaling": (lambda: dict(scaling=math.nan), ValueError, "scaling: expected a finite number"),
    "dropout": (lambda: dict(dropout_p=-0.1), ValueError, "dropout_p: expected a probability"),
    "base_dropout": (lambda: dict(base_dropout=0.1), TypeError, "base_dropout: expected True or False, got float"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    change, kind, message = BAD[case]
    arguments = dict(
        x=torch.randn(2, 5),
        weight=torch.randn(7, 5),
        lora_A=torch.randn(3, 5),
        lora_B=torch.randn(7, 3),
        magnitude=torch.ones(7),
    )
    with pytest.raises(kind, match=message):
        lowrank.dora_linear(**arguments | change())


def constant_norm(x, A, B, m, b, W, keep=None, base_dropout=True):
    return formula(x, A, B, m, b, W, keep=keep, inv_keep=1 if keep is None else 2.0, base_dropout=base_dropout)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
@pytest.mark.parametrize("trained", ["xABmb", "xBm", "ABm", "x", "m"])
@pytest.mark.parametrize(("p", "base_dropout"), [(0.0, True), (0.5, True), (0.5, False)])
def test_second_derivatives(p, base_dropout, trained, monkeypatch):
    """The formula's, in which the norm is a constant as well; the mask is the one that was drawn."""
    leaves, W = tensors(4, 40, 6, 2, torch.float64)
    leaves = [t.requires_grad_(name in trained) for name, t in zip("xABmb", leaves, strict=True)]
    seed = torch.tensor([5])
    monkeypatch.setattr(dropout, "draw_seeds", lambda n, device: seed)
    keep = torch.cat([m for _, m in dropout.draw(seed[0], 4, 40, dropout.threshold(p))])[:, :40] if p else None

    def second(f):
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(f().sin().sum(), wanted, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    ours = second(lambda: call(*leaves, W, dropout_p=p, base_dropout=base_dropout))
    expected = second(lambda: constant_norm(*leaves, W, keep, base_dropout))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_transforms_and_forward_mode():
    leaves, W = tensors(4, 8, 6, 2, torch.float64)
    leaves = tuple(t.detach() for t in leaves)
    for how in (
        lambda f: torch.func.jvp(lambda *ts: f(*ts, W), leaves, leaves)[1],
        lambda f: torch.func.jacrev(lambda *ts: f(*ts, W), (0, 1, 2, 3, 4))(*leaves),
        lambda f: torch.func.vmap(lambda x: f(x, *leaves[1:], W))(leaves[0][:, None]),
    ):
        torch.testing.assert_close(how(call), how(constant_norm), rtol=1e-9, atol=1e-9)
