"""fold_ and unfold_: materialize's bits in place, and every bit back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import _native
from lowrank.ops import fold
from lowrank.ops.materialize import MergeReport

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMS = ["native", "torch"]


@pytest.fixture(params=FORMS)
def form(request, environment):
    if request.param == "torch":
        environment.setenv("LOWRANK_BACKEND", "eager")
    elif not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    return request.param


def problem(N, K, r, dtype, size=1e-2, factors=FP32, seed=0):
    """A weight, and factors of an update ``size`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((N, K), (r, K), (N, r)))
    return (0.02 * W).to(dtype), A.to(factors), (B * (0.02 * size / math.sqrt(r))).to(factors)


def raw(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return torch.equal(raw(a), raw(b))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "r"), [(1, 1, 1), (3, 7, 2), (64, 256, 16), (129, 130, 5), (70, 33, 100), (0, 8, 2)]
)
def test_folds_as_materialize_does_and_back(form, dtype, N, K, r):
    W, A, B = problem(N, K, r, dtype)
    m = torch.linspace(0.5, 2, r)
    before, want = W.clone(), lowrank.materialize(W, A, m, B)
    receipt = lowrank.fold_(W, A, m, B)
    assert same_bits(W, want)
    assert lowrank.unfold_(W, A, m, B, receipt) is None
    assert same_bits(W, before)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-2, 0.3, 10.0, 1e4])
def test_any_size_of_update(form, dtype, size):
    """From nothing to one that leaves no bit of the weight, with overflow in fp16."""
    W, A, B = problem(96, 200, 8, dtype, size)
    before = W.clone()
    receipt = lowrank.fold_(W, A, 1.5, B)
    lowrank.unfold_(W, A, 1.5, B, receipt)
    assert same_bits(W, before)
    if form == "native":
        assert receipt.nbytes <= {0.0: 0.01, 1e-4: 0.02, 1e-2: 0.06, 0.3: 0.4}.get(size, 2.2) * W.numel() + 64


def test_special_values(form):
    """NaN payloads, infinities, both zeros and denormals come back; an update of zero touches nothing."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    for dtype in (BF16, FP16):
        W = bits.clone().view(dtype)
        A, B = torch.randn(3, 256), torch.randn(256, 3)
        A[:, :20] = 0
        A[:, 20] = math.inf
        receipt = lowrank.fold_(W, A, 1.0, B)
        assert same_bits(W[:, :20], bits.view(dtype)[:, :20])
        lowrank.unfold_(W, A, 1.0, B, receipt)
        assert torch.equal(W.view(torch.int16), bits)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 80),
    K=st.integers(1, 80),
    r=st.integers(1, 9),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    size=st.sampled_from([1e-5, 1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_bits(N, K, r, dtype, size, seed):
    """Weights of random bits: NaN payloads, infinities, denormals and both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.int32 if dtype is FP32 else torch.int16
    limits = torch.iinfo(width)
    W = torch.randint(limits.min, limits.max, (N, K), generator=generator).to(width).view(dtype)
    A, B = torch.randn(r, K, generator=generator), size * torch.randn(N, r, generator=generator)
    before, want = W.clone(), lowrank.materialize(W, A, 0.5, B)
    receipt = lowrank.fold_(W, A, 0.5, B)
    assert same_bits(W, want)
    lowrank.unfold_(W, A, 0.5, B, receipt)
    assert same_bits(W, before)


def test_a_thousand_cycles_change_no_bit():
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    W, A, B = problem(64, 128, 4, BF16)
    before, plain = W.clone(), W.clone()
    for n in range(1000):
        scale = 0.1 + n % 7
        lowrank.unfold_(W, A, scale, B, lowrank.fold_(W, A, scale, B))
        if n < 10:
            update = scale * (B @ A)
            plain += update
            plain -= update
    assert same_bits(W, before)
    assert not same_bits(plain, before)  # what PEFT's merge and unmerge do


def test_folds_nest():
    W, A, B = problem(40, 60, 4, BF16)
    _, C, D = problem(40, 60, 4, BF16, seed=1)
    before = W.clone()
    first = lowrank.fold_(W, A, 1.0, B)
    second = lowrank.fold_(W, C, 1.0, D)
    with pytest.raises(ValueError, match="the weight is not what fold_ left"):
        lowrank.unfold_(W, A, 1.0, B, first)
    lowrank.unfold_(W, C, 1.0, D, second)
    lowrank.unfold_(W, A, 1.0, B, first)
    assert same_bits(W, before)


def test_report_and_size(form):
    W, A, B = problem(512, 512, 8, BF16, 1e-3)
    want = lowrank.materialize(W, A, 1.0, B)
    update = B.double() @ A.double()
    kept = float((update * (want.double() - W.double())).sum() / update.square().sum())
    changed = int((raw(want) != raw(W)).sum())
    receipt = lowrank.fold_(W, A, 1.0, B)
    assert isinstance(receipt.report, MergeReport)
    assert receipt.report.kept == pytest.approx(kept, rel=1e-3)
    assert receipt.report.changed == changed
    assert 0.3 < kept < 0.8
    assert receipt.nbytes == sum(t.numel() * t.element_size() for t in receipt.fixes)
    assert receipt.nbytes < (0.02 if form == "native" else 2.01) * W.numel()
    assert "fixes" not in repr(receipt)


def test_chunks_are_the_whole(monkeypatch):
    """Blocks of a receipt do not depend on how many rows were taken at a time."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    folded = []
    for chunk in (1, 1 << 13, 1 << 30):
        monkeypatch.setattr(fold, "CHUNK", chunk)
        W, A, B = problem(300, 96, 4, BF16, 0.05)
        receipt = lowrank.fold_(W, A, 1.0, B)
        folded.append((W, receipt))
    for W, receipt in folded[1:]:
        assert same_bits(W, folded[0][0])
        assert all(torch.equal(raw8(a), raw8(b)) for a, b in zip(receipt.fixes, folded[0][1].fixes, strict=True))


def raw8(t):
    return t.contiguous().view(torch.uint8)


def test_parameters_and_versions(form):
    W, A, B = problem(32, 48, 4, BF16)
    before = W.clone()
    weight = torch.nn.Parameter(W)
    version = weight._version
    receipt = lowrank.fold_(weight, torch.nn.Parameter(A), 1.0, torch.nn.Parameter(B))
    assert weight._version > version
    version = weight._version
    lowrank.unfold_(weight, A, 1.0, B, receipt)
    assert weight._version > version
    assert same_bits(weight.detach(), before)


def test_refuses_and_writes_nothing(form):
    W, A, B = problem(24, 40, 4, BF16)
    with pytest.raises(ValueError, match=r"fold_: expected A \[r, 40\]"):
        lowrank.fold_(W, A[:, 1:], 1.0, B)
    with pytest.raises(TypeError, match="fold_: expected weight to be a tensor"):
        lowrank.fold_(None, A, 1.0, B)
    with pytest.raises(ValueError, match="fold_: expected a contiguous weight"):
        lowrank.fold_(W.mT, B.mT.contiguous(), 1.0, A.mT.contiguous())
    shared = torch.randn(4 * 40 + 24 * 4)
    with pytest.raises(ValueError, match="fold_: expected A apart from weight"):
        lowrank.fold_(shared[:160].view(4, 40), shared[:160].view(4, 40), 1.0, torch.randn(4, 4))
    receipt = lowrank.fold_(W, A, 1.0, B)
    folded = W.clone()
    other = B.clone()
    other[3, 2] += 1e-3
    moved = W.clone()
    moved[5, 7] = 3.0
    for weight, a, m, b, message in (
        (W, A, 1.0, other, "factors and scale that were folded"),
        (W, A, 1.0001, B, "factors and scale that were folded"),
        (W, A.double().float().flip(0), 1.0, B, "factors and scale that were folded"),
        (moved, A, 1.0, B, "the weight is not what fold_ left"),
        (W[:20], A, 1.0, B[:20], r"expected the weight of the receipt, \[24, 40\]"),
    ):
        kept = weight.clone()
        with pytest.raises(ValueError, match=message):
            lowrank.unfold_(weight, a, m, b, receipt)
        assert same_bits(weight, kept)
    with pytest.raises(TypeError, match="expected receipt from fold_, got NoneType"):
        lowrank.unfold_(W, A, 1.0, B, None)
    assert same_bits(W, folded)
    lowrank.unfold_(W, A, 1.0, B, receipt)
    with pytest.raises(ValueError, match="the weight is not what fold_ left"):
        lowrank.unfold_(W, A, 1.0, B, receipt)


def test_unfolding_where_the_sums_come_out_otherwise_is_refused(environment):
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    W, A, B = problem(24, 40, 4, BF16)
    receipt = lowrank.fold_(W, A, 1.0, B)
    folded = W.clone()
    environment.setenv("LOWRANK_BACKEND", "eager")
    with pytest.raises(ValueError, match="folded by the form 'native', which here would be 'torch'"):
        lowrank.unfold_(W, A, 1.0, B, receipt)
    assert same_bits(W, folded)


def test_dense_codes_beat_sparse_values_above_a_few_percent():
    """The receipt of an update that most elements do not survive by a unit: two bits each and a few verbatim."""
    if not _native.available("cpu"):
        pytest.skip(str(_native.why_not("cpu")))
    W, A, B = problem(512, 512, 8, BF16, 0.3)
    before = W.clone()
    receipt = lowrank.fold_(W, A, 1.0, B)
    heads = receipt.fixes[0].to(torch.int32) & 0xFFFF
    assert ((heads >> 11 & 3) == 3).float().mean() > 0.9
    assert receipt.nbytes < 0.35 * W.numel()
    lowrank.unfold_(W, A, 1.0, B, receipt)
    assert same_bits(W, before)


@pytest.mark.gpu
def test_a_gpu_folds_as_the_cpu_does():
    if not (_native.available("cpu") and _native.available("cuda")):
        pytest.skip(f"{_native.why_not('cpu')}; {_native.why_not('cuda')}")
    for size in (1e-3, 0.1, 10.0):
        W, A, B = problem(300, 264, 16, BF16, size)
        on_gpu = [t.cuda() for t in (W, A, B)]
        before = W.clone()
        here, there = lowrank.fold_(W, A, 2.0, B), lowrank.fold_(on_gpu[0], on_gpu[1], 2.0, on_gpu[2])
        assert same_bits(W, on_gpu[0].cpu())
        assert all(torch.equal(raw8(a), raw8(b.cpu())) for a, b in zip(here.fixes, there.fixes, strict=True))
        lowrank.unfold_(on_gpu[0], on_gpu[1], 2.0, on_gpu[2], there)
        assert same_bits(on_gpu[0].cpu(), before)
