"""``lowrank tools apply``: a delta (:mod:`lowrank.delta`) into a checkpoint on disk, one safetensors file at a time.

A file is copied, the copy changed in place and renamed over the file.  A journal, lowrank.apply.json, is there from before
the first such file until after the last; then lowrank.step.json says what the checkpoint is.  Values are verbatim, so the
same command after an interruption, whenever it came, ends with the same bytes.
"""

import argparse
import fcntl
import json
import mmap
import os
import shutil
from itertools import groupby
from pathlib import Path

import torch

from .. import delta
from .._screen import console, progress
from ..checkpoints import JOURNAL, STEP, open_tensors, publish, read_json, tensor_files, write_json

SUMMARY = "apply such a file to a checkpoint, in place; run again after an interruption"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint in safetensors")
    parser.add_argument("delta", metavar="FILE", help="lowrank tools delta's, or lowrank.delta.encode's")
    parser.add_argument("--verify", action="store_true", help="refuse another base than the delta's: reads all tensors")


def main(args: argparse.Namespace) -> int:
    folder = Path(args.model)
    if not args.model or not folder.is_dir():
        raise ValueError(f"MODEL: expected a checkpoint's folder, got {args.model!r}")
    with open_tensors(Path(args.delta)) as file:
        description = delta.parse((file.metadata() or {}).get("lowrank", "null"))
        lock = os.open(folder, os.O_RDONLY)  # until this process ends, however it does
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"MODEL: another process is applying a delta to {folder}") from error
            console().print(f"{folder}: {_apply(folder, file, description, args.verify)}", soft_wrap=True, markup=False)
        finally:
            os.close(lock)
    return 0


def _apply(folder: Path, file, description: dict, verify: bool) -> str:
    delta.check_parts("FILE", description, file.keys(), file.get_tensor)
    at, journal = read_json(folder / STEP), read_json(folder / JOURNAL)
    this = {key: description[key] for key in ("stream", "step", "sha256")}
    if journal is not None and journal.get("sha256") != description["sha256"]:
        steps = f"{journal.get('base_step')} to {journal.get('step')} of {journal.get('stream')!r}"
        raise ValueError(f"{folder / JOURNAL}: the delta from step {steps} was interrupted here; apply that one first")
    if at == this:
        (folder / JOURNAL).unlink(missing_ok=True)
        return f"already at step {description['step']}, by this delta"
    if at is not None:
        delta.check_order(str(folder / STEP), description, at.get("stream"), at.get("step"), again=False)
    shards = tensor_files(folder)
    tensors = description["tensors"]
    delta.same_names(f"MODEL: {folder}", shards, tensors)
    for name, facts in tensors.items():
        with open_tensors(shards[name]) as shard:
            t = shard.get_tensor(name)
            delta.check_tensor(f"MODEL: {name}", t, facts["shape"], getattr(torch, facts["dtype"]))
            delta.check_target(f"MODEL: {name}", t, facts, _parts(file, name), verify)

    changed = sorted((name for name, facts in tensors.items() if facts["changed"]), key=lambda name: shards[name])
    write_json(folder / JOURNAL, {**this, "base_step": description["base_step"]})
    for path, names in _progress(groupby(changed, shards.get), len({shards[name] for name in changed})):
        copy = path.with_name(f".{path.name}.applying")
        try:
            shutil.copyfile(path, copy)
            shutil.copymode(path, copy)
            _write(copy, names, tensors, file)
            publish(copy, path)
        finally:
            copy.unlink(missing_ok=True)
    write_json(folder / STEP, this)
    (folder / JOURNAL).unlink()
    return f"at step {description['step']}, {delta.share(description)}"


def _parts(file, name: str) -> list[torch.Tensor]:
    return [file.get_tensor(f"{name}.{part}") for part in delta.PARTS]


def _progress(shards, total: int):
    with progress() as bar:
        task = bar.add_task("", total=total)
        for path, names in shards:
            bar.update(task, description=path.name)
            yield path, names
            bar.advance(task)


def _write(copy: Path, names, tensors: dict, file) -> None:
    """The tensors of a safetensors file, changed where they lie."""
    with open(copy, "rb+") as opened:
        mapped = mmap.mmap(opened.fileno(), 0)
        first = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:first])
        for name in names:
            start, end = (first + offset for offset in header[name]["data_offsets"])
            dtype = getattr(torch, tensors[name]["dtype"])
            raw = torch.frombuffer(mapped, dtype=torch.uint8)[start:end]
            if start % dtype.itemsize:  # where the header's length is odd
                t = raw.clone().view(dtype)
                delta.write(t, _parts(file, name))
                raw.copy_(t.view(torch.uint8))
            else:
                delta.write(raw.view(dtype), _parts(file, name))
        mapped.flush()
