import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from right import in_the_mean, within

from lowrank import _native, _stats, bits
from lowrank._stats import FallbackError, stats, strict
from lowrank.ops.materialize import materialize, materialize_with_report

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(w, f) for w in (BF16, FP16, FP32) for f in (BF16, FP16, FP32)]  # weight, factors
SHAPES = [(1, 1), (3, 7), (64, 256), (65, 257), (130, 72), (33, 520), (257, 1031)]
RANKS = [1, 3, 16, 64, 65, 300]
needs_native = pytest.mark.skipif(not _native.available("cpu"), reason=str(_native.why_not("cpu")))
ISAS = ["baseline", "avx2", "avx512"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/kernels/ has the many shapes of r > 64 there


def shapes(r):
    return SHAPES[1:3] if INTERPRETED and r > 64 else SHAPES


def randn(*size, dtype=FP32):
    return torch.randn(*size).to(dtype)


def inputs(N, K, r, dtype, factors, scale=0.1):
    return randn(N, K, dtype=dtype), randn(r, K, dtype=factors), randn(r) * scale, randn(N, r, dtype=factors)


def oracle(W, A, m, B):
    return W.double() + (B.double() * m.double()) @ A.double()


def eager(W, A, m, B):
    return (W.float() + (B.float() * m) @ A.float()).to(W.dtype)


def poisoned(W):
    return torch.full_like(W, float("nan"), memory_format=torch.contiguous_format)


def raw(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return a.dtype is b.dtype and torch.equal(raw(a), raw(b))


def fma(a, b, c):
    """fp32 a * b + c rounded once: the product is exact in fp64, the sum is rounded to odd there, then to fp32."""
    p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + c
    lost = (p - (s - (s - p))) + (c - (s - p))  # TwoSum
    odd = (s.view(np.int64) & 1).astype(bool)
    s = np.where((lost != 0) & ~odd, np.nextafter(s, np.where(lost > 0, np.inf, -np.inf)), s)
    return s.astype(np.float32)


def in_order(W, A, m, B):
    """csrc/rank_update.h's definition, in NumPy and torch's casts."""
    a, bm = A.float().numpy(), (B.float() * m.float()).numpy()
    delta = np.zeros(tuple(W.shape), np.float32)
    for j in range(a.shape[0]):
        delta = fma(bm[:, j : j + 1], a[j : j + 1], delta)
    delta = torch.from_numpy(delta)
    return torch.where(delta == 0, W, (W.float() + delta).to(W.dtype))


@pytest.fixture
def isa(monkeypatch):
    return lambda name: monkeypatch.setenv("LOWRANK_ISA", name)


@pytest.fixture
def in_torch(environment):
    environment.setenv("LOWRANK_BACKEND", "eager")


@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_against_fp64(r, dtype, factors):
    for N, K in shapes(r)[1:]:
        arguments = inputs(N, K, r, dtype, factors)
        out = materialize(*arguments, out=poisoned(arguments[0]))
        assert same_bits(out, materialize(*arguments))
        within([out], [oracle(*arguments)], [oracle(*(t.abs() for t in arguments))], [f"{N} x {K}"])


@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("r", [16, 80])
def test_as_right_as_eager(r, dtype, factors):
    def draw():
        arguments = inputs(33, 40, r, dtype, factors)
        return [materialize(*arguments)], [eager(*arguments)], [oracle(*arguments)]

    in_the_mean(draw, ["W"])


def test_fma_reference_rounds_once():
    """Against exact rational arithmetic; and there are cases that rounding twice gets wrong."""
    from fractions import Fraction

    a, b, c = (np.float32(np.random.default_rng(i).standard_normal(2000)) for i in range(3))
    c = c * np.float32(2.0**-20)
    a[:500], b[:500] = np.float32(1 + 2**-12), np.float32(1 + 2**-12)  # a tie in fp32 but for a small c
    c[:500] *= np.float32(2.0**-30)
    once, twice = fma(a, b, c), (a.astype(np.float64) * b + c).astype(np.float32)
    for x, y, z, got in zip(a, b, c, once, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf))]
        assert min(abs(Fraction(float(n)) - exact) for n in near) == abs(Fraction(float(got)) - exact)
    assert (once != twice).any()


