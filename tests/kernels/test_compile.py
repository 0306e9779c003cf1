"""Every kernel at every config that pick_config can return, compiled for GPUs that are not here.

No spills in a loop, shared memory within the chip's, no fp64 arithmetic, 16-byte loads of activations.  ``make test``
compiles a cross-section; ``make compile-all`` everything (-m compile_all).
"""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import cross
import domain

SMS = 132  # an H100 or H200; configs depend on it through the number of chunks alone, which no binary does
FP64 = ("add.f64", "mul.f64", "fma.rn.f64", "add.rn.f64", "mul.rn.f64")


def check(launch: cross.Launch, arch: int | str) -> str:
    """What is wrong with the binary, or nothing."""
    compiled = launch.compile(arch)
    found = []
    if compiled.metadata.shared > cross.SHARED[arch]:
        found.append(f"{compiled.metadata.shared} bytes of shared memory")
    if not isinstance(arch, str):
        resources = cross.resources(compiled)
        # a few registers parked around a loop cost nothing that could be measured; in a loop, one is too many
        if resources["spills in loops"] or resources["spills"] > 16:
            found.append(f"spills: {resources}")
        if any(op in compiled.asm["ptx"] for op in FP64):
            found.append("fp64 arithmetic")
    return f"{arch} {launch}: {'; '.join(found)}" if found else ""


def complaints(launches, archs) -> list[str]:
    work = list(itertools.product(launches, archs))
    with ProcessPoolExecutor(2) as pool:
        return [what for what in pool.map(check, *zip(*work, strict=True), chunksize=4) if what]


def launches(arch=90, **which):
    with cross.recorded(SMS, arch) as found:
        domain.every_call(**which)
    return found


def one_per_kernel_and_dtype(found):
    """The launch with most constants of each kernel and set of types: the one that does most at once."""
    chosen = {}
    for launch in found:
        types = tuple(sorted({str(t) for _, t in launch.signature}))
        kept = chosen.get((launch.name, types))
        if kept is None or len(launch.signature) > len(kept.signature):
            chosen[launch.name, types] = launch
    return list(chosen.values())


def test_all_configs_on_hopper():
    """Rank 16 of one, two and three adapters and the largest ranks, at many rows and at few."""
    found = launches(rows=[8192], ranks=[(16,), (64,), (16, 16, 16)], svf_ranks=[(64,)])
    found += [launch for launch in launches(rows=[16], ranks=[(16,), (512,)], svf_ranks=[]) if launch not in found]
    assert len(found) > 150
    assert not complaints(found, [90])


@pytest.mark.parametrize("arch", [80, 100, 120, "gfx942"])
def test_one_config_per_kernel_and_dtype_elsewhere(arch):
    found = one_per_kernel_and_dtype(launches(arch, rows=[8192], ranks=[(16,)]))
    assert {launch.name for launch in found} == set(cross.KERNELS)
    assert not complaints(found, [arch])


@pytest.mark.compile_all
@pytest.mark.parametrize("arch", list(cross.SHARED))
def test_everything(arch):
    found = launches()
    found += [
        launch for launch in launches(rows=[8192], ranks=[(16,), (64,)], shape=domain.RAGGED) if launch not in found
    ]
    assert not complaints(found, [arch])


def test_wide_loads_of_activations():
    """cp.async or ld.global of 16 bytes in every kernel that reads activations whose rows are 16-byte aligned."""
    for launch in launches(dtypes=domain.DTYPES[:1], rows=[8192], ranks=[(16,)]):
        if launch.name in ("shrink", "x_pass", "dy_pass"):
            ptx = launch.compile(90).asm["ptx"]
            assert "cp.async.cg.shared.global" in ptx or "ld.global.v4" in ptx, str(launch)


def test_a_spilling_config_is_seen():
    import torch

    from lowrank.kernels import expand

    with cross.recorded(SMS) as found:
        x = torch.empty(8192, 128, device="meta")
        expand.expand(
            x, [torch.empty(4096, 128, device="meta")], [1.0], [None], None, x.dtype, expand.Config(128, 256, 4, 2)
        )
    assert "spills" in check(found[0], 90)
