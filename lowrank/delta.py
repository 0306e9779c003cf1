"""Sparse deltas of a model's weights: ``encode`` what changed, ``apply_`` it elsewhere, bit for bit (docs/delta.md).

A delta is a safetensors file in memory: of each tensor "NAME.heads", "NAME.index" and "NAME.values" (csrc/delta.h), and
under "lowrank" in its metadata, as JSON, what they are a delta of, with a checksum over everything.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoints import as_bytes
from .ops import delta as op

FORMAT = "lowrank delta 1"
PARTS = ("heads", "index", "values")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in op.DTYPES}


class Applied(NamedTuple):
    """What :func:`apply_` wrote: ``changed`` elements of ``numel``, and the delta's stream and steps."""

    stream: str
    base_step: int
    step: int
    changed: int
    numel: int


@torch.no_grad()
def encode(
    new: Mapping[str, Tensor],
    *,
    changes: Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None = None,
    old: Mapping[str, Tensor] | None = None,
    stream: str = "",
    base_step: int = 0,
    step: int = 1,
    fingerprint: bool = True,
) -> bytes:
    """The elements of ``new`` that changed, as bytes for :func:`apply_`.  Computed where the tensors are.

    Args:
        new: {name: tensor}, bf16, fp16, fp32, fp64 or integers of 16 bits and more; read in row-major order.
        changes: {name, or the tensor itself: int32 words} (:mod:`lowrank.bits`), of exactly ``new``'s tensors, such as
            ``optimizer.changes()``.  Or
        old: {name: tensor} with exactly ``new``'s names, shapes and dtypes: what differs in its bits has changed.
        stream, base_step, step: of which run this is, from which step to which; :func:`apply_` can insist on them.
        fingerprint: also of what did not change, for ``apply_(..., verify=True)``: a pass over the weights.

    Raises: ValueError or TypeError that names the argument or tensor.
    """
    if (changes is None) == (old is None):
        raise ValueError(f"delta.encode: expected one of changes and old, got {'none' if old is None else 'both'}")
    check_steps("delta.encode", stream, base_step, step)
    for name, t in new.items():
        check_tensor(f"delta.encode: {name}", t)
    if changes is not None:
        words_of = _by_name(new, changes)
    if old is not None:
        same_names("delta.encode: old", old, new, of="new")
        for name, t in new.items():
            check_tensor(f"delta.encode: {name} in old", old[name], list(t.shape), t.dtype, t.device)
    tensors, parts = {}, {}
    for name, t in sorted(new.items()):
        words = op.map_changes(old[name], t) if old is not None else words_of[name]
        tensors[name], parts[name] = encode_tensor(t, words, fingerprint)
    description = describe_parts(tensors, stream, base_step, step)
    description["sha256"] = checksum(description, (part for name in parts for part in parts[name]))
    from safetensors.torch import save

    named = {f"{name}.{part}": t for name in parts for part, t in zip(PARTS, parts[name], strict=True)}
    return save(named, {"lowrank": json.dumps(description)})


@torch.no_grad()
def apply_(
    tensors: Mapping[str, Tensor],
    blob: bytes,
    *,
    verify: bool = False,
    stream: str | None = None,
    step: int | None = None,
) -> Applied:
    """Write a delta of :func:`encode` into ``tensors``, in place.  Once or twice, they end as the sender's.

    Everything is checked before the first of them is written.

    Args:
        tensors: {name: tensor} with exactly the delta's names, shapes and dtypes; parameters as they are.
        verify: refuse tensors that are not the delta's base, by the fingerprint of what it leaves alone; reads all of them.
        stream, step: the receiver's.  Deltas of another stream are refused, and those whose ``base_step`` is not ``step``,
            except where ``step`` is the delta's already.

    Raises: ValueError or TypeError that names what is wrong: a damaged delta, other tensors, another base, out of order.
    """
    description = describe(blob)
    check_order("delta.apply_", description, stream, step)
    loaded = _load(blob)
    check_parts("delta.apply_", description, loaded, loaded.__getitem__)
    facts = description["tensors"]
    same_names("delta.apply_: tensors", tensors, facts)
    ready = []
    for name, t in tensors.items():
        where = f"delta.apply_: {name}"
        check_tensor(where, t, facts[name]["shape"], _DTYPES[facts[name]["dtype"]])
        if not t.is_contiguous() and torch._debug_has_internal_overlap(t) == 1:
            raise ValueError(f"{where}: expected elements of their own, got strides {t.stride()}")
        parts = [loaded[f"{name}.{part}"].to(t.device) for part in PARTS]
        check_target(where, t, facts[name], parts, verify)
        ready.append((t.detach(), parts))
    for t, parts in ready:
        write(t, parts)
    changed = sum(f["changed"] for f in facts.values())
    numel = sum(t.numel() for t, _ in ready)
    return Applied(description["stream"], description["base_step"], description["step"], changed, numel)


