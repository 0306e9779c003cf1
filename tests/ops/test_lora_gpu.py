"""The op on a CUDA device, on both backends: numbers against fp64, no host synchronisation, CUDA graphs, streams.  Skipped
without one.
"""

import pytest
import torch

import lowrank
from lowrank.testing import assert_as_right

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "eager"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("LOWRANK_BACKEND", request.param)


def inputs(M, K, N, r, dtype, adapter_dtype):
    def randn(*shape, dtype, scale=1.0):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()

    x, W = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, scale=K**-0.5)
    A, B = randn(r, K, dtype=adapter_dtype, scale=K**-0.5), randn(N, r, dtype=adapter_dtype, scale=0.25 * r**-0.5)
    return [x, W, A, B]


def formula(x, W, A, B):
    y = torch.nn.functional.linear(x, W)
    return (y + x.to(A.dtype) @ A.mT @ B.mT * 0.7).to(y.dtype)


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 64, 100, 8), (133, 300, 77, 100), (4097, 512, 1024, 16)], ids=str)
def test_forward_and_every_gradient(shape, dtype, adapter):
    torch.backends.cuda.matmul.allow_tf32 = False
    ts = inputs(*shape, dtype, torch.float32 if adapter == "fp32" else dtype)
    dy = torch.randn(shape[0], shape[2], device="cuda", dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in ts]
    runs = []
    for f, tensors, grad in (
        (lambda *ts: lowrank.lora_linear(*ts, 0.7), ts, dy),
        (formula, ts, dy),
        (formula, wide, dy.double()),
    ):
        y = f(*tensors)
        runs.append([y, *torch.autograd.grad(y, tensors, grad)])
    for name, ours, eager, oracle in zip(("y", "dx", "dW", "dA", "dB"), *runs, strict=True):
        assert_as_right(ours, eager, oracle, None, name)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_never_waits_for_the_device(p):
    x, W, A, B = inputs(64, 128, 96, 8, torch.bfloat16, torch.float32)
    lowrank.lora_linear(x, W, A, B, dropout_p=p).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lowrank.lora_linear(x, W, A, B, torch.tensor(0.5), dropout_p=p).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_with_changed_contents():
    x, W, A, B = (t.detach() for t in inputs(64, 128, 96, 8, torch.bfloat16, torch.float32))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        lowrank.lora_linear(x, W, A, B)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lowrank.lora_linear(x, W, A, B)
    for _ in range(2):
        x.normal_()
        B.normal_()
        graph.replay()
        assert torch.equal(y, lowrank.lora_linear(x, W, A, B))


def test_the_mask_is_the_cpus():
    """Dropout decisions are a function of the seed alone."""
    from lowrank.ops import dropout

    seed = torch.tensor(123456789)
    blocks = [
        torch.cat([m for _, m in dropout.draw(s, 300, 1000, dropout.threshold(0.3))]) for s in (seed, seed.cuda())
    ]
    assert torch.equal(blocks[0], blocks[1].cpu())


def test_dropout_is_the_same_on_every_backend(monkeypatch):
    x, W, A, B = inputs(300, 200, 96, 8, torch.float16, torch.float32)
    runs = []
    for name in ("triton", "eager"):
        monkeypatch.setenv("LOWRANK_BACKEND", name)
        torch.manual_seed(1)
        y = lowrank.lora_linear(x, W, A, B, dropout_p=0.3)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), (x, A, B))])
    torch.testing.assert_close(*runs, rtol=2e-3, atol=2e-3)


def test_another_stream_and_every_bit_twice():
    x, W, A, B = inputs(4097, 512, 1024, 16, torch.bfloat16, torch.float32)
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = lowrank.lora_linear(x, W, A, B)
            runs.append([y, *torch.autograd.grad(y.sum(), (x, A, B))])
        torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
