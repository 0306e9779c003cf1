import pytest
import torch
from right import in_the_mean, within
from thin_inputs import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    far_rows,
    randn,
    strided,
)

from lowrank.ops import dora_eager

SHAPES = [(1, 33, 1), (7, 64, 3), (65, 130, 16), (128, 1030, 24), (70, 300, 100), (33, 96, 512)]


def norm(W, A, B, config=None, gram=None):
    """``gram``: A Aᵀ in fp32, which PyTorch computes."""
    from lowrank.kernels.dora_norm import dora_norm

    parts = dora_norm(W, A, B, B @ (A.float() @ A.float().mT if gram is None else gram), config)
    return parts.sum(0).clamp(min=0).sqrt()


def oracle(W, A, B):
    return (W.double() + B.double() @ A.double()).norm(dim=1)


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, dtype, thin_dtype):
    N, K, R = shape
    W, A, B = strided(randn(N, K, dtype=dtype)), randn(R, K, dtype=thin_dtype), strided(randn(N, R, dtype=FP32))
    B = B / R**0.5
    ours, truth = norm(W, A, B), oracle(W, A, B)
    within([ours], [truth], [oracle(W.abs(), A.abs(), B.abs())], ["norm"])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin_dtype):
    def draw():
        W, A, B = randn(70, 130, dtype=dtype), randn(24, 130, dtype=thin_dtype), randn(70, 24, dtype=FP32) / 24**0.5
        return [norm(W, A, B)], [dora_eager.norm(W, A, B)], [oracle(W, A, B)]

    in_the_mean(draw, ["norm"])


@pytest.mark.parametrize("split_k", [1, 3, 8])
def test_split_k_and_every_bit_twice(split_k):
    from lowrank.kernels.dora_norm import Config

    W, A, B = randn(40, 1000, dtype=BF16), randn(16, 1000, dtype=BF16), randn(40, 16, dtype=FP32)
    config = Config(block_n=32, split_k=split_k)
    torch.testing.assert_close(norm(W, A, B, config).double(), oracle(W, A, B), rtol=1e-5, atol=0)
    assert torch.equal(norm(W, A, B, config), norm(W, A, B, config))


@pytest.mark.parametrize("R", [5, 100, 300])
def test_the_norm_of_the_weight_alone(R):
    """In bits what the whole is where B is 0, over several splits of K and of R."""
    from lowrank.kernels import dora

    W, A, B = randn(40, 1000, dtype=BF16), randn(R, 1000, dtype=BF16), randn(40, R, dtype=FP32)
    B[::2] = 0
    for products in (dora, dora_eager):
        whole, alone = products.norm(W, A, B, alone=True)
        assert torch.equal(whole, products.norm(W, A, B))
        assert torch.equal(whole[::2], alone[::2])
        assert not (whole == alone)[1::2].any()
        torch.testing.assert_close(alone.double(), W.double().norm(dim=1), rtol=1e-5, atol=0)


def test_transposed_factors():
    W, A, B = randn(40, 100, dtype=FP16), randn(100, 8, dtype=FP16).mT, randn(40, 8, dtype=FP32)
    gram = A.float() @ A.float().mT
    assert torch.equal(norm(W, A, B, gram=gram), norm(W, A.contiguous(), B, gram=gram))


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    W = far_rows(3, 64, FP16)
    W.copy_(torch.randn(3, 64))
    A, B = randn(4, 64, dtype=FP16), randn(3, 4, dtype=FP32)
    torch.testing.assert_close(norm(W, A, B).double(), oracle(W, A, B), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.ones(4, 7)), r"expected A \[r, 8\]"),
        (dict(B=torch.ones(6, 5)), r"expected B \[6, 4\] in fp32"),
        (dict(BG=torch.ones(6, 4).half()), r"expected BG \[6, 4\] in fp32"),
        (dict(B=torch.ones(4, 6).mT), "last dim contiguous"),
        (dict(W=torch.ones(8, 6).mT), "last dim must be contiguous"),
        (dict(W=torch.ones(6, 8).double()), "expected fp16, bf16 or fp32"),
        (dict(A=torch.ones(600, 8)), "rank 600"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    from lowrank.kernels.dora_norm import dora_norm

    arguments = dict(W=torch.ones(6, 8), A=torch.ones(4, 8), B=torch.ones(6, 4), BG=torch.ones(6, 4)) | change
    with pytest.raises(ValueError, match=message):
        dora_norm(**{name: t.to(DEVICE) for name, t in arguments.items()})
