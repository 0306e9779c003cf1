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


def expand(*args, **options):
    from lowrank.kernels.expand import expand

    return expand(*args, **options)


def oracle(S, Bs, scales, scale_tensors, start):
    parts = S.double().split([B.shape[1] for B in Bs], 1)
    y = 0 if start is None else start.double()
    for part, B, scale, t in zip(parts, Bs, scales, scale_tensors, strict=True):
        y = y + (part * scale * (1 if t is None else t.double())) @ B.double().mT
    return y


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("M", "_", "N", "ranks"), CASES, ids=str)
@pytest.mark.parametrize("start", [None, "bias", "matrix"])
def test_against_fp64(M, _, N, ranks, dtype, thin_dtype, start):
    S, Bs = randn(M, sum(ranks), dtype=thin_dtype), [randn(N, r, dtype=thin_dtype) for r in ranks]
    start = {None: None, "bias": randn(N, dtype=dtype), "matrix": randn(M, N, dtype=dtype)}[start]
    scales = [0.5, 2.0, 1.0][: len(ranks)]
    tensors = [None, torch.tensor(0.25, device=DEVICE), None][: len(ranks)]
    arguments = S, Bs, scales, tensors, start, dtype
    Y, truth = expand(*arguments), oracle(*arguments[:-1])
    within([Y], [truth], [oracle(*absolutes(S, Bs), scales, tensors, None if start is None else start.abs())], ["Y"])
    if dtype is not FP32:
        rounded_once([Y], [truth], "Y")


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin_dtype):
    M, _, N, (rank,) = MEAN

    def draw():
        S, B = randn(M, rank, dtype=thin_dtype), randn(N, rank, dtype=thin_dtype)
        arguments = S, [B], [0.5], [None], randn(M, N, dtype=dtype)
        return [expand(*arguments, dtype)], [thin_eager.expand(*arguments, dtype)], [oracle(*arguments)]

    in_the_mean(draw, ["Y"])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_gain_on_the_start(dtype, thin_dtype, biased):
    S, B, start = randn(33, 24, dtype=thin_dtype), randn(70, 24, dtype=FP32), strided(randn(33, 70, dtype=dtype))
    gain, bias = randn(70, dtype=FP32), randn(70, dtype=dtype) if biased else None
    truth = oracle(
        S, [B.to(thin_dtype)], [1.0], [None], start.double() * gain.double() + (bias.double() if biased else 0)
    )
    Y = expand(S, [B], [1.0], [None], start, dtype, gain=gain, bias=bias)
    if dtype is FP32:
        within([Y], [truth], [truth.abs() + 30], ["Y"])
    else:
        rounded_once([Y], [truth], "Y")


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("what", ["a matrix", "its own", "its own without the bias", "its own without a wide bias"])
def test_a_gain_beside_a_base(what, dtype, thin_dtype):
    """Where the gain and B are 0, the base itself; elsewhere Eager's order of operations."""
    S, B, base = randn(33, 24, dtype=thin_dtype), randn(70, 24, dtype=thin_dtype), strided(randn(33, 70, dtype=dtype))
    gain = randn(70, dtype=FP32)
    start = strided(randn(33, 70, dtype=dtype)) if what == "a matrix" else None
    bias = randn(70, dtype=FP32 if "wide" in what else dtype) if "bias" in what else None
    free = base if start is None else start
    free = free if bias is None else free - bias
    truth = oracle(S, [B], [1.0], [None], base.double() + gain.double() * free.double())
    Y = expand(S, [B], [1.0], [None], start, dtype, gain=gain, bias=bias, base=base)
    if dtype is FP32:
        within([Y], [truth], [truth.abs() + 30], ["Y"])
    else:
        rounded_once([Y], [truth], "Y")
    still = expand(S, [B * 0], [1.0], [None], start, dtype, gain=gain * 0, bias=bias, base=base)
    assert torch.equal(still, base)
    one = expand(S, [B * 0], [1.0], [None], start, dtype, gain=gain, bias=bias, base=base)
    if DEVICE == "cpu":  # a GPU multiplies and adds in one rounding
        assert torch.equal(one, (base + free * gain).to(dtype))


