import pytest

pytest.importorskip("triton")

import torch
from right import within
from thin_inputs import DEVICE

from lowrank.kernels import kl
from lowrank.ops import kl_eager

PLAIN = 1.0, 1.0, 0.0
SMALL = kl.Config(256, 4)


def run(z, base, scales, base_scales, dkl, dtype=torch.float32, module=kl, **config):
    out, stats = z.new_empty(len(z)), z.new_empty(5, len(z))
    module.forward(z.clone(), base.clone(), scales, base_scales, out, stats, **config)
    return out, module.backward(z.clone(), base.clone(), scales, base_scales, stats, dkl, dtype, **config)


def log_softmax(z, scales):
    inv_t, logit_scale, softcap = scales
    y = z * logit_scale
    y = softcap * torch.tanh(y / softcap) if softcap else y
    return (y * (inv_t[:, None] if isinstance(inv_t, torch.Tensor) else inv_t)).log_softmax(1)


def autograd(z, base, scales, base_scales, dkl):
    z = z.clone().requires_grad_()
    lp, lq = log_softmax(z, scales), log_softmax(base, base_scales)
    out = (lp.exp() * (lp - lq)).sum(1)
    return out.detach(), torch.autograd.grad(out, z, dkl)[0]


@pytest.mark.parametrize("V", [1, 2, 7, 127, 256, 257, 1031])
@pytest.mark.parametrize("capped", [False, True])
def test_values_and_gradient(V, capped):
    z = torch.randn(5, V, device=DEVICE) * 3
    base, dkl = z + torch.randn(5, V, device=DEVICE), torch.randn(5, device=DEVICE)
    scales = (torch.rand(5, device=DEVICE) + 0.5, 0.7, 5.0) if capped else (1.3, 1.0, 0.0)
    base_scales = (0.8, 1.0, 0.0) if capped else (torch.rand(5, device=DEVICE) + 0.5, 0.9, 4.0)
    exact = [tuple(t.double() if isinstance(t, torch.Tensor) else t for t in of) for of in (scales, base_scales)]
    truth = autograd(z.double(), base.double(), *exact, dkl.double())
    # z is rounded by its scale and its cap: |y| to about 10
    bounds = [10 * (t.abs() + t.abs().max()) for t in truth]
    within(run(z, base, scales, base_scales, dkl, config=SMALL), truth, bounds, ("kl", "dz"))


@pytest.mark.parametrize("module", [kl, kl_eager])
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_small_divergences_keep_their_digits(module, distance):
    """Where Σ p (log p − log q) in fp32 has lost them: KL is about distance² / 2."""
    z = torch.randn(8, 1031, device=DEVICE) * 3
    base, ones = z + distance * torch.randn(8, 1031, device=DEVICE), torch.ones(8, device=DEVICE)
    truth, _ = autograd(z.double(), base.double(), PLAIN, PLAIN, ones.double())
    out, _ = run(z, base, PLAIN, PLAIN, ones, module=module)
    naive, _ = autograd(z, base, PLAIN, PLAIN, ones)
    error, naive_error = (float((t.double() - truth).norm() / truth.norm()) for t in (out, naive))
    assert error < 3e-7 / distance
    assert error < naive_error / 3
    assert (out >= 0).all()


@pytest.mark.parametrize("module", [kl, kl_eager])
def test_the_same_bits_on_both_sides_are_exactly_zero(module):
    z = torch.randn(5, 300, device=DEVICE) * 3
    z[1, 5] = float("-inf")
    for scales in (PLAIN, (0.7, 0.9, 4.0)):
        for out in run(z, z, scales, scales, torch.ones(5, device=DEVICE), module=module):
            assert not out.any()


@pytest.mark.parametrize("module", [kl, kl_eager])
def test_infinities_and_nan(module):
    """−inf on both sides: not there.  On the policy's: q alone counts.  On the base's: the divergence is infinite."""
    z, base = torch.randn(4, 300, device=DEVICE), torch.randn(4, 300, device=DEVICE)
    z[0, :270] = base[0, :270] = float("-inf")
    z[1, :270] = float("-inf")
    base[2, 3] = float("-inf")
    z[3, 290] = float("nan")
    config = dict(config=SMALL) if module is kl else {}
    out, dz = run(z, base, PLAIN, PLAIN, torch.ones(4, device=DEVICE), module=module, **config)
    lp, lq = z[0, 270:].double().log_softmax(0), base[0, 270:].double().log_softmax(0)
    torch.testing.assert_close(out[0].double(), (lp.exp() * (lp - lq)).sum(), rtol=1e-5, atol=1e-6)
    lp, lq = z[1, 270:].double().log_softmax(0), base[1].double().log_softmax(0)[270:]
    torch.testing.assert_close(out[1].double(), (lp.exp() * (lp - lq)).sum(), rtol=1e-5, atol=1e-6)
    assert out[2] == float("inf")
    assert out[3].isnan()
    assert dz[:2].isfinite().all()
    assert not dz[:2, :270].any()


def test_gradient_is_rounded_once_to_16_bits_and_bits_are_the_rows_own():
    z, base, dkl = torch.randn(5, 300, device=DEVICE), torch.randn(5, 300, device=DEVICE), torch.randn(5, device=DEVICE)
    out, wide = run(z, base, PLAIN, PLAIN, dkl, config=SMALL)
    assert torch.equal(run(z, base, PLAIN, PLAIN, dkl, torch.bfloat16, config=SMALL)[1], wide.bfloat16())
    part, dz = run(z[3:4], base[3:4], PLAIN, PLAIN, dkl[3:4], config=SMALL)
    assert torch.equal(part, out[3:4])
    assert torch.equal(dz, wide[3:4])


def test_refuses_before_anything_is_launched():
    z, out, stats = torch.ones(4, 6), torch.ones(4), torch.ones(5, 4)
    for arguments, message in (
        ((z.double(), z, PLAIN, PLAIN, out, stats), "expected fp32 z"),
        ((z, z[:, :5], PLAIN, PLAIN, out, stats), "contiguous rows|differ"),
        ((z, torch.ones(4, 5), PLAIN, PLAIN, out, stats), "differ"),
        ((z, z, (torch.ones(3), 1.0, 0.0), PLAIN, out, stats), r"expected contiguous \[4\]"),
        ((z, z, PLAIN, PLAIN, out[:3], stats), r"expected contiguous \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kl.forward(*arguments)
    assert kl.backward(z[:0], z[:0], PLAIN, PLAIN, stats[:, :0].contiguous(), out[:0], torch.float32).shape == (0, 6)
