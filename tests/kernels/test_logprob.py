import pytest

pytest.importorskip("triton")

import torch
from right import within
from thin_inputs import DEVICE

from lowrank.kernels import logprob
from lowrank.ops import logprob_eager

SMALL = logprob.Config(256, 4)


def inputs(C, V, spread=3.0):
    z = torch.randn(C, V, device=DEVICE) * spread
    return z, torch.randint(V, (C,), device=DEVICE)


def formula(z, targets, scales, ignore_index=-100):
    inv_t, logit_scale, softcap = scales
    y = z * logit_scale
    y = softcap * torch.tanh(y / softcap) if softcap else y
    lp = (y * (inv_t[:, None] if isinstance(inv_t, torch.Tensor) else inv_t)).log_softmax(1)
    ignored = targets == ignore_index
    chosen = lp.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return chosen.masked_fill(ignored, 0), -(lp.exp() * lp).sum(1).masked_fill(ignored, 0)


def run(z, targets, scales, dlogp, dentropy, dtype=torch.float32, module=logprob, **config):
    logp, entropy, stats = z.new_empty(len(z)), z.new_empty(len(z)), z.new_empty(3, len(z))
    module.forward(z.clone(), targets, -100, scales, logp, entropy, stats, **config)
    dz = module.backward(z.clone(), targets, -100, scales, stats, dlogp, dentropy, dtype, **config)
    return logp, entropy, dz


def autograd(z, targets, scales, dlogp, dentropy):
    z = z.clone().requires_grad_()
    logp, entropy = formula(z, targets, scales)
    (dz,) = torch.autograd.grad((logp * dlogp + entropy * dentropy).sum(), z)
    return logp.detach(), entropy.detach(), dz


@pytest.mark.parametrize("V", [1, 2, 7, 127, 256, 257, 1031])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_values_and_gradient(V, cap, per_row):
    z, targets = inputs(5, V)
    targets[4] = -100
    scales = torch.rand(5, device=DEVICE) + 0.5 if per_row else 1.3, 0.7, cap
    g, h = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE)
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in scales]
    truth = autograd(z.double(), targets, exact, g.double(), h.double())
    # z is rounded by its scale and its cap: |y| to about 10
    bounds = [torch.full_like(truth[0], 10), torch.full_like(truth[1], 10), 10 * truth[2]]
    within(run(z, targets, scales, g, h, config=SMALL), truth, bounds, ("logp", "entropy", "dz"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once_to_16_bits(dtype):
    z, targets = inputs(5, 300)
    ones = torch.ones(5, device=DEVICE)
    wide, narrow = (run(z, targets, (1.0, 1.0, 0.0), ones, ones, t, config=SMALL)[2] for t in (torch.float32, dtype))
    assert narrow.dtype is dtype
    assert torch.equal(narrow, wide.to(dtype))


def test_growing_shrinking_and_distant_maxima():
    """What the running maximum does from block to block: up, down, far up, from −inf and from the least float."""
    z, targets = inputs(6, 512, 1.0)
    z[0] += torch.arange(512, device=DEVICE) * 0.1
    z[1] -= torch.arange(512, device=DEVICE) * 0.1
    z[2, 300:] += 1e4
    z[3, :256] = float("-inf")
    z[4, :256] = torch.finfo(torch.float32).min
    z[5, 128:] = float("-inf")
    targets = torch.tensor([500, 3, 400, 300, 300, 5], device=DEVICE)
    g, h = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    result, eager = (
        run(z, targets, (1.0, 1.0, 0.0), g, h, module=m, **c)
        for m, c in ((logprob, dict(config=SMALL)), (logprob_eager, {}))
    )
    for a, b in zip(result, eager, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    lp = z.double().log_softmax(1)
    torch.testing.assert_close(result[1].double(), -(lp.exp() * lp.clamp_min(-1e30)).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [logprob, logprob_eager])
def test_targets_that_are_none(module):
    z, _ = inputs(5, 130)
    targets = torch.tensor([0, 130, -1, -100, 129], device=DEVICE)
    ones = torch.ones(5, device=DEVICE)
    logp, entropy, dz = run(z, targets, (1.0, 1.0, 0.0), ones, ones, module=module)
    assert logp.isnan().tolist() == [False, True, True, False, False]
    assert logp[3] == entropy[3] == 0
    assert entropy.isfinite().all()
    assert dz.isfinite().all()
    assert dz.any(1).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("module", [logprob, logprob_eager])
def test_ignoring_a_class(module):
    z, _ = inputs(3, 130)
    targets, ones = torch.tensor([5, 7, 5], device=DEVICE), torch.ones(3, device=DEVICE)
    logp, entropy, stats = (torch.empty(n, device=DEVICE) for n in (3, 3, (3, 3)))
    module.forward(z.clone(), targets, 5, (1.0, 1.0, 0.0), logp, entropy, stats)
    dz = module.backward(z.clone(), targets, 5, (1.0, 1.0, 0.0), stats, ones, ones, torch.float32)
    for t in (logp, entropy, dz.abs().sum(1)):
        assert (t != 0).tolist() == [False, True, False]


def test_nan_stays_in_its_row():
    z, targets = inputs(3, 300)
    z[1, 290] = float("nan")
    ones = torch.ones(3, device=DEVICE)
    for out in run(z, targets, (1.0, 1.0, 0.0), ones, ones, config=SMALL):
        assert out.view(3, -1).isnan().any(1).tolist() == [False, True, False]


def test_bits_are_the_rows_own():
    z, targets = inputs(7, 300)
    g, h = torch.randn(7, device=DEVICE), torch.randn(7, device=DEVICE)
    whole = run(z, targets, (0.8, 1.0, 0.0), g, h, config=SMALL)
    padded = torch.full((7, 333), float("nan"), device=DEVICE)  # rows of another stride
    padded[:, :300] = z
    for rows in ([3], [6, 0]):
        part = run(z[rows], targets[rows], (0.8, 1.0, 0.0), g[rows], h[rows], config=SMALL)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))
    logp, entropy, stats = (torch.empty(n, device=DEVICE) for n in (7, 7, (3, 7)))
    logprob.forward(padded[:, :300], targets, -100, (0.8, 1.0, 0.0), logp, entropy, stats, SMALL)
    assert torch.equal(logp, whole[0])
    assert torch.equal(entropy, whole[1])


def test_empty():
    z, targets = inputs(0, 30)
    none = z.new_empty(0)
    assert run(z, targets, (1.0, 1.0, 0.0), none, none)[2].shape == (0, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z=torch.ones(4, 6).double()), "expected fp32 z"),
        (dict(z=torch.ones(6, 4).mT), "contiguous rows"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"expected contiguous \[4\]"),
        (dict(scales=(torch.ones(5), 1.0, 0.0)), r"expected contiguous \[4\]"),
        (dict(logp=torch.ones(8)[::2]), r"expected contiguous \[4\]"),
    ],
)
def test_refuses_before_anything_is_launched(change, message):
    arguments = dict(
        z=torch.ones(4, 6),
        targets=torch.zeros(4, dtype=torch.int64),
        ignore_index=-100,
        scales=(1.0, 1.0, 0.0),
        logp=torch.ones(4),
        entropy=torch.ones(4),
        stats=torch.ones(3, 4),
    )
    with pytest.raises(ValueError, match=message):
        logprob.forward(**(arguments | change))


def test_pick_config_covers_every_vocabulary():
    for V in (1, 7, 128, 129, 32000, 128256, 262144):
        c = logprob.pick_config(V)
        assert c.block >= min(V, 128)
        assert c.block & (c.block - 1) == 0
