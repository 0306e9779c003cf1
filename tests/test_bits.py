import pytest
import torch

from lowrank import bits


@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (32,), (33,), (7, 45), (3, 5, 64)])
def test_round_trip_and_layout(shape):
    mask = torch.rand(shape) < 0.5
    words = bits.pack(mask)
    assert words.dtype is torch.int32
    assert words.shape == ((mask.numel() + 31) // 32,)
    for i, bit in enumerate(mask.flatten().tolist()):
        assert (int(words[i // 32]) >> (i % 32)) & 1 == bit
    assert torch.equal(bits.unpack(words, shape), mask)


def test_tail_bits_are_zero():
    assert bits.pack(torch.ones(33, dtype=torch.bool)).tolist() == [-1, 1]


def test_every_byte_unpacks():
    words = torch.arange(256, dtype=torch.uint8).view(torch.int32)
    want = (torch.arange(256).view(256, 1) >> torch.arange(8)) & 1
    assert torch.equal(bits.unpack(words, (256, 8)), want.bool())


def test_strided_and_misaligned():
    mask = torch.rand(65, 70) < 0.5
    for view in (mask.t(), mask[:, 1:65], mask.flatten()[1:65], mask[1:, ::2]):
        assert torch.equal(bits.unpack(bits.pack(view), view.shape), view)


def test_refuses():
    with pytest.raises(TypeError, match=r"bits.pack: mask must be a bool tensor, got torch.float32"):
        bits.pack(torch.ones(3))
    with pytest.raises(TypeError, match=r"bits.unpack: words must be int32"):
        bits.unpack(torch.ones(3), (3,))
    with pytest.raises(ValueError, match=r"needs 2 words, got 1"):
        bits.unpack(torch.ones(1, dtype=torch.int32), (33,))


def test_popcount():
    words = torch.randint(-(2**31), 2**31, (999,), dtype=torch.int32)
    words[:4] = torch.tensor([0, -1, 1, -(2**31)])
    assert bits.popcount(words).tolist() == [(n % 2**32).bit_count() for n in words.tolist()]


def test_integers_of_64_bits():
    for n in (0, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5, -1, -(2**63), -(2**63) - 1):
        assert bits.wrap_int64(n) == torch.tensor(n % 2**64, dtype=torch.uint64).view(torch.int64).item()
        for by in (0, 1, 63):
            shifted = bits.logical_shift_right(torch.tensor([bits.wrap_int64(n)]), by)
            assert shifted.item() % 2**64 == n % 2**64 >> by


def test_splitmix64():
    """Known answers of the reference implementation, for seed 1234567; in memory that is given, too."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for scratch in (None, torch.empty(5, dtype=torch.int64)):
        z = torch.arange(1, 6).mul_(bits.GOLDEN_GAMMA).add_(1234567)
        assert bits.splitmix64_(z, scratch) is z
        assert [n % 2**64 for n in z.tolist()] == want
