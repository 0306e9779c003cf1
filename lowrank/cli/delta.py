"""``lowrank tools delta``: what changed from one checkpoint to another, in one file (:mod:`lowrank.delta`).

Both are read one tensor at a time; what was encoded waits in a file beside the one that is written.
"""

import argparse
import json
import os
from pathlib import Path

from .. import delta
from .._screen import console, progress
from ..checkpoints import JOURNAL, STEP, as_bytes, open_tensors, read_json, tensor_files, write_tensors
from ..ops import delta as op

SUMMARY = "write what changed between two checkpoints to one file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="folder of a checkpoint in safetensors, or one such file")
    parser.add_argument("new", metavar="NEW", help="the same tensors, later")
    parser.add_argument("--out", required=True, metavar="FILE", help="written when all is done")
    parser.add_argument("--stream", help=f"name of the run (what OLD's {STEP} says, or an empty one)")
    parser.add_argument("--base-step", type=int, metavar="N", help=f"of OLD (what its {STEP} says, or 0)")
    parser.add_argument("--step", type=int, metavar="N", help="of NEW (one more)")
    parser.add_argument("--no-fingerprint", action="store_true", help="`apply --verify` will not do")


def main(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir() or not out.name:
        raise IsADirectoryError(f"{out}: expected a file name to write to, got a directory")
    at = read_json(Path(args.old) / STEP) or {}
    stream = at.get("stream", "") if args.stream is None else args.stream
    base_step = at.get("step", 0) if args.base_step is None else args.base_step
    step = base_step + 1 if args.step is None else args.step
    delta.check_steps("lowrank tools delta", stream, base_step, step)
    old, new = _checkpoint("OLD", args.old), _checkpoint("NEW", args.new)
    delta.same_names(f"NEW: {args.new}", new, old, of="OLD")
    for name in sorted(old):
        with open_tensors(old[name]) as a, open_tensors(new[name]) as b:
            stored = a.get_slice(name)
            delta.check_tensor(f"NEW: {name}", b.get_tensor(name), stored.get_shape(), a.get_tensor(name).dtype)

    description = delta.describe_parts({}, stream, base_step, step)
    data = out.with_name(f".{out.name}.{os.getpid()}.parts")
    where: dict[str, tuple] = {}  # of each part: dtype, shape, place in the data file
    try:
        with open(data, "wb+") as file, progress() as bar:
            task = bar.add_task("", total=len(old))

            def parts():
                for name in sorted(old):
                    bar.update(task, description=name)
                    description["tensors"][name], encoded = _encode(name, old[name], new[name], not args.no_fingerprint)
                    for part, t in zip(delta.PARTS, encoded, strict=True):
                        where[f"{name}.{part}"] = t.dtype, [len(t)], file.tell()
                        file.write(as_bytes(t))
                        yield t
                    bar.advance(task)

            description["sha256"] = delta.checksum(description, parts())
            bar.update(task, description=str(out))
            _assemble(out, description, where, file)
    finally:
        data.unlink(missing_ok=True)
    nbytes, changed = out.stat().st_size, sum(facts["changed"] for facts in description["tensors"].values())
    density = f", {nbytes / changed:.2f} per changed element" if changed else ""
    said = f"{out}: step {base_step} to {step}, {delta.share(description)}, {nbytes:,} bytes{density}"
    console().print(said, soft_wrap=True, markup=False)
    return 0


def _checkpoint(what: str, path: str) -> dict[str, Path]:
    files = tensor_files(path) if path else {}
    if not files:
        raise ValueError(f"{what}: no safetensors in {path!r}")
    if (Path(path) / JOURNAL).exists():
        raise ValueError(f"{what}: {Path(path) / JOURNAL}: a delta was half applied here; apply it again first")
    return files


def _encode(name: str, old: Path, new: Path, fingerprint: bool):
    with open_tensors(old) as a, open_tensors(new) as b:
        t = b.get_tensor(name)
        return delta.encode_tensor(t, op.map_changes(a.get_tensor(name), t), fingerprint)


def _assemble(out: Path, description: dict, where: dict[str, tuple], file) -> None:
    ordered = sorted(where, key=lambda part: (-where[part][0].itemsize, part))

    def chunks():
        for part in ordered:
            dtype, (count,), place = where[part]
            file.seek(place)
            yield file.read(count * dtype.itemsize)

    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        metadata = {"lowrank": json.dumps(description)}
        write_tensors(out, unfinished, {part: where[part][:2] for part in ordered}, chunks(), metadata)
    finally:
        unfinished.unlink(missing_ok=True)
