import pytest
import torch
from right import head_scales, in_the_mean, within
from torch._dynamo.utils import counters

import lowrank
from lowrank import Head


def heads(T, H, V, r, dtype, distance=1.0):
    """(the policy's hidden, weight, bias, A, B; the base's hidden, weight and bias)."""
    h, W, b = torch.randn(T, H), torch.randn(V, H) * (3 / H**0.5), torch.randn(V)
    A, B, h0 = torch.randn(r, H) / H**0.5, distance * torch.randn(V, r), h + distance * torch.randn(T, H)
    policy = [t.to(dtype).requires_grad_() for t in (h, W, b, A, B)]
    return policy, [h0.to(dtype), *(t.detach().clone() for t in policy[1:3])]


def ours(policy, base, temperature=1.0, softcap=None, **options):
    h, W, b, A, B = policy
    policy_head = Head(h, W, b, (A, B, 0.7), temperature, 1.0, softcap)
    return lowrank.kl_to(policy_head, Head(*base, None, temperature, 1.0, softcap), **options)


def sides(policy, base, temperature=1.0, softcap=None):
    """log p and log q."""
    h, W, b, A, B = policy
    z = torch.nn.functional.linear(h, W, b) + 0.7 * (h @ A.mT) @ B.mT
    log_softmaxes = []
    for one in (z, torch.nn.functional.linear(*base)):
        one = one.to(torch.promote_types(one.dtype, torch.float32))
        one = softcap * torch.tanh(one / softcap) if softcap else one
        one = one / (temperature.to(one.dtype)[..., None] if isinstance(temperature, torch.Tensor) else temperature)
        log_softmaxes.append(one.log_softmax(-1))
    return log_softmaxes


def plain(policy, base, **options):
    lp, lq = sides(policy, base, **options)
    return (lp.exp() * (lp - lq)).sum(-1)


NAMES = "kl", "hidden", "weight", "bias", "A", "B"
OPTIONS = [{}, dict(temperature=torch.linspace(0.5, 2, 9)), dict(softcap=5.0)]


def once(V, dtype, options, T=9):
    """(ours, eager, oracle, f(|inputs|))."""
    policy, base = heads(T, 16, V, 3, dtype)
    wide = [[t.detach().double().requires_grad_() for t in side] for side in (policy, base)]
    dy = torch.randn(T)
    runs = [
        [y, *torch.autograd.grad(y, leaves, dy.to(y))]
        for y, leaves in (
            (ours(policy, base, **options), policy),
            (plain(policy, base, **options), policy),
            (plain(*wide, **options), wide[0]),
        )
    ]
    # d = g p (log p − log q − KL), term by term
    lp, lq = (log_softmax.detach() for log_softmax in sides(*wide, **options))
    factor = 1 / torch.as_tensor(options.get("temperature", 1.0)).double().view(-1, 1)
    terms = lp.exp() * (lp.abs() + lq.abs())
    d = dy[:, None].double().abs() * (terms + lp.exp() * terms.sum(1, keepdim=True)) * factor
    amplified = float(factor.max()) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    z, grads = head_scales(*policy, d, amplified)
    z0, _ = head_scales(*base, None, None, d)
    largest = torch.maximum(z, z0).max(1)[0] * factor[:, 0]
    return *runs, [(1 + largest) * (1 + terms.sum(1)), *grads]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V", [1, 7, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_and_every_gradient(dtype, V, options):
    results, _, oracle, scales = once(V, dtype, options)
    within(results, oracle, scales, NAMES)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_right_as_eager(dtype, options):
    """Of the gradients: a divergence is fp32 whatever the operands, and held to its bound."""
    in_the_mean(lambda: [of[1:] for of in once(127, dtype, options)[:3]], NAMES[1:], 24)  # of A, 48 numbers each


def test_gradcheck_of_every_side_of_the_policy():
    policy, base = heads(6, 5, 7, 2, torch.float64)

    def f(*policy):
        h, *rest = policy
        return ours((h.view(2, 3, 5), *rest), (base[0].view(2, 3, 5), *base[1:]), softcap=4.0, chunk_bytes=7 * 56 * 2)

    assert torch.autograd.gradcheck(f, policy)


def test_the_same_tensors_are_exactly_zero():
    (h, W, b, _, _), _ = heads(9, 16, 127, 3, torch.bfloat16)
    same = Head(h, W, b, temperature=0.7)
    kl = lowrank.kl_to(same, same)
    assert not kl.any()
    for grad in torch.autograd.grad(kl.sum(), (h, W, b)):
        assert not grad.any()


def test_the_base_is_constant_and_a_frozen_head_costs_nothing():
    policy, base = heads(9, 16, 37, 3, torch.float32)
    base = [t.requires_grad_() for t in base]
    policy[1] = policy[1].detach()
    h, W, b, A, B = policy
    lowrank.kl_to(Head(h, W, b, (A, B, 0.7)), Head(*base)).sum().backward()
    assert W.grad is base[0].grad is base[1].grad is None
    assert all(t.grad is not None for t in (h, b, A, B))
    none = [t.detach() for t in policy]
    assert not lowrank.kl_to(Head(none[0], none[1]), Head(*base)).requires_grad


