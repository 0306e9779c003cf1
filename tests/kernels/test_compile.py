"""Every kernel at every config that pick_config can return, compiled for GPUs that are not here.

No spills in a loop, shared memory within the chip's, no fp64 arithmetic, 16-byte loads of activations, and parameters that are
laid out as _host lays them out.  ``make test``
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
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lowrank import _host
from lowrank.kernels import expand
from lowrank.kernels._launch import Layout

SMS = 132  # an H100 or H200; configs depend on it through the number of chunks alone, which no binary does
FP64 = ("add.f64", "mul.f64", "fma.rn.f64", "add.rn.f64", "mul.rn.f64")


def check(launch: cross.Launch, arch: int | str) -> str:
    """What is wrong with the binary, or nothing."""
    compiled = launch.compile(arch)
    problems = []
    if compiled.metadata.shared > cross.SHARED[arch]:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory")
    if not isinstance(arch, str):
        resources = cross.resources(compiled)
        # a few registers parked around a loop cost nothing that could be measured; in a loop, one is too many
        if resources["spills in loops"] or resources["spills"] > 16:
            problems.append(f"spills: {resources}")
        if any(op in compiled.asm["ptx"] for op in FP64):
            problems.append("fp64 arithmetic")
        declared, expected = _host.declared(compiled.asm["ptx"]), [*launch.parameters, *[_host.POINTER] * _host.SCRATCH]
        if declared != expected:
            problems.append(f"parameters of kinds {declared}, expected {expected}")
    return f"{arch} {launch}: {'; '.join(problems)}" if problems else ""


def complaints(launches, archs) -> list[str]:
    work = list(itertools.product(launches, archs))
    with ProcessPoolExecutor(2) as pool:
        return [what for what in pool.map(check, *zip(*work, strict=True), chunksize=4) if what]


def launches(arch=90, **which):
    return cross.launches(domain.everything(cross.gpu(arch, SMS), **which))


def one_per_kernel_and_dtype(candidates):
    """The launch with most constants of each kernel and set of types: the one that does most at once."""
    chosen = {}
    for launch in candidates:
        types = tuple(sorted({str(t) for _, t in launch.signature}))
        kept = chosen.get((launch.name, types))
        if kept is None or len(launch.signature) > len(kept.signature):
            chosen[launch.name, types] = launch
    return list(chosen.values())


def test_all_configs_on_hopper():
    """Rank 16 of one, two and three adapters and the largest ranks, at many rows and at few.

    Where all is fp16 the binaries are bf16's to a register or two; between fp16 and fp32 they are not.
    """
    dtypes = [pair for pair in domain.DTYPES if pair != (domain.FP16, domain.FP16)]
    chosen = launches(dtypes=dtypes, rows=[8192], ranks=[(16,), (64,), (16, 16, 16)], svf_ranks=[(64,)])
    few = launches(dtypes=dtypes, rows=[16], ranks=[(16,), (512,)], svf_ranks=[])
    chosen += [launch for launch in few if launch not in chosen]
    assert len(chosen) > 150
    assert not complaints(chosen, [90])


@pytest.mark.parametrize("arch", list(cross.SHARED))
def test_one_config_per_kernel_and_dtype(arch):
    chosen = one_per_kernel_and_dtype(launches(arch, rows=[8192], ranks=[(16,)]))
    assert {launch.name for launch in chosen} == set(cross.KERNELS)
    assert not complaints(chosen, [arch])


@pytest.mark.compile_all
@pytest.mark.parametrize("arch", list(cross.SHARED))
def test_everything(arch):
    chosen = launches(names=domain.MIXTURES)
    chosen += [
        launch for launch in launches(rows=[8192], ranks=[(16,), (64,)], shape=domain.RAGGED) if launch not in chosen
    ]
    assert not complaints(chosen, [arch])


def stand_in(value):
    """What a launcher would be given for a Layout, or ``float``."""
    if isinstance(value, tuple) and not isinstance(value, Layout):
        return tuple(map(stand_in, value))
    if isinstance(value, Layout):
        return torch.zeros(17, dtype=value.dtype)[0 if value.aligned else 1 :]
    return 0.5 if value is float else value


def test_plans_are_specialised_as_triton_would():
    """Each plan's types, what is baked in and what is divisible by 16, against Triton's own binder for such a call."""
    seen = {}
    kinds = dict(rows=[16, 8192], ranks=[(16,), (4, 24)], svf_ranks=[(16,)])
    for shape in (domain.SHAPE, domain.RAGGED):
        for plan in cross.plans(domain.everything(cross.gpu(90, SMS), shape=shape, **kinds)):
            seen.setdefault(cross.Launch.of(plan), plan)
    backend, binders = make_backend(GPUTarget("cuda", 90, 32)), {}
    for launch, plan in seen.items():
        if launch.name not in binders:
            kernel = plan.kernel
            binders[launch.name] = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments = [*map(stand_in, plan.arguments), *plan.integers]
        bound, specialised, options = binders[launch.name](*arguments, **plan.constants)
        types, keys = zip(*specialised, strict=True)
        constants, divisible = [], []
        for path, kind, key, value in leaves(types, keys, tuple(bound.values())):
            if kind == "constexpr":
                constants.append((path, value))
            elif key == "D":
                divisible.append(path)
        assert dict(launch.signature) == dict(zip(bound, types, strict=True)), str(launch)
        assert (launch.constants, launch.divisible) == (tuple(constants), tuple(divisible)), str(launch)
        assert dict(launch.options) == options
    assert len(seen) > 200


def leaves(types, keys, values, path=()):
    for i, (kind, key, value) in enumerate(zip(types, keys, values, strict=True)):
        if isinstance(kind, tuple):
            yield from leaves(kind, key, value, (*path, i))
        else:
            yield (*path, i), kind, key, value


def test_wide_loads_of_activations():
    """cp.async or ld.global of 16 bytes in every kernel that reads activations whose rows are 16-byte aligned."""
    for launch in launches(dtypes=domain.DTYPES[:1], rows=[8192], ranks=[(16,)]):
        if launch.name in ("shrink", "x_pass", "dy_pass"):
            ptx = launch.compile(90).asm["ptx"]
            assert "cp.async.cg.shared.global" in ptx or "ld.global.v4" in ptx, str(launch)


def test_a_spilling_config_is_seen():
    S, B = cross.layout(8192, 128, dtype=domain.FP32), cross.layout(4096, 128, dtype=domain.FP32)
    config, gpu = expand.Config(128, 256, 4, 2), cross.gpu(90, SMS)
    of_S = (None,), None, (None,), None, None, None, None
    _, plan = expand.plan_new(S, (B,), domain.FP32, *of_S, "highest", config, gpu)
    assert "spills" in check(cross.Launch.of(plan), 90)
