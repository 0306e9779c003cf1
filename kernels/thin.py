"""The four thin products of a LoRA linear as kernels; lowrank/ops/thin_eager.py has the same four in PyTorch."""

from .dy_pass import dy_pass
from .expand import expand
from .shrink import shrink
from .x_pass import x_pass

__all__ = ["dy_pass", "expand", "shrink", "x_pass"]