def test_small_divergences_keep_their_digits():
    policy, base = heads(9, 32, 300, 3, torch.float32, distance=1e-3)
    truth = plain(*([t.detach().double() for t in side] for side in (policy, base)))
    kl, naive = (f(policy, base).detach() for f in (ours, plain))
    assert float((kl - truth).norm()) < 0.2 * float((naive - truth).norm())


@pytest.mark.parametrize("invariant", [False, True])
def test_chunks_rows_and_leading_dims(invariant):
    policy, base = heads(12, 16, 127, 3, torch.float32)
    whole = ours(policy, base, batch_invariant=invariant)
    folded = ours(
        [policy[0].view(2, 6, 16), *policy[1:]], [base[0].view(2, 6, 16), *base[1:]], batch_invariant=invariant
    )
    assert torch.equal(folded.view(12), whole)
    some = ours(policy, base, batch_invariant=invariant, chunk_bytes=1)
    torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-6)
    alone = ours([policy[0][3:4], *policy[1:]], [base[0][3:4], *base[1:]], batch_invariant=invariant)
    assert torch.equal(alone, whole[3:4]) or not invariant
    assert torch.equal(some, whole) or not invariant
    empty = ours([policy[0][:0], *policy[1:]], [base[0][:0], *base[1:]])
    empty.sum().backward()
    assert empty.shape == (0,)


def test_opcheck():
    (h, W, b, A, B), (h0, W0, _) = heads(5, 16, 37, 3, torch.float32)
    head = [t.detach() for t in (h, W, b, A, B)]
    call = (*head, torch.rand(5) + 0.5, [0.7, 1.0, 0.5, 4.0], h0, W0, None, None, None, None, [1.0, 2.0, 1.0, 0.0])
    call = (*call, 37 * 56, False, torch.float32)
    torch.library.opcheck(torch.ops.lowrank.kl_to.default, call)
    _, stats = torch.ops.lowrank.kl_to.default(*call)
    torch.library.opcheck(
        torch.ops.lowrank.kl_to_backward.default, (torch.randn(5), stats, *call, [True, False, True, True, True])
    )


@pytest.mark.slow
def test_compiles_to_one_graph_for_any_length():
    counters.clear()
    torch._dynamo.reset()
    policy, base = heads(1, 16, 37, 3, torch.float32)

    def f(h, h0, A):
        return ours((h, policy[1].detach(), policy[2], A, policy[4]), (h0, *base[1:]))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 33):
        h, h0, A = torch.randn(2, T, 16), torch.randn(2, T, 16), policy[3]
        out, same = compiled(h, h0, A), f(h, h0, A)
        torch.testing.assert_close(out, same)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), A), torch.autograd.grad(same.sum(), A))
    assert counters["stats"]["unique_graphs"] <= 2


def test_autocast():
    policy, base = heads(9, 16, 37, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kl = ours(policy, base)
    assert kl.dtype is torch.float32
    kl.sum().backward()
    assert policy[0].grad.dtype is torch.float32
    torch.testing.assert_close(kl, ours(policy, base), rtol=0.1, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(policy=1), TypeError, "policy: expected a lowrank.Head, got int"),
        (dict(base=None), TypeError, "base: expected a lowrank.Head"),
        (
            dict(base=Head(torch.ones(3, 4), torch.ones(5, 4))),
            ValueError,
            r"base.hidden: expected policy's leading shape",
        ),
        (dict(base=Head(torch.ones(2, 4), torch.ones(6, 4))), ValueError, r"base.weight: expected policy's vocabulary"),
        (
            dict(base=Head(*(torch.ones(n, 4).double() for n in (2, 5)))),
            ValueError,
            "base.hidden: expected policy's dtype",
        ),
        (dict(base=Head(torch.ones(2, 4), torch.ones(5, 3))), ValueError, r"base.weight: expected \[V, 4\]"),
        (dict(policy=Head(torch.ones(2, 4), torch.ones(5, 4), temperature=-1)), ValueError, "policy.temperature"),
        (dict(chunk_bytes=0), ValueError, "chunk_bytes"),
    ],
)
def test_refuses(change, error, message):
    head = Head(torch.ones(2, 4), torch.ones(5, 4))
    with pytest.raises(error, match=message):
        lowrank.kl_to(**dict(policy=head, base=head) | change)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_derivatives_of_every_order():
    policy, base = heads(3, 5, 6, 2, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *policy: ours(policy, base), policy, check_batched_grad=True)
    policy = tuple(t.detach() for t in policy)
    for how in (
        lambda f: torch.func.jvp(lambda *policy: f(policy, base), policy, policy)[1],
        lambda f: torch.func.jacrev(lambda *policy: f(policy, base), (0, 1, 2, 3, 4))(*policy),
        lambda f: torch.func.vmap(lambda h, h0: f((h, *policy[1:]), [h0, *base[1:]]))(policy[0], base[0]),
    ):
        torch.testing.assert_close(how(ours), how(plain), rtol=1e-9, atol=1e-9)
