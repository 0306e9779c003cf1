import pytest

pytest.importorskip("triton")

import torch
from right import in_the_mean, within
from thin_inputs import DEVICE

from lowrank.kernels.logits import Config, logits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SMALL = Config(16, 32, 32, 4, 2)


def inputs(C, H, V, r, dtype, thin):
    h, W, bias, t, B = (torch.randn(*shape, device=DEVICE) for shape in ((C, H), (V, H), (V,), (C, r), (V, r)))
    return h.to(dtype), W.to(dtype), bias.to(dtype), t, B.to(thin)


def formula(h, W, bias, t, B):
    z = h @ W.mT
    z = z if bias is None else z + bias
    return z if t is None else z + t @ B.mT


@pytest.mark.parametrize(
    ("dtype", "thin"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (5, 33, 40, 3), (17, 70, 131, 17)], ids=str)
@pytest.mark.parametrize("extra", ["none", "bias", "lora", "both"])
def test_values(dtype, thin, shape, extra):
    h, W, bias, t, B = inputs(*shape, dtype, thin)
    bias = bias if extra in ("bias", "both") else None
    t, B = (t, B) if extra in ("lora", "both") else (None, None)
    exact = [None if x is None else x.double() for x in (h, W, bias, t, B)]
    truth = formula(*exact)
    bound = formula(*(None if x is None else x.abs() for x in exact))
    results = [logits(h, W, bias, t, B, SMALL), logits(h, W, bias, t, B)]  # fp32, not rounded to 16 bits anywhere
    within(results, [truth, truth], [bound, bound], ("z", "z at the default config"))


@pytest.mark.parametrize(
    ("dtype", "thin"), [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)], ids=str
)
def test_as_right_as_fp32(dtype, thin):
    """GEMMs in fp32 of the same operands."""

    def draw():
        operands = inputs(17, 70, 131, 17, dtype, thin)
        return (
            [logits(*operands)],
            [formula(*(x.float() for x in operands))],
            [formula(*(x.double() for x in operands))],
        )

    in_the_mean(draw, ["z"])


@pytest.mark.parametrize("thin", [FP32, BF16])
def test_of_mixed_dtypes(thin):
    """h Aᵀ of fp32 factors over 16 bits, and the other way round: nothing of the fp32 is lost."""
    h, A = torch.randn(9, 70, device=DEVICE).to(BF16), torch.randn(5, 70, device=DEVICE)
    for a, b in ((h, A), (A, h)):
        truth = a.double() @ b.double().mT
        within([logits(a, b)], [truth], [a.double().abs() @ b.double().abs().mT], ["split"])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bits_are_the_rows_own(dtype):
    h, W, bias, t, B = inputs(37, 70, 50, 3, dtype, FP32)
    whole = logits(h, W, bias, t, B)
    for rows in ([0], [36], [20, 3], list(range(17))):
        assert torch.equal(logits(h[rows], W, bias, t[rows].contiguous(), B), whole[rows])


def test_strides():
    h, W, bias, t, B = inputs(9, 33, 40, 3, FP32, FP32)
    straight = logits(h, W, bias, t, B, SMALL)
    turned = (x.mT.contiguous().mT for x in (h, W))
    assert torch.equal(logits(*turned, bias, t, B.mT.contiguous().mT, SMALL), straight)
    assert torch.equal(logits(h.expand(2, 9, 33)[1], W, bias, t, B, SMALL), straight)


def test_empty():
    assert logits(torch.empty(0, 8, device=DEVICE), torch.empty(5, 8, device=DEVICE)).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(h=torch.ones(4, 6).double()), "expected fp16, bf16 or fp32"),
        (dict(h=torch.ones(4, 6).half(), W=torch.ones(8, 6).bfloat16()), "expected h and W in one dtype"),
        (dict(W=torch.ones(8, 5)), "do not fit h"),
        (dict(bias=torch.ones(7)), "do not fit h"),
        (dict(t=torch.ones(4, 2)), "or neither"),
        (dict(t=torch.ones(4, 2), B=torch.ones(8, 3)), "expected t"),
        (dict(t=torch.ones(4, 2).half(), B=torch.ones(8, 2)), "expected contiguous fp32 t"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(h=torch.ones(4, 6), W=torch.ones(8, 6)) | change
    with pytest.raises(ValueError, match=message):
        logits(**arguments)
