import contextlib

import pytest
import torch
from right import PAIRS, in_the_mean, within

import lowrank
from lowrank import _native
from lowrank.measure.saved import SavedActivations
from lowrank.ops._choice import forced

NAMES = ("y", "dx", "dW", "db", "dA", "dB")
# rows of each expert, K, N, r; rows behind the last expert's come last, as None
SHAPES = [
    ([3, 0, 5, 1], 0, 32, 48, 8),
    ([0, 40, 0], 0, 64, 16, 16),
    ([7, 1, 0, 0, 12], 5, 33, 65, 3),
    ([1], 0, 8, 8, 1),
    ([16, 33, 2], 4, 72, 40, 24),
    ([0, 0, 0], 6, 24, 24, 4),
    ([0, 1, 0, 1, 0, 0, 1, 0], 0, 40, 24, 5),
]


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).int()


def tensors(counts, behind, K, N, r, dtype, factors=None, grad=True):
    """x, W, b, A and B in PEFT's layout: A expert-slowest, B expert-fastest."""
    E, S, factors = len(counts), sum(counts) + behind, factors or dtype
    x, W, b = torch.randn(S, K).to(dtype), (torch.randn(E, N, K) / K**0.5).to(dtype), (torch.randn(E, N) / 4).to(dtype)
    A, B = (torch.randn(E * r, K) / K**0.5).to(factors), (torch.randn(N, r * E) / (4 * r**0.5)).to(factors)
    return [t.requires_grad_(grad) for t in (x, W, b, A, B)]


def shaped(A, B, E):
    return A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)


def call(counts, x, W, b, A, B, **options):
    return lowrank.experts_linear(x, W, *shaped(A, B, len(W)), 0.7, offsets_of(counts), bias=b, **options)


def formula(counts, x, W, b, A, B):
    """Expert by expert, as PEFT writes a linear layer in PyTorch."""
    A, B = shaped(A, B, len(W))
    parts, first = [], 0
    for e, count in enumerate(counts):
        part, first = x[first : first + count], first + count
        y = torch.nn.functional.linear(part, W[e], b[e])
        thin = torch.nn.functional.linear(part.to(A.dtype), A[e])
        parts.append((y + torch.nn.functional.linear(thin, B[e]) * 0.7).to(y.dtype))
    return torch.cat([*parts, x.new_zeros(len(x) - first, W.shape[1])])


def grads(f, counts, ts, dy):
    y = f(counts, *ts)
    found = torch.autograd.grad(y, ts, dy.to(y.dtype), allow_unused=True)
    return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(ts, found, strict=True))]


def wide(ts):
    return [t.detach().double().requires_grad_() for t in ts]


def absolutes(ts):
    return [t.detach().double().abs().requires_grad_() for t in ts]


@pytest.fixture(params=["csrc", "torch"])
def either(request):
    """Through csrc/experts_cpu.cpp, where it is built, and without it."""
    with contextlib.nullcontext() if request.param == "csrc" else forced("eager"):
        yield


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("dtype", "factors"), [*PAIRS, (torch.float64, torch.float64)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, factors):
    counts, behind, _, N, _ = shape
    ts = tensors(*shape, dtype, factors)
    dy = torch.randn(sum(counts) + behind, N).to(dtype)
    ours = grads(call, counts, ts, dy)
    within(
        ours,
        grads(formula, counts, wide(ts), dy.double()),
        grads(formula, counts, absolutes(ts), dy.double().abs()),
        NAMES,
    )
    for name, t, out in zip(NAMES[1:], ts, ours[1:], strict=True):
        assert out.dtype is t.dtype, name
        assert name not in ("dA", "dB") or 1 in t.shape or out.stride() == t.stride(), name
    assert not ours[0][sum(counts) :].any()
    assert not ours[1][sum(counts) :].any()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("dtype", "factors"), PAIRS, ids=str)
