"""Planned launches without Triton's launcher: Python has decided, csrc/plan_cuda.cpp executes.

A plan is launched through Triton once, which compiles it; :func:`register` then lays out its parameters as the compiled kernel
takes them, and from there on :func:`launch` copies pointers and floats into place and calls ``cuLaunchKernel``.
What is not laid out as expected, or needs more than that, stays with Triton: so does everything where csrc/ is not built.
"""

import functools
import re
import weakref

import torch

from . import _native

INT32, INT64, FLOAT32, POINTER = range(4)  # csrc/plan.h's Kind
NULL = -1  # the index of a pointer that is null
SCRATCH = 2  # pointers that Triton appends, null where the kernel needs no scratch memory
MAX_SHARED = 228 << 10  # above which Triton sets another attribute

_lib = torch.library.Library("lowrank", "FRAGMENT")
_lib.define("new_plan(int function, int[] grid, int threads, int shared, int device, int[] kinds, int[] values) -> int")
_lib.define("launch(int plan, Tensor(a!)[] tensors, float[] floats) -> ()")
_lib.define("free_plan(int plan) -> ()")

launch = torch.ops.lowrank.launch.default


def register(plan, compiled) -> int:
    """A handle of ``plan`` (kernels/_launch.py) for launch(handle, tensors, floats); 0 if Triton is to launch it.

    ``compiled``: what Triton's launch has returned, to be kept as long as the handle is used.
    """
    if not _native.available("cpu") or why_not(plan, compiled) is not None:
        return 0
    kinds = declared(compiled.asm["ptx"])
    values = [value for _, value in parameters(plan)]
    handle = torch.ops.lowrank.new_plan(
        compiled.function,
        (*plan.grid, 1, 1)[:3],
        32 * compiled.metadata.num_warps,
        compiled.metadata.shared,
        plan.device.index or 0,
        kinds,
        values + [NULL] * (len(kinds) - len(values)),
    )
    if handle:
        weakref.finalize(plan, torch.ops.lowrank.free_plan, handle).atexit = False
    return handle


def why_not(plan, compiled) -> str | None:
    """Why Triton is to launch it; None if it need not."""
    ptx = getattr(compiled, "asm", {}).get("ptx")
    if ptx is None:
        return "not compiled for an NVIDIA GPU"
    metadata = getattr(compiled, "metadata", None)
    read = (getattr(compiled, "function", None), *(getattr(metadata, name, None) for name in ("num_warps", "shared")))
    if not all(isinstance(value, int) for value in read):
        return "Triton keeps the function, or what it is launched with, elsewhere"
    for name, plain in (("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)):
        if getattr(metadata, name, plain) != plain:
            return f"{name} is {getattr(metadata, name)}"
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, name, 0):
            return f"{name} is {getattr(metadata, name)}"
    if metadata.shared > MAX_SHARED:
        return f"{metadata.shared} bytes of shared memory"
    expected, kinds = [kind for kind, _ in parameters(plan)], declared(ptx)
    if kinds[: len(expected)] != expected or kinds[len(expected) :] not in ([POINTER] * n for n in range(SCRATCH + 1)):
        return f"the kernel's parameters are of kinds {kinds}, expected {expected} and scratch"
    return None


def parameters(plan) -> list[tuple[int, int]]:
    """(kind, value) of each parameter of the compiled kernel but scratch: what Triton bakes in, None and 1, is none.

    The value of an integer; the index of a pointer or float among a call's.
    """
    of_a_call = [(POINTER, i) for i in range(plan.tensors)] + [(FLOAT32, i) for i in range(plan.floats)]
    return of_a_call + [
        (INT32 if -(1 << 31) <= integer < 1 << 31 else INT64, integer)
        for integer in flat(plan.integers)
        if integer != 1
    ]


@functools.lru_cache(1024)
def declared(ptx: str) -> list[int]:
    """The kind of each parameter of the kernel."""
    entry = "".join(re.findall(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL))
    kinds = {"u32": INT32, "u64": INT64, "f32": FLOAT32, "u64 .ptr": POINTER}
    return [kinds.get(kind) for kind in re.findall(r"\.param\s+\.(\w+(?: \.ptr)?)", entry)]


def flat(nested: tuple) -> list:
    """Its items and those of tuples among them, without None."""
    return [leaf for item in nested for leaf in (item if type(item) is tuple else (item,)) if leaf is not None]
