import pytest
import torch
from right import within
from torch.nn.functional import cross_entropy, linear

import lowrank
from lowrank import _stats

needs_torchs = pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch is older")


def tensors(T=9, H=16, V=37, dtype=torch.float32):
    h, W, b = torch.randn(T, H), torch.randn(V, H) * (3 / H**0.5), torch.randn(V)
    target = torch.randint(V, (T,))
    target[1::4] = -100
    return [t.to(dtype).requires_grad_() for t in (h, W, b)], target, torch.rand(V) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [None, 3])
def test_equals_torchs_reference(dtype, reduction, weighted, ignore_index):
    leaves, target, weight = tensors(dtype=dtype)
    target = target if ignore_index is None else target.clamp(3)
    options = dict(reduction=reduction, ignore_index=-100 if ignore_index is None else ignore_index)

    def run(leaves, f, weight):
        h, W, b = leaves
        loss = f(h, W, b, weight if weighted else None)
        return [
            loss,
            *torch.autograd.grad((loss * torch.linspace(-1, 1, max(loss.numel(), 2))[: loss.numel()]).sum(), leaves),
        ]

    def reference(h, W, b, weight):
        z = linear(h, W, b)
        return cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), target, weight=weight, **options)

    def ours(h, W, b, weight):
        return lowrank.linear_cross_entropy(
            h, W, target, linear_bias=b, weight=weight, reduction=reduction, ignore_index=ignore_index
        )

    result = run(leaves, ours, weight)
    truth = run([t.detach().double().requires_grad_() for t in leaves], reference, weight.double())
    # a logit, to 6, is rounded: a relative error of as much in every probability
    scales = [
        6 * (truth[0].abs() + truth[0].abs().max()),
        *((6 if dtype is torch.float32 else 2) * t for t in truth[1:]),
    ]
    within(result, truth, scales, ("loss", "input", "weight", "bias"))


@needs_torchs
def test_takes_torchs_arguments_and_gives_its_value():
    import inspect

    torchs = torch.nn.functional.linear_cross_entropy
    parameters = inspect.signature(lowrank.linear_cross_entropy).parameters
    assert [*inspect.signature(torchs).parameters, "lora"] == list(parameters)
    (h, W, b), target, weight = tensors()
    options = dict(linear_bias=b, weight=weight, reduction="mean", options=torch.nn.LinearCrossEntropyOptions())
    torch.testing.assert_close(lowrank.linear_cross_entropy(h, W, target, **options), torchs(h, W, target, **options))
    one = lowrank.linear_cross_entropy(h[0], W, target[0])
    torch.testing.assert_close(one, torchs(h[0], W, target[0]))


def test_lora_and_leading_dims():
    (h, W, b), target, _ = tensors(T=12)
    A, B = torch.randn(3, 16, requires_grad=True), torch.randn(37, 3, requires_grad=True)
    loss = lowrank.linear_cross_entropy(
        h.view(2, 6, 16), W.detach(), target.view(2, 6), linear_bias=b, lora=(A, B, 0.5)
    )
    same = cross_entropy(linear(h, W + 0.5 * B @ A, b), target)
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, A, B)), torch.autograd.grad(same, (h, A, B)))


def test_nothing_counted_is_nan_as_in_torch():
    (h, W, _), target, _ = tensors()
    target = torch.full_like(target, -100)
    assert lowrank.linear_cross_entropy(h, W, target).isnan()
    assert cross_entropy(linear(h, W), target).isnan()
    assert lowrank.linear_cross_entropy(h, W, target, reduction="sum") == 0


@needs_torchs
def test_what_only_torch_does_is_handed_over_and_counted():
    (h, W, _), target, _ = tensors()
    target = target.clamp(0)
    calls = {
        "label smoothing": (h, W, target, dict(label_smoothing=0.1)),
        "class probabilities": (h, W, torch.rand(9, 37).softmax(1), {}),
        "K-dimensional": (h, W.detach()[:36].view(12, 3, 16), torch.randint(12, (9, 3)), {}),
    }
    _stats.reset()
    for reason, (x, w, y, options) in calls.items():
        with pytest.warns(UserWarning, match=reason):
            loss = lowrank.linear_cross_entropy(x, w, y, **options)
        torch.testing.assert_close(loss, torch.nn.functional.linear_cross_entropy(x, w, y, **options))
        with lowrank.strict(), pytest.raises(lowrank.FallbackError, match=reason):
            lowrank.linear_cross_entropy(x, w, y, **options)
        with pytest.raises(NotImplementedError, match=f"{reason}.*beside a lora"):
            lowrank.linear_cross_entropy(x, w, y, lora=(torch.ones(1, 16), torch.ones(37, 1), 1.0), **options)
    assert len(lowrank.stats()["fallback"]) == 3


def test_refuses():
    (h, W, _), target, weight = tensors()
    with pytest.raises(ValueError, match="reduction: expected"):
        lowrank.linear_cross_entropy(h, W, target, reduction="average")
    with pytest.raises(ValueError, match=r"weight: expected \[37\]"):
        lowrank.linear_cross_entropy(h, W, target, weight=weight[:-1])
    with pytest.raises(ValueError, match="targets: expected 0 <= target < 37"):
        lowrank.linear_cross_entropy(h, W, target.clamp(0) + 37)
