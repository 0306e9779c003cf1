import pytest
import torch
from right import INTERPRETED, head_scales, in_the_mean, within
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.ops import head, logprob_impl, mixed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN = 16, 40, 127, 8
SHAPES = [(1, 8, 1, 1), (3, 16, 2, 1), (5, 33, 7, 3), MEAN, (9, 64, 1031, 16)]  # T, H, V, r
NAMES = ("hidden", "weight", "bias", "A", "B")


def tensors(T, H, V, r, dtype, lora=None, bias=True):
    """(leaves: hidden, weight, bias, A and B, targets).  lora: the factors' dtype, None for none."""
    h, W, b = torch.randn(T, H), torch.randn(V, H) * (3 / H**0.5), torch.randn(V)
    A, B = torch.randn(r, H) / H**0.5, torch.randn(V, r)
    leaves = [h.to(dtype), W.to(dtype), b.to(dtype) if bias else None]
    leaves += [None, None] if lora is None else [A.to(lora), B.to(lora)]
    targets = torch.randint(V, (T,))
    if T > 2:
        targets[1] = -100
    return [None if t is None else t.requires_grad_() for t in leaves], targets


def ours(leaves, targets, **options):
    h, W, b, A, B = leaves
    return lowrank.linear_logprob(h, W, targets, bias=b, lora=None if A is None else (A, B, 0.7), **options)


def plain(leaves, targets, temperature=1.0, logit_scale=1.0, softcap=None):
    """The same in PyTorch: logits in the dtype of their operands, log_softmax in fp32."""
    h, W, b, A, B = leaves
    z = torch.nn.functional.linear(h, W, b)
    if A is not None:
        z = z + 0.7 * (h.to(A.dtype) @ A.mT) @ B.mT
    lp, ignored = distribution(z, temperature, logit_scale, softcap), targets == -100
    chosen = lp.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    return chosen.masked_fill(ignored, 0), -(lp.exp() * lp).sum(-1).masked_fill(ignored, 0)


def distribution(z, temperature=1.0, logit_scale=1.0, softcap=None):
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return (
        z / (temperature.to(z.dtype)[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    ).log_softmax(-1)


def run(f, leaves, targets, dlogp, dentropy, **options):
    logp, entropy = f(leaves, targets, **options)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [logp, entropy, *torch.autograd.grad((logp, entropy), wanted, (dlogp.to(logp), dentropy.to(logp)))]


def once(draw, **options):
    """(ours, eager, oracle, f(|inputs|)) and their names."""
    leaves, targets = draw()
    grads = torch.randn(targets.shape), torch.randn(targets.shape)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    names = ["logp", "entropy", *(name for name, t in zip(NAMES, leaves, strict=True) if t is not None)]
    return (
        run(ours, leaves, targets, *grads, **options),
        run(plain, leaves, targets, *grads, **options),
        run(plain, exact, targets, *grads, **options),
        scales(exact, targets, *grads, torch.finfo(leaves[0].dtype).eps, **options),
    ), names


def scales(leaves, targets, dlogp, dentropy, eps, temperature=1.0, logit_scale=1.0, **options):
    """d = g (1[v = y] − p) − g_H p (log p + H), term by term."""
    h, W, b, A, B = leaves
    z = torch.nn.functional.linear(h, W, b) + (0 if A is None else 0.7 * (h @ A.mT) @ B.mT)
    options |= dict(temperature=temperature, logit_scale=logit_scale)
    lp = distribution(z.detach(), **options)
    entropy = -(lp.exp() * lp).sum(-1, keepdim=True)
    factor = logit_scale / torch.as_tensor(temperature).double().view(-1, 1)
    d = dlogp[:, None].abs() * (lp.exp() + torch.nn.functional.one_hot(targets.clamp(0), z.shape[-1]))
    d = (d + dentropy[:, None].abs() * lp.exp() * (entropy - lp)) * factor * (targets != -100)[:, None]
    largest, grads = head_scales(*leaves, d, float(factor.max()) * torch.finfo(torch.float32).eps / eps)
    values = (largest.max(-1, keepdim=True)[0] * factor + entropy)[:, 0] + 1
    return [values, values * (1 + entropy[:, 0]), *grads]


def bounded(draw, **options):
    (ours, _, oracle, scales), names = once(draw, **options)
    within(ours, oracle, scales, names)


def compare(draw, **options):
    """As right as eager in the mean; log-probabilities and entropies, fp32 whatever the operands, are held to their bound."""
    bounded(draw, **options)
    _, names = once(draw, **options)
    in_the_mean(lambda: [of[2:] for of in once(draw, **options)[0][:3]], names[2:])


@pytest.mark.parametrize(
    ("dtype", "lora"), [(d, lora) for d in DTYPES for lora in dict.fromkeys((None, d, torch.float32))], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, lora):
    (compare if shape == MEAN else bounded)(lambda: tensors(*shape, dtype, lora))


@pytest.mark.parametrize("lora", [None, torch.bfloat16, torch.float32], ids=str)
def test_where_a_head_in_bf16_is_widened(lora, monkeypatch):
    """As on a CPU without bf16 units."""
    monkeypatch.setattr(mixed, "takes", lambda device, dtype: False)
    compare(lambda: tensors(*MEAN, torch.bfloat16, lora))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.6),
        dict(temperature=torch.linspace(0.5, 2, 16)),
        dict(logit_scale=0.25),
        dict(softcap=3.0),
        dict(softcap=30.0, logit_scale=0.5, temperature=torch.linspace(0.5, 2, 16)),
    ],
    ids=["temperature", "temperatures", "scale", "capped", "all"],
)
def test_scale_cap_and_temperature(dtype, options):
    compare(lambda: tensors(*MEAN, dtype, dtype), **options)


