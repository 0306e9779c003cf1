"""Started by test_host.py with tests/libcuda.c as the driver: what Triton asks of it for a plan's first launch, and what
csrc/plan_cuda.cpp asks for the second.

Prints a line per launch that differs, and how many were compared.
"""

import ctypes
import dataclasses
import sys
from types import SimpleNamespace

cuda, torch_cuda = (ctypes.CDLL(path) for path in sys.argv[1:3])
cuda.recorded.restype = ctypes.c_char_p

import cross
import domain
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from lowrank import _host, _native
from lowrank.kernels import _launch
from lowrank.kernels._launch import Layout

DEVICE = torch.device("cuda", 1)
kept = []  # so that no two tensors are at one address


def bring(value):
    """What a launcher would be given for a Layout, or ``float``."""
    if isinstance(value, tuple) and not isinstance(value, Layout):
        return tuple(map(bring, value))
    if isinstance(value, Layout):
        kept.append(torch.zeros(17, dtype=value.dtype))
        return kept[-1][0 if value.aligned else 1 :]
    if value is float:
        kept.append(1 / (3 + len(kept)))
        return kept[-1]
    return value


def recorded(launch, plan, given) -> str:
    sizes = [4 if kind in (_host.INT32, _host.FLOAT32) else 8 for kind in launch.parameters]
    sizes += [8] * _host.SCRATCH
    cuda.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    _launch.run(plan, *given)
    return cuda.recorded().decode()


def main():
    assert _native.available("cpu"), _native.why_not("cpu")
    gpu = SimpleNamespace(
        utils=CudaUtils(),
        launcher_cls=CudaLauncher,
        get_current_device=lambda: DEVICE.index,
        get_current_stream=lambda device: 0x5000 + device,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(gpu)
    kinds = dict(rows=[16, 8192], ranks=[(16,), (4, 24)], svf_ranks=[(16,)], dtypes=[(torch.bfloat16, torch.float32)])
    compared = set()
    for plan in cross.plans(domain.everything(cross.gpu(90, 132), **kinds)):
        launch = cross.Launch.of(plan)
        kind = launch.name, launch.signature, launch.divisible  # of parameters, whatever the blocks
        if kind in compared:
            continue
        compared.add(kind)
        last, given, plan.device = plan, bring(plan.arguments), DEVICE
        theirs = recorded(launch, plan, given)
        assert plan.handle, _host.why_not(plan, plan.compiled)
        ours = recorded(launch, plan, given)
        if ours != theirs:
            print(f"{launch}\n  Triton {theirs}\n  ours   {ours}")
    refused(last, *given)
    print(f"{len(compared)} launches of {len({name for name, *_ in compared})} kernels compared")


def refused(plan, *given):
    """A hook or a kernel that needs more keeps a launch with Triton; one that fails is an error."""
    compiled, theirs, asked = plan.compiled, plan.launch, []
    plan.launch = lambda *args, **constants: asked.append(args) or compiled
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    _launch.run(plan, *given)
    hook.remove(print)
    if len(asked) != 1:
        print("a hook is passed by")
    plan.launch = theirs
    again = dataclasses.replace(plan)
    again.device = DEVICE
    _launch.run(again, *(3 if isinstance(value, float) else value for value in given))
    if again.handle or not any(isinstance(value, float) for value in given):
        print("an integer in a float's place is laid out as a float")
    cuda.break_()
    try:
        _launch.run(plan, *given)
        print("a failing launch raises nothing")
    except RuntimeError as error:
        if "CUDA error 1" not in str(error):
            print(error)
    needs = dict(
        num_ctas=2, launch_pdl=True, launch_cooperative_grid=True, global_scratch_size=8, profile_scratch_size=8
    )
    for name, value in (needs | dict(shared=(228 << 10) + 1)).items():
        metadata = compiled.metadata._replace(**{name: value})
        if _host.register(plan, SimpleNamespace(asm=compiled.asm, metadata=metadata, function=1)):
            print(f"{name} = {value} is not refused")
    more = compiled.asm["ptx"].replace(".param .u64", ".param .u64 .ptr .global .align 8 one_more,\n.param .u64", 1)
    if _host.register(plan, SimpleNamespace(asm=dict(ptx=more), metadata=compiled.metadata, function=1)):
        print("a parameter more is not refused")
    if not _host.register(plan, SimpleNamespace(asm=compiled.asm, metadata=compiled.metadata, function=1)):
        print("what is as expected is refused")
    if _host.register(plan, SimpleNamespace(asm=compiled.asm, metadata=compiled.metadata)):
        print("a kernel without its function is not refused")


if __name__ == "__main__":
    main()