def describe(blob: bytes) -> dict:
    """What a delta says of itself: format, stream, base_step, step, sha256, and under "tensors", by name, shape, dtype,
    changed and fingerprint.  The checksum is not checked here.

    Raises: ValueError for anything else.
    """
    try:
        length = int.from_bytes(blob[:8], "little")
        if not 0 < length <= len(blob) - 8:
            raise ValueError(f"{len(blob)} bytes, expected a header of {length}")
        header = json.loads(bytes(blob[8 : 8 + length]))
        text = header["__metadata__"]["lowrank"]
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if max(ends, default=0) != len(blob) - 8 - length:
            raise ValueError(f"{len(blob)} bytes, expected {8 + length + max(ends, default=0)}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"delta: not a whole delta ({type(error).__name__}: {error})") from error
    return parse(text)


# One tensor, one file at a time: also for lowrank.cli.tools.


def encode_tensor(new: Tensor, words: Tensor, fingerprint: bool) -> tuple[dict, list[Tensor]]:
    """(facts, the three parts on the CPU)."""
    parts = op.encode(new, words)
    facts = {
        "shape": list(new.shape),
        "dtype": str(new.dtype).removeprefix("torch."),
        "changed": len(parts[2]),
        "fingerprint": f"{op.fingerprint(new, words):016x}" if fingerprint else None,
    }
    return facts, [part.cpu() for part in parts]


def describe_parts(tensors: dict[str, dict], stream: str, base_step: int, step: int) -> dict:
    return {"format": FORMAT, "stream": stream, "base_step": base_step, "step": step, "tensors": tensors}


def checksum(description: dict, parts: Iterable[Tensor]) -> str:
    """sha256, in hexadecimal, of all parts in the order of their names, then of the description without it.

    The description is read last, so that what makes the parts may fill it in.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(as_bytes(part))
    described = {key: value for key, value in description.items() if key != "sha256"}
    digest.update(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def parse(text: str) -> dict:
    """The description in a delta's metadata; ValueError unless everything in it is of its type."""
    try:
        description = json.loads(text)
        if description.get("format") != FORMAT:
            raise ValueError(f"expected {FORMAT!r}, got {description.get('format')!r}")
        check_steps("delta", description["stream"], description["base_step"], description["step"])
        whole = isinstance(description["sha256"], str) and isinstance(description["tensors"], dict)
        for facts in description["tensors"].values():
            sizes = [*facts["shape"], facts["changed"]]
            whole &= isinstance(facts["shape"], list) and all(type(n) is int and n >= 0 for n in sizes)
            whole &= facts["dtype"] in _DTYPES and (facts["fingerprint"] is None or int(facts["fingerprint"], 16) >= 0)
        if not whole:
            raise ValueError("of a wrong type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"delta: not a description of {FORMAT!r} ({type(error).__name__}: {error})") from error
    return description


def share(description: dict) -> str:
    """How much of it changed, for people."""
    tensors = description["tensors"].values()
    changed, numel = sum(facts["changed"] for facts in tensors), sum(math.prod(facts["shape"]) for facts in tensors)
    return f"{changed:,} of {numel:,} elements changed ({changed / max(numel, 1):.2%})"


def check_steps(where: str, stream: object, base_step: object, step: object) -> None:
    if not isinstance(stream, str):
        raise TypeError(f"{where}: expected stream as a string, got {type(stream).__name__}")
    if type(base_step) is not int or type(step) is not int:
        raise TypeError(f"{where}: expected base_step and step as integers, got {base_step!r} and {step!r}")
    if not 0 <= base_step < step:
        raise ValueError(f"{where}: expected step > base_step >= 0, got {step} and {base_step}")


def check_order(where: str, description: dict, stream: str | None, step: int | None, again: bool = True) -> None:
    """ValueError unless the receiver, of that stream, is at ``base_step``, or with ``again`` at ``step`` already."""
    if stream is not None and stream != description["stream"]:
        raise ValueError(f"{where}: expected a delta of stream {stream!r}, got {description['stream']!r}")
    if step is not None and step != description["base_step"] and not (again and step == description["step"]):
        expected = f"{description['base_step']} to {description['step']}"
        raise ValueError(f"{where}: out of order: the delta is from step {expected}, the receiver at {step}")


def check_parts(where: str, description: dict, names: Iterable[str], get: Callable[[str], Tensor]) -> None:
    """ValueError unless exactly the described parts are there, and the checksum is theirs."""
    tensors = description["tensors"]
    if set(names) != {f"{name}.{part}" for name in tensors for part in PARTS}:
        raise ValueError(f"{where}: damaged: its parts are not those of its description")
    parts = (get(f"{name}.{part}") for name in sorted(tensors) for part in PARTS)
    if checksum(description, parts) != description["sha256"]:
        raise ValueError(f"{where}: damaged: its checksum is another")


def check_tensor(
    where: str,
    t: object,
    shape: list[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(t).__name__}")
    if type(t).__name__ == "DTensor":
        raise TypeError(f"{where}: a DTensor is not supported: give its local shard")
    if t.dtype not in op.DTYPES:
        raise TypeError(f"{where}: expected one of {', '.join(_DTYPES)}, got {t.dtype}")
    if t.layout is not torch.strided or t.is_meta:
        raise TypeError(f"{where}: expected a dense tensor with data, got {t.layout} on {t.device}")
    if shape is not None and list(t.shape) != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {list(t.shape)}")
    if dtype is not None and t.dtype is not dtype:
        raise ValueError(f"{where}: expected {dtype}, got {t.dtype}")
    if device is not None and t.device != device:
        raise ValueError(f"{where}: expected on {device}, got {t.device}")


def same_names(where: str, actual: Mapping, expected: Mapping, of: str = "the delta") -> None:
    if missing := sorted(expected.keys() - actual.keys()):
        raise ValueError(f"{where}: lacks {missing[0]!r}")
    if extra := sorted(actual.keys() - expected.keys()):
        raise ValueError(f"{where}: has {extra[0]!r}, which is not in {of}")


def check_target(where: str, t: Tensor, facts: dict, parts: list[Tensor], verify: bool) -> None:
    """ValueError unless the parts fit the tensor and, with ``verify``, the tensor is their base."""
    numel = math.prod(facts["shape"])
    try:
        op.check(numel, _DTYPES[facts["dtype"]], *parts, codes=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len(parts[2]) != facts["changed"]:
        raise ValueError(f"{where}: expected {facts['changed']} values, got {len(parts[2])}")
    if verify:
        if facts["fingerprint"] is None:
            raise ValueError(f"{where}: verify: the delta was encoded with fingerprint=False")
        if op.fingerprint(t, op.changed_words(numel, *parts[:2])) != int(facts["fingerprint"], 16):
            raise ValueError(f"{where}: not the base of this delta: what it leaves alone is another tensor's")


def write(t: Tensor, parts: list[Tensor]) -> None:
    if len(parts[2]) == 0:
        return
    whole = t if t.is_contiguous() else t.contiguous()
    op.apply_(whole, *parts)
    if whole is not t:
        t.copy_(whole)


def _load(blob: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(bytes(blob))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"delta: not a whole delta ({type(error).__name__}: {error})") from error


def _by_name(new: Mapping[str, Tensor], changes: Mapping[str, Tensor] | Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """``changes`` under the names of ``new``, checked."""
    names: dict[int, list[str]] = {}
    for name, t in new.items():
        names.setdefault(id(t), []).append(name)
    by_name: dict[str, Tensor] = {}
    for key, words in changes.items():
        of = names.get(id(key), []) if not isinstance(key, str) else [key] if key in new else []
        shown = repr(key) if isinstance(key, str) else f"a tensor {list(key.shape)}"
        if not of:
            raise ValueError(f"delta.encode: changes has {shown}, which is not in new")
        for name in of:
            if name in by_name:
                raise ValueError(f"delta.encode: changes has {name!r} twice")
            by_name[name] = words
    for name, t in new.items():
        if name not in by_name:
            raise ValueError(f"delta.encode: changes lacks {name!r}; zeros if nothing of it changed")
        count = -(-t.numel() // 32)
        words = by_name[name]
        if not isinstance(words, Tensor) or words.dtype is not torch.int32 or words.shape != (count,):
            got = f"{list(words.shape)} in {words.dtype}" if isinstance(words, Tensor) else type(words).__name__
            raise ValueError(f"delta.encode: expected changes of {name!r} as int32 [{count}], got {got}")
        by_name[name] = words.to(t.device)
    return by_name
