"""Writes the layout of a kernel repository of the Hugging Face Hub (docs/hub.md): ``python contrib/hub.py build/hub``.

    build.toml, flake.nix, CARD.md, tests/, benchmarks/   contrib/hub/, with the repository's id in place
    torch-ext/lowrank/                                    the part of lowrank that its __init__.py imports, found by following
                                                          its relative imports, with a namespace of its own for the ops
    build/torch-cpu/, build/torch-cuda/                   the same, as ``kernels`` loads it from a folder

Raises ValueError where a file breaks a rule that the Hub has for them.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}
_OPS = '''"""The namespace of this build's ops, which no other build has.  kernel-builder writes one for each of its own."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''


def write(out: Path, repo_id: str) -> None:
    """The whole layout, in place of what ``out`` held."""
    if out.exists() and not (out / "build.toml").exists() and any(out.iterdir()):
        raise ValueError(f"out: expected a new folder, or one that this wrote, got {out}")
    shutil.rmtree(out, ignore_errors=True)
    for path in files_of(ROOT / "contrib" / "hub"):
        target = out / path.relative_to(ROOT / "contrib" / "hub")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace("ACCOUNT/lowrank", repo_id))
    shutil.copy(ROOT / "LICENSE", out)
    package = out / "torch-ext" / "lowrank"
    copy_closure(ROOT / "lowrank", package)
    for path in files_of(package):
        check(path, package)
    sources = {path.relative_to(package): path.read_text() for path in files_of(package)}
    unique = hashlib.sha256(repr(sorted((str(k), v) for k, v in sources.items())).encode()).hexdigest()[:10]
    config = (out / "build.toml").read_text()
    for backend in re.search(r"^backends = \[(.*)\]", config, re.M)[1].replace('"', "").split(", "):
        build(out / "build" / f"torch-{backend}", sources, backend, f"_lowrank_{backend}_{unique}", config)


def copy_closure(source: Path, package: Path) -> None:
    """Every module that ``package``'s __init__.py needs, and an empty __init__.py in each folder below."""
    todo = imported(package / "__init__.py", package)
    while todo:
        path = todo.pop()
        if (package / path).exists():
            continue
        if not (source / path).exists():
            raise ValueError(f"{path}: imported, but not there")
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).parent.joinpath("__init__.py").touch()
        (package / path).write_text(with_own_namespace((source / path).read_text(), len(path.parts)))
        todo += imported(package / path, package)


def imported(path: Path, package: Path) -> list[Path]:
    """The files, relative to the package, that ``path`` imports relatively, at its top or in a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.relative_to(package).parents[node.level - 1].joinpath(*(node.module or "").split("."))
            is_module = node.module and not (ROOT / "lowrank" / folder).is_dir()
            names = [folder] if is_module else [folder / alias.name for alias in node.names]
            found += [name.with_suffix(".py") for name in names if name != Path("_ops")]
    return found


def with_own_namespace(text: str, depth: int) -> str:
    """``torch.ops.lowrank`` is the installed package's; kernel-builder's _ops.py has this build's."""
    changed = text.replace('torch.library.Library("lowrank"', "torch.library.Library(ops.name")
    changed = changed.replace("torch.ops.lowrank.", "ops.")
    changed = re.sub(r'"lowrank::(\w+)"', r'add_op_namespace_prefix("\1")', changed)
    if changed == text or "ops.name" not in changed:  # nothing, or no more than a docstring
        return text
    first = next(node for node in ast.parse(changed).body if isinstance(node, ast.ImportFrom) and node.level)
    lines = changed.splitlines(keepends=True)
    lines.insert(first.lineno - 1, f"from {'.' * depth}_ops import add_op_namespace_prefix, ops\n")
    return "".join(lines)


def check(path: Path, package: Path) -> None:
    """Raise ValueError on what a compliant kernel may not do (kernels' docs, kernel-requirements and writing-kernels)."""
    where = path.relative_to(package)
    tree = ast.parse(path.read_text(), str(where), feature_version=(3, 9))
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            if module.partition(".")[0] not in ALLOWED:
                raise ValueError(
                    f"{where}:{node.lineno}: imports {module}; expected itself, torch, triton or Python's own"
                )
        in_namespace = isinstance(node, ast.Constant) and str(node.value).startswith(("lowrank::", "lowrank."))
        if in_namespace or (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.lowrank"):
            raise ValueError(f"{where}:{node.lineno}: names the installed package's module or ops")
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library."):
            name = ast.unparse(node.args[0])
            if name != "ops.name" and not name.startswith("add_op_namespace_prefix("):
                raise ValueError(f"{where}:{node.lineno}: registers {name}; expected a name of this build's namespace")


def build(folder: Path, sources: dict[Path, str], backend: str, id: str, config: str) -> None:
    """One variant, with the metadata.json that ``kernels`` reads."""
    for path, text in {**sources, Path("_ops.py"): _OPS.format(id=id)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files_of(folder)
    }
    metadata = {
        "id": id,
        "name": "lowrank",
        "version": int(re.search(r"^version = (\d+)", config, re.M)[1]),
        "license": re.search(r'^license = "(.*)"', config, re.M)[1],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repo-id", default="ACCOUNT/lowrank", help="owner and name of the repository on the Hub")
    args = parser.parse_args()
    write(args.out, args.repo_id)
    print(f"{args.out}: ready for kernel-builder, and for kernels.LocalLayerRepository")
