"""A GGUF file as a transformers checkpoint: its weights dequantised, its tokenizer and chat template beside them.

transformers reads GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), but refuses to save what it read as
"quantized", dense as its weights are.  Here they go into a model made from its configuration alone, which saves as any other.
Memory: the file's size and the checkpoint's together, and about 0.6 GB.
"""

import contextlib
import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoints import publish_folder

PACKAGES = ("gguf", "accelerate")  # what transformers reads GGUF with
BESIDE = 100 << 20  # bytes on disk for tokenizer and configuration, at most


class Converted(NamedTuple):
    architecture: str  # transformers' class
    parameters: int
    left_out: tuple[
        str, ...
    ]  # names of the file's tensors that position encodings are made of: transformers reads none


def check_packages(what: str) -> None:
    """ImportError where a package is missing that transformers reads GGUF with."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} needs {package}: pip install 'lowrank-kernels[smollm2]'")


def convert(file: str | os.PathLike[str], folder: str | os.PathLike[str], dtype: torch.dtype) -> Converted:
    """Write a causal language model's GGUF file as a transformers checkpoint, complete or not at all.

    Args:
        file: of any architecture and quantisation that transformers and the gguf package read, in one piece.
        folder: of the checkpoint: nothing or an empty directory before.
        dtype: the weights', torch.float32 or torch.bfloat16.

    Raises: ImportError without the packages gguf and accelerate; FileNotFoundError; ValueError for what is no GGUF file, or
    none of a causal language model that transformers reads; FileExistsError for a folder with something in it; OSError if
    the disk has too little room.
    """
    file, folder = Path(file), Path(folder).resolve()
    check_packages("reading GGUF")
    contents = _contents(file)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: expected nothing there, or an empty directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = contents.elements * dtype.itemsize + BESIDE, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder.parent}: {free / 1e9:.1f} GB free, the checkpoint takes up to {needed / 1e9:.1f}")
    model, tokenizer = _loaded(file, contents, dtype)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name  # the scratch folder itself is its owner's alone
        unfinished.mkdir()
        with _one_line(f"{folder}: could not be written", OSError):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        publish_folder(unfinished, folder)
    left_out = tuple(name for name in contents.names if name.startswith("rope_"))
    return Converted(type(model).__name__, sum(p.numel() for p in model.parameters()), left_out)


class _Contents(NamedTuple):
    elements: int  # of all tensors
    names: list[str]  # the tensors'
    eos: int | None  # the token that ends a text


def _contents(file: Path) -> _Contents:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: {'is no file' if file.exists() else 'no such file'}; expected a GGUF file")
    with open(file, "rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{file}: no GGUF file, begins with {magic!r}")
    from gguf import GGUFReader

    with _one_line(f"{file}: no whole GGUF file ({file.stat().st_size} bytes)", ValueError):
        reader = GGUFReader(file)
        eos = reader.fields.get("tokenizer.ggml.eos_token_id")
        return _Contents(
            elements=sum(int(tensor.n_elements) for tensor in reader.tensors),
            names=[tensor.name for tensor in reader.tensors],
            eos=None if eos is None else int(eos.parts[eos.data[0]][0]),
        )


def _loaded(file: Path, contents: _Contents, dtype: torch.dtype) -> tuple[Any, Any]:
    """(a model of dense weights that knows of no GGUF, its tokenizer)"""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reads = f"transformers {transformers.__version__} does not read"
    options: dict[str, Any] = dict(gguf_file=file.name, dtype=dtype, output_loading_info=True)
    if hasattr(transformers, "GgufConfig"):  # else a kernel for this device may keep weights in GGUF's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _one_line(f"{file}: {reads} its tokenizer", ValueError):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if contents.eos not in (None, tokenizer.eos_token_id):  # transformers 5.0 took SmolLM2's for Code Llama's
        raise ValueError(
            f"{file}: transformers {transformers.__version__} reads its tokenizer wrong, a text ends with token "
            f"{tokenizer.eos_token_id} instead of {contents.eos}; expected a newer transformers"
        )
    with _one_line(f"{file}: {reads} it", ValueError):
        packed, report = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    if lost := sorted(report["missing_keys"]):
        raise ValueError(f"{file}: lacks {len(lost)} weights of a {type(packed).__name__}, such as {lost[0]}")

    config = copy.deepcopy(packed.config)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known = getattr(tokenizer, name)
        if known is not None and not isinstance(getattr(model.generation_config, name), list):
            setattr(model.generation_config, name, known)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


@contextlib.contextmanager
def _one_line(what: str, kind: type[Exception]) -> Iterator[None]:
    """Inside, whatever other packages raise of a file they were not written for is one ``kind`` of one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise kind(f"{what}: {type(error).__name__}: {reason}") from error
