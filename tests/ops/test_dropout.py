import itertools

import pytest
import torch

from lowrank import _native, bits
from lowrank.ops import dropout


def mask(seed, rows, columns, p):
    blocks = [m for _, m in dropout.draw(torch.tensor(seed), rows, columns, dropout.threshold(p))]
    return torch.cat(blocks)[:, :columns]


def splitmix64(i, seed):
    """The published generator in Python integers."""
    z = (i * 0x9E3779B97F4A7C15 + seed) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_is_splitmix64_with_16_bit_thresholds():
    got = mask(987654321012345678, 5, 70, 0.3)
    for row, column in ((0, 0), (0, 1), (0, 69), (3, 33), (4, 69)):
        word = splitmix64(row * 24 + column // 4, 987654321012345678)  # 96 = 70 padded to 32s, four decisions a word
        decision = (word >> (16 * (column % 4))) % 2**16
        decision -= 2**16 * (decision >= 2**15)  # compared as int16
        assert bool(got[row, column]) == (decision >= round(0.3 * 65536) - 32768)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keeps_one_minus_p_without_correlation(p):
    m = mask(3, 2000, 1024, p).double()
    sigma = (p * (1 - p) / m.numel()) ** 0.5
    assert abs(m.mean() - (1 - p)) < 5 * sigma
    assert (m.mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 2000) ** 0.5
    centred = m - m.mean()
    for shift in ((0, 1), (0, 2), (0, 4), (1, 0), (1, 1), (0, 32)):
        product = (centred * centred.roll(shift, (0, 1))).mean() / (p * (1 - p))
        assert abs(product) < 6 / m.numel() ** 0.5
    other = mask(4, 2000, 1024, p).double() - m.mean()
    assert abs((centred * other).mean() / (p * (1 - p))) < 6 / m.numel() ** 0.5


def test_does_not_depend_on_the_blocks(monkeypatch):
    whole = mask(11, 100, 200, 0.2)
    monkeypatch.setattr(dropout, "row_blocks", lambda rows, *_: (slice(i, min(i + 7, rows)) for i in range(0, rows, 7)))
    assert torch.equal(mask(11, 100, 200, 0.2), whole)


def test_zero_and_one():
    assert mask(1, 10, 50, 0.0).all()
    assert not mask(1, 10, 50, 1.0).any()
    assert dropout.keep_scale(1.0) == 0.0
    assert dropout.keep_scale(0.0) == 1.0
    assert dropout.keep_scale(0.5) == 2.0


def test_what_is_kept_is_scaled_for_the_p_that_is_drawn():
    assert dropout.drawable(0.1) == 6554 / 65536
    assert dropout.drawable(1e-6) == 0
    assert all(dropout.keep_scale(cut / 65536) == 65536 / (65536 - cut) for cut in range(65536))


X = {
    "dense": lambda: torch.ones(6, 5, 70),
    "transposed": lambda: torch.ones(5, 6, 70).transpose(0, 1),
    "last dim first": lambda: torch.ones(70, 6).mT,
    "a slice": lambda: torch.ones(6, 5, 128)[..., ::2],
    "a vector": lambda: torch.ones(64),
    "nothing": lambda: torch.ones(0, 70),
    "no columns": lambda: torch.ones(3, 0),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("which", X)
def test_as_torch_is_torchs(which, p, dtype):
    x = X[which]().to(dtype)
    M, K = x.numel() // max(x.shape[-1], 1) if x.numel() else len(x), x.shape[-1]
    torch.manual_seed(3)
    want, state = torch.nn.functional.dropout(x, p) != 0, torch.get_rng_state()
    torch.manual_seed(3)
    drawn = dropout.as_torch(x, p)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.p == p
    assert drawn.keep.shape == (M, -(-K // 32))
    kept = bits.unpack(drawn.keep.reshape(-1), (M, 32 * drawn.keep.shape[1]))
    assert torch.equal(kept[:, :K], want.reshape(M, K))
    assert not kept[:, K:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_zeroes_even_nan_and_inf(dtype):
    t = torch.randn(6, 40, dtype=dtype)
    t[0], t[1] = float("nan"), float("-inf")
    m = torch.rand(6, 64) < 0.5
    out = dropout.apply(t, m, out=torch.empty_like(t))
    torch.testing.assert_close(out, torch.where(m[:, :40], t, 0), rtol=0, atol=0, equal_nan=True)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    if not _native.available("cpu"):
        pytest.skip("needs lowrank/_C_cpu.so")
    monkeypatch.setenv("LOWRANK_ISA", request.param)
    try:
        one_pass(torch.zeros(1, 1), 0, 0, torch.float32)
    except RuntimeError as error:
        if "LOWRANK_ISA" not in str(error):
            raise
        pytest.skip(f"no {request.param} here")


def one_pass(x, seed, cut, dtype, first=0):
    M, K = x.shape
    out, keep = torch.empty(M, K, dtype=dtype), torch.empty(M, -(-K // 32), dtype=torch.int32)
    dropout.draw_(x, torch.tensor(seed), first, cut, out, keep)
    return out, keep


TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("to", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_pass_is_the_same_to_the_bit(isa, dtype, to):
    """Drawn, applied and packed; and applied from the bits, in place, to columns, added and rounded once."""
    for (M, K), p in itertools.product(
        [(0, 5), (1, 1), (3, 31), (2, 32), (5, 97), (33, 300)], [0.0, 1e-5, 0.3, 0.5, 1.0]
    ):
        x = torch.randn(M, 2 * K).to(dtype)[:, :K]
        x[:1], x[1:2, :3] = float("nan"), float("-inf")
        cut, seed = dropout.threshold(p), 987654321012345678
        out, keep = one_pass(x, seed, cut, to)
        blocks = [m for _, m in dropout.draw(torch.tensor(seed), M, K, cut)]
        mask = torch.cat(blocks) if blocks else torch.empty(0, 32 * keep.shape[1], dtype=torch.bool)
        assert torch.equal(keep, bits.pack(mask).view(keep.shape))
        dropped = torch.where(mask[:, :K], x, 0)
        torch.testing.assert_close(out, dropped.to(to), rtol=0, atol=0, equal_nan=True)
        if M > 2:
            assert same_bits(one_pass(x[2:], seed, cut, to, first=2)[0].nan_to_num_(), out[2:].nan_to_num())

        applied = torch.empty(M, K, dtype=to)
        dropout.apply_(x, keep, applied, False)
        torch.testing.assert_close(applied, out, rtol=0, atol=0, equal_nan=True)
        start = torch.randn(M, K).to(to)
        for first in range(0, K, 64):
            columns, words = slice(first, min(first + 64, K)), slice(first // 32, -(-min(first + 64, K) // 32))
            applied = start[:, columns].clone()
            dropout.apply_(x[:, columns], keep[:, words], applied, True)
            expected = (start[:, columns] + dropped[:, columns]).to(to)
            if to.itemsize < dtype.itemsize or {dtype, to} == {torch.float16, torch.bfloat16}:
                wide = torch.promote_types(torch.promote_types(dtype, to), torch.float32)
                expected = (start[:, columns].to(wide) + dropped[:, columns].to(wide)).to(to)
            torch.testing.assert_close(applied, expected, rtol=0, atol=0, equal_nan=True)
        again = x.clone(memory_format=torch.contiguous_format)
        dropout.apply_(again, keep, again, False)
        torch.testing.assert_close(again, dropped, rtol=0, atol=0, equal_nan=True)


def test_one_pass_does_not_depend_on_threads(isa):
    x = torch.randn(700, 513)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(one_pass(x, 5, 20000, torch.float32))
    finally:
        torch.set_num_threads(before)
    for out, keep in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(keep, results[0][1])


def test_one_pass_refuses_what_it_would_read_past(isa):
    x = torch.randn(4, 40)
    for out, keep in (
        (torch.empty(4, 39), torch.empty(4, 2)),
        (torch.empty(4, 40), torch.empty(4, 1)),
        (torch.empty(40, 4).mT, None),
    ):
        keep = torch.zeros(4, 2) if keep is None else keep
        with pytest.raises(RuntimeError, match="dropout: expected"):
            dropout.apply_(x, keep.to(torch.int32), out, False)
