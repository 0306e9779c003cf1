import pytest
import torch
from right import in_the_mean, rounded_once, within
from test_svf_dy import scales_and_mix
from thin_inputs import BF16, DEVICE, FP16, FP32, far_rows, randn, strided

from lowrank.ops import svf_eager

SHAPES = [(1, 600), (7, 33), (64, 128), (133, 1030), (300, 16)]


def svf_scale(*args, **options):
    from lowrank.kernels.svf_scale import svf_scale

    return svf_scale(*args, **options)


def oracle(D, scales, mix, S):
    D, scales = D.double(), scales.double()
    m = scales if mix is None else mix.double() @ scales
    h = D * S.double()
    return (D * m, h.sum(0)) if mix is None else (D * m, mix.double().mT @ h, h @ scales.mT)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("E", [None, 1, 3])
@pytest.mark.parametrize(("M", "R"), SHAPES, ids=str)
def test_against_fp64(M, R, dtype, E):
    D, S, (scales, mix) = strided(randn(M, R, dtype=dtype)), strided(randn(M, R, dtype=dtype)), scales_and_mix(M, R, E)
    results = svf_scale(D, scales, mix, S, dtype)
    names = ("dS", "dscales", "dmix")[: 2 if E is None else 3]
    within(results[: len(names)], oracle(D, scales, mix, S), oracle(D.abs(), scales, mix, S.abs()), names)
    assert torch.equal(svf_scale(D, scales, mix, None, dtype)[0], results[0])
    assert torch.equal(svf_scale(D, scales, mix, S, None)[1], results[1])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("E", [None, 3])
def test_as_right_as_eager(dtype, E):
    def draw():
        D, S, (scales, mix) = randn(33, 70, dtype=dtype), randn(33, 70, dtype=dtype), scales_and_mix(33, 70, E)
        results, same = svf_scale(D, scales, mix, S, dtype), svf_eager.scale_and_dot(D.clone(), scales, mix, S, True)
        truth = oracle(D, scales, mix, S)
        return results[: len(truth)], same[: len(truth)], truth

    in_the_mean(draw, ("dS", "dscales", "dmix")[: 2 if E is None else 3])


@pytest.mark.parametrize("E", [None, 2])
def test_partials_are_summed_first(E):
    D, S, (scales, mix) = randn(3, 40, 70, dtype=FP32), randn(40, 70, dtype=BF16), scales_and_mix(40, 70, E)
    results = svf_scale(D, scales, mix, S, BF16)
    truth = oracle(D.double().sum(0), scales, mix, S)
    scales_ = oracle(D.double().abs().sum(0), scales, mix, S.abs())
    names = ("dS", "dscales", "dmix")[: len(truth)]
    within(results[: len(truth)], truth, scales_, names)
    rounded_once(results[:1], truth[:1], "dS")


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    D, scales = far_rows(3, 64, FP16), torch.rand(64, device=DEVICE)
    D.copy_(torch.randn(3, 64))
    torch.testing.assert_close(svf_scale(D, scales, None, None, FP16)[0], (D * scales).half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(S=torch.ones(8, 5)), r"expected \[8, 4\]"),
        (dict(D=torch.ones(8, 4).double()), r"expected \[8, 4\] fp16, bf16 or fp32"),
        (dict(D=torch.ones(4, 8).mT), "contiguous last dim"),
        (dict(scales=torch.ones(5)), r"expected contiguous fp32 \[4\]"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(D=torch.ones(8, 4), scales=torch.ones(4), mix=None, S=torch.ones(8, 4), dtype=FP32) | change
    with pytest.raises(ValueError, match=message):
        svf_scale(**arguments)
