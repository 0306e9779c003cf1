"""Every entry of the registry once at toy sizes, so that the harness cannot rot:

python -m pytest bench/test_registry.py --benchmark-only --benchmark-columns=median,iqr
"""

import math
from pathlib import Path

import logprob
import pytest
import torch
from registry import REGISTRY, Options, floor_us

from lowrank.measure.layer import Problem, adapter_kinds
from lowrank.ops import dropout
from lowrank.testing import error

TOY = dict(M=32, K=64, N=96, r=4, dtype="float32", thin_dtype="float32", sets=2)
STREAMS = ("adamw", "diff_stats", "topk_mask", "delta", "fold")
CASES = [(name, p) for name, benchmark in REGISTRY.items() for p in benchmark.dropouts]


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for one in result or () for t in flat(one)] if isinstance(result, (tuple, list)) else []


def run(name, **settings):
    """(problem, inputs, {pass: {provider: [tensors of set 0]}})."""
    p = Problem(**{**TOY, **settings})
    torch.manual_seed(0)
    inputs = REGISTRY[name].make_inputs(p)
    calls = REGISTRY[name].calls(p, inputs, Options(("frozen", "lowrank", "peft")))
    return p, inputs, {mode: {n: flat(call(0)) for n, call in of.items()} for mode, of in calls.items()}


def test_the_tests_that_gate_an_entry_exist():
    tests = {test for benchmark in REGISTRY.values() for test in benchmark.tests}
    assert [test for test in sorted(tests) if not (Path(__file__).parent.parent / test).is_file()] == []


@pytest.mark.parametrize(("name", "p"), CASES)
def test_times(benchmark, name, p):
    """pytest-benchmark's own figure is of one round of every pass and provider."""
    problem = Problem(**TOY, dropout=p)
    calls = REGISTRY[name].calls(problem, REGISTRY[name].make_inputs(problem), Options(("frozen", "lowrank", "peft")))
    assert all(REGISTRY[name].baseline in of and len(of) > 1 for of in calls.values())

    def everything():
        return [call(1) for of in calls.values() for call in of.values()]

    outputs = benchmark.pedantic(everything, rounds=1, warmup_rounds=1)
    assert all(t.isfinite().all() for result in outputs for t in flat(result) if t.is_floating_point())
    for mode in calls:
        assert 0 < floor_us(REGISTRY[name], problem, mode, 1e9, 1e12) < math.inf


@pytest.mark.parametrize("name", ["lora_linear", "small", "llama_layer", "dora_linear", "experts", "experts_model"])
def test_providers_compute_the_same(name):
    pytest.importorskip("peft")
    _, _, outputs = run(name)
    for mode, of in outputs.items():
        adapted = {n: out for n, out in of.items() if not n.startswith(("frozen", "lora-"))}
        assert len(adapted) > 1
        first = next(iter(adapted.values()))
        for n, out in adapted.items():
            assert len(out) == len(first)
            for a, b in zip(out, first, strict=True):
                assert error(a, b.double()) < 1e-5, (mode, n)
        assert error(of["frozen"][0], first[0].double()) > 1e-3  # the adapters do something


def test_thin_products_are_the_formulas():
    p, inputs, shrink = run("shrink", dropout=0.1)
    t = inputs[0]
    keep = next(iter(dropout.draw(t["seeds"][0], p.M, p.K, t["cuts"][0])))[1][:, : p.K]
    assert 0 < keep.float().mean() < 1
    assert error(shrink[""]["eager"][0], (t["x"] * keep).double() @ t["A"].double().mT) < 1e-5
    p, inputs, expand = run("expand")
    t = inputs[0]
    assert error(expand[""]["eager"][0], 2 * t["S"].double() @ t["B"].double().mT) < 1e-5
    p, inputs, dy_pass = run("dy_pass")
    t = inputs[0]
    assert error(dy_pass[""]["eager"][0], 2 * t["dY"].double() @ t["B"].double()) < 1e-5
    assert error(dy_pass[""]["eager"][1], 2 * t["dY"].double().mT @ t["S"].double()) < 1e-5
    p, inputs, x_pass = run("x_pass")
    t = inputs[0]
    assert error(x_pass[""]["eager"][0], t["dS"].double().mT @ t["x"].double()) < 1e-5
    assert error(x_pass[""]["eager"][1], t["dS"].double() @ t["A"].double()) < 1e-5


