"""The compiled libraries of csrc/: loaded on first use, never by ``import lowrank``."""

import functools
from pathlib import Path

import torch

LIBRARIES = ("cpu", "cuda", "node")


def available(library: str) -> bool:
    """Whether torch.ops.lowrank has the ``library``'s (one of LIBRARIES) implementations; loads it on the first call."""
    return why_not(library) is None


@functools.cache
def why_not(library: str) -> str | None:
    """Why ``library`` cannot be used, in one line; None if it can."""
    version = f"-{torch.__version__}" if library == "node" else ""  # which is built for one torch
    path = Path(__file__).with_name(f"_C_{library}{version}.so")
    if library == "cuda" and torch.version.cuda is None:
        return "this torch is not a CUDA build"
    if not path.exists():
        return f"lowrank/{path.name} was not built, as where torch came after it: {_how_to_build()}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"lowrank/{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def _how_to_build() -> str:
    """The command, from what pip wrote down of where this came from."""
    import importlib.metadata
    import json
    import shlex
    import urllib.parse

    try:
        origin = json.loads(importlib.metadata.distribution("lowrank-kernels").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {}
    source = origin.get("url", "")
    if not source or origin.get("dir_info", {}).get("editable"):
        return "python setup.py build_ext --inplace builds it, or says why not"
    source = shlex.quote(urllib.parse.unquote(source.removeprefix("file://")))
    return f"pip install -v --force-reinstall --no-deps {source} builds it, or says why not"
