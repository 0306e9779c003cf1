import math

import pytest
import torch

import lowrank

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(*shape, dtype=torch.float32, vocabularies=(50, 50, 50)):
    return [(4 * torch.randn(*shape, V)).to(dtype) for V in vocabularies]


def row(*values):
    return torch.tensor(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
def test_against_fp64(dtype, shape):
    base, expert, antiexpert = draw(*shape, dtype=dtype)
    out = lowrank.combine_logits(base, expert, antiexpert, 0.7)
    truth = base.double() + 0.7 * (expert.double() - antiexpert.double())
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert out.dtype is wide
    # three roundings, each at most u times the largest number on the way
    largest = base.double().abs() + expert.double().abs() + antiexpert.double().abs()
    assert ((out.double() - truth).abs() <= 1.5 * torch.finfo(wide).eps * largest).all()


def test_chained_in_bf16_it_would_be_another_result():
    base, expert, antiexpert = draw(64, dtype=torch.bfloat16)
    assert (
        lowrank.combine_logits(base, expert, antiexpert) - (base + (expert - antiexpert)).float()
    ).abs().max() > 0.01


def test_mixed_dtypes_take_the_widest():
    base, expert, antiexpert = draw(3)
    assert lowrank.combine_logits(base.bfloat16(), expert.half(), antiexpert).dtype is torch.float32
    assert lowrank.combine_logits(base, expert.bfloat16(), antiexpert.double()).dtype is torch.float64


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_alpha_per_row_and_per_sequence(shape):
    tensors = draw(*shape)
    every = torch.rand(*shape)
    first = torch.rand(shape[0])
    for alpha, rows in (
        (every, every),
        (every.unsqueeze(-1), every),
        (first, first.view(-1, *[1] * (len(shape) - 1)).expand(shape)),
        (first[:, None], first.view(-1, *[1] * (len(shape) - 1)).expand(shape)),
        (torch.tensor(0.3), torch.full(shape, 0.3)),
        (torch.tensor([0.3]), torch.full(shape, 0.3)),
        (2, torch.full(shape, 2.0)),
    ):
        out = lowrank.combine_logits(*tensors, alpha)
        for index in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
            at = tuple(index)
            alone = lowrank.combine_logits(*(t[at] for t in tensors), float(rows[at]))
            torch.testing.assert_close(out[at], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.5, (1 + 1.5 * (2 - 5), -INF, -INF, 1.0, -INF, 1.0, -INF, NAN, NAN, NAN)),
        (-1.5, (1 - 1.5 * (2 - 5), -INF, -INF, 1.0, 1.0, -INF, -INF, NAN, NAN, NAN)),
        (0.0, (1.0, -INF, -INF, 1.0, 1.0, 1.0, -INF, NAN, NAN, NAN)),
    ],
)
def test_excluded_tokens_and_nan(alpha, expected, per_row):
    base = row(1, -INF, -INF, 1, 1, 1, -INF, NAN, 1, 1).requires_grad_()
    expert = row(2, 2, -INF, -INF, -INF, 2, NAN, 2, NAN, -INF).requires_grad_()
    antiexpert = row(5, 5, -INF, -INF, 5, -INF, 5, 5, -INF, NAN).requires_grad_()
    out = lowrank.combine_logits(base, expert, antiexpert, torch.tensor(alpha) if per_row else alpha)
    torch.testing.assert_close(out, row(*expected), rtol=0, atol=0, equal_nan=True)
    out[out.isfinite()].sum().backward()
    for t in (base, expert, antiexpert):
        assert t.grad.isfinite().all()
    assert expert.grad[0] == alpha == -antiexpert.grad[0]
    assert not expert.grad[1:].any()
    assert not antiexpert.grad[1:].any()
    assert (base.grad == out.isfinite()).all()


