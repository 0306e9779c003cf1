"""Every op on a CUDA device: numbers against fp64, no wait for the device, CUDA graphs, other streams, other devices, Inductor.

The table of calls and the numbers run on a CPU too, so that what waits for a GPU is known to be well formed.
"""

import contextlib
import functools
import itertools
import os
from typing import NamedTuple

import pytest
import torch
from right import in_the_mean
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import bits
from lowrank.ops import dropout
from lowrank.ops.activations import Activation
from lowrank.ops.experts_layer import Experts, experts_layer
from lowrank.ops.linear import Adapter, Projection
from lowrank.testing import DRAWS, assert_within

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("each op's own file runs on the kernels there", allow_module_level=True)

M, K, N, R, V = 257, 320, 192, 16, 1000
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


class Op(NamedTuple):
    """``shapes``: of the leaves; ``call`` and ``plain`` take them and return one tensor, ``plain`` in PyTorch."""

    shapes: tuple[tuple[int, ...], ...]
    call: object
    plain: object
    trained: tuple[int, ...]  # leaves that get a gradient


def thin(x, A, B, s=1.0):
    return (x.to(A.dtype) @ A.mT @ B.mT) * s


def dora(x, W, A, B, m):
    norm = (W.to(A.dtype) + 2 * (B @ A)).detach().norm(dim=1)
    return ((m / norm) * (linear(x, W) + thin(x, A, B, 2))).to(x.dtype)


def factors(U, S, Vh):
    return lowrank.SVDFactors(U, S.abs(), Vh)


def svf(x, W, U, S, Vh, z):
    return (linear(x, W) + (x @ Vh.mT * (S.abs() * (z - 1)).to(x.dtype)) @ U.mT).to(x.dtype)


def head(hidden, W, A, B):
    return (
        (linear(hidden, W) + thin(hidden, A, B)).float()
        if hidden.dtype is not torch.float64
        else linear(hidden, W) + thin(hidden, A, B)
    )


def targets(hidden):
    return torch.arange(hidden.shape[0], device=hidden.device) * 7 % V


def logp(hidden, W, A, B):
    return head(hidden, W, A, B).log_softmax(-1).gather(1, targets(hidden)[:, None])[:, 0]


def elsewhere(hidden):
    """The base's hidden states: of the same ones PyTorch's two GEMMs round alike, and what they round cancels."""
    return hidden.detach().roll(1, 0)


def kl(hidden, W, A, B):
    ours = head(hidden, W, A, B).log_softmax(-1)
    base_z = linear(elsewhere(hidden), W).to(torch.promote_types(hidden.dtype, torch.float32))
    return (ours.exp() * (ours - base_z.log_softmax(-1).detach())).sum(-1)


E, I = 8, 64  # noqa: E741


