"""The passes of a DoRA linear as kernels; lowrank/ops/dora_eager.py has the same in PyTorch."""

import torch

from . import expand as _expand
from .dora_norm import dora_norm
from .drop import drop
from .dy_pass import dy_pass
from .gain_dy import gain_dy
from .shrink import shrink
from .x_pass import x_pass

__all__ = ["drop", "dy_pass", "expand", "gain_dy", "norm", "shrink", "x_pass"]


def norm(W, A, B, alone=False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """‖W + B A‖ of each row, and with ``alone`` ‖W‖, the same bits where B is 0."""
    A_cast, B = A.to(B.dtype), B.contiguous()
    squares = dora_norm(W, A, B, B @ (A_cast @ A_cast.mT), alone=alone)
    if not alone:
        return squares.sum(0).clamp_(min=0).sqrt_()
    merged, base = squares
    return merged.sum(0).clamp_(min=0).sqrt_(), base.sum(0).sqrt_()


def expand(S, B, v, gain, bias, base=None) -> torch.Tensor:
    """gain ∘ v + S Bᵀ + bias; onto ``base`` as lowrank/ops/dora_eager.py has it."""
    dtype = v.dtype if base is None else base.dtype
    return _expand.expand(S, [B], [1.0], [None], v, dtype, gain=gain, bias=bias, base=base)
