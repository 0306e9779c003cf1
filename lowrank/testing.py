"""How right is right: the two budgets that every kernel and op of the package is tested with.

The rule is a statistic: over enough draws, an error against fp64 of at most 1.15 times PyTorch eager's in the same dtype.  The
ratio of two errors of one draw is luck, and eager's own error is another on every CPU; a single draw is held to a bound from
theory.
"""

from collections.abc import Callable, Iterable

import torch

DRAWS = 16
ENOUGH = 1000  # numbers


def error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖out − oracle‖ / ‖oracle‖ in fp64; nan if out holds one."""
    return float((out.detach().double() - oracle.detach()).norm() / _norm(oracle))


def stacked(draw: Callable[[], Iterable[list[torch.Tensor]]], draws: int = DRAWS) -> list[list[torch.Tensor]]:
    """``draw()`` -> (ours, eager's, the oracle's) lists of tensors, ``draws`` times: each tensor stacked over the draws."""
    runs = [draw() for _ in range(draws)]
    return [
        [torch.stack([t.detach() for t in same]) for same in zip(*of, strict=True)] for of in zip(*runs, strict=True)
    ]


def assert_as_right(out: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, what: str) -> None:
    """Draws stacked along the first dim: ``out``'s error against the fp64 ``oracle`` is at most 1.15 times ``eager``'s.

    The norm of n independent errors is within 1 / √(2n) of its mean, the ratio of two such within 1 / √n: 1,000 numbers are
    3 %, so that what is as right as eager stays below 1.15 by five standard deviations.  They are to come from several draws
    (16 where that costs little), since the errors of one draw share those of its operands.
    """
    if len(oracle) < 4 or oracle.numel() < ENOUGH:
        raise ValueError(f"{what}: a ratio of errors needs 4 draws and {ENOUGH} numbers, got {list(oracle.shape)}")
    _assert_like(out, oracle, what, eager.dtype)
    error_of_out, error_of_eager = error(out, oracle), error(eager, oracle)
    if not error_of_out <= 1.15 * error_of_eager:
        raise AssertionError(
            f"{what}: error {error_of_out:.3e} > {1.15 * error_of_eager:.3e} (eager {error_of_eager:.3e})"
        )


def assert_within(
    out: torch.Tensor,
    oracle: torch.Tensor,
    scale: torch.Tensor,
    what: str,
    roundings: float = 3,
    unit: torch.dtype | None = None,
) -> None:
    """One draw: ‖out − oracle‖ ≤ roundings · u · ‖scale‖ with ``scale`` = f(|inputs|) in fp64.

    u is the unit roundoff of out's dtype, or of ``unit``, in which it was computed (autocast).  Each operand that is rounded on
    its way adds at most u f(|inputs|), and so does the result.  A sum of n products of random signs adds 0.4 u f(|inputs|) when
    it is summed one by one in that dtype, whatever n is, and less in a tree.
    """
    _assert_like(out, oracle, what, out.dtype)
    distance = float((out.detach().double() - oracle.detach()).norm())
    bound = roundings * torch.finfo(unit or out.dtype).eps / 2 * float(_norm(scale))
    if not distance <= bound:
        raise AssertionError(f"{what}: error {distance:.3e} > {bound:.3e}")


def _assert_like(out, oracle, what, dtype) -> None:
    if out.dtype != dtype or out.shape != oracle.shape:
        raise AssertionError(f"{what}: {out.dtype} {list(out.shape)}, expected {dtype} {list(oracle.shape)}")


def _norm(t: torch.Tensor) -> torch.Tensor:
    return t.detach().double().norm().clamp_min(torch.finfo(torch.float64).tiny)