def test_a_scale_per_column_and_strides():
    S, B, m = strided(randn(33, 24, dtype=FP32)), randn(24, 70, dtype=FP32).mT, torch.rand(24, device=DEVICE)
    start = strided(randn(33, 70, dtype=BF16))
    truth = oracle(S, [B], [0.5], [m], start)
    rounded_once([expand(S, [B], [0.5], [m], start, BF16)], [truth], "Y")


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "R", "E"), [(1, 33, 8, 1), (37, 130, 24, 3), (70, 65, 200, 5)], ids=str)
def test_a_scale_per_row_and_column(M, N, R, E, dtype, thin_dtype):
    S, B, start = randn(M, R, dtype=thin_dtype), randn(N, R, dtype=thin_dtype), randn(N, dtype=dtype)
    scales, mix = torch.rand(E, R, device=DEVICE), torch.rand(M, E, device=DEVICE)
    m = mix.double() @ scales.double()
    truth = (S.double() * m) @ B.double().mT + start.double()
    bound = (S.double().abs() * m) @ B.double().abs().mT + start.double().abs()
    within([expand(S, [B], [1.0], [scales], start, dtype, mix=mix)], [truth], [bound], ["Y"])
    with pytest.raises(ValueError, match="expected contiguous fp32"):
        expand(S, [B], [1.0], [scales], start, dtype, mix=mix[1:])


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(16,), (100, 8)], ids=str)
def test_masked_sum_is_the_backwards_dx(ranks, dtype, thin_dtype):
    from lowrank.kernels.expand import expand_into

    M, K, n = 37, 150, len(ranks)
    dS, As = [randn(M, r, dtype=thin_dtype) for r in ranks], [randn(r, K, dtype=thin_dtype) for r in ranks]
    keeps = [torch.randint(-(2**31), 2**31, (M, 5), dtype=torch.int32, device=DEVICE) for _ in ranks]
    dX = torch.full((M, K), float("nan"), dtype=dtype, device=DEVICE)
    expand_into(dX, dS, [A.mT for A in As], [1.0] * n, [None] * n, None, keeps)
    truth = sum((d.double() @ A.double()) * dropout_bits(k, K) for d, A, k in zip(dS, As, keeps, strict=True))
    if dtype is FP32:
        d, A = absolutes(dS, As)
        within([dX], [truth], [sum(a.double() @ b.double() for a, b in zip(d, A, strict=True))], ["dX"])
    else:
        rounded_once([dX], [truth], "dX")


@pytest.mark.gpu
def test_rows_further_apart_than_int32_reaches():
    S, B, start = randn(3, 4, dtype=FP16), randn(70, 4, dtype=FP16), far_rows(3, 70, FP16)
    start.copy_(torch.randn(3, 70))
    truth = oracle(S, [B], [1.0], [None], start)
    rounded_once([expand(S, [B], [1.0], [None], start, FP16)], [truth], "Y")


def test_empty():
    assert expand(randn(0, 4, dtype=FP32), [randn(7, 4, dtype=FP32)], [1.0], [None], None, FP32).shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(Bs=[torch.ones(7, 5)]), "does not fit"),
        (dict(S=torch.ones(4, 8).mT), "last dim must be contiguous"),
        (dict(start=torch.ones(6)), r"expected start \[7\] or \[8, 7\]"),
        (dict(start=torch.ones(7, 8).mT), "start's last dim must be contiguous"),
        (dict(base=torch.ones(7, 8).mT, gain=torch.ones(7)), "base's last dim must be contiguous"),
        (dict(base=torch.ones(8, 7)), r"expected base \[8, 7\] beside a gain"),
        (
            dict(base=torch.ones(8, 7), start=torch.ones(8, 7), gain=torch.ones(7), bias=torch.ones(7)),
            "no bias on a start",
        ),
        (dict(start=torch.ones(7, dtype=torch.float64)), "expected fp16, bf16 or fp32"),
        (dict(S=torch.ones(8, 600), Bs=[torch.ones(7, 600)]), "rank 600 is outside"),
        (dict(dtype=torch.float64), "expected fp16, bf16 or fp32"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = (
        dict(S=torch.ones(8, 4), Bs=[torch.ones(7, 4)], scales=[1.0], scale_tensors=[None], start=None, dtype=FP32)
        | change
    )
    with pytest.raises(ValueError, match=message):
        expand(**arguments)