@pytest.mark.parametrize("alpha", [0.0, 1.5])
@pytest.mark.parametrize("vocabularies", [(50, 64, 56), (50, 40, 64), (50, 64, 40), (50, 30, 40)], ids=str)
def test_padded_vocabularies(vocabularies, alpha):
    base, expert, antiexpert = draw(3, vocabularies=vocabularies)
    out = lowrank.combine_logits(base, expert, antiexpert, alpha)
    common = min(vocabularies)
    assert out.shape == base.shape
    cut = lowrank.combine_logits(base[:, :common], expert[:, :common], antiexpert[:, :common], alpha)
    assert torch.equal(out[:, :common], cut)
    assert torch.equal(out[:, common:], base[:, common:])


def test_is_base_bit_for_bit_without_a_difference():
    base, expert, antiexpert = draw(7)
    assert torch.equal(lowrank.combine_logits(base, expert, antiexpert, 0), base)
    assert torch.equal(lowrank.combine_logits(base, expert, expert, 3.0), base)


@pytest.mark.parametrize("vocabularies", [(9, 9, 9), (9, 8, 12)], ids=str)
def test_gradcheck(vocabularies):
    tensors = [t.requires_grad_() for t in draw(2, 3, dtype=torch.float64, vocabularies=vocabularies)]
    alpha = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lowrank.combine_logits, (*tensors, alpha))


def test_compiles_in_one_graph():
    tensors = [*draw(2, 3, vocabularies=(50, 40, 64)), torch.rand(2)]
    compiled = torch.compile(lowrank.combine_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), lowrank.combine_logits(*tensors))
    for alpha in (0.7, 0.3):  # a number that Dynamo traces as a symbol
        dynamic = torch.compile(lowrank.combine_logits, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(dynamic(*tensors[:3], alpha), lowrank.combine_logits(*tensors[:3], alpha))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(base=[1.0]), TypeError, "base: expected a tensor, got list"),
        (dict(base=torch.ones(2, 50).int()), TypeError, "base: expected one of .*, got torch.int32"),
        (dict(base=torch.tensor(1.0)), ValueError, r"base: expected \[..., V\] with V >= 1, got \[\]"),
        (dict(base=torch.ones(2, 0)), ValueError, r"base: .*got \[2, 0\]"),
        (dict(expert=torch.ones(3, 50)), ValueError, r"expert: .*base's leading dimensions \[2, 50\], got \[3, 50\]"),
        (dict(expert=torch.ones(50)), ValueError, "expert: "),
        (dict(antiexpert=torch.ones(2, 1, 50)), ValueError, "antiexpert: "),
        (dict(antiexpert=torch.ones(2, 0)), ValueError, "antiexpert: "),
        (dict(antiexpert=torch.ones(2, 50, dtype=torch.int64)), TypeError, "antiexpert: "),
        (dict(expert=torch.ones(2, 50, device="meta")), ValueError, "expert: expected base's device cpu, got meta"),
        (dict(alpha=NAN), ValueError, "alpha: expected a finite number, got nan"),
        (dict(alpha=INF), ValueError, "alpha: "),
        (dict(alpha="1"), TypeError, "alpha: expected a number or a float tensor, got str"),
        (dict(alpha=True), TypeError, "alpha: "),
        (dict(alpha=torch.tensor([1.0, NAN])), ValueError, "alpha: holds NaN or infinity"),
        (dict(alpha=torch.ones(2).int()), TypeError, "alpha: "),
        (dict(alpha=torch.ones(3)), ValueError, r"alpha: .*base \[2, 50\], got \[3\]"),
        (dict(alpha=torch.ones(2, 50)), ValueError, "alpha: "),
        (dict(alpha=torch.ones(2, 1, 1)), ValueError, "alpha: "),
        (dict(alpha=torch.ones(2, device="meta")), ValueError, "alpha: expected base's device"),
    ],
)
def test_refuses(change, error, message):
    arguments = dict(zip(("base", "expert", "antiexpert"), draw(2), strict=True), alpha=1.0)
    with pytest.raises(error, match=message):
        lowrank.combine_logits(**{**arguments, **change})