def test_svf_modes_are_the_formulas():
    p, inputs, outputs = run("svf_linear")
    s = inputs[0]
    (U, S, Vh), z = s.full, s.z.detach()
    composed = (U * (S * z)) @ Vh
    added = s.W + (U * (S * (z - 1))) @ Vh
    top = s.W + (s.top.U * (s.top.S * (z[: p.r] - 1))) @ s.top.Vh
    weights = {"activation": composed, "delta": top, "delta-full": added, "merged": added, "merged-layer": added}
    for name, W in weights.items():
        y, *_ = outputs["forward"][f"lowrank-{name}"]
        assert error(y, s.x.detach().double() @ W.double().mT) < 1e-5, name
        dx, dz = outputs["backward"][f"lowrank-{name}"]
        assert error(dx, s.dY.double() @ W.double()) < 1e-5, name
        h = ((s.x @ Vh.mT) * (s.dY @ U)).sum(0) * S
        assert error(dz, (h[: len(dz)]).double().detach()) < 1e-4, name
    scale = S.sum() / (S * z).sum()
    assert error(outputs["forward"]["reference"][0], s.x.detach().double() @ (scale * composed).double().mT) < 1e-5
    _, inputs, dy = run("svf_dy")
    t = inputs[0]
    assert error(dy[""]["eager"][0], (t["dY"].double() @ t["B"].double()) * t["scales"].double()) < 1e-5
    m = t["mixed"]["mix"].double() @ t["mixed"]["scales"].double()
    assert error(dy["4 experts"]["eager"][0], (t["dY"].double() @ t["B"].double()) * m) < 1e-5
    _, inputs, weights = run("materialize")
    assert error(weights[""]["lowrank"][0], weights[""]["eager"][0].double()) < 1e-6


def test_log_probabilities_are_the_formulas():
    _, inputs, outputs = run("linear_logprob")
    s = inputs[0]
    for name, (out, *_) in outputs["forward"].items():
        if name == "gemms":
            continue
        h, W, A, B = (t.detach().double().requires_grad_() for t in s[:4])
        W = W + logprob.SCALING * B @ A if "lora" in name else W
        logp = (h @ W.mT).log_softmax(1).gather(1, s.targets[:, None])[:, 0]
        assert error(out if out.dim() else out[None], logp if out.dim() else logp.sum()[None]) < 1e-5, name
        grads = torch.autograd.grad(logp.sum(), [h, A, B] if "lora" in name else [h])
        for grad, exact in zip(outputs["both"][name][1:], grads, strict=True):
            assert error(grad, exact) < 1e-5, name
    z = s.h.detach() @ s.W.mT
    assert error(outputs["forward"]["gemms"][0], z.double()) < 1e-5
    assert error(outputs["both"]["gemms"][0], z.double() @ s.W.double()) < 1e-5


def test_addmm_adds():
    p = Problem(**TOY)
    benchmark = REGISTRY["addmm"]
    inputs = benchmark.make_inputs(p)
    x, W, Y, dY, dX = inputs[0]
    calls, before = benchmark.calls(p, inputs, Options()), (Y.clone(), dX.clone())
    calls["forward"]["addmm_"](0)
    calls["dX"]["addmm_"](0)
    assert error(Y, before[0].double() + x.double() @ W.double().mT) < 1e-5
    assert error(dX, before[1].double() + dY.double() @ W.double()) < 1e-5
    calls["forward"]["mm"](0)
    assert error(Y, x.double() @ W.double().mT) < 1e-5


