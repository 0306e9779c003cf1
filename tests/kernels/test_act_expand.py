import pytest
import torch
from experts_inputs import COUNTS, routing, spread
from right import in_the_mean, within
from thin_inputs import BF16, DTYPES, randn, strided

from lowrank.ops import activations
from lowrank.ops.activations import Activation

ACTIVATIONS = [
    Activation("silu"),
    Activation("gelu", interleaved=True),
    Activation("gelu_tanh"),
    Activation("relu2", gated=False),
    Activation("clamped", interleaved=True, alpha=1.702, limit=0.7),
    Activation("silu", gated=False),
]


def act_expand(*args, **options):
    from lowrank.kernels.act_expand import act_expand

    return act_expand(*args, **options)


def thin(G, S, B, bias, counts):
    n = sum(counts)
    y = G[:n] + 0.7 * torch.einsum("sr,snr->sn", S[:n], spread(B, counts)).to(G.dtype)
    return y if bias is None else y + spread(bias, counts).to(G.dtype)


def inputs(counts, behind, N, rank, dtype, thin_dtype):
    E, rows = len(counts), sum(counts) + behind
    B = randn(N, rank * E, dtype=thin_dtype).view(N, rank, E).permute(2, 0, 1)
    return (
        strided(randn(rows, N, dtype=dtype)),
        strided(randn(rows, rank, dtype=thin_dtype)),
        B,
        randn(E, N, dtype=dtype),
    )


def slope_bound(y, act):
    """What bounds |h| and how it moves with its arguments: the functions are at most 1.2 steep."""
    if not act.gated:
        return y.abs() * (2 * y.abs() + 1.2)
    gate, up = (y[:, ::2], y[:, 1::2]) if act.interleaved else y.chunk(2, 1)
    return 2.5 * (gate.abs() + 1) * (up.abs() + 1)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: f"{act.name}-{act.gated}")
@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_against_fp64(dtype, thin_dtype, act):
    for counts, N, rank in zip(COUNTS, (40, 130, 72, 8, 34), (8, 16, 3, 1, 100), strict=True):
        behind, n = 2 * (len(counts) == 4), sum(counts)
        G, S, B, bias = inputs(counts, behind, N, rank, dtype, thin_dtype)
        _, ends = routing(counts, behind=behind)
        for b in (bias, None):
            h = act_expand(G, S, B, 0.7, b, ends, act, not behind)
            wide = [None if t is None else t.double() for t in (G, S, B, b)]
            y = thin(*wide, counts)
            bound = thin(*(None if t is None else t.abs() for t in wide), counts)
            within([h[:n]], [activations.differentiable(y, act)], [slope_bound(bound, act)], ["h"])
            assert not h[n:].any()
    plain = act_expand(G, None, None, 1.0, None, ends, act, True)
    assert torch.allclose(plain.float(), activations.forward(G, act).float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin_dtype):
    counts, act = [17, 1, 0, 70, 2], Activation("silu")
    _, ends = routing(counts)

    def draw():
        G, S, B, bias = inputs(counts, 0, 72, 16, dtype, thin_dtype)
        eager = activations.forward(thin(G, S, B, bias, counts), act)
        oracle = activations.differentiable(thin(*(t.double() for t in (G, S, B, bias)), counts), act)
        return [act_expand(G, S, B, 0.7, bias, ends, act, True)], [eager], [oracle]

    in_the_mean(draw, ["h"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(act=Activation("mish")), "expected one of silu"),
        (dict(G=torch.ones(6, 7), S=None, B=None), "an even number of columns"),
        (dict(S=torch.ones(5, 4)), "do not fit G"),
        (dict(B=torch.ones(2, 8, 5)), "do not fit G"),
        (dict(G=torch.ones(6, 8).double()), "fp16, bf16 or fp32"),
        (dict(ends=torch.tensor([2, 6])), "int32 ends"),
        (dict(bias=torch.ones(2, 7)), "contiguous bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_before_anything_is_launched(change, message):
    good = dict(G=torch.ones(6, 8), S=torch.ones(6, 4), B=torch.ones(2, 8, 4), scale=1.0, bias=None)
    good |= dict(ends=torch.tensor([2, 6], dtype=torch.int32), act=Activation("silu"), full=True)
    with pytest.raises(ValueError, match=message):
        act_expand(**good | change)


def test_empty():
    _, ends = routing([0, 0])
    assert act_expand(randn(0, 8, dtype=BF16), None, None, 1.0, None, ends, Activation("silu"), True).shape == (0, 4)
