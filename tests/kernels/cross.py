"""Cross-compilation: plans for a GPU that need not be there, compiled.

for launch in launches([shrink.plan(layout(8192, 4096), ..., gpu=gpu(90, sms=132))]):
    resources(launch.compile(90))
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank import _host
from lowrank.kernels import (
    _reduce,
    act_backward,
    act_expand,
    combine_expand,
    dora_norm,
    drop,
    dy_pass,
    expand,
    gain_dy,
    gather_shrink,
    kl,
    logits,
    logprob,
    materialize,
    shrink,
    svf_dy,
    svf_scale,
    x_pass,
)
from lowrank.kernels._launch import GPU, Layout, Plan

KERNELS = {
    "reduce": _reduce._reduce_kernel,
    "shrink": shrink._shrink_kernel,
    "expand": expand._expand_kernel,
    "dy_pass": dy_pass._dy_pass_kernel,
    "x_pass": x_pass._x_pass_kernel,
    "svf_dy": svf_dy._svf_dy_kernel,
    "svf_scale": svf_scale._svf_scale_kernel,
    "dora_norm": dora_norm._dora_norm_kernel,
    "gain_dy": gain_dy._gain_dy_kernel,
    "drop": drop._drop_kernel,
    "materialize": materialize._materialize_kernel,
    "logits": logits._logits_kernel,
    "logprob": logprob._logprob_kernel,
    "dlogits": logprob._dlogits_kernel,
    "kl": kl._kl_kernel,
    "dkl": kl._dkl_kernel,
    "gather_shrink": gather_shrink._gather_shrink_kernel,
    "act_expand": act_expand._act_expand_kernel,
    "act_backward": act_backward._act_backward_kernel,
    "combine_expand": combine_expand._combine_expand_kernel,
}
# bytes of shared memory that one program may have
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything its binary depends on; equal launches are one compilation."""

    name: str
    signature: tuple
    constants: tuple
    divisible: tuple
    options: tuple
    parameters: tuple  # the kind of each, as _host lays them out

    @classmethod
    def of(cls, plan: Plan) -> "Launch":
        assert 0 < len(plan.grid) <= 3, plan.grid
        assert all(0 < n < 2**31 for n in plan.grid[:1]), plan.grid
        assert all(0 < n < 65536 for n in plan.grid[1:]), plan.grid
        name = next(name for name, kernel in KERNELS.items() if kernel is plan.kernel)
        params, options = plan.kernel.params, dict(plan.constants)
        arguments = [*plan.arguments, *plan.integers]
        assert [p.is_constexpr for p in params[: len(arguments)]] == [False] * len(arguments)
        signature, constants, divisible = [], [], []
        for i, value in enumerate(arguments):
            signature.append((params[i].name, _specialise(value, (i,), constants, divisible)))
        for i in range(len(arguments), len(params)):
            signature.append((params[i].name, "constexpr"))
            constants.append(((i,), options.pop(params[i].name)))
        options = tuple(sorted(options.items()))
        parameters = tuple(kind for kind, _ in _host.parameters(plan))
        return cls(name, tuple(signature), tuple(constants), tuple(divisible), options, parameters)

    def compile(self, arch: int | str):
        target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
        attrs = {path: [["tt.divisibility", 16]] for path in self.divisible}
        source = ASTSource(KERNELS[self.name], dict(self.signature), dict(self.constants), attrs)
        return triton.compile(source, target=target, options=dict(self.options))

    def __str__(self) -> str:
        constants = {k: v for (k, *rest), v in self.constants if not rest}
        names = KERNELS[self.name].arg_names
        sizes = {names[k]: v for k, v in constants.items() if names[k].isupper() and isinstance(v, (int, str))}
        types = [t for _, t in self.signature if isinstance(t, str) and t[0] == "*"]
        return f"{self.name} {' '.join(dict.fromkeys(types))} {sizes} {dict(self.options)}"


def gpu(arch: int | str, sms: int) -> GPU:
    """An imagined one."""
    return GPU(0, sms, hip=True) if isinstance(arch, str) else GPU(arch, sms)


def layout(*shape: int, dtype: torch.dtype) -> Layout:
    """Of a new tensor on no device."""
    return Layout.new(shape, dtype, torch.device("meta"))


def launches(planned) -> list[Launch]:
    """The distinct ones of what launchers' plans return."""
    return list(dict.fromkeys(Launch.of(plan) for plan in plans(planned)))


def plans(planned):
    """The Plans in what launchers' plans return."""
    for plan in planned:
        if isinstance(plan, Plan):
            yield plan
        elif isinstance(plan, (tuple, list)):
            yield from plans(plan)


def _specialise(value, path, constants, divisible):
    """The type Triton's launcher would give ``value``; what it would bake in goes into the other two."""
    if value is float:
        return "fp32"
    if isinstance(value, Layout):
        if value.aligned:
            divisible.append(path)
        return "*" + _TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constants, divisible) for i, v in enumerate(value))
    if value is None or value == 1:
        constants.append((path, value))
        return "constexpr"
    if value % 16 == 0:
        divisible.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(compiled) -> dict[str, int]:
    """Of one NVIDIA binary: registers, bytes of shared memory, and accesses to local memory (spills), in all and in loops."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(compiled.metadata_group[next(k for k in compiled.metadata_group if k.endswith(".cubin"))])

    def dump(*what):
        return subprocess.run([tool, *what, path], capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    # what is spilled is spilled to the stack; disassembling takes as long as compiling
    text = "" if re.search(r"STACK:0 .*LOCAL:0 ", usage) else dump("-sass")
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", text)]
    loops = [
        (int(m[1], 16), at)
        for at, line in code
        if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) and int(m[1], 16) < at
    ]
    spills = [at for at, line in code if re.search(r"\b(LDL|STL)\b", line)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "spills": len(spills),
        "spills in loops": sum(any(start <= at <= end for start, end in loops) for at in spills),
    }