def test_bytes_and_flops_as_counted_by_hand():
    """M = 8, K = 64, N = 32, r = 2; activations bf16, factors fp32.  x is 1024 bytes, W 4096, Y 512, A 512, B 256, S 64."""
    p = Problem(8, 64, 32, 2, "bfloat16", "float32", dropout=0.1)  # its keep bits: 8 rows of 2 words, 64 bytes
    passes = {name: "apply" if name == "delta" else "" if name in STREAMS else "forward" for name in REGISTRY}
    count = {name: (entry.bytes(p, passes[name]), entry.flops(p, passes[name])) for name, entry in REGISTRY.items()}
    assert count["addmm"] == (1024 + 4096 + 512, 2 * 8 * 64 * 32)
    assert count["shrink"] == (1024 + 512 + 64 + 64, 2 * 8 * 64 * 2)
    assert count["expand"] == (512 + 256 + 64, 2 * 8 * 32 * 2)
    assert count["dy_pass"] == (512 + 2 * (256 + 64), 4 * 8 * 32 * 2)
    assert count["x_pass"] == (2 * 1024 + 2 * 512 + 64 + 64, 4 * 8 * 64 * 2)
    assert count["lora_linear"] == (1024 + 4096 + 512 + 512 + 256, 2 * 8 * 64 * 32 + 2 * 8 * 2 * 96)
    linear = REGISTRY["lora_linear"]
    assert linear.bytes(p, "backward") == 2 * 1024 + 4096 + 512 + 2 * (512 + 256)
    assert linear.flops(p, "backward") == 2 * 8 * 64 * 32 + 4 * 8 * 2 * 96
    # hidden 64 (4 heads of 16, 1 key-value head), MLP 32: q, o 64x64; k, v 64x16; gate, up 64x32; down 32x64
    linears = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 32
    sides = 2 * 128 + 2 * 80 + 3 * 96
    assert count["llama_layer"][1] == 2 * 8 * (linears + 2 * sides) + 2 * 8 * 8 * 64
    assert count["llama_layer"][0] == 2 * (linears + 2 * sides + 2 * 8 * 64)
    # one dtype for the factors of the whole SVF linear: A 256 bytes, B 128, S 32
    assert count["svf_linear"] == (1024 + 4096 + 512 + 256 + 128 + 32, 2 * 8 * 64 * 32 + 2 * 8 * 2 * 96)
    assert count["svf_dy"] == (512 + 256 + 2 * 64, 2 * 8 * 32 * 2)
    # W twice (once for its norm), v written and read; backward x and dX, W, dY and v
    assert count["dora_linear"] == (
        1024 + 2 * 4096 + 3 * 512 + 512 + 256,
        2 * 8 * 64 * 32 + 2 * 8 * 2 * 96 + 2 * 64 * 32 * 2,
    )
    assert REGISTRY["dora_linear"].bytes(p, "backward") == 2 * 1024 + 4096 + 2 * 512 + 2 * (512 + 256)
    assert REGISTRY["dora_linear"].flops(p, "backward") == linear.flops(p, "backward")
    assert count["dora_norm"] == (4096 + 512 + 2 * 256, 2 * 64 * 32 * 2)  # B and B A Aᵀ in fp32
    assert count["gain_dy"] == (3 * 512 + 2 * 128, 0)  # a gain and a sum in fp32
    assert count["drop"] == (2 * 1024 + 64, 0)
    assert count["materialize"] == (2 * 4096 + 512 + 256, 2 * 64 * 32 * 2)
    adamw = REGISTRY["adamw"]  # 2048 elements: p read and written, g read, m and v read and written
    assert adamw.bytes(p, "") == 2048 * (2 + 2 + 2 + 4 * 4)
    assert adamw.bytes(p, "master") == 2048 * (6 + 16 + 8)
    assert adamw.bytes(p, "masked") == int(2048 * (6 + 0.2 * 16 + 1 / 8))
    assert count["diff_stats"] == (2 * 4096, 0)  # old and new
    assert count["topk_mask"] == (8 * 4096 + 2048 // 8, 0)  # both four times, and a bit per element
    encoded = 2048 * (0.01 * (1 + 2) + 2 / 1024)
    touched = 4096 * (1 - 0.99**16)  # sectors of 16 elements
    assert REGISTRY["delta"].bytes(p, "encode-map") == int(encoded + 2048 / 8 + touched)
    assert REGISTRY["delta"].bytes(p, "encode-old") == int(encoded + 2 * 4096)
    assert count["delta"] == (int(encoded + 2 * touched), 0)  # read and written
    assert count["fold"] == (4 * 4096, 0)  # read and written, twice

    # h 1024 bytes, W 4096, 8 targets, logp and entropy 64 bytes each; backward dlogp 32, h and W again, dh
    assert count["linear_logprob"] == (1024 + 4096 + 64 + 64, 2 * 8 * 64 * 32)
    head = REGISTRY["linear_logprob"]
    assert head.bytes(p, "both") == 1024 + 4096 + 64 + 64 + 32 + 2 * 1024 + 4096
    assert head.flops(p, "both") == 6 * 8 * 64 * 32
    assert floor_us(linear, p, "forward", copy_rate=6400, matmul_rate=1e12) == 1e6  # 6400 bytes
    assert floor_us(linear, p, "forward", copy_rate=1e12, matmul_rate=2 * 8 * 64 * 32 + 2 * 8 * 2 * 96) == 1e6


def test_kinds_of_adapters():
    assert adapter_kinds(Problem(**TOY)) == ("fp32",)
    assert adapter_kinds(Problem(**{**TOY, "dtype": "bfloat16"})) == ("16bit", "fp32", "fp32-autocast")
