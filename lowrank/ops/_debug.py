"""Whether checks look at values, which on a GPU waits for the device."""

import torch

from .node import followed


class debug_checks:
    """Check values on a GPU too, which waits for the device at every call: targets, temperatures, z.

    A switch, and a context manager that puts it back, like :class:`lowrank.strict`.
    """

    enabled = False

    def __init__(self, enabled: bool = True):
        self.before, debug_checks.enabled = debug_checks.enabled, enabled

    def __enter__(self) -> "debug_checks":
        return self

    def __exit__(self, *exc: object) -> None:
        debug_checks.enabled = self.before


def may_look(t: torch.Tensor) -> bool:
    """Whether a check may read the values of ``t``: on a CPU, or under :class:`debug_checks`; never while traced or batched."""
    if torch.compiler.is_compiling() or followed() is not None or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return t.device.type == "cpu" or (debug_checks.enabled and not t.is_meta)
