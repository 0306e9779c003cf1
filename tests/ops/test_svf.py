import itertools

import pytest
import torch
from right import PAIRS, in_the_mean, within
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.ops import svf
from lowrank.svd import SVDFactors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN = (33, 130, 66, 64)
SHAPES = [(1, 8, 8, 3), (2, 33, 65, 16), (7, 64, 100, 8), MEAN, (133, 300, 77, 64), (65, 96, 40, 40)]


def factors_of(N, K, k, dtype):
    """Of a random weight with a decaying spectrum; U and Vh in ``dtype``, S fp32."""
    U, _ = torch.linalg.qr(torch.randn(N, k, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(K, k, dtype=torch.float64))
    S = torch.linspace(2, 0.1, k)
    return SVDFactors(U.to(dtype), S, V.mT.contiguous().to(dtype))


def tensors(M, K, N, k, dtype, factors_dtype=None, E=None):
    x, W = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    factors = factors_of(N, K, k, factors_dtype or dtype)
    z = 1 + 0.3 * torch.randn(*([k] if E is None else [E, k]))
    mix = None if E is None else torch.rand(M, E)
    b = (torch.randn(N) / 4).to(dtype)
    leaves = [None if t is None else t.requires_grad_() for t in (x, W, z, mix, b)]
    return leaves, factors


def dy_of(shape, dtype):
    return torch.randn(shape[0], shape[2]).to(dtype)


def formula(x, W, z, mix, b, factors, normalize=None):
    """The equation in plain PyTorch: scales in z's dtype, GEMMs in x's (or the factors', where that is wider)."""
    U, S, Vh = factors
    S = S.to(z.dtype)
    zt = z if mix is None else mix @ z
    if normalize:
        zt = zt * (S.sum() / (zt * S).sum(-1, keepdim=True))
    m = S * zt if W is None else S * (zt - 1)
    wide = torch.promote_types(x.dtype, U.dtype)
    thin = ((x.to(wide) @ Vh.to(wide).mT) * m).to(wide) @ U.to(wide).mT
    y = thin if W is None else torch.nn.functional.linear(x, W, None) + thin
    return (y + b).to(x.dtype)


def run(f, leaves, dy):
    y = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)]


def wide(leaves):
    return [None if t is None else t.detach().double().requires_grad_() for t in leaves]


def once(draw, call, plain):
    """(ours, eager, oracle, f(|inputs|)) and their names.  ``draw()`` -> (leaves, factors, dy)."""
    leaves, factors, dy = draw()
    exact = SVDFactors(*(t.double() for t in factors))
    positive = [None if t is None else t.detach().double().abs().requires_grad_() for t in leaves]
    names = ["y", *(name for name, t in zip(("dx", "dW", "dz", "dmix", "db"), leaves, strict=True) if t is not None)]
    return (
        run(lambda *ts: call(*ts, factors), leaves, dy),
        run(lambda *ts: plain(*ts, factors), leaves, dy),
        run(lambda *ts: plain(*ts, exact), wide(leaves), dy.double()),
        run(lambda *ts: upper_bound(*ts, exact), positive, dy.double().abs()),
    ), names


def bounded(draw, call, plain):
    """``call`` and ``plain`` take (leaves..., factors)."""
    (ours, _, oracle, scales), names = once(draw, call, plain)
    within(ours, oracle, scales, names, unit=ours[0].dtype)


def compare(draw, call, plain):
    """As right as eager in the mean: dz's k numbers, too, are enough in 16 draws."""
    bounded(draw, call, plain)
    _, names = once(draw, call, plain)
    in_the_mean(lambda: once(draw, call, plain)[0][:3], names)


def upper_bound(x, W, z, mix, b, factors):
    """f(|inputs|)."""
    U, S, Vh = (t.abs() for t in factors)
    y = ((x @ Vh.mT) * (S * ((z if mix is None else mix @ z) + 1))) @ U.mT + b
    return y if W is None else y + x @ W.mT


