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
    MEAN,
    absolutes,
    far_rows,
    randn,
    strided,
)

from lowrank.ops import thin_eager


def dy_pass(*args, **options):
    from lowrank.kernels.dy_pass import dy_pass

    return dy_pass(*args, **options)


def oracle(dY, Bs, scales, tensors, S):
    parts = S.double().split([B.shape[1] for B in Bs], 1)
    scales = [s * (1 if t is None else t.double()) for s, t in zip(scales, tensors, strict=True)]
    dS = [dY.double() @ B.double() * s for B, s in zip(Bs, scales, strict=True)]
    return dS, [dY.double().mT @ part * s for part, s in zip(parts, scales, strict=True)]


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("M", "_", "N", "ranks"), CASES, ids=str)
def test_against_fp64(M, _, N, ranks, dtype, thin_dtype):
    dY, Bs = randn(M, N, dtype=dtype), [randn(N, r, dtype=thin_dtype) for r in ranks]
    S, n = randn(M, sum(ranks), dtype=thin_dtype), len(ranks)
    scales, tensors = [0.5, 2.0, 1.0][:n], [None, torch.tensor(0.25, device=DEVICE), None][:n]
    dS, dB = dy_pass(dY, Bs, scales, tensors, S, [True] * n, True, thin_dtype)
    true_dS, true_dB = oracle(dY, Bs, scales, tensors, S)
    a_dY, a_Bs, a_S = absolutes(dY, Bs, S)
    dS_scales, dB_scales = oracle(a_dY, a_Bs, scales, tensors, a_S)
    within(dS + dB, true_dS + true_dB, dS_scales + dB_scales, ["dS"] * n + ["dB"] * n)
    if thin_dtype is not FP32:
        rounded_once(dB, true_dB, "dB")


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin_dtype):
    M, _, N, (rank,) = MEAN

    def draw():
        dY, B, S = randn(M, N, dtype=dtype), randn(N, rank, dtype=thin_dtype), randn(M, rank, dtype=thin_dtype)
        runs = [f(dY, [B], [0.5], [None], S, [True], True, thin_dtype) for f in (dy_pass, thin_eager.dy_pass)]
        return *([*dS, *dB] for dS, dB in runs), [t for of in oracle(dY, [B], [0.5], [None], S) for t in of]

    in_the_mean(draw, ["dS", "dB"])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 1), (3, 2)], ids=str)
def test_one_pass_splits_both_ways_and_gives_every_bit_twice(grid, dtype, thin_dtype):
    from lowrank.kernels.dy_pass import Config

    chunks, groups = grid
    M, N, R = 133, 250, 24
    config = Config(block_m=32, block_n=32, blocks=8 // groups, chunks=chunks)
    dY, B, S = randn(M, N, dtype=dtype), randn(N, R, dtype=thin_dtype), randn(M, R, dtype=thin_dtype)
    columns = torch.rand(R, device=DEVICE)
    runs = [dy_pass(dY, [B], [0.5], [columns], S, [True], True, thin_dtype, config=config) for _ in range(2)]
    (dS,), (dB,) = runs[0]
    assert torch.equal(dS, runs[1][0][0])
    assert torch.equal(dB, runs[1][1][0])
    (true_dS,), (true_dB,) = oracle(dY, [B], [0.5], [columns], S)
    (dS_scale,), (dB_scale,) = oracle(*absolutes(dY, [B]), [0.5], [columns], S.abs())
    within([dS, dB], [true_dS, true_dB], [dS_scale, dB_scale], ["dS", "dB"])


def test_only_what_is_needed():
    dY, Bs, S = randn(9, 40, dtype=FP16), [randn(40, 4, dtype=FP16), randn(40, 8, dtype=FP16)], randn(9, 12, dtype=FP16)
    dS, dB = dy_pass(dY, Bs, [1.0, 1.0], [None, None], S, [False, True], False, FP16)
    assert dS == [None, None]
    assert dB[0] is None
    assert dB[1].shape == (40, 8)
    dS, dB = dy_pass(dY, Bs, [1.0, 1.0], [None, None], None, [False, False], True, FP16)
    assert [d.shape for d in dS] == [(9, 4), (9, 8)]
    assert dB == [None, None]


def test_strides_and_another_factor_dtype():
    dY, B, S = strided(randn(33, 70, dtype=BF16)), randn(8, 70, dtype=FP32).mT, strided(randn(33, 8, dtype=BF16))
    (dS,), (dB,) = dy_pass(dY, [B], [0.5], [None], S, [True], True, BF16)
    (true_dS,), (true_dB,) = oracle(dY, [B.to(BF16)], [0.5], [None], S)
    assert dB.dtype is FP32
    rounded_once([dS], [true_dS], "dS")
    within([dB], [true_dB], [0.5 * dY.double().abs().mT @ S.double().abs()], ["dB"])


@pytest.mark.gpu
@pytest.mark.parametrize("one_pass", [False, True])
def test_rows_further_apart_than_int32_reaches(one_pass):
    from lowrank.kernels.dy_pass import Config

    dY, B, S = far_rows(3, 64, FP16), randn(64, 4, dtype=FP16), randn(3, 4, dtype=FP16)
    dY.copy_(torch.randn(3, 64))
    (dS,), (dB,) = dy_pass(
        dY, [B], [1.0], [None], S, [True], True, FP16, config=Config(16, 32, 2, 1) if one_pass else None
    )
    torch.testing.assert_close(dS, dY.contiguous() @ B)
    torch.testing.assert_close(dB, dY.contiguous().mT @ S)


def test_bytes_choose_between_one_pass_and_two():
    from lowrank.kernels.dy_pass import one_pass_pays, pick_config

    def pays(R, dtype=BF16, thin=BF16):
        kind = "same" if dtype is thin else "split"
        return one_pass_pays(8192, 4096, R, dtype, thin, pick_config(8192, 4096, max(16, R), kind, 90, 132))

    assert pays(16)
    assert pays(32)
    assert not pays(64)
    assert not pays(128)
    assert not pays(16, FP16, FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(Bs=[torch.ones(8, 4)]), "do not fit"),
        (dict(S=torch.ones(8, 5)), "do not fit"),
        (dict(S=None), "do not fit"),
        (dict(dY=torch.ones(7, 8).mT), "last dim must be contiguous"),
        (dict(Bs=[torch.ones(7, 4, dtype=torch.float64)]), "expected fp16, bf16 or fp32"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(
        dY=torch.ones(8, 7),
        Bs=[torch.ones(7, 4)],
        scales=[1.0],
        scale_tensors=[None],
        S=torch.ones(8, 4),
        need_dB=[True],
        need_dS=True,
        dtype=FP32,
    )
    with pytest.raises(ValueError, match=message):
        dy_pass(**(arguments | change))
