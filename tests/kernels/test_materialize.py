import pytest
import torch
from right import in_the_mean, within
from thin_inputs import BF16, DEVICE, FP16, FP32, far_rows, randn, strided

from lowrank import bits

SHAPES = [(1, 65, 129), (130, 72, 65), (33, 300, 100), (7, 8, 3)]  # N, K, r


def materialize(W, A, m, B, changed=None, config=None):
    from lowrank.kernels.materialize import materialize

    out = torch.full_like(W, float("nan"))
    materialize(W, A, m, B, out, changed, config)
    return out


def oracle(W, A, m, B):
    return W.double() + (B.double() * m.double()) @ A.double()


def eager(W, A, m, B):
    return (W.float() + (B.float() * m) @ A.float()).to(W.dtype)


def raw(t):
    return t.view(torch.int32 if t.dtype is FP32 else torch.int16)


@pytest.mark.parametrize("weight", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("A_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("B_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("one_m", [False, True])
def test_against_fp64(weight, A_dtype, B_dtype, one_m):
    torch.backends.cuda.matmul.allow_tf32 = False
    for N, K, r in SHAPES:
        W, A, B = randn(N, K, dtype=weight), randn(r, K, dtype=A_dtype), randn(N, r, dtype=B_dtype)
        m = torch.rand(1 if one_m else r, device=DEVICE) * 0.1
        changed = None if K % 8 else torch.zeros((N * K + 31) // 32, dtype=torch.int32, device=DEVICE)
        out = materialize(W, A, m, B, changed)
        within([out], [oracle(W, A, m, B)], [oracle(W.abs(), A.abs(), m, B.abs())], [f"{N} x {K} x {r}"])
        if changed is not None:
            assert torch.equal(changed.cpu(), bits.pack((raw(out) != raw(W)).cpu()))


@pytest.mark.parametrize("weight", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("factors", [BF16, FP16, FP32], ids=str)
def test_as_right_as_eager(weight, factors):
    torch.backends.cuda.matmul.allow_tf32 = False

    def draw():
        W, A, B = randn(33, 72, dtype=weight), randn(100, 72, dtype=factors), randn(33, 100, dtype=factors)
        arguments = W, A, torch.rand(100, device=DEVICE) * 0.1, B
        return [materialize(*arguments)], [eager(*arguments)], [oracle(*arguments)]

    in_the_mean(draw, ["W"])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_strides_and_a_small_update(dtype):
    W, A, B = randn(70, 88, dtype=dtype), strided(randn(100, 88, dtype=BF16)), randn(100, 70, dtype=BF16).mT
    m, changed = torch.full((100,), 1e-4, device=DEVICE), torch.zeros(193, dtype=torch.int32, device=DEVICE)
    out = materialize(W, A, m, B, changed)
    within([out], [oracle(W, A, m, B)], [oracle(W.abs(), A.abs(), m, B.abs())], ["strided"])
    assert bits.unpack(changed.cpu(), (70, 88)).any()
    assert torch.equal(changed.cpu(), bits.pack((raw(out) != raw(W)).cpu()))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("one_m", [False, True])
def test_a_zero_update_keeps_every_bit(dtype, one_m):
    W, A, B = randn(40, 48, dtype=dtype), randn(80, 48, dtype=dtype), randn(40, 80, dtype=dtype)
    W[0, :2] = torch.tensor([-0.0, float("inf")])
    assert torch.equal(raw(materialize(W, A, torch.zeros(1 if one_m else 80, device=DEVICE), B)), raw(W))


def test_nan_and_infinity_propagate():
    W, A, B = randn(40, 48, dtype=FP32), randn(80, 48, dtype=FP32), randn(40, 80, dtype=FP32)
    W[3, 4], A[1, 7], B[9, 2] = float("nan"), float("nan"), float("inf")
    out, expected = materialize(W, A, torch.ones(80, device=DEVICE), B), eager(W, A, 1.0, B)
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.gpu
def test_offsets_past_int32():
    W, B = (
        torch.zeros(2**18 + 3, 2**13, dtype=BF16, device="cuda"),
        torch.zeros(2**18 + 3, 65, dtype=BF16, device="cuda"),
    )
    A = far_rows(65, 2**13, BF16)
    A[64], B[-1, 64] = 1, 3
    out = materialize(W, A, torch.ones(1, device="cuda"), B)
    assert (out[-1] == 3).all()
    assert not out[:-1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.ones(4, 7)), "do not fit weight"),
        (dict(m=torch.ones(3)), "do not fit weight"),
        (dict(B=torch.ones(6, 5)), "do not fit weight"),
        (dict(B=torch.ones(6, 4, dtype=torch.float64)), "expected fp16, bf16 or fp32"),
        (dict(W=torch.ones(8, 6).mT), "be contiguous"),
        (dict(changed=torch.zeros(3, dtype=torch.int32)), "as many words, got 3"),
        (dict(W=torch.ones(6, 9), A=torch.ones(4, 9), changed=torch.zeros(2, dtype=torch.int32)), "needs K % 8 == 0"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(W=torch.ones(6, 8), A=torch.ones(4, 8), m=torch.ones(4), B=torch.ones(6, 4)) | change
    with pytest.raises(ValueError, match=message):
        materialize(**arguments)
