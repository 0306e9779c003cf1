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


def shrink(*args, **options):
    from lowrank.kernels.shrink import shrink

    return shrink(*args, **options)


def oracle(x, As, masks, keeps):
    kept = [dropout_bits(keep, x.shape[1]) for keep in keeps]
    return torch.cat(
        [(x.double() * kept[m] if m >= 0 else x.double()) @ A.double().mT for A, m in zip(As, masks, strict=True)], 1
    )


def dropout_bits(keep, columns):
    from lowrank import bits

    return bits.unpack(keep.view(-1), (keep.shape[0], 32 * keep.shape[1]))[:, :columns]


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "_", "ranks"), CASES, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_against_fp64(M, K, _, ranks, dtype, thin_dtype, dropped):
    x, As = randn(M, K, dtype=dtype), [randn(r, K, dtype=thin_dtype) for r in ranks]
    masks = [j % 2 for j in range(len(ranks))] if dropped else [-1] * len(ranks)
    cuts = [19661, 32768][: max(masks) + 1]
    seeds = torch.tensor([987654321012345678, 3], device=DEVICE)[: len(cuts)]
    S, keeps = shrink(x, As, thin_dtype, masks, cuts, seeds)
    _, eager_keeps = thin_eager.shrink(x, As, thin_dtype, masks, cuts, seeds)
    assert all(torch.equal(ours, expected) for ours, expected in zip(keeps, eager_keeps, strict=True))
    within([S], [oracle(x, As, masks, keeps)], [oracle(*absolutes(x, As), masks, keeps)], ["S"])
    if dropped:  # the masks given
        S_again, none = shrink(x, As, thin_dtype, masks, cuts, torch.stack(keeps))
        assert torch.equal(S_again, S)
        assert none == []


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("masks", [[-1], [0]], ids=str)
def test_as_right_as_eager(dtype, thin_dtype, masks):
    M, K, _, (rank,) = MEAN
    seeds = torch.tensor([987654321012345678], device=DEVICE)

    def draw():
        x, A = randn(M, K, dtype=dtype), randn(rank, K, dtype=thin_dtype)
        cuts = [19661][: len(masks)] if masks[0] >= 0 else []
        S, keeps = shrink(x, [A], thin_dtype, masks, cuts, seeds)
        return [S], [thin_eager.shrink(x, [A], thin_dtype, masks, cuts, seeds)[0]], [oracle(x, [A], masks, keeps)]

    in_the_mean(draw, ["S"])


@pytest.mark.parametrize("split_k", [1, 3, 8])
def test_split_k_and_every_bit_twice(split_k):
    from lowrank.kernels.shrink import Config

    x, A = randn(5, 1000, dtype=BF16), randn(16, 1000, dtype=BF16)
    config = Config(16, 64, split_k, 4, 2)
    runs = [shrink(x, [A], BF16, [0], [6554], torch.tensor([5], device=DEVICE), config=config) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    truth = oracle(x, [A], [0], runs[0][1])
    within([runs[0][0]], [truth], [oracle(*absolutes(x, [A]), [0], runs[0][1])], ["S"])
    assert torch.equal(
        runs[0][1][0], thin_eager.shrink(x, [A], BF16, [0], [6554], torch.tensor([5], device=DEVICE))[1][0]
    )


def test_scales_strides_and_another_factor_dtype():
    x, A, B = strided(randn(33, 70, dtype=FP16)), strided(randn(8, 70, dtype=FP32)), randn(70, 24, dtype=FP16)
    columns = torch.rand(24, device=DEVICE)
    out = torch.full((33, 40), float("nan"), dtype=FP16, device=DEVICE)
    S, _ = shrink(
        x,
        [A, B.mT],
        FP16,
        [-1, -1],
        [],
        None,
        [0.5, 2.0],
        [torch.tensor(3.0, device=DEVICE), columns],
        out=out[:, 4:36],
    )
    truth = torch.cat([x.double() @ A.to(FP16).double().mT * 1.5, x.double() @ B.double() * 2 * columns.double()], 1)
    rounded_once([S], [truth], "S")
    assert out[:, :4].isnan().all()
    assert out[:, 36:].isnan().all()


def test_what_is_dropped_is_gone_even_if_it_is_nan():
    x, A = torch.full((3, 40), float("nan"), device=DEVICE), randn(4, 40, dtype=FP32)
    S, (keep,) = shrink(x, [A], FP32, [0], [65536], torch.tensor([1], device=DEVICE))
    assert not S.any()
    assert not keep.any()


def test_rows_further_apart_than_int32_reaches():
    x, A = far_rows(3, 64, FP16), randn(4, 64, dtype=FP16)
    x.copy_(torch.randn(3, 64))
    torch.testing.assert_close(shrink(x, [A], FP16, [-1], [], None)[0], x.contiguous() @ A.mT)


def test_empty():
    S, (keep,) = shrink(
        torch.empty(0, 40, device=DEVICE), [randn(4, 40, dtype=FP32)], FP32, [0], [9], torch.tensor([1], device=DEVICE)
    )
    assert S.shape == (0, 4)
    assert keep.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(4, 8).mT), "last dim must be contiguous"),
        (dict(x=torch.ones(8, 4, dtype=torch.float64)), "expected fp16, bf16 or fp32"),
        (dict(As=[torch.ones(513, 4)]), "rank 513 is outside 1..512"),
        (dict(As=[torch.ones(0, 4)]), "rank 0 is outside"),
        (dict(As=[torch.ones(2, 5)]), r"expected factors \[r, 4\]"),
        (dict(As=[torch.ones(2, 4, device="meta")]), "tensors on"),
        (dict(x=torch.ones(8, 4).half(), dtype=torch.bfloat16), "thin products in torch.bfloat16 over torch.float16"),
        (dict(masks=[0]), "masks"),
        (dict(masks=[0], thresholds=[1], seeds=torch.zeros(1, 8, 2, dtype=torch.int32)), r"keep bits \[1, 8, 1\]"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = (
        dict(x=torch.ones(8, 4), As=[torch.ones(2, 4)], dtype=FP32, masks=[-1], thresholds=[], seeds=None) | change
    )
    with pytest.raises(ValueError, match=message):
        shrink(**arguments)
