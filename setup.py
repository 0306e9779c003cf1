"""Metadata is in pyproject.toml; here the native code of csrc/ is built, through ninja.

    lowrank/_C_cpu.so              needs a C++ compiler
    lowrank/_C_cuda.so             needs nvcc, and a CUDA build of torch (or LOWRANK_BUILD_CUDA=1: compiled, not loaded)
    lowrank/_C_node-<tags>.so      needs Python's headers too; not on torch's stable ABI: it is for one torch and one Python

All need the headers of the torch that is installed, and nothing of it that runs: they are found where this Python keeps its
packages, so that pip's isolated builds find them too.  ``python setup.py build_ext --inplace`` builds in a checkout.  What
cannot be built is left out with a message: lowrank then does in PyTorch, slower, what the library would have done.
LOWRANK_REQUIRE_NATIVE=1 makes that an error.  CXX, LOWRANK_NVCC and LOWRANK_ARCHS ("80;90a;100a") choose.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
STEMS = sorted(path.stem for path in CSRC.glob("*.cu"))  # the CUDA library's
HOST = ["plan_cuda"]  # host code alone, HOST.cpp: in the library that needs no nvcc
ARCHS = os.environ.get("LOWRANK_ARCHS", "80;90a;100a")
# The same bits from every compiler: nothing is fused or reordered.  The two -fno allow fmaf and selects in vectors.
CXXFLAGS = "-std=c++17 -O3 -fPIC -Wall -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
NVCCFLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -fmad=false -DUSE_CUDA"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and later
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2 -mfma"
    ISAS["avx512"] = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def nvcc() -> str | None:
    return os.environ.get("LOWRANK_NVCC") or shutil.which("nvcc")


def ninja() -> str | None:
    if importlib.util.find_spec("ninja"):  # the package brings the program, not always on PATH
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def torch_folder() -> Path | None:
    """Where torch is: on the path, or beside this Python's other packages, which an isolated build does not see."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(path) for path in spec.submodule_search_locations or []] if spec else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((folder for folder in folders if (folder / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def torch_version(of: str = "__version__") -> str | None:
    """The version of that torch, or of its "cuda", read from its version.py: an isolated build cannot import it."""
    match = re.search(rf"^{of}\b[^=\n]*= *'([^']+)'", (torch_folder() / "version.py").read_text(), re.MULTILINE)
    return match and match[1]


def torch_flags() -> tuple[str, str]:
    """(include directories, libraries).  The libraries only so that the loader finds torch, which Python loads privately."""
    torch = torch_folder()
    includes = f"-isystem {torch / 'include'} -isystem {torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"
    return includes, f"-L{torch / 'lib'} -Wl,--no-as-needed -ltorch -ltorch_cpu"


def why_not(library: str) -> str | None:
    """Why ``library`` ("cpu", "cuda" or "node") cannot be built here; None if it can."""
    if sys.platform != "linux":
        return "is built on Linux only"
    if torch_folder() is None:
        return "needs torch 2.10 or later when it is built: install that, then install lowrank again"
    if ninja() is None:
        return "needs ninja: pip install ninja"
    if compiler() is None:
        return "needs a C++ compiler"
    if library == "node" and not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "needs Python's headers, as of a package python3-dev"
    if library == "cuda":
        if nvcc() is None:
            return "needs nvcc"
        if torch_version("cuda") is None and os.environ.get("LOWRANK_BUILD_CUDA") != "1":
            return "needs a CUDA build of torch"
    return None


def ninja_file(library: str, target: Path, folder: Path) -> str:
    """The text of a build.ninja that makes ``target`` with its objects in ``folder``."""
    includes, libraries = torch_flags()
    if library == "node":
        includes += f" -isystem {sysconfig.get_path('include')}"
        libraries += " -lc10 -ltorch_python"
    if library == "cuda":
        archs = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS.split(";"))
        rules = [
            "rule compile",
            f"  command = {nvcc()} {NVCCFLAGS} {STABLE_ABI} {archs} {includes} -MD -MF $out.d -c $in -o $out",
            "rule link",
            f"  command = {nvcc()} -shared -cudart=static $in -o $out -Xlinker={','.join(libraries.split())}",
        ]
        rules[-1] = rules[-1].replace("-Wl,", "")
        objects = [(folder / f"{stem}.cuda.o", f"{stem}.cu", "") for stem in STEMS]
    else:
        rules = [
            "rule compile",
            f"  command = {compiler()} {CXXFLAGS} $flags -MMD -MF $out.d -c $in -o $out",
            "rule link",
            f"  command = {compiler()} -shared $in -o $out {libraries}",
        ]
        sources = [CSRC / "node.cpp"]
        if library == "cpu":
            sources = sorted(CSRC.glob("*_cpu.cpp")) + [CSRC / f"{stem}.cpp" for stem in HOST]
        abi = "" if library == "node" else STABLE_ABI
        objects = [(folder / f"{p.stem}.o", p.name, f"{abi} {includes}") for p in sources]
        objects += [
            (folder / f"{path.stem}_{isa}.o", path.name, f"-DISA={isa} {flags}")
            for path in sorted(CSRC.glob("dropout_rows.cpp" if library == "node" else "*_rows.cpp"))
            for isa, flags in ISAS.items()
        ]
    rules[2:2] = ["  depfile = $out.d", "  deps = gcc"]
    for output, source, flags in objects:
        rules += [f"build {output}: compile {CSRC / source}", f"  flags = {flags}"]
    return "\n".join([*rules, f"build {target}: link {' '.join(str(output) for output, *_ in objects)}", ""])


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:  # no Python symbols, so no Python version in the name
        tags = f"-{torch_version()}-{sys.implementation.cache_tag}" if fullname.endswith("_node") else ""
        return str(Path(*fullname.split("."))) + tags + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition("_")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / library
        for path in (folder, target.parent):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(library, target, folder))
        done = subprocess.run([ninja(), "-C", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise CompileError(f"{target.name} was not built: ninja -C {folder}")


def extensions() -> list[Extension]:
    required = os.environ.get("LOWRANK_REQUIRE_NATIVE") == "1"
    modules = []
    for library in ("cpu", "cuda", "node"):
        reason = why_not(library)
        if reason is None:
            sources = [str(path.relative_to(CSRC.parent)) for path in sorted(CSRC.iterdir()) if path.suffix != ".md"]
            modules.append(Extension(f"lowrank._C_{library}", sources, py_limited_api=True, optional=not required))
        elif required and library == "cpu":
            raise SystemExit(f"lowrank/_C_{library} {reason}")
        else:
            print(f"lowrank/_C_{library} is left out: it {reason}", file=sys.stderr)
    return modules


if __name__ == "__main__":
    modules = extensions()
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
