import math

import pytest
import torch

from lowrank.svd import SVDFactors, svd_factors

METHODS = ["svd", "eigh", "randomized"]
SHAPES = [(48, 48), (96, 40), (40, 96), (1, 17), (17, 1), (1, 1), (33, 32)]


def gapped(N, K, dtype=torch.float64, ratio=0.9):
    """A weight with the singular values 1, ratio, ratio², ..."""
    n = min(N, K)
    U, V = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64)).Q for size in (N, K))
    return ((U * ratio ** torch.arange(n, dtype=torch.float64)) @ V.mT).to(dtype)


def signed(U, Vh):
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * sign, Vh * sign.mT


def check_orthonormal(factors, tolerance):
    U, S, Vh = factors
    eye = torch.eye(len(S), dtype=torch.float64)
    assert (U.double().mT @ U.double() - eye).abs().max() < tolerance
    assert (Vh.double() @ Vh.double().mT - eye).abs().max() < tolerance
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, method, dtype):
    W = gapped(*shape)
    factors = svd_factors(W, method=method, dtype=dtype)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, Vh = signed(U, Vh)
    double = dtype is torch.float64
    tolerance = 1e-10 if double else 2e-4  # of a vector: eps σ₁ over the gap to its neighbour
    torch.testing.assert_close(factors.S.double(), S, rtol=0, atol=1e-13 if double else 1e-6)
    torch.testing.assert_close(factors.U.double(), U, rtol=0, atol=tolerance)
    torch.testing.assert_close(factors.Vh.double(), Vh, rtol=0, atol=tolerance)
    check_orthonormal(factors, 1e-13 if double else 5e-6)
    for tensor in factors:
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
    assert factors.errors(W).reconstruction < (1e-13 if double else 3e-6)


@pytest.mark.parametrize("shape", [(130, 200), (200, 130), (160, 160)])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_the_first_k(shape, method):
    W, k = gapped(*shape, dtype=torch.bfloat16), 2  # k ≤ n/64: auto is randomized
    factors = svd_factors(W, k, method=method)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    U, Vh = signed(U[:, :k], Vh[:k])
    assert [tuple(t.shape) for t in factors] == [(shape[0], k), (k,), (k, shape[1])]
    torch.testing.assert_close(factors.S.double(), S[:k], rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.U.double(), U, rtol=0, atol=1e-3)
    torch.testing.assert_close(factors.Vh.double(), Vh, rtol=0, atol=1e-3)
    check_orthonormal(factors, 5e-6)


def test_randomized_on_a_flat_spectrum():
    """No gap at k, nor anywhere: the directions are near enough to capture what the best ones do."""
    W = torch.randn(300, 400)
    S = torch.linalg.svdvals(W.double())
    factors = svd_factors(W, 20, method="randomized")
    errors = factors.errors(W)
    best = ((S[20:].square().sum()) / S.square().sum()).sqrt().item()
    assert best <= errors.reconstruction < best * (1 + 1e-4)
    assert 1e-5 < errors.residual < 1e-2
    assert svd_factors(W, 20, method="eigh").errors(W).residual < 1e-6


def test_one_sign_for_all_methods_and_ties():
    W = gapped(30, 30)
    for method in METHODS:
        U = svd_factors(W, 8, method=method, dtype=torch.float64).U
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    tied = svd_factors(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 1)
    assert tied.U[0, 0] == pytest.approx(-tied.U[1, 0])
    first = tied.U[:, 0].abs().argmax()
    assert tied.U[first, 0] > 0
    exact = svd_factors(-torch.eye(3))
    assert torch.equal(exact.U @ exact.Vh, -torch.eye(3))
    assert (exact.U >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_equal_and_the_generator_untouched(method):
    W = torch.randn(70, 90)
    state = torch.get_rng_state()
    first = svd_factors(W, 9, method=method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(map(torch.equal, svd_factors(W, 9, method=method), first))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
def test_rank_deficient(shape, rank, method):
    W = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    for k in (None, 8):
        factors = svd_factors(W, k, method=method)
        check_orthonormal(factors, 5e-6)
        errors = factors.errors(W)
        assert max(errors) < 1e-5
        assert (factors.S[rank:] <= 1e-5 * max(factors.S[0], 1e-30)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e36])
def test_scale_of_the_weight(method, scale):
    W = gapped(20, 30, torch.float32)
    one, scaled = svd_factors(W, 5, method=method), svd_factors(W * scale, 5, method=method)
    torch.testing.assert_close(scaled.S.double() / scale, one.S.double(), rtol=1e-4, atol=0)
    check_orthonormal(scaled, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weight_dtypes_and_layouts(dtype):
    W = gapped(40, 60, dtype)
    factors = svd_factors(W)
    assert factors.errors(W).reconstruction < 1e-6
    assert all(map(torch.equal, svd_factors(W.mT.contiguous().mT), factors))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, svd_factors(torch.nn.Parameter(W)), factors))


