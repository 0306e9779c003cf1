"""Which backend an op takes.  One visible chain of conditions; ``lowrank doctor`` prints its answer and its reason."""

import os

import torch


def backend(device: torch.device) -> tuple[str, str]:
    """("eager", reason).  Raises ValueError if LOWRANK_BACKEND asks for what this version does not have."""
    forced = os.environ.get("LOWRANK_BACKEND")
    if forced == "eager":
        return "eager", "LOWRANK_BACKEND=eager"
    if forced:
        raise ValueError(f"LOWRANK_BACKEND={forced!r}: this version has only 'eager'")
    return (
        "eager",
        f"this version has no Triton kernels yet; {device.type} runs the same order of operations in PyTorch",
    )
