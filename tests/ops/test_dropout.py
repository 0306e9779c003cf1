import pytest
import torch

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_zeroes_even_nan_and_inf(dtype):
    t = torch.randn(6, 40, dtype=dtype)
    t[0], t[1] = float("nan"), float("-inf")
    m = torch.rand(6, 64) < 0.5
    out = dropout.apply(t, m, out=torch.empty_like(t))
    torch.testing.assert_close(out, torch.where(m[:, :40], t, 0), rtol=0, atol=0, equal_nan=True)
