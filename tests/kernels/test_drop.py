import pytest
import torch
from thin_inputs import BF16, DEVICE, FP16, FP32, far_rows, randn, strided

from lowrank import bits
from lowrank.ops import dora_eager


def drop(*args, **options):
    from lowrank.kernels.drop import drop

    return drop(*args, **options)


def keeps(M, K):
    mask = torch.rand(M, -(-K // 32) * 32, device=DEVICE) < 0.7
    return bits.pack(mask).view(M, -1), mask[:, :K]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 8), (7, 33), (16, 256), (33, 300), (64, 1030)], ids=str)
def test_every_bit_of_every_element(M, K, dtype):
    t, (keep, mask) = strided(randn(M, K, dtype=dtype)), keeps(M, K)
    t[0, 0] = float("inf") if not mask[0, 0] else 1.0
    assert torch.equal(drop(t, keep), torch.where(mask, t, 0))
    assert torch.equal(drop(t, keep), dora_eager.drop(t, keep))
    start = strided(randn(M, K, dtype=dtype))
    ours, expected = start.clone(), start.clone()
    assert drop(t, keep, ours) is ours
    assert torch.equal(ours, dora_eager.drop(t, keep, expected))
    assert torch.equal(ours, start + torch.where(mask, t, 0))


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    t, (keep, mask) = far_rows(3, 64, FP16), keeps(3, 64)
    t.copy_(torch.randn(3, 64))
    assert torch.equal(drop(t, keep), torch.where(mask, t, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(t=torch.ones(4, 40).double()), "expected fp16, bf16 or fp32"),
        (dict(t=torch.ones(40, 4).mT), "last dim contiguous"),
        (dict(keep=torch.ones(4, 1, dtype=torch.int32)), r"keep bits \[4, 2\]"),
        (dict(keep=torch.ones(4, 2, dtype=torch.int64)), r"keep bits \[4, 2\]"),
        (dict(out=torch.ones(4, 41)), r"expected out \[4, 40\]"),
        (dict(out=torch.ones(4, 40).half()), "expected fp16, bf16 or fp32"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(t=torch.ones(4, 40), keep=torch.ones(4, 2, dtype=torch.int32)) | change
    with pytest.raises(ValueError, match=message):
        drop(**arguments)
