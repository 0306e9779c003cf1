"""The compiled libraries of csrc/: loaded on first use, never by ``import lowrank``."""

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

LIBRARIES = ("cpu", "cuda", "node")


def available(library: str) -> bool:
    """Whether torch.ops.lowrank has the ``library``'s (one of LIBRARIES) implementations; loads it on the first call."""
    return why_not(library) is None


@functools.cache
def why_not(library: str) -> str | None:
    """Why ``library`` cannot be used, in one line; None if it can."""
    path = _path(library)
    if library == "cuda" and torch.version.cuda is None:
        return "this torch is not a CUDA build"
    if not path.exists():
        return f"lowrank/{path.name} was not built, as where torch came after it: {_how_to_build()}"
    try:
        node() if library == "node" else torch.ops.load_library(path)
    except (OSError, ImportError) as error:
        return f"lowrank/{path.name} does not load: {str(error).splitlines()[0]}"
    return None


@functools.cache
def node():
    """The module that csrc/node.cpp is."""
    loader = importlib.machinery.ExtensionFileLoader("_C_node", str(_path("node")))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_node", loader))
    loader.exec_module(module)
    return module


def _path(library: str) -> Path:
    # the node is built for one torch and one Python
    tags = f"-{torch.__version__}-{sys.implementation.cache_tag}" if library == "node" else ""
    return Path(__file__).with_name(f"_C_{library}{tags}.so")


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
