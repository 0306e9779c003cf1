"""svf_eager.py's functions for more directions than a kernel accumulates: GEMMs, and one kernel for each pass over [M,k]."""

from torch import Tensor

from . import thin_eager
from .thin_eager import shrink, x_pass

__all__ = ["dy_pass", "expand", "shrink", "x_pass"]


def expand(S, B, scales, mix, start, dtype) -> Tensor:
    from ..kernels import svf

    return thin_eager.expand(svf.scale(S, scales, mix), [B], [1.0], [None], start, dtype)


def dy_pass(dy, B, scales, mix, S, need_dS, dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from ..kernels import svf

    (D,), _ = thin_eager.dy_pass(dy, [B], [1.0], [None], None, [False], True, dtype)
    return svf.scale_and_dot(D, scales, mix, S, need_dS)