def test_as_right_as_eager(dtype, factors):
    counts, behind, K, N, r = [16, 0, 33, 2, 45], 0, 64, 72, 16

    def draw():
        ts = tensors(counts, behind, K, N, r, dtype, factors)
        dy = torch.randn(sum(counts), N).to(dtype)
        oracle = grads(formula, counts, wide(ts), dy.double())
        return grads(call, counts, ts, dy), grads(formula, counts, ts, dy), oracle

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [1, 0, 0, 1, 0, 0, 0, 0]], ids=str)
def test_without_grad_the_same(counts):
    ts = tensors(counts, 2, 40, 24, 5, torch.float32)
    with torch.no_grad():
        without = call(counts, *ts)
    torch.testing.assert_close(without, call(counts, *ts).detach())


def test_a_stack_stored_the_other_way_round():
    counts, (x, W, b, A, B) = [4, 9, 3], tensors([4, 9, 3], 0, 32, 32, 8, torch.float32)  # square: shapes say nothing
    stored = W.detach().transpose(1, 2).contiguous()
    torch.testing.assert_close(call(counts, x, stored.transpose(1, 2), b, A, B), call(counts, x, W, b, A, B))
    assert not torch.allclose(call(counts, x, stored, b, A, B), call(counts, x, W, b, A, B))


def test_several_adapters():
    counts, (x, W, b, A, B) = [4, 0, 9], tensors([4, 0, 9], 1, 32, 48, 8, torch.float32)
    _, _, _, A2, B2 = tensors([4, 0, 9], 1, 32, 48, 3, torch.float32)
    (A, B), (A2, B2) = shaped(A, B, 3), shaped(A2, B2, 3)
    y = lowrank.experts_linear(x, W, [A, A2], [B, B2], [0.7, -0.2], offsets_of(counts), bias=b)
    base = lowrank.experts_linear(x, W, [A], [B], [0.0], offsets_of(counts), bias=b)
    first = lowrank.experts_linear(x, W, A, B, 0.7, offsets_of(counts), bias=b)
    second = lowrank.experts_linear(x, W, A2, B2, -0.2, offsets_of(counts), bias=b)
    torch.testing.assert_close(y, first + second - base)
    for t in torch.autograd.grad(y.square().sum(), (A, B, A2, B2)):
        assert t.abs().sum() > 0
    alone = lowrank.experts_linear(x, W, [], [], [], offsets_of(counts), bias=b)
    torch.testing.assert_close(alone, base)


def test_dropout_follows_a_rows_own_number():
    counts, (x, W, b, A, B) = [6, 10], tensors([6, 10], 0, 64, 32, 4, torch.float32)
    W0 = torch.zeros_like(W)
    numbers = torch.randperm(16)

    def drawn(numbers, x=x):
        torch.manual_seed(7)
        return call(counts, x, W0, torch.zeros_like(b), A, B, dropout_p=0.5, numbers=numbers)

    # the same rows the other way round within an expert: the same numbers, the same masks
    swapped = torch.cat([torch.arange(6).flip(0), 6 + torch.arange(10).flip(0)])
    torch.testing.assert_close(drawn(numbers)[swapped], drawn(numbers[swapped], x[swapped]))
    assert not torch.allclose(drawn(numbers), drawn(torch.arange(16)))
    torch.testing.assert_close(drawn(None), drawn(torch.arange(16)))
    assert drawn(numbers).abs().sum() > 0
    assert not call(counts, x, W0, torch.zeros_like(b), A, B, dropout_p=1.0).any()


def test_the_gradients_with_dropout_are_the_mask_s():
    counts, (x, W, b, A, B) = [6, 0, 10], tensors([6, 0, 10], 0, 64, 32, 4, torch.float64)
    numbers = torch.randperm(16)

    def drawn(*ts):
        torch.manual_seed(7)
        return call(counts, *ts, dropout_p=0.3, numbers=numbers)

    torch.autograd.gradcheck(drawn, (x, W, b, A, B), fast_mode=True)
    torch.autograd.gradgradcheck(drawn, (x, W, b, A, B), fast_mode=True)


