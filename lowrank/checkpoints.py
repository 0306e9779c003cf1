"""Checkpoints on disk: which safetensors file holds which tensor, opened one at a time."""

import json
from pathlib import Path

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(folder) -> dict[str, Path]:
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


def open_tensors(path: Path):
    """safetensors' safe_open for torch on the CPU; ValueError where the file is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}") from error
