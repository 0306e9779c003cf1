import pytest
import torch
from test_svf_dy import scales_and_mix
from thin_inputs import BF16, DEVICE, FP16, FP32, as_right, far_rows, few_or_interpreted, needs_triton, randn, strided

from lowrank.ops.svf_impl import Eager

pytestmark = needs_triton
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
    found = svf_scale(D, scales, mix, S, dtype)
    same = Eager.scale_and_dot(D.clone(), scales, mix, S, True)
    absolute = oracle(D.abs(), scales, mix, S.abs())
    for name, ours, eager, true, bound in zip(
        ("dS", "dscales", "dmix"), found, same, oracle(D, scales, mix, S), absolute, strict=False
    ):
        as_right([ours], [eager], [true], name, [bound] if few_or_interpreted(ours) else None)
    assert torch.equal(svf_scale(D, scales, mix, None, dtype)[0], found[0])
    assert torch.equal(svf_scale(D, scales, mix, S, None)[1], found[1])


@pytest.mark.parametrize("E", [None, 2])
def test_partials_are_summed_first(E):
    D, S, (scales, mix) = randn(3, 40, 70, dtype=FP32), randn(40, 70, dtype=BF16), scales_and_mix(40, 70, E)
    found = svf_scale(D, scales, mix, S, BF16)
    truth = oracle(D.double().sum(0), scales, mix, S)
    for name, ours, true in zip(("dS", "dscales", "dmix"), found, truth, strict=False):
        as_right([ours], [true.to(BF16).to(ours.dtype)], [true], name)


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
