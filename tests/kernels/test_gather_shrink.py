import pytest
import torch
from experts_inputs import COUNTS, routing, spread
from right import in_the_mean, within
from thin_inputs import BF16, DTYPES, randn, strided


def gather_shrink(*args, **options):
    from lowrank.kernels.gather_shrink import gather_shrink

    return gather_shrink(*args, **options)


def formula(x, A, order, counts, choices):
    n = sum(counts)
    X = x[order[:n] // choices]
    return torch.einsum("sk,srk->sr", X.to(A.dtype), spread(A, counts))


@pytest.mark.parametrize(("dtype", "thin"), DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "K", "rank"), list(zip(COUNTS, (40, 130, 72, 8, 33), (8, 16, 3, 1, 64), strict=True)), ids=str
)
def test_against_fp64(counts, K, rank, dtype, thin):
    behind = (-sum(counts)) % 2 + 2 * (len(counts) == 3)
    choices, n = 2, sum(counts)
    order, ends = routing(counts, choices, behind)
    width = -(-rank // 8) * 8
    x = strided(randn(len(order) // choices, K, dtype=dtype))
    A = randn(len(counts) * rank, K, dtype=thin).view(len(counts), rank, K)
    for factor in (A, A.mT.contiguous().mT):
        X, S = gather_shrink(x, factor, order, ends, choices, thin, width, not behind)
        assert torch.equal(X[:n], x[order[:n] // choices])
        assert not X[n:].any()
        assert not S[n:].any()
        assert not S[:, rank:].any()
        wide = x.double(), A.double()
        oracle, scale = (
            formula(*wide, order, counts, choices),
            formula(*(t.abs() for t in wide), order, counts, choices),
        )
        within([S[:n, :rank]], [oracle], [scale], ["S"])
    X, S = gather_shrink(x, None, order, ends, choices, dtype, 0, not behind)
    assert S is None
    assert torch.equal(X[:n], x[order[:n] // choices])


@pytest.mark.parametrize(("dtype", "thin"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin):
    counts = [17, 1, 0, 70, 2]
    order, ends = routing(counts, 2)

    def draw():
        x, A = randn(45, 130, dtype=dtype), randn(5, 16, 130, dtype=thin)
        _, S = gather_shrink(x, A, order, ends, 2, thin, 16, True)
        return [S], [formula(x, A, order, counts, 2)], [formula(x.double(), A.double(), order, counts, 2)]

    in_the_mean(draw, ["S"])


def test_empty():
    order, ends = routing([0, 0])
    X, S = gather_shrink(randn(0, 8, dtype=BF16), randn(2, 4, 8, dtype=BF16), order, ends, 2, BF16, 8, True)
    assert X.shape == (0, 8)
    assert S.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.ones(2, 4, 7)), "does not fit x"),
        (dict(A=torch.ones(3, 4, 8)), "does not fit x"),
        (dict(A=torch.ones(2, 65, 8), width=72), "a rank of at most 64"),
        (dict(x=torch.ones(3, 8).double()), "fp16, bf16 or fp32"),
        (dict(order=torch.arange(5)), "expected order"),
        (dict(ends=torch.tensor([2, 6])), "int32 ends"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_before_anything_is_launched(change, message):
    good = dict(
        x=torch.ones(3, 8), A=torch.ones(2, 4, 8), order=torch.arange(6), choices=2, thin=torch.float32, width=8
    )
    good |= dict(ends=torch.tensor([2, 6], dtype=torch.int32), full=True)
    with pytest.raises(ValueError, match=message):
        gather_shrink(**good | change)
