import pytest
import torch
from right import in_the_mean, rounded_once, within
from thin_inputs import (
    BF16,
    CASES,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    absolutes,
    far_rows,
    randn,
    strided,
)

from lowrank.ops import svf_eager

NAMES = "dS", "dscales", "dmix"
CASES = [(M, N, ranks[0]) for M, _, N, ranks in CASES]


def svf_dy(*args, **options):
    from lowrank.kernels.svf_dy import svf_dy

    return svf_dy(*args, **options)


def scales_and_mix(M, R, E):
    if E is None:
        return torch.rand(R, device=DEVICE) + 0.5, None
    return torch.rand(E, R, device=DEVICE) + 0.5, torch.rand(M, E, device=DEVICE)


def oracle(dY, B, scales, mix, S):
    dY, B, scales, S = dY.double(), B.double(), scales.double(), S.double()
    D = dY @ B
    h = S * D
    if mix is None:
        return D * scales, h.sum(0)
    mix = mix.double()
    return D * (mix @ scales), mix.mT @ h, h @ scales.mT


@pytest.mark.parametrize("E", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "R"), CASES, ids=str)
def test_against_fp64(M, N, R, dtype, thin_dtype, E):
    dY, B, S = randn(M, N, dtype=dtype), randn(N, R, dtype=thin_dtype), randn(M, R, dtype=thin_dtype)
    scales, mix = scales_and_mix(M, R, E)
    results = [t for t in svf_dy(dY, B, scales, mix, S, True, thin_dtype) if t is not None]
    scales_of = oracle(*absolutes(dY, B), scales, mix, S.abs())
    within(results, oracle(dY, B, scales, mix, S), scales_of, NAMES[: len(results)])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("E", [None, 3])
def test_as_right_as_eager(dtype, thin_dtype, E):
    def draw():
        dY, B, S = randn(33, 66, dtype=dtype), randn(66, 70, dtype=thin_dtype), randn(33, 70, dtype=thin_dtype)
        arguments = dY, B, *scales_and_mix(33, 70, E), S
        runs = (f(*arguments, True, thin_dtype) for f in (svf_dy, svf_eager.dy_pass))
        return *([t for t in of if t is not None] for of in runs), oracle(*arguments)

    in_the_mean(draw, NAMES[: 2 if E is None else 3])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("E", [None, 2])
@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize("R", [24, 200])
def test_split_and_whole_give_every_bit_twice(split_k, E, dtype, thin_dtype, R):
    from lowrank.kernels.shrink import Config

    M, N = 70, 250
    config = Config(block_m=32, block_k=32, split_k=split_k, num_warps=4, num_stages=2)
    dY, B, S = randn(M, N, dtype=dtype), randn(N, R, dtype=thin_dtype), randn(M, R, dtype=thin_dtype)
    scales, mix = scales_and_mix(M, R, E)
    runs = [svf_dy(dY, B, scales, mix, S, True, thin_dtype, config) for _ in range(2)]
    truth, scales_of = oracle(dY, B, scales, mix, S), oracle(*absolutes(dY, B), scales, mix, S.abs())
    first, second = ([t for t in of if t is not None] for of in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    within(first, truth, scales_of, NAMES[: len(first)])


@pytest.mark.parametrize("split_k", [1, 2])
def test_only_what_is_needed(split_k):
    from lowrank.kernels.shrink import Config

    config = Config(16, 32, split_k, 4, 2)
    dY, B, S = randn(9, 100, dtype=FP16), randn(100, 4, dtype=FP16), randn(9, 4, dtype=FP16)
    scales, mix = scales_and_mix(9, 4, 2)
    dS, dscales, dmix = svf_dy(dY, B, scales, mix, S, False, FP16, config)
    assert dS is None
    assert (dscales.shape, dmix.shape) == ((2, 4), (9, 2))
    dS, dscales, dmix = svf_dy(dY, B, scales[0], None, None, True, FP16, config)
    assert (dS.shape, dscales, dmix) == ((9, 4), None, None)
    dS, dscales, dmix = svf_dy(dY[:0], B, scales, mix[:0], S[:0], True, FP16)
    assert dS.shape == (0, 4)
    assert torch.equal(dscales, torch.zeros(2, 4, device=DEVICE))
    assert dmix.shape == (0, 2)


def test_strides_and_another_factor_dtype():
    dY, B, S = strided(randn(33, 70, dtype=BF16)), randn(8, 70, dtype=FP32).mT, strided(randn(33, 8, dtype=BF16))
    scales, mix = scales_and_mix(33, 8, 2)
    truth = oracle(dY, B.to(BF16), scales, mix, S)
    results = svf_dy(dY, B, scales, mix, S, True, BF16)
    within(results, truth, oracle(*absolutes(dY, B.to(BF16)), scales, mix, S.abs()), NAMES)
    rounded_once(results[:1], truth[:1], "dS")


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    dY, B, S = far_rows(3, 64, FP16), randn(64, 4, dtype=FP16), far_rows(3, 4, FP16)
    dY.copy_(torch.randn(3, 64))
    S.copy_(torch.randn(3, 4))
    scales, _ = scales_and_mix(3, 4, None)
    dS, dscales, _ = svf_dy(dY, B, scales, None, S, True, FP16)
    truth = oracle(dY, B, scales, None, S)
    torch.testing.assert_close(dS, truth[0].half(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dscales, truth[1].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(B=torch.ones(8, 4)), "do not fit"),
        (dict(S=torch.ones(8, 5)), "do not fit"),
        (dict(S=torch.ones(4, 8).mT), "do not fit"),
        (dict(dY=torch.ones(7, 8).mT), "last dim must be contiguous"),
        (dict(B=torch.ones(7, 4, dtype=torch.float64)), "expected fp16, bf16 or fp32"),
        (dict(scales=torch.ones(4).half()), r"expected contiguous fp32 \[4\]"),
        (dict(scales=torch.ones(5)), r"expected contiguous fp32 \[4\]"),
        (dict(scales=torch.ones(2, 4), mix=torch.ones(7, 2)), r"expected contiguous fp32 \[8, 2\]"),
        (dict(scales=torch.ones(3, 4), mix=torch.ones(8, 2)), r"expected contiguous fp32 \[2, 4\]"),
        (dict(scales=torch.ones(2, 4), mix=torch.ones(2, 8).mT), "expected contiguous fp32"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(
        dY=torch.ones(8, 7),
        B=torch.ones(7, 4),
        scales=torch.ones(4),
        mix=None,
        S=torch.ones(8, 4),
        need_dS=True,
        dtype=FP32,
    )
    with pytest.raises(ValueError, match=message):
        svf_dy(**(arguments | change))
