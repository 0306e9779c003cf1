"""What runs on a device: kernels or PyTorch, and what csrc/ does for the latter.  Chosen once, not per call."""

import contextlib
import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from .. import _native


class Choice(NamedTuple):
    """What runs on a device."""

    backend: str  # "triton" or "eager"
    reason: str
    forced: bool  # kernels, however small the call
    native: bool  # eager's order of operations in one call of csrc/linear.h, where eager's they are
    node: bool  # csrc/node.cpp's autograd node around it


def choice(device: torch.device) -> Choice:
    """Made once per device.  Raises ValueError if LOWRANK_BACKEND asks for what this device cannot do."""
    chosen = _choices.get(device)
    if chosen is None:
        chosen = _choices[device] = _choose(device, _forced or os.environ.get("LOWRANK_BACKEND"))
    return chosen


def backend(device: torch.device) -> tuple[str, str]:
    """("triton" or "eager", reason); raises as :func:`choice` does."""
    return choice(device)[:2]


def read_environment() -> None:
    """Let the next calls see what LOWRANK_BACKEND and TRITON_INTERPRET are now."""
    for choices in _choices_of.values():
        choices.clear()


@contextlib.contextmanager
def forced(name: str):
    """As under LOWRANK_BACKEND=name in here, for every thread."""
    global _choices, _forced
    before = _choices, _forced
    _choices, _forced = _choices_of.setdefault(name, {}), name
    try:
        yield
    finally:
        _choices, _forced = before


def _choose(device: torch.device, asked: str | None) -> Choice:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if asked not in (None, "", "eager", "triton"):
        raise ValueError(f"LOWRANK_BACKEND={asked!r}: expected 'eager' or 'triton'")
    if asked == "eager":
        return Choice("eager", "LOWRANK_BACKEND=eager", False, False, False)
    possible = device.type == "cuda" or interpreted
    if asked == "triton" and not (possible and _has_triton()):
        raise ValueError(f"LOWRANK_BACKEND='triton': {device.type} needs triton and a GPU, or TRITON_INTERPRET=1")
    if possible and _has_triton():
        why = "LOWRANK_BACKEND=triton" if asked else "TRITON_INTERPRET=1" if interpreted else "a GPU"
        node = device.type == "cuda" and _native.available("node")  # for what is too small for kernels
        return Choice("triton", why, asked == "triton" or interpreted, node, node)
    native = device.type == "cpu" and _native.available("cpu")
    reason = (
        f"{device.type}: the kernels' order of operations in PyTorch" if not possible else "triton is not installed"
    )
    return Choice("eager", reason, False, native, native and _native.available("node"))


_choices_of: dict[str | None, dict[torch.device, Choice]] = {None: {}}
_choices, _forced = _choices_of[None], None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