def test_errors_find_what_is_wrong():
    W = gapped(50, 30)
    U, S, Vh = factors = svd_factors(W, 10)
    left = W - (U.double() * S.double()) @ Vh.double()
    errors = factors.errors(W)
    assert errors.reconstruction == pytest.approx((left.norm() / W.norm()).item())
    assert errors.orthogonality < 1e-6
    assert errors.residual < 1e-6

    assert SVDFactors(U * 1.01, S, Vh).errors(W).orthogonality == pytest.approx(0.0201, rel=1e-3)
    assert SVDFactors(U, S * 1.01, Vh).errors(W).residual == pytest.approx(0.01 / 1.01, rel=1e-3)
    rotated = torch.linalg.qr(torch.randn(10, 10)).Q  # the same subspace: only the residual sees it
    turned = SVDFactors(U @ rotated, S, rotated.mT @ Vh).errors(W)
    assert turned.orthogonality < 1e-5
    assert turned.residual > 1e-2


def test_errors_across_blocks(monkeypatch):
    W = torch.randn(50, 70)
    factors = svd_factors(W), svd_factors(W, 13)
    whole = [f.errors(W) for f in factors]
    monkeypatch.setattr("lowrank.svd._BLOCK", 16)
    for f, expected in zip(factors, whole, strict=True):
        assert f.errors(W) == pytest.approx(expected, rel=1e-6)


def test_errors_refuse_another_shape():
    with pytest.raises(ValueError, match=r"weight: expected \[4, 6\].*got \[6, 4\]"):
        svd_factors(torch.randn(4, 6)).errors(torch.randn(6, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.randn(3)}, ValueError, r"weight: expected \[N, K\].*got \[3\]"),
        ({"weight": torch.randn(2, 3, 4)}, ValueError, r"got \[2, 3, 4\]"),
        ({"weight": torch.randn(0, 4)}, ValueError, r"got \[0, 4\]"),
        ({"weight": torch.ones(3, 3, dtype=torch.int8)}, TypeError, "weight: expected float16.*got torch.int8"),
        ({"weight": torch.ones(3, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"weight": [[1.0]]}, TypeError, "weight: expected a tensor, got list"),
        ({"weight": torch.full((3, 3), math.nan)}, ValueError, "weight: expected finite values"),
        ({"weight": torch.tensor([[1.0, -math.inf]])}, ValueError, "weight: expected finite values"),
        ({"k": 0}, ValueError, r"k: expected an integer from 1 to min\(N, K\) = 4, or None, got 0"),
        ({"k": 5}, ValueError, "k: .*got 5"),
        ({"k": 2.0}, ValueError, "k: .*got 2.0"),
        ({"k": True}, ValueError, "k: .*got True"),
        ({"method": "lanczos"}, ValueError, "method: expected one of auto, svd, eigh, randomized, got 'lanczos'"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype: expected torch.float32 or torch.float64, got torch.bfloat16"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"weight": torch.randn(4, 6)} | change
    weight = arguments.pop("weight")
    with pytest.raises(error, match=message):
        svd_factors(weight, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda(method):
    W = gapped(96, 64, torch.float32)
    factors, cpu = svd_factors(W.cuda(), 8, method=method), svd_factors(W, 8, method=method)
    for ours, theirs in zip(factors, cpu, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    assert factors.errors(W.cuda()).orthogonality < 5e-6


@pytest.mark.parametrize("method", ["auto", "svd", "randomized"])
def test_of_a_weight_on_meta_there_are_the_shapes(method):
    weight = torch.empty(12, 7, dtype=torch.bfloat16, device="meta")
    U, S, Vh = svd_factors(weight, 3, method=method)
    assert [tuple(t.shape) for t in (U, S, Vh)] == [(12, 3), (3,), (3, 7)]
    assert {(t.device.type, t.dtype) for t in (U, S, Vh)} == {("meta", torch.float32)}
    with pytest.raises(ValueError, match="k: expected an integer from 1 to"):
        svd_factors(weight, 8)