@needs_native
@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("name", ISAS)
def test_bits_are_the_documented_chain_of_fmas(name, dtype, factors, isa):
    isa(name)
    for (N, K), r in zip(SHAPES, [1, 3, 16, 64, 9, 8, 33], strict=True):
        arguments = inputs(N, K, r, dtype, factors)
        try:
            out = materialize(*arguments, out=poisoned(arguments[0]))
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
        assert same_bits(out, in_order(*arguments)), (N, K, r)


@needs_native
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rounding_is_torchs_for_every_kind_of_number(dtype):
    """Every 16-bit weight, and sums of every exponent: ties, subnormals, overflow."""
    W = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 256)
    W = W.view(dtype) if dtype is not FP32 else W.view(BF16).float()
    W = torch.where(W.isnan(), 1.0, W)
    for exponent in range(-40, 18, 2):
        A = torch.randint(-(2**9), 2**9, (1, 256)).float() * 2.0**exponent
        B = torch.ones(256, 1)
        expected = torch.where(A == 0, W, (W.float() + A).to(dtype))
        out = materialize(W, A, 1.0, B)
        nan = expected.isnan()
        assert torch.equal(nan, out.isnan())
        assert same_bits(torch.where(nan, 0.0, out), torch.where(nan, 0.0, expected)), exponent


@needs_native
def test_factors_are_converted_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, -1)
    for dtype in (BF16, FP16):
        A = every.view(dtype)
        out = materialize(torch.zeros(2, 2**16), A, 1.0, torch.ones(2, 1, dtype=dtype))
        assert torch.equal(out.nan_to_num(7.0), torch.where(A == 0, 0.0, A.float()).nan_to_num(7.0).expand(2, -1))
        B = materialize(torch.zeros(2**16, 1), torch.ones(1, 1), 1.0, A.view(-1, 1))
        assert torch.equal(B.mT.nan_to_num(7.0), out[:1].nan_to_num(7.0))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(threads):
    before = torch.get_num_threads()
    try:
        arguments = inputs(700, 300, 9, BF16, BF16)
        expected = materialize_with_report(*arguments)
        torch.set_num_threads(threads)
        result = materialize_with_report(*arguments)
        assert same_bits(result[0], expected[0])
        assert result[1] == expected[1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
def test_rank_one_leaves_no_order_to_choose(dtype, factors, environment):
    arguments = inputs(65, 99, 1, dtype, factors)
    expected = eager(*arguments)
    assert same_bits(materialize(*arguments), expected)
    environment.setenv("LOWRANK_BACKEND", "eager")
    assert same_bits(materialize(*arguments), expected)


@pytest.mark.parametrize("r", [3, 65])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_a_zero_update_keeps_every_bit(dtype, r):
    W, A, _, B = inputs(33, 40, r, dtype, dtype)
    W[0, 0], W[1, :3] = -0.0, torch.tensor([float("nan"), float("inf"), -float("inf")])
    raw(W)[2, 5] = raw(torch.tensor([float("nan")], dtype=dtype))[0] ^ 1 if dtype is not FP64 else 1  # a NaN's payload
    for m in (0.0, 0, torch.zeros(()), torch.zeros(r)):
        assert same_bits(materialize(W, A, m, B), W)


@pytest.mark.parametrize("r", [4, 70])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_changed_map(r, dtype):
    for shape in shapes(r):
        W, A, m, B = inputs(*shape, r, dtype, dtype if dtype is FP64 else BF16, 1e-3)
        B[1::2] = 0
        changed = torch.full(((W.numel() + 31) // 32,), -1, dtype=torch.int32)
        out = materialize(W, A, m, B, changed=changed)
        assert torch.equal(changed, bits.pack(raw(out) != raw(W))), shape
        assert same_bits(out, materialize(W, A, m, B))


@pytest.mark.parametrize("r", [8, 80])
def test_nan_and_infinity_propagate(r):
    W, A, m, B = inputs(20, 40, r, BF16, BF16)
    W[3, 4], A[1, 7], B[9, 2] = float("nan"), float("nan"), float("inf")
    out = materialize(W, A, m, B)
    expected = eager(W, A, m, B)
    assert torch.equal(out.isfinite(), expected.isfinite())
    if r <= 64:  # splitting an infinite factor for tensor cores makes NaN of it
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("r", [8, 80])
@pytest.mark.parametrize("m", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=BF16), "vector"], ids=str)
def test_forms_of_m_and_strides(m, r):
    W, A, B = randn(33, 50, dtype=BF16).mT, randn(33, 2 * r, dtype=FP16)[:, ::2].mT, randn(r, 50, dtype=FP32).mT
    m = torch.rand(2 * r, dtype=FP64)[::2] if isinstance(m, str) else m
    out = materialize(W, A, m, B)
    dense = torch.as_tensor(m, dtype=FP32).expand(r).contiguous()
    assert out.is_contiguous()
    assert same_bits(out, materialize(W.contiguous(), A.contiguous(), dense, B.contiguous()))


@needs_native
def test_memory_that_does_not_start_on_a_vector():
    W, A, m, B = inputs(40, 64, 8, BF16, BF16)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (W, A, m, B, W)]
    assert same_bits(materialize(*shifted[:4], out=shifted[4]), materialize(W, A, m, B))


