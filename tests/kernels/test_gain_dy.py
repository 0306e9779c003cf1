import pytest
import torch
from right import in_the_mean, within
from thin_inputs import BF16, DEVICE, FP16, FP32, far_rows, randn, strided

from lowrank.ops import dora_eager

NAMES = "scaled", "dots", "sums"
SHAPES = [(1, 600), (7, 33), (64, 128), (133, 1030), (300, 16)]


def gain_dy(*args, **options):
    from lowrank.kernels.gain_dy import gain_dy

    return gain_dy(*args, **options)


def oracle(dY, gain, v):
    dY = dY.double()
    return dY * gain.double(), (dY * v.double()).sum(0), dY.sum(0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("M", "N"), SHAPES, ids=str)
def test_against_fp64(M, N, dtype):
    dY, v, gain = strided(randn(M, N, dtype=dtype)), strided(randn(M, N, dtype=dtype)), randn(N, dtype=FP32)
    results, truth = gain_dy(dY, gain, v, True, True), oracle(dY, gain, v)
    within(results, truth, oracle(dY.abs(), gain.abs(), v.abs()), NAMES)
    assert torch.equal(gain_dy(dY, gain, None, True, False)[0], results[0])
    assert torch.equal(gain_dy(dY, gain, v, False, False)[1], results[1])
    assert torch.equal(gain_dy(dY, gain, None, False, True)[2], results[2])
    assert gain_dy(dY, gain, None, False, False) == (None, None, None)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_as_right_as_eager(dtype):
    def draw():
        arguments = randn(33, 70, dtype=dtype), randn(70, dtype=FP32), randn(33, 70, dtype=dtype)
        return gain_dy(*arguments, True, True), dora_eager.gain_dy(*arguments, True, True), oracle(*arguments)

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize("bias_dtype", [BF16, FP32], ids=str)
def test_a_bias_that_is_part_of_v(bias_dtype):
    dY, v, gain = randn(133, 70, dtype=BF16), randn(133, 70, dtype=BF16), randn(70, dtype=FP32)
    bias = 100 * randn(70, dtype=bias_dtype)
    v = (v + bias).to(BF16)
    for run in (gain_dy, dora_eager.gain_dy):
        scaled, dots, sums = run(dY, gain, v, True, True, bias)
        free = v.double() - bias.double()
        truth = (dY.double() * free).sum(0)
        assert ((dots - truth).abs() <= 1e-5 * (dY.double() * free).abs().sum(0)).all()
        for result, same in zip((scaled, sums), run(dY, gain, v, True, True)[::2], strict=True):
            assert torch.equal(result, same)


def test_empty():
    scaled, dots, sums = gain_dy(randn(0, 8, dtype=BF16), randn(8, dtype=FP32), randn(0, 8, dtype=BF16), True, True)
    assert scaled.shape == (0, 8)
    assert not dots.any()
    assert not sums.any()


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    dY, gain = far_rows(3, 64, FP16), torch.rand(64, device=DEVICE)
    dY.copy_(torch.randn(3, 64))
    torch.testing.assert_close(gain_dy(dY, gain, dY, True, False)[0], (dY * gain).half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(v=torch.ones(8, 5)), r"expected \[8, 4\]"),
        (dict(dY=torch.ones(8, 4).double()), "fp16, bf16 or fp32"),
        (dict(dY=torch.ones(4, 8).mT), "contiguous last dim"),
        (dict(gain=torch.ones(5)), r"contiguous fp32 gain \[4\]"),
        (dict(bias=torch.ones(5)), r"contiguous bias \[4\]"),
        (dict(gain=torch.ones(4).half()), r"contiguous fp32 gain \[4\]"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(dY=torch.ones(8, 4), gain=torch.ones(4), v=torch.ones(8, 4), need_scaled=True, need_sum=True)
    with pytest.raises(ValueError, match=message):
        gain_dy(**arguments | change)