@pytest.mark.parametrize(
    "options",
    [{}, dict(softcap=2.0), dict(temperature=torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(2, 3))],
    ids=["plain", "capped", "temperature"],
)
def test_gradcheck(options):
    (h, W, b, A, B), targets = tensors(6, 5, 7, 2, torch.float64, torch.float64)
    targets = targets.view(2, 3)
    chunk = dict(chunk_bytes=2 * 7 * 24)  # two rows and the cap's, or three

    def f(h, W, b, A, B):
        return tuple(ours((h.view(2, 3, 5), W, b, A, B), targets, **options, **chunk))

    assert torch.autograd.gradcheck(f, (h, W, b, A, B))


@pytest.mark.parametrize("which", [0, 1])
def test_either_result_alone(which):
    leaves, targets = tensors(5, 16, 37, 3, torch.float64, torch.float64)
    dy = torch.randn(5, dtype=torch.float64)
    result, truth = ours(leaves, targets)[which], plain(leaves, targets)[which]
    for a, b in zip(torch.autograd.grad(result, leaves, dy), torch.autograd.grad(truth, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)
    # a sum hands over a gradient of strides 0
    a, b = (torch.autograd.grad(f(leaves, targets)[which].sum(), leaves) for f in (ours, plain))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_keep_their_entropy(scale):
    """All near one offset of the size ``scale``: Σ p z beside lse would leave the entropy none of its digits."""
    h, W = torch.ones(4, 1), (scale + torch.randn(257, 1)).requires_grad_()
    targets = torch.tensor([0, 5, 7, 256])
    logp, entropy = lowrank.linear_logprob(h, W, targets)
    wide = W.detach().double().requires_grad_()
    truth = plain((h.double(), wide, None, None, None), targets)
    torch.testing.assert_close(logp.double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-6, atol=0)
    got, exact = (torch.autograd.grad(e.sum(), w)[0] for e, w in ((entropy, W), (truth[1], wide)))
    assert float((got - exact).norm() / exact.norm()) < 1e-5


def test_a_peaked_row():
    """One logit 2e4 above the others: probability 1, entropy 0, gradients 0, exactly."""
    W = torch.full((300, 1), -1e4)
    W[7] = 1e4
    h = torch.ones(2, 1, requires_grad=True)
    logp, entropy = lowrank.linear_logprob(h, W, torch.tensor([7, 8]))
    assert logp.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    (dh,) = torch.autograd.grad(logp[0] + entropy.sum(), h)
    assert dh.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_vocabulary(masked):
    """A bias of −inf (or the least float) takes words away: as if they were not there, forward and backward."""
    (h, W, b, *_), targets = tensors(5, 16, 300, 1, torch.float32)
    banned = torch.zeros(300, dtype=torch.bool)
    banned[:200] = True
    banned[250] = True
    kept = (~banned).nonzero()[:, 0]
    targets = kept[torch.tensor([0, 5, 20, 3, 98])]
    few = (kept[None] == targets[:, None]).nonzero()[:, 1]
    bias = b.detach().masked_fill(banned, masked)
    dy = torch.randn(2, 5)
    result = lowrank.linear_logprob(h, W, targets, bias=bias)
    truth = lowrank.linear_logprob(h, W[kept], few, bias=b[kept])
    torch.testing.assert_close(result, truth)
    got, exact = (torch.autograd.grad(out, (h, W), list(dy)) for out in (result, truth))
    torch.testing.assert_close(got, exact)
    assert not got[1][banned].any()


def test_masked_vocabulary_by_blocks():
    """The first 4096 words and more masked: whole blocks of the kernel hold nothing but the least float."""
    V = 9000 if not INTERPRETED else 4500
    h, W = torch.randn(2, 4, requires_grad=True), torch.randn(V, 4)
    bias = torch.zeros(V)
    bias[:4200] = torch.finfo(torch.float32).min
    targets = torch.tensor([4300, V - 1])
    out = lowrank.linear_logprob(h, W, targets, bias=bias)
    torch.testing.assert_close(tuple(out), plain((h, W, bias, None, None), targets))
    (dh,) = torch.autograd.grad(sum(out).sum(), h)
    (same,) = torch.autograd.grad(sum(t.sum() for t in plain((h, W, bias, None, None), targets)), h)
    torch.testing.assert_close(dh, same)


def test_ignored_rows_are_exactly_zero_whatever_they_hold():
    leaves, targets = tensors(9, 16, 37, 3, torch.float32, torch.float32)
    targets[[1, 4]] = -100
    clean = run(ours, leaves, targets, torch.ones(9), torch.ones(9))
    spoilt = leaves[0].detach().clone()
    spoilt[[1, 4]] = float("nan")
    dirty = run(ours, [spoilt.requires_grad_(), *leaves[1:]], targets, torch.ones(9), torch.ones(9))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for t in clean[:2]:
        assert (t[[1, 4]] == 0).all()
    assert (clean[2][[1, 4]] == 0).all()
    everything = run(ours, leaves, torch.full((9,), 3), torch.ones(9), torch.ones(9), ignore_index=3)
    assert not any(t.any() for t in everything)


def test_nan_stays_in_its_row():
    (h, W, *_), targets = tensors(5, 16, 37, 3, torch.float32)
    targets[1] = 0
    h = h.detach().clone()
    h[2, 3] = float("nan")
    h.requires_grad_()
    out = lowrank.linear_logprob(h, W, targets)
    (dh,) = torch.autograd.grad(sum(out).sum(), h)
    for t in (*out, dh[:, 0]):
        assert t.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("T", [0, 1])
def test_no_row_and_one(T):
    leaves, targets = tensors(T, 16, 37, 3, torch.float64, torch.float64)
    got = run(ours, leaves, targets, torch.ones(T), torch.ones(T))
    assert got[0].shape == (T,)
    for a, b in zip(got, run(plain, leaves, targets, torch.ones(T), torch.ones(T)), strict=True):
        torch.testing.assert_close(a, b)
    h = torch.randn(16, dtype=torch.float64)  # no leading dimension at all
    out = lowrank.linear_logprob(h, leaves[1], torch.tensor(5))
    assert out.logp.shape == ()
    torch.testing.assert_close(out.logp, (leaves[1] @ h).log_softmax(0)[5])


def test_leading_dims_and_strides():
    (h, W, b, A, B), targets = tensors(12, 16, 37, 3, torch.float32, torch.float32)
    flat = ours((h, W, b, A, B), targets)
    h = h.detach()
    folded = h.view(2, 6, 16).transpose(0, 1), W, b, A, B
    out = ours(folded, targets.view(2, 6).mT)
    for a, whole in zip(out, flat, strict=True):
        torch.testing.assert_close(a, whole.view(2, 6).mT)
    strided = [t.detach().mT.contiguous().mT for t in (h, W)] + [b, *(t.detach().mT.contiguous().mT for t in (A, B))]
    for a, whole in zip(ours(strided, targets), flat, strict=True):
        torch.testing.assert_close(a, whole)
    one = h[:1].expand(12, 16)
    torch.testing.assert_close(ours((one, W, b, A, B), targets), ours((one.contiguous(), W, b, A, B), targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_change_nothing_and_identical_calls_give_identical_bits(dtype):
    leaves, targets = tensors(24, 16, 37, 3, dtype, dtype)
    grads = torch.randn(24), torch.randn(24)
    whole, again, chunked = (
        run(ours, leaves, targets, *grads, chunk_bytes=size) for size in (1 << 28, 1 << 28, 37 * 8 * 6)
    )
    for a, same, b in zip(whole, again, chunked, strict=True):
        assert torch.equal(a, same)
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype is dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_batch_invariant(dtype, lora):
    """A row has the same bits alone, among others, at another place, in other chunks and over several threads."""
    threads = torch.get_num_threads()
    T, V = 7, 150 if INTERPRETED else 33001  # from 32768 elements on a single row's sum would be split over threads
    leaves, targets = tensors(T, 33, V, 5, dtype, dtype if lora else None)
    leaves = [None if t is None else t.detach() for t in leaves]
    try:
        torch.set_num_threads(2)
        for bytes_ in (1 << 28, V * 24):
            whole = ours(leaves, targets, batch_invariant=True, chunk_bytes=bytes_)
            for rows in ([0], [3], [6, 2]):
                part = ours([leaves[0][rows], *leaves[1:]], targets[rows], batch_invariant=True)
                assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(ours(leaves, targets), whole, strict=True):
        torch.testing.assert_close(a, b)


class Watch(TorchDispatchMode):
    """The largest new tensor, in bytes, and every shape."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.shapes = 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
                self.shapes.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_logits_of_all_rows_and_no_gradient_of_a_frozen_head(dtype, softcap, monkeypatch):
    monkeypatch.setattr(head, "BLOCK_BYTES", 8192)
    T, H, V, r = 64, 24, 1031, 3
    (h, W, _, A, B), targets = tensors(T, H, V, r, dtype, dtype)
    W = W.detach()
    chunk = T * V * 4 // 8
    with Watch((h, W, A, B, targets)) as seen:
        sum(ours((h, W, None, A, B), targets, softcap=softcap, chunk_bytes=chunk)).sum().backward()
    assert 0 < seen.largest <= chunk // 2
    assert (V, H) not in seen.shapes
    assert W.grad is None
    assert h.grad is not None


def test_only_a_cpu_without_bf16_units_widens_a_head(monkeypatch):
    monkeypatch.setattr(head, "BLOCK_BYTES", 8192)
    T, H, V = 8, 24, 1031
    (h, W, *_), targets = tensors(T, H, V, 3, torch.bfloat16)
    call = (h, W, None, None, None, None, [1.0, 1.0, 1.0, 0.0], targets, -100, 1 << 28, False, torch.bfloat16)
    with torch.no_grad():
        _, _, stats = logprob_impl.forward(*call)
        with Watch(()) as seen:
            logprob_impl.backward(torch.ones(T), torch.ones(T), stats, *call, [True, False, False, False, False])
    assert (T, V) in seen.shapes
    assert ((8192 // (4 * H), H) in seen.shapes) != mixed.takes(h.device, h.dtype)


def test_only_what_is_needed():
    leaves, targets = tensors(9, 16, 37, 3, torch.float64, torch.float64)
    h, W, b, A, B = (t.detach() for t in leaves)
    every = run(plain, leaves, targets, torch.ones(9), torch.zeros(9))[2:]
    saved = []
    for i, t in enumerate((h, W, b, A, B)):
        some = [h, W, b, A, B]
        some[i] = t.clone().requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            logp, _ = ours(some, targets)
        assert sorted(saved) == sorted([3 * 9, 9, *(t.numel() for t in some)])  # max, ℓ, Ē, targets and what came in
        torch.testing.assert_close(torch.autograd.grad(logp.sum(), some[i])[0], every[i])
    assert not ours((h, W, b, A, B), targets).logp.requires_grad


def test_opcheck():
    (h, W, b, A, B), targets = tensors(5, 16, 37, 3, torch.float32, torch.float32)
    head = [t.detach() for t in (h, W, b, A, B)]
    call = (*head, torch.rand(5) + 0.5, [0.7, 1.0, 0.5, 4.0], targets, -100, 37 * 24, False, torch.float32)
    torch.library.opcheck(torch.ops.lowrank.linear_logprob.default, call)
    _, _, stats = torch.ops.lowrank.linear_logprob.default(*call)
    for needs in ([True] * 5, [True, False, False, True, True]):
        torch.library.opcheck(
            torch.ops.lowrank.linear_logprob_backward.default, (torch.randn(5), torch.randn(5), stats, *call, needs)
        )


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [False, True])
def test_compiles_to_one_graph_for_any_length(per_row):
    counters.clear()
    torch._dynamo.reset()
    (_, W, b, A, B), _ = tensors(1, 16, 37, 3, torch.float32, torch.float32)

    def f(h, A, targets, temperature):
        return ours((h, W.detach(), b, A, B), targets, temperature=temperature if per_row else 0.5)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 33):
        h, targets, temperature = torch.randn(2, T, 16), torch.randint(37, (2, T)), torch.rand(2, T) + 0.5
        out, same = compiled(h, A, targets, temperature), f(h, A, targets, temperature)
        torch.testing.assert_close(out, same)
        dy = [torch.randn(2, T), torch.randn(2, T)]
        torch.testing.assert_close(torch.autograd.grad(out, A, dy), torch.autograd.grad(same, A, dy))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    (h, W, *_), targets = tensors(9, 16, 37, 3, torch.float32)
    truth = torch.autograd.grad(sum(lowrank.linear_logprob(h, W, targets)).sum(), (h, W))
    out = checkpoint(lambda h, W: sum(lowrank.linear_logprob(h, W, targets)), h, W, use_reentrant=use_reentrant)
    out.sum().backward()
    torch.testing.assert_close((h.grad, W.grad), truth)


def test_autocast():
    (h, W, b, A, B), targets = tensors(9, 16, 37, 3, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = ours((h, W, b, A, B), targets)
    assert logp.dtype is entropy.dtype is torch.float32
    (logp + entropy).sum().backward()
    assert h.grad.dtype is W.grad.dtype is torch.float32
    rounded = [t.detach().bfloat16() for t in (h, W)]
    torch.testing.assert_close(
        logp, ours((*rounded, b.bfloat16().float().bfloat16(), A, B), targets).logp, rtol=1e-2, atol=1e-2
    )


def test_arguments_stay_as_they_are():
    leaves, targets = tensors(9, 16, 37, 3, torch.float32, torch.float32)
    temperature = torch.rand(9) + 0.5
    everything = (*leaves, targets, temperature)
    before = [t.detach().clone() for t in everything]
    sum(ours(leaves, targets, temperature=temperature, softcap=3.0)).sum().backward()
    assert all(torch.equal(t, same) for t, same in zip(everything, before, strict=True))


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, logit_scale=1.3, softcap=2.0)], ids=str)
def test_second_derivatives(options):
    leaves, targets = tensors(4, 5, 6, 2, torch.float64, torch.float64)

    def f(*leaves):
        return tuple(ours(leaves, targets, **options))

    assert torch.autograd.gradgradcheck(f, leaves, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:lowrank runs some calls in PyTorch")
def test_transforms_and_forward_mode():
    leaves, targets = tensors(4, 5, 6, 2, torch.float64, torch.float64)
    leaves = tuple(t.detach() for t in leaves)
    for how in (
        lambda f: torch.func.jvp(lambda *ts: tuple(f(ts, targets)), leaves, leaves)[1],
        lambda f: torch.func.jacrev(lambda *ts: tuple(f(ts, targets)), (0, 1, 2, 3, 4))(*leaves),
        lambda f: torch.func.vmap(lambda h, y: tuple(f((h, *leaves[1:]), y)))(leaves[0], targets),
    ):
        torch.testing.assert_close(how(ours), how(plain), rtol=1e-9, atol=1e-9)


def bad(h, W, b, A, B, y):
    wrong, t = y.clone(), torch.ones(2, 3)
    wrong[1, 2] = 37
    return [
        (dict(hidden=h.long()), TypeError, "hidden: expected one of"),
        (dict(hidden=h[..., :-1]), ValueError, r"weight: expected \[V, 15\]"),
        (dict(hidden=None), TypeError, "hidden: expected a tensor, got NoneType"),
        (dict(hidden=h[..., :0], weight=W[:, :0]), ValueError, r"hidden: expected \[..., H\]"),
        (dict(weight=W.bfloat16()), TypeError, "weight: expected hidden's dtype"),
        (dict(weight=W[:0]), ValueError, "weight: expected"),
        (dict(targets=y.int()), TypeError, "targets: expected an int64 tensor"),
        (dict(targets=y[0]), ValueError, r"targets: expected \[2, 3\]"),
        (dict(targets=wrong), ValueError, r"targets: expected 0 <= target < 37 or -100, got 37 at \[1, 2\]"),
        (dict(targets=wrong - 38), ValueError, "targets: expected 0 <= target"),
        (dict(bias=b[:-1]), ValueError, r"bias: expected \[37\]"),
        (dict(lora=(A, B)), TypeError, r"lora: expected \(A, B, scaling\)"),
        (dict(lora=(A[:, :-1], B, 1.0)), ValueError, r"lora\[0\]: expected A \[r, 16\]"),
        (dict(lora=(A, B[:-1], 1.0)), ValueError, r"lora\[1\]: expected B \[37, 3\]"),
        (dict(lora=(A, B, torch.tensor(1.0))), TypeError, r"lora\[2\]: expected a number"),
        (dict(lora=(A, B, float("nan"))), ValueError, r"lora\[2\]: expected a finite number"),
        (dict(temperature=0.0), ValueError, "temperature: expected a positive number"),
        (dict(temperature="hot"), TypeError, "temperature: expected a number"),
        (dict(temperature=t[0]), ValueError, r"temperature: expected a number or a tensor \[2, 3\]"),
        (dict(temperature=t * 0), ValueError, "temperature: expected positive numbers"),
        (dict(temperature=t.requires_grad_()), ValueError, "without grad"),
        (dict(softcap=-1.0), ValueError, "softcap: expected a positive number"),
        (dict(logit_scale=float("inf")), ValueError, "logit_scale: expected a finite number"),
        (dict(ignore_index=1.5), TypeError, "ignore_index: expected an integer"),
        (dict(chunk_bytes=0), ValueError, "chunk_bytes: expected a positive integer"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(25))
def test_refuses(case):
    (h, W, b, A, B), y = tensors(6, 16, 37, 3, torch.float32, torch.float32)
    change, error, message = bad(h.detach().view(2, 3, 16), W, b, A, B, y.clamp(0).view(2, 3))[case]
    arguments = dict(hidden=h.view(2, 3, 16), weight=W, targets=y.view(2, 3), bias=b, lora=(A, B, 0.5)) | change
    with pytest.raises(error, match=message):
        lowrank.linear_logprob(**arguments)


def test_debug_checks_is_a_switch_and_a_context():
    from lowrank.ops import _debug

    meta = torch.empty(2, device="meta")
    assert _debug.may_look(torch.empty(2))
    with lowrank.debug_checks():
        assert _debug.debug_checks.enabled
        assert not _debug.may_look(meta)
    assert not _debug.debug_checks.enabled
    lowrank.debug_checks()
    assert _debug.debug_checks.enabled
    lowrank.debug_checks(False)
    assert not _debug.debug_checks.enabled


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_bad_targets_give_nan():
    (h, W, b, A, B), targets = tensors(9, 16, 37, 3, torch.bfloat16, torch.bfloat16)
    leaves = [t.detach().cuda().requires_grad_() for t in (h, W, b, A, B)]
    targets[3] = 37
    targets = targets.cuda()
    ours(leaves, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logp, entropy = ours(leaves, targets)
        grads = torch.autograd.grad((logp + entropy).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logp.isnan().nonzero().tolist() == [[3]]
    assert not grads[0][3].any()
    assert all(g.isfinite().all() for g in grads)
    with lowrank.debug_checks(), pytest.raises(ValueError, match=r"got 37 at \[3\]"):
        ours(leaves, targets)