@pytest.mark.parametrize(("dtype", "factors_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("E", [None, 3])
def test_delta_forward_and_every_gradient(shape, dtype, factors_dtype, E):
    def delta(x, W, z, mix, b, f):
        return lowrank.svf_linear(x, W, f, z, bias=b, mix=mix, mode="delta")

    (compare if shape == MEAN else bounded)(
        lambda: (*tensors(*shape, dtype, factors_dtype, E), dy_of(shape, dtype)), delta, formula
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [None, 3])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("shape", [(33, 96, 70, 70), (133, 96, 24, 24)], ids=str)
def test_activation_forward_and_every_gradient(dtype, E, normalize, shape):
    def draw():
        (x, _, z, mix, b), factors = tensors(*shape, dtype, E=E)
        return (x, None, z, mix, b), factors, dy_of(shape, dtype)

    (compare if shape[0] == 33 else bounded)(
        draw,
        lambda x, W, z, mix, b, f: lowrank.svf_linear(
            x, W, f, z, bias=b, mix=mix, normalize=normalize, mode="activation"
        ),
        lambda *ts: formula(*ts, normalize=normalize),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 70])
def test_merged_forward_and_every_gradient(dtype, k):
    shape = (33, 96, 70, k)
    (compare if k == 70 else bounded)(
        lambda: (*tensors(*shape, dtype), dy_of(shape, dtype)),
        lambda x, W, z, mix, b, f: lowrank.svf_linear(x, W, f, z, bias=b, mode="merged"),
        formula,
    )


def op(x, factors, z, W=None, **options):
    return lowrank.svf_linear(x, W, factors, z, **options)


@pytest.mark.parametrize("E", [None, 3])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("mode", ["delta", "activation", "merged"])
def test_gradcheck(E, normalize, mode):
    if E and mode == "merged":
        pytest.skip("one weight for all rows")
    (x, W, z, mix, b), factors = tensors(6, 9, 7, 7, torch.float64, E=E)
    z, mix = (None if t is None else t.detach().double().requires_grad_() for t in (z, mix))
    W = None if mode == "activation" else W

    def f(x, W, z, mix, b):
        mix = None if mix is None else mix.view(2, 3, E)
        return op(x.view(2, 3, 9), factors, z, W, bias=b, mix=mix, mode=mode, normalize=normalize)

    assert torch.autograd.gradcheck(f, (x, W, z, mix, b))


@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_the_modes_are_one_function(normalize):
    torch.manual_seed(3)
    W = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    factors = SVDFactors(*torch.linalg.svd(W.detach(), full_matrices=False))
    x, z = torch.randn(11, 30, dtype=torch.float64, requires_grad=True), torch.rand(20, dtype=torch.float64) + 0.5
    z, dy = z.requires_grad_(), torch.randn(11, 20, dtype=torch.float64)
    results = []
    for weight, mode in ((W, "delta"), (W, "merged"), (W, "activation"), (None, "activation"), (None, "merged")):
        y = op(x, factors, z, weight, mode=mode, normalize=normalize)
        results.append([y, *torch.autograd.grad(y, (x, z), dy)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [None, "nuclear"])
@pytest.mark.parametrize("E", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_one_is_the_frozen_linear_bit_for_bit(dtype, normalize, E, bias):
    (x, W, *_, b), factors = tensors(133, 96, 70, 16, dtype)
    b, z, mix = b if bias else None, torch.ones(16), None
    if E:
        z, mix = torch.ones(E, 16), torch.eye(E)[torch.randint(E, (133,))]
    y = op(x, factors, z, W, bias=b, mix=mix, mode="delta", normalize=normalize)
    start = torch.zeros(133, 70, dtype=dtype) if b is None else b.detach().repeat(133, 1)
    assert torch.equal(y, start.addmm_(x.detach(), W.detach().mT))
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))


def test_under_nuclear_the_gradient_is_orthogonal_to_z():
    (x, W, z, _, b), factors = tensors(133, 96, 70, 64, torch.bfloat16)
    dy = torch.randn(133, 70).bfloat16()
    (dz,) = torch.autograd.grad(op(x, factors, z, W, bias=b, mode="delta", normalize="nuclear"), z, dy)
    assert float(abs(z @ dz) / (z.norm() * dz.norm())) < 1e-3


def test_nuclear_ignores_the_scale_of_z():
    (x, W, z, _, b), factors = tensors(33, 96, 70, 64, torch.float32)
    y, same = (op(x, factors, s * z, W, bias=b, mode="delta", normalize="nuclear") for s in (1.0, 0.52))
    torch.testing.assert_close(y, same)
    assert torch.equal(
        op(x, factors, torch.full((64,), 0.5), W, normalize="nuclear"), op(x, factors, torch.ones(64), W)
    )


@pytest.mark.parametrize("mode", ["delta", "activation"])
@pytest.mark.parametrize("normalize", [None, "nuclear"])
def test_mixing_equals_a_loop_over_rows(mode, normalize):
    (x, W, Z, mix, _), factors = tensors(24, 40, 30, 30, torch.float64, E=3)
    Z, mix, x = (t.detach().double() for t in (Z, mix, x))
    W = W.detach() if mode == "delta" else None
    options = dict(mode=mode, normalize=normalize)
    rows = torch.cat([op(x[i : i + 1], factors, mix[i] @ Z, W, **options) for i in range(24)])
    torch.testing.assert_close(op(x, factors, Z, W, mix=mix, **options), rows)
    sequences = x.view(2, 3, 4, 40)
    torch.testing.assert_close(op(sequences, factors, Z, W, mix=mix.view(2, 3, 4, 3), **options).view(24, 30), rows)
    whole = op(sequences, factors, Z, W, mix=mix[:2], **options)
    for i in range(2):
        torch.testing.assert_close(whole[i], op(sequences[i], factors, mix[i] @ Z, W, **options))
    torch.testing.assert_close(
        op(sequences, factors, Z, W, mix=mix[0], **options), op(sequences, factors, mix[0] @ Z, W, **options)
    )


def test_only_what_is_needed():
    (x, W, z, _, _), factors = tensors(33, 40, 30, 8, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = op(x, factors, z, W.detach())
    assert sorted(s for s in saved if len(s) == 2) == sorted([(30, 40), (8, 40), (30, 8), (33, 8)])  # W, A, B, S; not x
    (dz,) = torch.autograd.grad(y.sum(), z)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = op(x, factors, z.detach(), W.detach())
    assert (33, 8) not in saved
    assert dz.shape == (8,)
    x2 = x.detach()
    torch.testing.assert_close(torch.autograd.grad(op(x2, factors, z, W.detach()).sum(), z)[0], dz)


def test_delta_mode_allocates_nothing_of_the_weights_size_nor_k_by_k():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    sizes.append(t.untyped_storage().nbytes() // t.element_size())
            return out

    M, K, N, k = 24, 257, 263, 129
    (x, W, z, _, b), factors = tensors(M, K, N, k, torch.bfloat16)
    W, b = W.detach(), b.detach()
    known = {t.untyped_storage().data_ptr() for t in (x, W, z, b, *factors)}
    with Watch():
        op(x, factors, z, W, bias=b, mode="delta").sum().backward()
    assert sizes
    assert max(sizes) < min(N * K, k * k), sorted(sizes)[-3:]
    assert z.grad.shape == (k,)


@pytest.mark.parametrize("E", [None, 2])
def test_opcheck(E):
    (x, W, z, mix, b), factors = tensors(9, 24, 16, 8, torch.float32, E=E)
    scales = z.detach().contiguous()
    mix = None if mix is None else mix.detach()
    x, W, b = (t.detach() for t in (x, W, b))
    A, B = factors.Vh, factors.U
    forward = (x, W, b, None, A, B, scales, mix, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.lowrank.svf_linear.default, forward)
    needs = [True, True, True, True, E is not None]
    S = x @ A.mT
    backward = (torch.randn(9, 16), x, W, A, B, scales, mix, S, torch.float32, torch.float32, needs)
    torch.library.opcheck(torch.ops.lowrank.svf_linear_backward.default, backward)


@pytest.mark.slow
@pytest.mark.parametrize("E", [None, 2])
@pytest.mark.parametrize("mode", ["delta", "activation"])
def test_compiles_to_one_graph_for_any_length(E, mode):
    counters.clear()
    torch._dynamo.reset()
    (_, W, z, mix, b), factors = tensors(1, 24, 16, 16, torch.float32, E=E)
    z, mix = z.detach().requires_grad_(), None if mix is None else mix.detach()[0]
    f = torch.compile(
        lambda x, z: op(x, factors, z, W.detach(), bias=b, mix=mix, mode=mode, normalize="nuclear"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for T in (5, 9, 33):
        x = torch.randn(2, T, 24)
        y, same = f(x, z), op(x, factors, z, W, bias=b, mix=mix, mode=mode, normalize="nuclear")
        torch.testing.assert_close(y, same)
        dy = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, z, dy), torch.autograd.grad(same, z, dy))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    (x, W, z, _, b), factors = tensors(33, 40, 30, 8, torch.float32)
    plain = torch.autograd.grad(op(x, factors, z, W, bias=b).square().sum(), (x, z))
    y = checkpoint(lambda x, z: op(x, factors, z, W, bias=b), x, z, use_reentrant=use_reentrant)
    x.grad = z.grad = None
    y.square().sum().backward()
    torch.testing.assert_close((x.grad, z.grad), plain)


@pytest.mark.parametrize("mode", ["delta", "activation", "merged"])
def test_autocast(mode):
    (x, W, z, _, b), factors = tensors(33, 40, 30, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, factors, z, W, bias=b, mode=mode)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype is torch.float32
    truth = op(x.detach(), factors, z.detach(), W.detach(), bias=b.detach(), mode=mode)
    assert float((y - truth).norm() / truth.norm()) < 1e-2


def test_strides_leading_dims_and_empty_batches():
    (x, W, z, _, b), factors = tensors(24, 40, 30, 8, torch.float32)
    y = op(x, factors, z, W, bias=b)
    folded = x.detach().view(2, 3, 4, 40).permute(2, 0, 1, 3)
    torch.testing.assert_close(op(folded, factors, z, W, bias=b), y.view(2, 3, 4, 30).permute(2, 0, 1, 3))
    transposed = SVDFactors(factors.U.mT.contiguous().mT, factors.S, factors.Vh.mT.contiguous().mT)
    torch.testing.assert_close(op(x.detach().mT.contiguous().mT, transposed, z, W, bias=b), y)
    empty = torch.zeros(0, 5, 40, requires_grad=True)
    for E, mode in itertools.product((None, 2), ("delta", "activation")):
        if mode == "activation":
            factors = factors_of(30, 40, 30, torch.float32)
        experts = torch.ones(E, factors.S.shape[0]) if E else torch.ones(factors.S.shape[0])
        experts.requires_grad_()
        out = op(empty, factors, experts, W, mix=torch.ones(0, E) if E else None, mode=mode)
        assert out.shape == (0, 5, 30)
        out.sum().backward()
        assert torch.equal(experts.grad, torch.zeros_like(experts))


def test_the_callers_tensors_are_untouched_and_the_result_may_be_added_to():
    (x, W, z, _, b), factors = tensors(33, 40, 30, 8, torch.float32)
    before = [t.detach().clone() for t in (x, W, z, b, *factors)]
    y = op(x, factors, z, W, bias=b)
    y += 1
    y.sum().backward()
    assert all(torch.equal(t, same) for t, same in zip((x, W, z, b, *factors), before, strict=True))


def test_the_cost_rule():
    square, mlp = dict(N=4096, K=4096), dict(N=14336, K=4096)
    assert svf.cheapest(**square, k=64, rows=8192) == "delta"
    assert svf.cheapest(**mlp, k=4096, rows=8192, cached=True) == "activation"
    assert svf.cheapest(**square, k=4096, rows=1024, cached=True) == "activation"
    assert svf.cheapest(**square, k=4096, rows=16384, cached=True) == "merged"
    assert svf.cheapest(**square, k=4096, rows=16384, cached=True, mixed=True) == "activation"
    assert svf.cheapest(**square, k=4096, rows=16384, training=False) == "merged"
    assert svf.cheapest(**square, k=4096, rows=64, training=False) == "activation"


def spoilt(x, W, factors, z, mix, b):
    U, S, Vh = factors
    nan = z.detach().clone()
    nan[3] = float("nan")
    many = torch.ones(3, 8)
    return [
        (dict(x=x[:, :-1]), ValueError, r"x: expected \[..., 40\]"),
        (dict(x=x.long()), TypeError, "x: expected one of"),
        (dict(weight=W[:-1]), ValueError, r"weight: expected \[30, 40\]"),
        (dict(weight=W.double()), TypeError, "weight: expected x's dtype"),
        (dict(factors=(U, S)), TypeError, "factors: expected SVDFactors"),
        (dict(factors=SVDFactors(U[:, :-1], S, Vh)), ValueError, r"factors: expected U \[N,k\]"),
        (dict(factors=SVDFactors(U, S.clone().requires_grad_(), Vh)), ValueError, "factors.S: expected a frozen tensor"),
        (dict(factors=factors_of(30, 50, 8, x.dtype)), ValueError, "x: expected"),
        (dict(z=z[:-1]), ValueError, r"z: expected \[8\]"),
        (dict(z=z.bfloat16()), TypeError, "z: expected torch.float32"),
        (dict(z=nan), ValueError, "z: holds NaN"),
        (dict(z=many), ValueError, r"z: expected \[8\] .* need a mix"),
        (dict(z=many, mix=torch.ones(7, 3)), ValueError, r"mix: expected \[..., 3\]"),
        (dict(z=many, mix=torch.ones(33, 2)), ValueError, r"mix: expected \[..., 3\]"),
        (dict(z=many, mix=torch.ones(33, 1, 3)), ValueError, r"mix: expected \[..., 3\]"),
        (dict(mix=torch.ones(33, 1)), ValueError, r"z: expected experts \[E, 8\]"),
        (dict(z=many, mix=torch.ones(3), mode="merged"), ValueError, "mode: 'merged' is one weight"),
        (dict(mode="fast"), ValueError, "mode: expected"),
        (dict(mode="activation"), ValueError, "would lose"),
        (dict(mode="delta", weight=None), ValueError, "'delta' adds to W"),
        (dict(normalize="frobenius"), ValueError, "normalize: expected"),
        (dict(z=torch.zeros(8), normalize="nuclear"), ValueError, "divides by Σσz"),
        (dict(z=torch.stack((z.detach(), -z.detach())), mix=torch.ones(2), normalize="nuclear"), ValueError, "Σσz"),
        (dict(bias=b[:-1]), ValueError, r"bias: expected \[30\]"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(24))
def test_refuses(case):
    (x, W, z, mix, b), factors = tensors(33, 40, 30, 8, torch.float32)
    change, error, message = spoilt(x, W, factors, z, mix, b)[case]
    with pytest.raises(error, match=message):
        lowrank.svf_linear(**dict(x=x, weight=W, factors=factors, z=z, bias=b) | change)


def test_more_directions_than_the_weight_has():
    U, Vh = torch.randn(4, 6), torch.randn(6, 40)
    with pytest.raises(ValueError, match="k = 6 directions are more than"):
        op(torch.randn(3, 40), SVDFactors(U, torch.ones(6), Vh), torch.ones(6))


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
@pytest.mark.parametrize("trained", ["xz", "z", "x", "xWzb"])
@pytest.mark.parametrize("mode", ["delta", "activation", "merged", "mix"])
def test_second_derivatives(mode, trained):
    leaves, factors = tensors(3, 5, 4, 4, torch.float64, E=2 if mode == "mix" else None)
    x, W, z, mix, b = (None if t is None else t.detach().double() for t in leaves)
    named = {"x": x, "W": W, "z": z, "b": b} | ({} if mix is None else {"z": z, "mix": mix})
    ts = [t.requires_grad_(name in trained or name == "mix") for name, t in named.items()]

    def f(x, W, z, b, mix=None):
        W = None if mode == "activation" else W
        return lowrank.svf_linear(x, W, factors, z, bias=b, mix=mix, mode="delta" if mode == "mix" else mode)

    assert torch.autograd.gradgradcheck(f, ts, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_transforms_and_forward_mode():
    leaves, factors = tensors(4, 9, 7, 3, torch.float64)
    x, W, z, _, b = (None if t is None else t.detach().double() for t in leaves)

    def ours(x, z, b):
        return lowrank.svf_linear(x, W, factors, z, bias=b)

    def expected(x, z, b):
        return formula(x, W, z, None, b, factors)

    for how in (
        lambda f: torch.func.jvp(f, (x, z, b), (x, z, b))[1],
        lambda f: torch.func.jacrev(f, (0, 1, 2))(x, z, b),
        lambda f: torch.func.vmap(f, (0, None, None))(x, z, b),
        lambda f: torch.func.vmap(f, (None, 0, None))(x, torch.stack([z, 2 * z]), b),
    ):
        torch.testing.assert_close(how(ours), how(expected))
