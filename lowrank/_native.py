"""The compiled libraries of csrc/: loaded on first use, never by ``import lowrank``."""

import functools
from pathlib import Path

import torch

LIBRARIES = ("cpu", "cuda")


def available(library: str) -> bool:
    """Whether torch.ops.lowrank has the ``library``'s ("cpu" or "cuda") implementations; loads it on the first call."""
    return why_not(library) is None


@functools.cache
def why_not(library: str) -> str | None:
    """Why ``library`` cannot be used, in one line; None if it can."""
    path = Path(__file__).with_name(f"_C_{library}.so")
    if library == "cuda" and torch.version.cuda is None:
        return "this torch is not a CUDA build"
    if not path.exists():
        return f"lowrank/{path.name} was not built (python setup.py build_ext --inplace says why)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"lowrank/{path.name} does not load: {str(error).splitlines()[0]}"
    return None