def test_fp64_is_plain_torch():
    W, A, m, B = inputs(20, 30, 5, FP64, FP32)
    torch.testing.assert_close(materialize(W, A, m.double(), B.double()), oracle(W, A, m, B), rtol=1e-14, atol=1e-14)


def test_autocast_changes_nothing():
    arguments = inputs(40, 64, 80, FP32, FP32)
    with torch.autocast("cpu", torch.bfloat16):
        out = materialize(*arguments)
    assert same_bits(out, materialize(*arguments))


def test_no_gradient_flows_and_a_write_is_seen():
    arguments = [t.requires_grad_() for t in inputs(8, 16, 4, FP32, FP32)]
    assert not materialize(*arguments).requires_grad
    for r in (4, 70):
        W, A, m, B = inputs(8, 16, r, FP32, FP32)
        out = torch.empty_like(W)
        before = out._version
        assert materialize(W, A, m, B, out=out) is out
        assert out._version > before
    with torch.inference_mode():
        materialize(W, A, m, B, out=torch.empty_like(W))


def test_lists():
    calls = [inputs(n, 40, r, BF16, BF16) for n, r in ((8, 4), (16, 3), (5, 70))]
    W, A, m, B = (list(ts) for ts in zip(*calls, strict=True))
    out = [poisoned(w) for w in W]
    changed = [torch.empty((w.numel() + 31) // 32, dtype=torch.int32) for w in W]
    results = materialize(W, A, m, B, out=out, changed=changed)
    for f, o, c, call in zip(results, out, changed, calls, strict=True):
        assert f is o
        assert same_bits(f, materialize(*call))
        assert torch.equal(c, bits.pack(raw(f) != raw(call[0])))
    assert materialize([], [], [], []) == []
    with pytest.raises(ValueError, match="expected B to be a list of 3 like weight, got 2 entries"):
        materialize(W, A, m, B[:2])
    with pytest.raises(ValueError, match="expected m to be a list of 3 like weight, got float"):
        materialize(W, A, 1.0, B)
    with pytest.raises(ValueError, match=r"expected A \[r, 40\]"):  # the last one, before the first is written
        materialize(W, [*A[:2], A[2][:, 1:]], m, B, out=(fresh := [poisoned(w) for w in W]))
    assert fresh[0].isnan().all()
    with pytest.raises(ValueError, match="expected out apart from weight"):
        materialize(W, A, m, B, out=[*fresh[:2], W[2]])
    assert fresh[0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty(shape):
    W, A, m, B = inputs(*shape, 3, BF16, BF16)
    assert materialize(W, A, m, B, changed=torch.empty(0, dtype=torch.int32)).shape == shape
    assert materialize_with_report(W, A, m, B)[1] == (1.0, 0, 0)


@pytest.mark.parametrize("r", [4, 70])
def test_memory_that_overlaps_is_refused(r):
    W, A, m, B = inputs(8, 16, r, FP32, FP32)
    both = torch.zeros(12, 16)
    before = W.clone()
    with pytest.raises(ValueError, match="expected out apart from weight"):
        materialize(W, A, m, B, out=W)
    with pytest.raises(ValueError, match="expected out apart from weight"):
        materialize(both[:8], A, m, B, out=both[4:])
    assert torch.equal(W, before)
    assert not both.any()
    materialize(both[:4], A, m, B[:4], out=both[4:8])  # neighbours
    if r == 70:
        with pytest.raises(ValueError, match="expected out apart from A"):
            materialize(W, A, m, B, out=A[:8])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=1.0), TypeError, "expected weight to be a tensor, got float"),
        (dict(A=None), TypeError, "expected A to be a tensor, got NoneType"),
        (dict(weight=torch.ones(8, 6, dtype=torch.int32)), TypeError, "expected weight in .*, got torch.int32"),
        (dict(weight=torch.ones(8)), ValueError, r"expected weight with two dimensions, got \[8\]"),
        (dict(A=torch.ones(4, 5)), ValueError, r"expected A \[r, 6\], r >= 1, for weight \[8, 6\], got \[4, 5\]"),
        (dict(A=torch.ones(0, 6), B=torch.ones(8, 0)), ValueError, r"expected A .*r >= 1.*got \[0, 6\]"),
        (dict(B=torch.ones(8, 5)), ValueError, r"expected B \[8, 4\] beside A \[4, 6\], got \[8, 5\]"),
        (dict(B=torch.ones(8, 4, dtype=FP64)), TypeError, "expected B in fp32 or less .*, got torch.float64"),
        (dict(B=torch.ones(8, 4, device="meta")), ValueError, "expected B on weight's device cpu, got meta"),
        (dict(m=torch.ones(5)), ValueError, r"expected m a number or \[4\], got \[5\]"),
        (dict(m=torch.ones(4, dtype=torch.int64)), TypeError, "expected m in .*, got torch.int64"),
        (dict(m=torch.ones(4, device="meta")), ValueError, "expected m on weight's device cpu, got meta"),
        (dict(m="1"), TypeError, "expected m a float or a tensor, got str"),
        (
            dict(out=torch.ones(8, 6, dtype=BF16)),
            TypeError,
            "expected out in weight's dtype torch.float32, got torch.bf",
        ),
        (
            dict(out=torch.ones(6, 8).mT),
            ValueError,
            r"expected out contiguous \[8, 6\], got \[8, 6\], strides \(1, 8\)",
        ),
        (dict(out=torch.ones(6, 8)), ValueError, r"expected out contiguous \[8, 6\], got \[6, 8\]"),
        (dict(changed=torch.zeros(2)), TypeError, "expected changed as int32 words, got torch.float32"),
        (dict(changed=torch.zeros(3, dtype=torch.int32)), ValueError, r"expected changed contiguous \[2\] on cpu"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(weight=torch.ones(8, 6), A=torch.ones(4, 6), m=1.0, B=torch.ones(8, 4)) | change
    with pytest.raises(error, match=f"materialize: {message}"):
        materialize(**arguments)


@needs_native
def test_the_op_itself_refuses_what_does_not_fit():
    W, A, m, B = inputs(8, 16, 4, FP32, FP32)
    materialize(W, A, m, B)
    op = torch.ops.lowrank.rank_update.default
    for arguments in (
        (W, A[:, 1:].contiguous(), m, B, W.clone(), None, None),
        (W, A, m[:2], B, W.clone(), None, None),
        (W, A, m, B, W.bfloat16(), None, None),
        (W, A.mT.contiguous().mT, m, B, W.clone(), None, None),
        (W, A, m, B, W.clone(), torch.zeros(3, dtype=torch.int32), None),
        (W, A, m, B, W.clone(), None, torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError, match="rank_update: "):
            op(*arguments)


def test_an_unknown_instruction_set_is_refused(isa):
    if not _native.available("cpu"):
        pytest.skip(_native.why_not("cpu"))
    isa("avx1024")
    with pytest.raises(RuntimeError, match="LOWRANK_ISA='avx1024'"):
        materialize(*inputs(8, 16, 4, FP32, FP32))


@pytest.mark.parametrize("form", ["native", "torch"])
@pytest.mark.parametrize("r", [16, 80])
@pytest.mark.parametrize("shape", [(65, 520), (65, 99), (3, 5)])
def test_report(shape, r, form, environment):
    if form == "torch":
        environment.setenv("LOWRANK_BACKEND", "eager")
    W, A, m, B = inputs(*shape, r, BF16, BF16)
    out, report = materialize_with_report(W, A, m, B)
    assert same_bits(out, materialize(W, A, m, B))
    delta = (B.double() * m.double()) @ A.double()
    kept = (delta * (out.double() - W.double())).sum() / delta.square().sum()
    assert report.kept == pytest.approx(float(kept), rel=1e-5)
    assert report.changed == int((raw(out) != raw(W)).sum())
    assert report.numel == W.numel()


def test_report_of_an_infinite_step_is_nan():
    for B in (torch.full((130, 4), float("inf")), torch.full((130, 4), float("nan"))):
        B[::2] *= -1
        report = materialize_with_report(torch.ones(130, 300), torch.ones(4, 300), 1.0, B)[1]
        assert report.kept != report.kept
        assert report.changed == 130 * 300


def test_report_of_a_large_and_of_a_small_step():
    W, A, _, B = inputs(512, 512, 16, BF16, BF16)
    size = ((B.float() @ A.float()).norm() / W.float().norm()).item()
    assert materialize_with_report(W, A, 0.3 / size, B)[1].kept == pytest.approx(1, abs=1e-3)
    report = materialize_with_report(W, A, 1e-4 / size, B)[1]
    assert 0.02 < report.kept < 0.1  # a bf16 weight holds a relative step of 2**-9 at best
    assert 0.005 < report.changed / report.numel < 0.05


@needs_native
def test_report_is_the_same_on_every_instruction_set(isa):
    arguments = inputs(130, 300, 16, FP16, BF16, 1e-3)
    reports = []
    for name in ISAS:
        isa(name)
        try:
            reports.append(materialize_with_report(*arguments)[1])
        except RuntimeError as error:
            assert "does not have it" in str(error)  # noqa: PT017
    assert len(set(reports)) == 1


def test_falls_back_to_torch_and_says_so(monkeypatch):
    arguments = inputs(40, 64, 8, BF16, FP32)
    changed = [torch.empty(80, dtype=torch.int32) for _ in range(2)]
    materialize(*arguments, changed=changed[0])
    monkeypatch.setattr(_native, "why_not", lambda library: f"no {library} library today")
    monkeypatch.delenv("LOWRANK_BACKEND", raising=False)
    _stats.reset()
    with pytest.warns(UserWarning, match="materialize: no cpu library today"):
        out = materialize(*arguments, changed=changed[1])
    materialize(*arguments)
    assert stats()["fallback"] == {"materialize: no cpu library today": 2}
    within([out], [oracle(*arguments)], [oracle(*(t.abs() for t in arguments))], ["fallback"])
    assert torch.equal(changed[1], bits.pack(raw(out) != raw(arguments[0])))
    with strict(), pytest.raises(FallbackError, match="no cpu library today"):
        materialize(*arguments)


def test_row_blocks_need_no_second_matrix(in_torch):
    """An N x K fp32 temporary would be 64 MB here."""
    N, K = 4096, 4096
    W, A, B = torch.zeros(N, K, dtype=BF16), torch.ones(4, K, dtype=BF16), torch.ones(N, 4, dtype=BF16)
    out = torch.empty_like(W)
    with torch.profiler.profile(profile_memory=True) as profile:
        materialize(W, A, 1.0, B, out=out)
    assert max(event.cpu_memory_usage for event in profile.events()) < 16 << 20
    assert (out == 4).all()


@pytest.mark.parametrize("r", [4, 70])
def test_opcheck(r):
    W, A, m, B = inputs(16, 32, r, FP32, FP32)
    changed = torch.zeros(16, dtype=torch.int32)
    torch.library.opcheck(torch.ops.lowrank.materialize.default, (W, A, m, B, torch.empty_like(W), changed, None))
    if _native.available("cpu"):
        torch.library.opcheck(torch.ops.lowrank.rank_update.default, (W, A, m, B, torch.empty_like(W), changed, None))


def test_compiles_without_a_break():
    def merged(W, A, m, B):
        return materialize(W, A, m, B) * 2, materialize(W, A, 0.5, B)

    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    for r in (4, 70):
        arguments = inputs(16, 32, r, BF16, FP32)
        for result, expected in zip(compiled(*arguments), merged(*arguments), strict=True):
            assert same_bits(result, expected)


def test_importing_loads_no_library():
    code = (
        "import torch, lowrank, lowrank.ops.materialize, lowrank._native as n;"
        "assert not n.why_not.cache_info().currsize; assert not torch.ops.loaded_libraries; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not _native.available("cuda"), reason=str(_native.why_not("cuda")))
@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 16, 33, 64])
def test_a_gpu_gives_the_cpus_bits(r, dtype, factors):
    for N, K in [*SHAPES, (300, 4096)]:
        W, A, m, B = inputs(N, K, r, dtype, factors)
        W[0, 0], B[N // 2, 0] = float("nan"), float("inf")
        changed = torch.empty((W.numel() + 31) // 32, dtype=torch.int32)
        expected = materialize(W, A, m, B, changed=changed)
        there = [t.cuda() for t in (W, A, m, B)]
        words = torch.full_like(changed, -1).cuda()
        out = materialize(*there, out=poisoned(there[0]), changed=words)
        assert same_bits(out.cpu(), expected), (N, K)
        assert torch.equal(words.cpu(), changed)
        W[0, 0], B[N // 2, 0] = 0, 0
        reports = [materialize_with_report(*ts)[1] for ts in ((W, A, m, B), [t.cuda() for t in (W, A, m, B)])]
        assert reports[1].kept == pytest.approx(reports[0].kept, rel=1e-12)
        assert reports[1].changed == reports[0].changed


@pytest.mark.gpu
@pytest.mark.parametrize("r", [16, 100])
def test_a_gpu_is_not_waited_for_and_can_be_captured(r):
    W, A, m, B = (t.cuda() for t in inputs(300, 512, r, BF16, BF16))
    out = materialize(W, A, m, B)
    torch.cuda.set_sync_debug_mode("error")
    try:
        materialize(W, A, m, B, out=out)
        materialize(W, A, 0.5, B)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        materialize(W, A, m, B, out=out)
    m.mul_(2)
    graph.replay()
    assert same_bits(out, materialize(W, A, m, B))
