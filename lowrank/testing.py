"""How right is right: the error budget that every kernel and op of the package is tested with."""

import torch


def error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖out − oracle‖ / ‖oracle‖ in fp64; nan if out holds one."""
    return float((out.detach().double() - oracle.detach()).norm() / _norm(oracle))


def assert_as_right(
    out: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, noise: torch.Tensor | None, what: str
):
    """``out``'s error against the fp64 ``oracle`` is at most 1.15 times PyTorch eager's in the same dtype.

    ``noise``: f(|inputs|) where so few numbers are summed that this ratio is luck; then the bound is 3u‖f(|inputs|)‖,
    u the unit roundoff of out's dtype.
    """
    if out.dtype != eager.dtype or out.shape != oracle.shape:
        raise AssertionError(f"{what}: {out.dtype} {list(out.shape)}, expected {eager.dtype} {list(oracle.shape)}")
    ours, theirs = error(out, oracle), error(eager, oracle)
    budget = 1.15 * theirs
    if noise is not None:
        budget = max(budget, 1.5 * torch.finfo(out.dtype).eps * float(_norm(noise) / _norm(oracle)))
    if not ours <= budget:
        raise AssertionError(f"{what}: error {ours:.3e} > {budget:.3e} (eager {theirs:.3e})")


def _norm(t: torch.Tensor) -> torch.Tensor:
    return t.detach().double().norm().clamp_min(torch.finfo(torch.float64).tiny)
