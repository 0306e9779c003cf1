import itertools

import pytest
import torch
from right import within

from lowrank.ops import _choice, mixed

CPU, BF16 = torch.device("cpu"), torch.bfloat16
as_they_are = pytest.mark.skipif(mixed.why_not(CPU, BF16) is not None, reason=str(mixed.why_not(CPU, BF16)))
# M, K, N: one of each, ragged tiles of 6 x 64, pairs of k with a last one alone, several blocks of 192 x 256 x 512
SHAPES = [(1, 1, 1), (5, 33, 7), (6, 32, 64), (7, 31, 65), (13, 257, 130), (1, 300, 1000), (200, 600, 700), (3, 0, 5)]


def matrix(rows, columns, form):
    """bf16, its rows contiguous, its columns, or neither."""
    if form == "columns":
        return torch.randn(columns, rows).to(BF16).mT
    return torch.randn(rows, 2 * columns).to(BF16)[:, ::2] if form == "neither" else torch.randn(rows, columns).to(BF16)


FORMS = "rows", "columns", "neither"


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_products_of_bf16(shape, started):
    M, K, N = shape
    for form in itertools.product(FORMS, FORMS):
        a, b = matrix(M, K, form[0]), matrix(K, N, form[1])
        around = torch.randn(M, N + 5)
        out = around[:, 2 : N + 2]
        before, start = around.clone(), out.double() if started else torch.zeros(M, N, dtype=torch.float64)
        mixed.add_product(out, a, b, started)
        exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        within(
            [out, mixed.mm(a, b, torch.float32)], [start + exact, exact], [start.abs() + scale, scale], ("sum", "mm")
        )
        before[:, 2 : N + 2] = out
        assert torch.equal(around, before)


def test_inf_and_nan_stay_in_their_rows_and_columns():
    a, b = matrix(9, 35, "rows"), matrix(35, 70, "columns")
    a[7, 3], b[34, 66] = float("nan"), float("inf")
    out = mixed.mm(a, b, torch.float32)
    assert out[7].isnan().all()
    rest = torch.arange(9) != 7
    assert not out[rest][:, torch.arange(70) != 66].isfinite().logical_not().any()
    assert not out[rest][:, 66].isfinite().any()


@as_they_are
def test_a_number_has_the_bits_of_its_row_and_column_alone():
    """Whatever is beside them, how they lie in memory and how many threads there are."""
    threads = torch.get_num_threads()
    a, b, start = matrix(400, 700, "rows"), matrix(700, 1100, "rows"), torch.randn(400, 1100)

    def product(a, b, start):
        out = start.clone()
        mixed.add_product(out, a, b, True)
        return out

    try:
        torch.set_num_threads(1)
        whole = product(a, b, start)
        torch.set_num_threads(3)
        assert torch.equal(product(a, b, start), whole)
        assert torch.equal(product(a.mT.contiguous().mT, b.mT.contiguous().mT, start), whole)
        for i, j, m, n in ((7, 8, 0, 1100), (3, 300, 65, 66), (0, 400, 1, 77)):
            rows, columns = slice(i, j), slice(m, n)
            assert torch.equal(product(a[rows], b[:, columns], start[rows, columns]), whole[rows, columns])
    finally:
        torch.set_num_threads(threads)


@as_they_are
def test_refuses():
    a, b, out = matrix(3, 4, "rows"), matrix(4, 5, "rows"), torch.zeros(3, 5)
    cases = [(out, a.float(), b), (out, a, b.half()), (out.double(), a, b)]
    cases += [(out[:2], a, b), (out, a, b[:3]), (torch.zeros(5, 3).mT, a, b)]
    for case in cases:
        with pytest.raises(RuntimeError, match="mixed_mm_: expected"):
            torch.ops.lowrank.mixed_mm_(*case, False)


def test_why_matrices_are_widened():
    assert mixed.why_not(torch.device("cuda"), BF16) is None
    for dtype in (torch.float16, torch.float32):
        assert not mixed.takes(CPU, dtype)
        assert str(dtype) in mixed.why_not(CPU, dtype)
    assert mixed.takes(CPU, BF16) == (mixed.why_not(CPU, BF16) is None)
    with _choice.forced("eager"):
        assert not mixed.takes(CPU, BF16)
        assert "LOWRANK_BACKEND=eager" in (mixed.why_not(CPU, BF16) or "")