def test_derivatives_of_every_order():
    counts, ts = [2, 0, 3], tensors([2, 0, 3], 1, 5, 4, 2, torch.float64)
    torch.autograd.gradcheck(lambda *ts: call(counts, *ts), ts)
    torch.autograd.gradgradcheck(lambda *ts: call(counts, *ts), ts, fast_mode=True)
    (x, W, b, A, B), ends = (t.detach() for t in ts), offsets_of(counts)

    def loss(A, x=x, W=W, b=b, B=B):
        return lowrank.experts_linear(x, W, *shaped(A, B, 3), 0.7, ends, bias=b).square().sum()

    leaf = A.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(A), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weights_size(dtype):
    """A stack that dwarfs everything else: whatever is allocated is told by its size."""
    counts, K, N, r = [9, 0, 8, 3, 0, 0, 5, 7], 256, 512, 8
    x, W, b, A, B = tensors(counts, 0, K, N, r, dtype)
    W.requires_grad_(False)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            owned = {
                t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)
            }
            for t in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in owned:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Sizes():
        y = call(counts, x, W, b, A, B)
        y.sum().backward()
    assert 0 < largest < W.numel() * W.element_size() / 8
    assert x.grad.isfinite().all()
    largest = 0
    W.requires_grad_(True)
    with Sizes():
        call(counts, x, W, b, A, B).sum().backward()
    assert largest >= W.numel() * W.element_size()


def test_what_is_saved_for_backward():
    counts, K, N, r = [9, 0, 8, 3], 256, 512, 8
    x, W, b, A, B = tensors(counts, 0, K, N, r, torch.float32)
    with SavedActivations((W, b, A, B)) as saved:
        y = call(counts, x, W, b, A, B)
    assert saved.bytes <= x.nbytes + 20 * r * 4 + 4 * 4
    y.sum().backward()


