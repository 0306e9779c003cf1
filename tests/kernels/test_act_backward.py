import pytest
import torch
from experts_inputs import COUNTS, routing, spread
from right import in_the_mean, within
from test_act_expand import ACTIVATIONS, inputs, thin
from thin_inputs import BF16, DTYPES, FP32, randn, strided

from lowrank.ops import activations
from lowrank.ops.activations import Activation

NAMES = "dG", "h", "dots"


def act_backward(*args, **options):
    from lowrank.kernels.act_backward import act_backward

    return act_backward(*args, **options)


def formula(H, G, S, B, bias, D, A, w, order, counts, act):
    """In the dtypes of its arguments, as PyTorch rounds."""
    n = sum(counts)
    y = thin(G, S, B, bias, counts)
    h = activations.forward(y, act) if G.dtype is not torch.float64 else activations.differentiable(y, act)
    dh = H[:n] + 0.3 * torch.einsum("sr,sri->si", D[:n], spread(A, counts)).to(H.dtype)
    dh = (dh * w[order[:n], None]).to(H.dtype)
    return activations.backward(y, dh, act), h, (H[:n] * h).sum(1, dtype=torch.promote_types(FP32, G.dtype))


def more(counts, behind, I, rank, dtype, thin_dtype):  # noqa: E741
    E, rows = len(counts), sum(counts) + behind
    D, A = strided(randn(rows, rank, dtype=thin_dtype)), randn(E, rank, I, dtype=thin_dtype)
    return strided(randn(rows, I, dtype=dtype)), D, A, randn(rows, dtype=FP32).abs()


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: f"{act.name}-{act.gated}")
@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_against_fp64(dtype, thin_dtype, act):
    for counts, N, rank in zip(COUNTS, (40, 130, 72, 8, 34), (8, 16, 3, 1, 100), strict=True):
        behind, n = 2 * (len(counts) == 4), sum(counts)
        I = N // 2 if act.gated else N  # noqa: E741
        G, S, B, bias = inputs(counts, behind, N, rank, dtype, thin_dtype)
        H, D, A, w = more(counts, behind, I, 5, dtype, thin_dtype)
        order, ends = routing(counts, behind=behind)
        for b in (bias, None):
            ours = act_backward(H, G, S, B, 0.7, b, D, A, 0.3, w, order, ends, act, not behind, True)
            wide = [None if t is None else t.double() for t in (H, G, S, B, b, D, A, w)]
            truth = formula(*wide, order, counts, act)
            small = [None if t is None else t.abs() for t in wide]
            y = thin(*small[1:5], counts)
            dh = small[0][:n] + 0.3 * torch.einsum("sr,sri->si", small[5][:n], spread(small[6], counts))
            h = 2.5 * (y.abs() + 1) ** 2  # bounds functions of gate and up, and how steep they are
            steep = h if not act.gated else h[:, :I] + h[:, I:]
            dG = (dh * small[7][order[:n], None] * steep).repeat(1, 2 if act.gated else 1)
            scales = dG, steep, (small[0][:n] * steep).sum(1)
            within([t[:n] for t in ours], truth, scales, NAMES)
            assert not any(t[n:].any() for t in ours)
        only = act_backward(H, G, None, None, 1.0, None, None, None, 1.0, w, order, ends, act, not behind, False)
        assert only[1] is None
        assert only[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "thin_dtype"), DTYPES, ids=str)
def test_as_right_as_eager(dtype, thin_dtype):
    counts, act = [17, 1, 0, 70, 2], Activation("silu")
    order, ends = routing(counts)

    def draw():
        G, S, B, bias = inputs(counts, 0, 72, 16, dtype, thin_dtype)
        H, D, A, w = more(counts, 0, 36, 16, dtype, thin_dtype)
        ours = act_backward(H, G, S, B, 0.7, bias, D, A, 0.3, w, order, ends, act, True, True)
        tensors = (H, G, S, B, bias, D, A, w)
        oracle = formula(*(t.double() for t in tensors), order, counts, act)
        return ours, formula(*tensors, order, counts, act), oracle

    in_the_mean(draw, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(H=torch.ones(6, 3)), "expected H"),
        (dict(D=torch.ones(5, 4)), "do not fit H"),
        (dict(A=torch.ones(2, 4, 5)), "do not fit H"),
        (dict(w=torch.ones(5)), "contiguous weights"),
        (dict(act=Activation("mish")), "expected one of silu"),
        (dict(order=torch.arange(6).int()), "int64 order"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_before_anything_is_launched(change, message):
    good = dict(H=torch.ones(6, 4), G=torch.ones(6, 8), S=torch.ones(6, 4), B=torch.ones(2, 8, 4), scale=1.0, bias=None)
    good |= dict(D=torch.ones(6, 4), A=torch.ones(2, 4, 4), scale2=1.0, w=torch.ones(6), order=torch.arange(6))
    good |= dict(ends=torch.tensor([2, 6], dtype=torch.int32), act=Activation("silu"), full=True, need_h=True)
    with pytest.raises(ValueError, match=message):
        act_backward(**good | change)


def test_empty():
    order, ends = routing([0, 0])
    none, G = (None,) * 3, randn(0, 8, dtype=BF16)
    made = act_backward(
        G[:, :4],
        G,
        *none[:2],
        1.0,
        None,
        *none[:2],
        1.0,
        randn(0, dtype=FP32),
        order,
        ends,
        Activation("silu"),
        True,
        True,
    )
    assert [t.shape for t in made] == [(0, 8), (0, 4), (0,)]