def routed(x):
    """Two experts of each token, never the same."""
    token = torch.arange(len(x), device=x.device)
    return torch.stack([token % E, (token + 1 + token // E % (E - 1)) % E], 1)


def stacks(W1, W2, B1, A1, B2, A2):
    """(weight [E,N,K], A [E,R,K], B [E,N,R]) of both projections, the factors in PEFT's layout."""
    for W, A, B in ((W1, A1, B1), (W2, A2, B2)):
        yield W.view(E, -1, W.shape[1]), A.view(E, R, -1), B.view(len(B), R, E).permute(2, 0, 1)


def experts(x, W1, W2, *rest):
    *factors, w = rest
    up, down = (Projection(W, None, (Adapter(A, B, 0.25),)) for W, A, B in stacks(W1, W2, *factors))
    return experts_layer(x, routed(x), w, Experts(up, down, Activation("silu")))


def plain_experts(x, W1, W2, *rest):
    *factors, w = rest
    (U, A1, B1), (D, A2, B2) = stacks(W1, W2, *factors)
    index, out = routed(x), torch.zeros_like(x)
    for e in range(E):
        token, choice = torch.where(index == e)
        gate, up = (linear(x[token], U[e]) + thin(x[token], A1[e], B1[e], 0.25)).to(x.dtype).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        z = (linear(h, D[e]) + thin(h, A2[e], B2[e], 0.25)).to(x.dtype) * w[token, choice, None]
        out = out.index_add(0, token, z)
    return out


THIN = (M, K), (N, K), (R, K), (N, R)
HEAD = (M, K), (V, K), (R, K), (V, R)
OPS = {
    "lora_linear": Op(
        THIN,
        lambda x, W, A, B: lowrank.lora_linear(x, W, A, B, 0.7),
        lambda x, W, A, B: (linear(x, W) + thin(x, A, B, 0.7)).to(x.dtype),
        (0, 1, 2, 3),
    ),
    "dora_linear": Op((*THIN, (N,)), lambda x, W, A, B, m: lowrank.dora_linear(x, W, A, B, m, 2.0), dora, (0, 2, 3, 4)),
    "svf_linear": Op(
        ((M, K), (N, K), (N, R), (R,), (R, K), (R,)),
        lambda x, W, U, S, Vh, z: lowrank.svf_linear(x, W, factors(U, S, Vh), z, mode="delta"),
        svf,
        (0, 5),
    ),
    "linear_logprob": Op(
        HEAD, lambda h, W, A, B: lowrank.linear_logprob(h, W, targets(h), lora=(A, B, 1.0)).logp, logp, (0, 2, 3)
    ),
    "linear_cross_entropy": Op(
        HEAD,
        lambda h, W, A, B: lowrank.linear_cross_entropy(h, W, targets(h), lora=(A, B, 1.0)).view(1),
        lambda *ts: -logp(*ts).mean().view(1),
        (0, 2, 3),
    ),
    "experts_layer": Op(
        ((M, K), (E * 2 * I, K), (E * K, I), (2 * I, R * E), (E * R, K), (K, R * E), (E * R, I), (M, 2)),
        experts,
        plain_experts,
        (0, 3, 4, 5, 6, 7),
    ),
    "kl_to": Op(
        HEAD,
        lambda h, W, A, B: lowrank.kl_to(lowrank.Head(h, W, lora=(A, B, 1.0)), lowrank.Head(elsewhere(h), W)),
        kl,
        (0, 2, 3),
    ),
}
FP32 = {"svf_linear": (3, 5)}  # leaves that are fp32 whatever the others are


def leaves(name, dtype, device, seed=0):
    """Rows of unit size, lora_B's of a quarter: outputs, logits too, are numbers near one, and adapters the smaller part."""
    torch.manual_seed(seed)
    op, tensors = OPS[name], []
    for i, shape in enumerate(op.shapes):
        t = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 and i else 1.0) * (0.25 if i == 3 else 1.0)
        t = t.to(device, torch.float32 if i in FP32.get(name, ()) else dtype)
        tensors.append(t.requires_grad_(i in op.trained))
    return tensors


def run(f, name, ts):
    y = f(*ts)
    dy = torch.arange(y.numel(), device=y.device).mul(12.9898).sin().view(y.shape)  # no generator: it is captured too
    return [y.detach(), *torch.autograd.grad(y, [ts[i] for i in OPS[name].trained], dy.to(y.dtype))]


def as_right(name, draw, autocast=contextlib.nullcontext, unit=None):
    """``draw(seed)`` -> leaves.  Losses and log-probabilities, sums of terms that are larger than they are, within a bound."""
    op, seeds = OPS[name], itertools.count()
    few = name not in ("lora_linear", "dora_linear", "svf_linear", "experts_layer")

    def once():
        ts = draw(next(seeds))
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in ts]
        oracle = run(op.plain, name, wide)
        with autocast():
            ours, eager = run(op.call, name, ts), run(op.plain, name, ts)
        if few:
            assert_within(ours[0], oracle[0], oracle[0].abs() + 4, name, unit=unit)
        return ours[few:], eager[few:], oracle[few:]

    names = [f"{name}[{i}]" for i in range(few, 1 + len(op.trained))]
    in_the_mean(once, names, 64 if name == "svf_linear" else 8)  # z has 16 numbers, and the others 257 rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(t, marks=gpu) for t in (torch.float16, torch.float32))], ids=str
)
@pytest.mark.parametrize("name", OPS)
def test_numbers(name, dtype, device):
    torch.set_float32_matmul_precision("highest")
    as_right(name, lambda seed: leaves(name, dtype, device, seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)], ids=str)
def test_masks_as_torch_draws_them(order, start, dtype, device):
    """A GPU's depend on dtype, strides and alignment."""
    x = torch.ones(1 + 6 * 50 * 72, dtype=dtype, device=device)[start:][: 6 * 50 * 72].view(6, 50, 72).permute(order)
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    torch.manual_seed(3)
    want, after = torch.nn.functional.dropout(x, 0.1) != 0, state()
    torch.manual_seed(3)
    keep = dropout.as_torch(x, 0.1).keep
    assert torch.equal(state(), after)
    kept = bits.unpack(keep.reshape(-1), (keep.shape[0], 32 * keep.shape[1]))[:, : x.shape[-1]]
    assert torch.equal(kept, want.reshape(kept.shape))


