"""Cross-compilation: what a launcher would launch, recorded on meta tensors and compiled for a GPU that need not be there.

with recorded(sms=132) as launches:
    shrink(torch.empty(8192, 4096, device="meta", dtype=torch.bfloat16), ...)
for launch in launches:
    resources(launch.compile(90))
"""

import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank.kernels import (
    _launch,
    _reduce,
    dora_norm,
    drop,
    dy_pass,
    expand,
    gain_dy,
    kl,
    logits,
    logprob,
    materialize,
    shrink,
    svf_dy,
    svf_scale,
    x_pass,
)

KERNELS = {
    "reduce": (_reduce, "_reduce_kernel"),
    "shrink": (shrink, "_shrink_kernel"),
    "expand": (expand, "_expand_kernel"),
    "dy_pass": (dy_pass, "_dy_pass_kernel"),
    "x_pass": (x_pass, "_x_pass_kernel"),
    "svf_dy": (svf_dy, "_svf_dy_kernel"),
    "svf_scale": (svf_scale, "_svf_scale_kernel"),
    "dora_norm": (dora_norm, "_dora_norm_kernel"),
    "gain_dy": (gain_dy, "_gain_dy_kernel"),
    "drop": (drop, "_drop_kernel"),
    "materialize": (materialize, "_materialize_kernel"),
    "logits": (logits, "_logits_kernel"),
    "logprob": (logprob, "_logprob_kernel"),
    "dlogits": (logprob, "_dlogits_kernel"),
    "kl": (kl, "_kl_kernel"),
    "dkl": (kl, "_dkl_kernel"),
}
# bytes of shared memory that one program may have
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
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

    def compile(self, arch: int | str):
        kernel = getattr(*KERNELS[self.name])
        target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
        attrs = {path: [["tt.divisibility", 16]] for path in self.divisible}
        source = ASTSource(kernel, dict(self.signature), dict(self.constants), attrs)
        return triton.compile(source, target=target, options=dict(self.options))

    def __str__(self) -> str:
        constants = {k: v for (k, *rest), v in self.constants if not rest}
        names = getattr(*KERNELS[self.name]).arg_names
        sizes = {names[k]: v for k, v in constants.items() if names[k].isupper() and isinstance(v, (int, str))}
        types = [t for _, t in self.signature if isinstance(t, str) and t[0] == "*"]
        return f"{self.name} {' '.join(dict.fromkeys(types))} {sizes} {dict(self.options)}"


@contextlib.contextmanager
def recorded(sms: int, arch: int | str = 90):
    """A list of the launches that happen inside; nothing runs.  ``sms``, ``arch``: of the imagined GPU."""
    launches: list[Launch] = []
    undo = [(module, name, getattr(module, name)) for module, name in KERNELS.values()]
    version = torch.version.hip
    facts = [(m, "device_facts", m.device_facts) for m in (_launch, shrink, dy_pass, svf_dy, x_pass, logits)]
    try:
        for (name, (module, attribute)), (_, _, kernel) in zip(KERNELS.items(), undo, strict=True):
            setattr(module, attribute, _Recorder(name, kernel, launches))
        for module, attribute, _ in facts:
            setattr(module, attribute, lambda device: (0 if isinstance(arch, str) else arch, sms))
        torch.version.hip = "imagined" if isinstance(arch, str) else version
        yield launches
    finally:
        torch.version.hip = version
        for module, attribute, before in undo + facts:
            setattr(module, attribute, before)


class _Recorder:
    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        assert 0 < len(grid) <= 3, grid
        assert all(0 < n < 2**31 for n in grid[:1]), grid
        assert all(0 < n < 65536 for n in grid[1:]), grid
        return self._record

    def _record(self, *args, **options):
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False))
        given |= {name: options.pop(name) for name in list(options) if name in names}
        signature, constants, divisible = [], [], []
        for i, name in enumerate(names):
            if self.kernel.params[i].is_constexpr:
                signature.append((name, "constexpr"))
                constants.append(((i,), given[name]))
            else:
                signature.append((name, _specialise(given[name], (i,), constants, divisible)))
        launch = Launch(self.name, tuple(signature), tuple(constants), tuple(divisible), tuple(sorted(options.items())))
        if launch not in self.launches:
            self.launches.append(launch)


def _specialise(value, path, constants, divisible):
    """The type Triton's launcher would give ``value``; what it would bake in goes into the other two."""
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constants, divisible) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants.append((path, value))
        return "constexpr"
    if isinstance(value, torch.Tensor):
        if value.storage_offset() * value.element_size() % 16 == 0:
            divisible.append(path)
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        divisible.append(path)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(compiled) -> dict[str, int]:
    """Of one NVIDIA binary: registers, bytes of shared memory, and accesses to local memory (spills), in all and in loops."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(compiled.metadata_group[next(k for k in compiled.metadata_group if k.endswith(".cubin"))])
    text = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", text)]
    loops = [
        (int(m[1], 16), at)
        for at, line in code
        if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) and int(m[1], 16) < at
    ]
    spills = [at for at, line in code if re.search(r"\b(LDL|STL)\b", line)]
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "shared": compiled.metadata.shared,
        "spills": len(spills),
        "spills in loops": sum(any(start <= at <= end for start, end in loops) for at in spills),
    }
