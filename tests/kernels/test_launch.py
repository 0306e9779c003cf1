"""Plans: found again for the same sizes, strides, dtypes and alignment, and for no others."""

import pytest
import torch
from thin_inputs import BF16, DEVICE, FP32, randn

from lowrank import _host, _native
from lowrank.kernels import _launch, _reduce, dy_pass, expand, shrink, thin, x_pass
from lowrank.kernels._launch import Layout, layout


def inputs(M=40, K=64, N=48, r=16, dtype=BF16):
    x, dY, dX = randn(M, K, dtype=dtype), randn(M, N, dtype=dtype), randn(M, K, dtype=dtype)
    S, dS, A, B = randn(M, r, dtype=dtype), randn(M, r, dtype=dtype), randn(r, K, dtype=dtype), randn(N, r, dtype=dtype)
    return dict(x=x, dY=dY, dX=dX, S=S, dS=dS, A=A, B=B)


def call(name, t):
    dtype = t["S"].dtype
    if name == "shrink":
        return [thin.shrink(t["x"], [t["A"]], dtype, [-1], [], None)[0]]
    if name == "expand":
        return [thin.expand(t["S"], [t["B"]], [2.0], [None], None, dtype)]
    if name == "dy_pass":
        (dS,), (dB,) = thin.dy_pass(t["dY"], [t["B"]], [2.0], [None], t["S"], [True], True, dtype)
        return [dS, dB]
    (dA,) = thin.x_pass(t["x"], [t["dS"]], [t["A"]], [True], t["dX"], [-1], [])
    return [dA, t["dX"]]


PLANS = {"shrink": shrink.plan, "expand": expand.plan_new, "dy_pass": dy_pass.plan, "x_pass": x_pass.plan}
READS = {"shrink": "xA", "expand": "SB", "dy_pass": ("dY", "S", "B"), "x_pass": ("x", "dS", "A", "dX")}


def shifted(t):
    """The same numbers at an address that is no multiple of 16, rows as far apart."""
    memory = torch.empty(t.numel() + 8, dtype=t.dtype, device=t.device)
    at = next(i for i in range(8) if (memory.data_ptr() + i * t.element_size()) % 16)
    return memory[at : at + t.numel()].view(t.shape).copy_(t)


def strided(t):
    return torch.cat([t, t], 1)[:, : t.shape[1]]


@pytest.mark.parametrize("name", PLANS)
def test_found_again_and_no_other(name):
    def new_plans(t):
        before = PLANS[name].cache_info().misses
        results = call(name, t)
        return PLANS[name].cache_info().misses - before, results

    PLANS[name].cache_clear()
    t = inputs()
    _, expected = new_plans(t)
    again, results = new_plans({k: v.clone() for k, v in t.items()})
    assert again == 0
    assert all(map(torch.equal, results, expected))
    for which in READS[name]:
        for change in (shifted, strided):
            new, results = new_plans(t | {which: change(t[which])})
            assert new == 1, (which, change)
            assert all(map(torch.equal, results, expected)), (which, change)
    assert new_plans(inputs(M=41))[0] == new_plans(inputs(r=8))[0] == new_plans(inputs(dtype=FP32))[0] == 1
    assert new_plans(t)[0] == 0


@pytest.mark.parametrize("name", PLANS)
def test_the_precision_of_matmuls_is_asked_at_every_call(name):
    t, before = inputs(dtype=FP32), torch.get_float32_matmul_precision()
    plans = PLANS[name]
    plans.cache_clear()
    try:
        for precision, new in (("highest", 1), ("high", 1), ("highest", 0)):
            torch.set_float32_matmul_precision(precision)
            misses = plans.cache_info().misses
            call(name, t)
            assert plans.cache_info().misses - misses == new
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision():
    nvidia, amd = _launch.GPU(90, 132), _launch.GPU(0, 304, hip=True)
    assert [_launch.precision("fp32", m, nvidia) for m in ("highest", "high")] == ["ieee", "tf32"]
    assert _launch.precision("same", "high", nvidia) == "ieee"
    assert [_launch.precision("split", "highest", gpu) for gpu in (nvidia, amd)] == ["tf32x3", "ieee"]


@pytest.mark.parametrize("shape", [(3, 5), (1, 4), (4, 1), (0, 4), (6,), (2, 3, 4)], ids=str)
def test_layouts_are_tensors(shape):
    t = torch.empty(shape, device=DEVICE)
    assert layout(t) == Layout.new(shape, t.dtype, t.device)
    assert layout(t).contiguous
    assert layout(t).numel == t.numel()
    if t.dim() == 2:
        assert layout(t.mT) == layout(t).mT
        assert layout(t.mT).contiguous == t.mT.is_contiguous()
        assert layout(strided(t)).contiguous == strided(t).is_contiguous()


@pytest.mark.parametrize("sizes", [(8, 4, 12), (3, 5)], ids=str)
def test_split_layouts_are_split_tensors(sizes):
    t = torch.empty(7, sum(sizes), dtype=BF16, device=DEVICE)
    assert layout(t).split(sizes) == _launch.layouts(t.split(sizes, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_the_same_bits_through_triton_and_without_it(name, monkeypatch):
    """Then on another stream, and in a CUDA graph."""
    if not _native.available("cpu"):
        pytest.skip(_native.why_not("cpu"))
    executed, execute = [], _host.launch
    monkeypatch.setattr(_host, "launch", lambda *args: executed.append(args) or execute(*args))
    for plans in (*PLANS.values(), expand.plan, _reduce.plan):
        plans.cache_clear()
    t = inputs(M=4096, K=1024, N=1024)
    expected = [r.clone() for r in call(name, t)]
    assert not executed
    assert all(map(torch.equal, call(name, t), expected))
    launches = len(executed)
    assert launches > 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(name, t)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, t)
    for result in results:
        result.zero_()
    graph.replay()
    assert all(map(torch.equal, results, expected))
    assert len(executed) == 3 * launches
