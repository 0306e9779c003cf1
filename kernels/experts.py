"""The passes of a mixture's layer as kernels; what lies between them are grouped products of lowrank/ops/experts_eager.py."""

from .act_backward import act_backward
from .act_expand import act_expand
from .combine_expand import combine_expand
from .gather_shrink import MAX_RANK, gather_shrink

__all__ = ["MAX_RANK", "act_backward", "act_expand", "combine_expand", "gather_shrink"]
