import pytest
import torch
from right import in_the_mean, rounded_once, within
from test_shrink import dropout_bits
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


def x_pass(*args, **options):
    from lowrank.kernels.x_pass import x_pass

    return x_pass(*args, **options)


def oracle(x, dS, As, masks, keeps):
    kept = [dropout_bits(keep, x.shape[1]).double() for keep in keeps]
    kept = [kept[m] if m >= 0 else torch.ones((), dtype=torch.float64, device=DEVICE) for m in masks]
    dA = [d.double().mT @ (x.double() * k) for d, k in zip(dS, kept, strict=True)]
    return dA, sum((d.double() @ A.double()) * k for d, A, k in zip(dS, As, kept, strict=True))


def inputs(M, K, ranks, dtype, thin_dtype, masks):
    keeps = [
        torch.randint(-(2**31), 2**31, (M, -(-K // 32)), dtype=torch.int32, device=DEVICE)
        for _ in range(max(masks) + 1)
    ]
    factors = [randn(r, K, dtype=thin_dtype) for r in ranks]
    return randn(M, K, dtype=dtype), [randn(M, r, dtype=thin_dtype) for r in ranks], factors, keeps


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("ranks", [(8,), (16, 3)], ids=str)
def test_added_to_dx_and_rounded_once(ranks, dropped):
    """Sums that fit fp16 of terms that do not."""
    n = len(ranks)
    masks = list(range(n)) if dropped else [-1] * n
    x, dS, As, keeps = inputs(37, 150, ranks, FP16, FP32, masks)
    As = [10000 * A for A in As]
    _, thin = oracle(x, dS, As, masks, keeps)
    assert thin.abs().max() > 70000
    start = (randn(37, 150, dtype=FP32) - thin).clamp(-60000, 60000).half()
    truth = start.double() + thin
    fits = truth.abs() < 65000
    for run in (x_pass, thin_eager.x_pass):
        dX = start.clone()
        run(x, dS, As, [True] * n, dX, masks, keeps, add=True)
        assert ((dX - truth).abs() <= 2**-11 * truth.abs() + 1e-5 * thin.abs() + 0.1)[fits].all()


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "_", "ranks", "dropped"),
    [(*case, how) for case in CASES for how in ("none", "shared", "each")[: 2 if len(case[3]) == 1 else 3]],
    ids=str,
)
def test_against_fp64(M, K, _, ranks, dtype, thin_dtype, dropped):
    n = len(ranks)
    masks = {"none": [-1] * n, "shared": [0] * n, "each": list(range(n))}[dropped]
    if dropped == "each" and n > 2:
        masks[1] = -1  # and one adapter without dropout between two with
        masks[2] = 1
    x, dS, As, keeps = inputs(M, K, ranks, dtype, thin_dtype, masks)
    dX = torch.full((M, K), float("nan"), dtype=dtype, device=DEVICE)
    dA = x_pass(x, dS, As, [True] * n, dX, masks, keeps)
    true_dA, true_dX = oracle(x, dS, As, masks, keeps)
    dA_scale, dX_scale = oracle(*absolutes(x, dS, As), masks, keeps)
    within([*dA, dX], [*true_dA, true_dX], [*dA_scale, dX_scale], ["dA"] * n + ["dX"])
    if dtype is not FP32:  # under several masks too, where eager rounds their sum once per mask
        rounded_once([dX], [true_dX], "dX")


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("masks", [[-1], [0]], ids=str)
def test_as_right_as_eager(dtype, thin_dtype, masks):
    M, K, _, ranks = MEAN

    def draw():
        x, dS, As, keeps = inputs(M, K, ranks, dtype, thin_dtype, masks)
        dX, same_dX = torch.full_like(x, float("nan")), torch.empty_like(x)
        dA, same_dA = (
            f(x, dS, As, [True], out, masks, keeps) for f, out in ((x_pass, dX), (thin_eager.x_pass, same_dX))
        )
        true_dA, true_dX = oracle(x, dS, As, masks, keeps)
        return [*dA, dX], [*same_dA, same_dX], [*true_dA, true_dX]

    in_the_mean(draw, ["dA", "dX"])


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_and_every_bit_twice(chunks):
    from lowrank.kernels.x_pass import Config

    x, dS, As, keeps = inputs(133, 300, (24, 5), BF16, BF16, [0, 1])
    config = Config(block_m=32, block_k=64, chunks=chunks)
    runs = []
    for _ in range(2):
        dX = torch.full_like(x, float("nan"))
        runs.append([*x_pass(x, dS, As, [True, True], dX, [0, 1], keeps, config=config), dX])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    true_dA, true_dX = oracle(x, dS, As, [0, 1], keeps)
    truth = [*true_dA, true_dX]
    rounded_once(runs[0], truth, "dA, dX")


def test_more_columns_than_one_launch_takes():
    ranks = (64, 100, 128)
    x, dS, As, keeps = inputs(40, 96, ranks, FP16, FP16, [0, -1, 0])
    dX = torch.full_like(x, float("nan"))
    dA = x_pass(x, dS, As, [True, False, True], dX, [0, -1, 0], keeps)
    true_dA, true_dX = oracle(x, dS, As, [0, -1, 0], keeps)
    assert dA[1] is None
    rounded_once([dA[0], dA[2], dX], [true_dA[0], true_dA[2], true_dX], "dA, dX")


def test_only_what_is_needed():
    x, dS, As, keeps = inputs(9, 40, (4, 8), FP16, FP16, [0, 0])
    true_dA, true_dX = oracle(x, dS, As, [0, 0], keeps)
    assert x_pass(None, dS, As, [False, False], None, [0, 0], keeps) == [None, None]
    dX = torch.full_like(x, float("nan"))
    assert x_pass(None, dS, As, [False, False], dX, [0, 0], keeps) == [None, None]
    rounded_once([dX], [true_dX], "dX")
    only = x_pass(x, dS, As, [False, True], None, [0, 0], keeps)
    assert only[0] is None
    rounded_once([only[1]], [true_dA[1]], "dA")


def test_strides_and_another_factor_dtype():
    x, dS, A = strided(randn(33, 70, dtype=BF16)), strided(randn(33, 8, dtype=BF16)), randn(70, 8, dtype=FP32).mT
    dX = strided(randn(33, 70, dtype=BF16))
    (dA,) = x_pass(x, [dS], [A], [True], dX, [-1], [])
    assert dA.dtype is FP32
    assert dA.is_contiguous()
    (true_dA,), true_dX = oracle(x, [dS], [A.to(BF16)], [-1], [])
    within([dA], [true_dA], [dS.double().abs().mT @ x.double().abs()], ["dA"])
    rounded_once([dX], [true_dX], "dX")


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    x, dX = far_rows(3, 64, FP16), far_rows(3, 64, FP16)
    x.copy_(torch.randn(3, 64))
    dS, A = randn(3, 4, dtype=FP16), randn(4, 64, dtype=FP16)
    (dA,) = x_pass(x, [dS], [A], [True], dX, [-1], [])
    torch.testing.assert_close(dA, dS.mT @ x.contiguous())
    torch.testing.assert_close(dX.contiguous(), dS @ A)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(7, 8).mT), "last dim must be contiguous"),
        (dict(dS=[torch.ones(9, 4)]), "does not fit x"),
        (dict(As=[torch.ones(4, 8)]), r"expected factors \[R, 7\]"),
        (dict(dX=torch.ones(8, 8)), "expected dX"),
        (dict(masks=[0]), "do not fit 0 keep tensors"),
        (dict(dS=[torch.ones(8, 4).double()]), "thin products in torch.float64|expected fp16"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(
        x=torch.ones(8, 7),
        dS=[torch.ones(8, 4)],
        As=[torch.ones(4, 7)],
        need_dA=[True],
        dX=torch.ones(8, 7),
        masks=[-1],
        keeps=[],
    )
    with pytest.raises(ValueError, match=message):
        x_pass(**(arguments | change))