@gpu
@pytest.mark.parametrize("name", OPS)
def test_never_waits_for_the_device(name):
    op, ts = OPS[name], leaves(name, torch.bfloat16, "cuda")
    run(op.call, name, ts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op.call, name, ts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("name", OPS)
def test_a_graph_of_forward_and_backward_replays_with_changed_contents(name):
    op, ts = OPS[name], leaves(name, torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(op.call, name, ts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op.call, name, ts)
    for scale in (0.5, 1.5):
        with torch.no_grad():
            for i in op.trained:
                ts[i].mul_(scale)
        graph.replay()
        now = run(op.call, name, ts)
        assert all(torch.equal(a, b) for a, b in zip(captured, now, strict=True))


@gpu
@pytest.mark.parametrize("name", OPS)
def test_another_stream_and_every_bit_twice(name):
    op, ts, results = OPS[name], leaves(name, torch.bfloat16, "cuda"), []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(op.call, name, ts))
        torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", OPS)
def test_a_device_that_is_not_the_current_one(name):
    op = OPS[name]
    results = [run(op.call, name, leaves(name, torch.bfloat16, device)) for device in ("cuda:0", "cuda:1")]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(*results, strict=True))


@gpu
@pytest.mark.parametrize("name", OPS)
def test_compiled_by_inductor(name):
    op, ts = OPS[name], leaves(name, torch.float32, "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(op.call, fullgraph=True)
    torch.testing.assert_close(run(compiled, name, ts), run(op.call, name, ts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_checkpointed(name, reentrant, device):
    op, ts = OPS[name], leaves(name, torch.float32, device)
    wrapped = functools.partial(checkpoint, op.call, use_reentrant=reentrant)
    if not reentrant:
        results = run(wrapped, name, ts), run(op.call, name, ts)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        return
    grads = []  # torch.autograd.grad does not go through reentrant checkpoints
    for f in (wrapped, op.call):
        for t in ts:
            t.grad = None
        f(*ts).sum().backward()
        grads.append([ts[i].grad for i in op.trained])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_autocast(name, device):
    """fp32 in, bf16 arithmetic: as far from fp64 as PyTorch's own autocast at most."""
    bf16 = torch.bfloat16
    as_right(name, lambda seed: leaves(name, torch.float32, device, seed), lambda: torch.autocast(device, bf16), bf16)


@gpu
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 64, 100, 8), (133, 300, 77, 100), (4097, 512, 1024, 16)], ids=str)
def test_lora_linear_at_other_shapes(shape, dtype, adapter, backend, environment):
    environment.setenv("LOWRANK_BACKEND", backend)
    torch.set_float32_matmul_precision("highest")
    M, K, N, r = shape

    def draw():
        ts = [t.cuda() for t in (torch.randn(M, K), torch.randn(N, K) * K**-0.5)]
        ts = [t.to(dtype).requires_grad_() for t in ts]
        factors = torch.randn(r, K) * K**-0.5, torch.randn(N, r) * 0.25 * r**-0.5
        ts += [t.cuda().to(torch.float32 if adapter == "fp32" else dtype).requires_grad_() for t in factors]
        wide = [t.detach().double().requires_grad_() for t in ts]
        return tuple(run(OPS["lora_linear"][f], "lora_linear", of) for f, of in ((1, ts), (2, ts), (2, wide)))

    in_the_mean(draw, ("y", "dx", "dW", "dA", "dB"), DRAWS if M < 1000 else 4)


@gpu
def test_dropout_never_waits_for_the_device():
    x, W, A, B = leaves("lora_linear", torch.bfloat16, "cuda")
    lowrank.lora_linear(x, W, A, B, dropout_p=0.2).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lowrank.lora_linear(x, W, A, B, torch.tensor(0.5), dropout_p=0.2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_mask_is_the_cpus():
    """Dropout decisions are a function of the seed alone."""
    seed = torch.tensor(123456789)
    blocks = [
        torch.cat([m for _, m in dropout.draw(s, 300, 1000, dropout.threshold(0.3))]) for s in (seed, seed.cuda())
    ]
    assert torch.equal(blocks[0], blocks[1].cpu())


@gpu
def test_dropout_is_the_same_on_every_backend(environment):
    ts, runs = leaves("lora_linear", torch.float16, "cuda"), []
    for name in ("triton", "eager"):
        environment.setenv("LOWRANK_BACKEND", name)
        torch.manual_seed(1)
        runs.append(run(lambda *ts: lowrank.lora_linear(*ts, dropout_p=0.3), "lora_linear", ts))
    torch.testing.assert_close(*runs, rtol=2e-3, atol=2e-3)