def test_under_compile():
    counts, ts = [3, 0, 5, 1], tensors([3, 0, 5, 1], 0, 32, 48, 8, torch.float32)
    ends = offsets_of(counts)

    def f(x, W, b, A, B):
        return lowrank.experts_linear(x, W, *shaped(A, B, 4), 0.7, ends, bias=b)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    dy = torch.randn(9, 48)
    for ours, plain in zip(
        grads(lambda _, *ts: compiled(*ts), counts, ts, dy), grads(call, counts, ts, dy), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_opcheck():
    counts, (x, W, b, A, B) = [3, 0, 5, 1], tensors([3, 0, 5, 1], 0, 32, 48, 8, torch.float32, grad=False)
    A, B = shaped(A, B, 4)
    seeds = torch.tensor([3])
    for grad, p in ((True, 0.0), (False, 0.0), (True, 0.25)):
        arguments = (x, W, b, [A], [B], [0.7], [p], offsets_of(counts), seeds, None, True, grad, torch.float32)
        torch.library.opcheck(torch.ops.lowrank.expert_linear.default, arguments)
    _, Ss, keeps = torch.ops.lowrank.expert_linear.default(*arguments)
    dy = torch.randn(9, 48)
    rest = ([A], [B], Ss, keeps, [0.7], [0.25], offsets_of(counts), True, torch.float32, [True] * 5)
    torch.library.opcheck(torch.ops.lowrank.expert_linear_backward.default, (dy, x, W, *rest))


def test_offsets_that_are_a_column():
    counts, ts = [3, 0, 5, 1], tensors([3, 0, 5, 1], 0, 32, 48, 8, torch.float32)
    column = offsets_of(counts)[:, None].repeat(1, 2)[:, 0]
    y = lowrank.experts_linear(ts[0], ts[1], *shaped(ts[3], ts[4], 4), 0.7, column, bias=ts[2])
    torch.testing.assert_close(y, call(counts, *ts))


def test_autocast_computes_in_the_weights_dtype():
    counts, ts = [3, 0, 5, 1], tensors([3, 0, 5, 1], 0, 32, 48, 8, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(counts, ts[0].detach().float(), *ts[1:])
    assert y.dtype is torch.float32
    plain = call(counts, ts[0], ts[1], ts[2], ts[3].bfloat16(), ts[4].bfloat16())
    torch.testing.assert_close(y, plain.float())


def test_the_same_whatever_the_threads():
    """Blocks of many rows, an expert with most of them, experts with none."""
    counts = [700, 0, 3, 290, 0, 17, 1]
    ts = tensors(counts, 9, 64, 48, 8, torch.float32)
    dy, before, seen = torch.randn(sum(counts) + 9, 48), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(grads(call, counts, ts, dy))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*seen, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_ends_that_python_did_not_check_are_refused():
    x, stack, out = torch.randn(5, 8), torch.randn(2, 4, 8), torch.empty(5, 4)
    if not _native.available("cpu"):
        pytest.skip(_native.why_not("cpu"))
    for ends in ([3, 6], [4, 2], [-1, 5]):
        with pytest.raises(RuntimeError, match="ends decrease, or pass 5"):
            torch.ops.lowrank.grouped_rows_(x, stack, torch.tensor(ends, dtype=torch.int32), out)
        with pytest.raises(RuntimeError, match="ends decrease, or pass 5"):
            torch.ops.lowrank.grouped_outer_(x, x, torch.tensor(ends, dtype=torch.int32), torch.empty(2, 8, 8))
    with pytest.raises(RuntimeError, match="expected x"):
        torch.ops.lowrank.grouped_rows_(x, stack.mT, torch.tensor([2, 5], dtype=torch.int32), out)


GOOD = tensors([3, 0, 5, 1], 0, 32, 48, 8, torch.float32, grad=False)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=GOOD[0][None]), ValueError, r"x: expected \[S, K\]"),
        (dict(x=GOOD[0].bfloat16()), TypeError, "weight: expected x's dtype torch.bfloat16"),
        (dict(x="a"), TypeError, "x: expected a tensor, got str"),
        (dict(weight=GOOD[1].transpose(1, 2)), ValueError, r"weight: expected \[E, N, 32\]"),
        (dict(weight=GOOD[1][0]), ValueError, r"weight: expected \[E, N, 32\]"),
        (dict(lora_A=GOOD[3]), ValueError, r"lora_A: expected \[4, r, 32\]"),
        (dict(lora_A=GOOD[3].view(4, 8, 32)[:3]), ValueError, r"lora_A: expected \[4, r, 32\]"),
        (dict(lora_B=GOOD[4].view(48, 8, 4).permute(2, 0, 1)[:, :, :5]), ValueError, r"lora_B: expected \[4, 48, 8\]"),
        (dict(lora_B=[]), TypeError, "lora_B: expected a tensor, got list"),
        (dict(lora_A=[GOOD[3].view(4, 8, 32)], lora_B=[], scaling=[1.0]), ValueError, "lora_B: expected 1, as many as"),
        (dict(scaling=float("nan")), ValueError, "scaling: expected a finite float"),
        (dict(scaling="2"), TypeError, "scaling: expected a float"),
        (dict(offsets=torch.tensor([3, 3, 8, 9])), TypeError, "offsets: expected torch.int32, got torch.int64"),
        (dict(offsets=torch.tensor([3, 8, 9], dtype=torch.int32)), ValueError, r"offsets: expected \[4\], got \[3\]"),
        (dict(offsets=torch.tensor([3, 2, 8, 9], dtype=torch.int32)), ValueError, "offsets: expected ends that do not"),
        (
            dict(offsets=torch.tensor([3, 3, 8, 10], dtype=torch.int32)),
            ValueError,
            "offsets: expected ends that do not",
        ),
        (
            dict(offsets=torch.tensor([-1, 3, 8, 9], dtype=torch.int32)),
            ValueError,
            "offsets: expected ends that do not",
        ),
        (dict(offsets=[3, 3, 8, 9]), TypeError, "offsets: expected a tensor, got list"),
        (dict(bias=GOOD[2][:, :5]), ValueError, r"bias: expected \[4, 48\]"),
        (dict(dropout_p=1.5), ValueError, "dropout_p: expected a probability"),
        (dict(numbers=torch.arange(8)), ValueError, r"numbers: expected \[9\]"),
        (dict(numbers=torch.arange(9) + 1), ValueError, "numbers: expected 0 to 8, got 1 to 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change, error, match):
    x, W, b, A, B = GOOD
    A, B = shaped(A, B, 4)
    good = dict(x=x, weight=W, lora_A=A, lora_B=B, scaling=0.7, offsets=offsets_of([3, 0, 5, 1]), bias=b)
    with pytest.raises(error, match=match):
        lowrank.experts_linear(**{**good, **change})
