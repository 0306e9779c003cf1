"""Checkpoints on disk: which safetensors file holds which tensor, opened one at a time; files written piece by piece."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from safetensors import safe_open
    from typing_extensions import Buffer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
STEP, JOURNAL = "lowrank.step.json", "lowrank.apply.json"  # lowrank tools apply's, in a checkpoint's folder
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.uint8: "U8",
}


def tensor_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """{tensor's name: its safetensors file} of a checkpoint's folder, or of one file; empty if there is none.

    Raises: ValueError for a damaged index or file.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            return {key: folder / file for key, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: no safetensors index ({type(error).__name__}: {error})") from error
    path = folder if folder.is_file() else folder / SINGLE
    if not path.is_file():
        return {}
    with open_tensors(path) as file:
        return dict.fromkeys(file.keys(), path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, what safetensors cannot read is a ValueError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}") from error


def open_tensors(path: Path) -> "safe_open":
    """safetensors' safe_open for torch on the CPU; ValueError where the file is not whole."""
    from safetensors import safe_open

    with _whole(path):
        return safe_open(path, "pt")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a file, by name, on the CPU; ValueError where it is not whole."""
    with open_tensors(path) as file, _whole(path):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_tensors(
    path: Path,
    unfinished: Path,
    entries: dict[str, tuple[torch.dtype, list[int]]],
    chunks: Iterable,
    metadata: dict[str, str],
) -> None:
    """A safetensors file of ``chunks``, the bytes of all tensors in ``entries`` one after the other, not all in memory.

    It is written as ``unfinished``, on the same file system, and published as ``path``.  The larger dtypes come first,
    or what follows an odd number of bytes is not aligned.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(unfinished, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks:
            out.write(chunk)
        if out.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{unfinished}: {out.tell()} bytes, expected {8 + len(text) + end}")
    publish(unfinished, path)


def as_bytes(t: torch.Tensor) -> "Buffer":
    """A CPU tensor's memory, for a file or a hash."""
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy()  # type: ignore[return-value]  # numpy: Python 3.12


def publish(unfinished: Path, path: Path) -> None:
    """Give a written file its final name, both on the disk when this returns."""
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync_folder(path.parent)


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Give a folder of written files its final name, all of it on the disk before.  OSError if something is there."""
    for path in unfinished.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(unfinished)
    os.rename(unfinished, folder)  # over an empty folder, but no other
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, value: dict) -> None:
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(value))
    publish(unfinished, path)


def read_json(path: Path) -> dict | None:
    """None if there is no such file; ValueError for one that :func:`write_json` did not write."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
