import pytest
import torch
from experts_inputs import COUNTS, routing, spread
from right import in_the_mean, within
from thin_inputs import BF16, DTYPES, FP32, randn, strided


def combine_expand(*args, **options):
    from lowrank.kernels.combine_expand import combine_expand

    return combine_expand(*args, **options)


def formula(Z, S, B, bias, w, order, counts, dtype=None):
    """In the dtypes of its arguments, as PyTorch rounds; the rows of experts alone."""
    n = sum(counts)
    y = Z[:n] + 0.7 * torch.einsum("sr,snr->sn", S[:n], spread(B, counts)).to(Z.dtype)
    y = y if bias is None else y + spread(bias, counts).to(Z.dtype)
    out = torch.zeros_like(Z)
    out[order[:n]] = y if w is None else (y * w[order[:n], None]).to(Z.dtype)
    return out


def inputs(counts, behind, N, rank, dtype, thin, columns=None):
    E, rows = len(counts), sum(counts) + behind
    B = randn(N, rank * E, dtype=thin).view(N, rank, E).permute(2, 0, 1)  # PEFT's
    return (
        strided(randn(rows, N, dtype=dtype)),
        strided(randn(rows, rank, dtype=thin)),
        B,
        randn(E, N, dtype=dtype),
        randn(rows, dtype=FP32).abs(),
    )


@pytest.mark.parametrize(("dtype", "thin"), DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "N", "rank"), list(zip(COUNTS, (40, 130, 72, 8, 33), (8, 16, 3, 1, 100), strict=True)), ids=str
)
def test_against_fp64(counts, N, rank, dtype, thin):
    behind = 2 * (len(counts) == 4)
    Z, S, B, bias, w = inputs(counts, behind, N, rank, dtype, thin)
    order, ends = routing(counts, behind=behind)
    for b, weights in ((bias, w), (None, None)):
        out = combine_expand(Z, S, B, 0.7, b, weights, order, ends, not behind)
        wide = [None if t is None else t.double() for t in (Z, S, B, b, weights)]
        within(
            [out],
            [formula(*wide, order, counts)],
            [formula(*(None if t is None else t.abs() for t in wide), order, counts)],
            ["U"],
        )
    alone = combine_expand(Z, None, None, 1.0, None, None, order, ends, not behind)
    n = sum(counts)
    assert torch.equal(alone[order[:n]], Z[:n])
    assert not alone[order[n:]].any()


@pytest.mark.parametrize(("dtype", "thin"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin):
    counts = [17, 1, 0, 70, 2]
    order, ends = routing(counts)

    def draw():
        Z, S, B, bias, w = inputs(counts, 0, 72, 16, dtype, thin)
        ours = combine_expand(Z, S, B, 0.7, bias, w, order, ends, True)
        oracle = formula(*(t.double() for t in (Z, S, B, bias, w)), order, counts)
        return [ours], [formula(Z, S, B, bias, w, order, counts)], [oracle]

    in_the_mean(draw, ["U"])


def test_empty():
    order, ends = routing([0, 0])
    out = combine_expand(randn(0, 8, dtype=BF16), None, None, 1.0, None, None, order, ends, True)
    assert out.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(S=torch.ones(5, 4)), "do not fit Z"),
        (dict(B=torch.ones(2, 8, 5)), "do not fit Z"),
        (dict(Z=torch.ones(6, 8).double()), "fp16, bf16 or fp32"),
        (dict(order=torch.arange(6).int()), "int64 order"),
        (dict(ends=torch.tensor([2, 6])), "int32 ends"),
        (dict(bias=torch.ones(2, 7)), "contiguous bias"),
        (dict(w=torch.ones(5)), "contiguous weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_before_anything_is_launched(change, message):
    good = dict(Z=torch.ones(6, 8), S=torch.ones(6, 4), B=torch.ones(2, 8, 4), scale=1.0, bias=None, w=None)
    good |= dict(order=torch.arange(6), ends=torch.tensor([2, 6], dtype=torch.int32), full=True)
    with pytest.raises(ValueError, match=message):
        combine_expand(**good | change)
