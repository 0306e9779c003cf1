"""The thin products of singular-value scaling as kernels; lowrank/ops/svf_eager.py has the same in PyTorch."""

import torch

from . import expand as _expand
from . import svf_scale as _svf_scale
from .shrink import shrink
from .svf_dy import svf_dy as dy_pass
from .x_pass import x_pass

__all__ = ["dy_pass", "expand", "scale", "scale_and_dot", "shrink", "x_pass"]


def expand(S, B, scales, mix, start, dtype) -> torch.Tensor:
    """(S ∘ m) Bᵀ + start."""
    return _expand.expand(S, [B], [1.0], [scales], start, dtype, mix=mix)


def scale(S, scales, mix) -> torch.Tensor:
    """S ∘ m."""
    return _svf_scale.svf_scale(S, scales, mix, None, S.dtype)[0]


def scale_and_dot(D, scales, mix, S, need_dS):
    """D ∘ m and the sums of S ∘ D."""
    return _svf_scale.svf_scale(D, scales, mix, S, D.dtype if need_dS else None)
