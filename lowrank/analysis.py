"""What a fine-tuning did to a model's weights: how much changed, where it changed most, and how masks of it overlap.

Passes over the weights, of one tensor at a time (csrc/analysis).  Masks are packed words (:mod:`lowrank.bits`).
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from . import checkpoints
from .ops import analysis as _ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCOPES = ("global", "tensor")


class DiffStats(NamedTuple):
    """What :func:`diff_stats` counts in one tensor, or in several (:func:`total`)."""

    numel: int
    changed: int
    beyond_abs: int
    beyond_rel: int
    beyond_ulp: int
    max: float
    norm: float
    old_norm: float

    @property
    def share_changed(self) -> float:
        """changed / numel; 0 of nothing."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def share_beyond(self) -> float:
        """beyond_abs / numel: one minus this is the sparsity of an update as arXiv 2505.11711 reports it."""
        return self.beyond_abs / self.numel if self.numel else 0.0

    @property
    def relative_norm(self) -> float:
        """norm / old_norm; of zeros, 0 if nothing changed, else infinite."""
        return self.norm / self.old_norm if self.old_norm else math.inf if self.norm else 0.0


@overload
def diff_stats(old: Tensor, new: Tensor, tol: float = 1e-5, *, rel: float = 1e-3, ulp: int = 1) -> DiffStats: ...
@overload
def diff_stats(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], tol: float = 1e-5, *, rel: float = 1e-3, ulp: int = 1
) -> dict[str, DiffStats]: ...
@overload
def diff_stats(
    old: str | os.PathLike[str], new: str | os.PathLike[str], tol: float = 1e-5, *, rel: float = 1e-3, ulp: int = 1
) -> dict[str, DiffStats]: ...
@torch.no_grad()
def diff_stats(
    old: Tensor | Mapping[str, Tensor] | str | os.PathLike[str],
    new: Tensor | Mapping[str, Tensor] | str | os.PathLike[str],
    tol: float = 1e-5,
    *,
    rel: float = 1e-3,
    ulp: int = 1,
) -> DiffStats | dict[str, DiffStats]:
    """How far ``new`` is from ``old``, in one pass.

    With d = new - old, in fp32 from the exact values of 16-bit numbers (in fp64 for fp64), :class:`DiffStats` has

        numel        elements
        changed      whose bits differ: -0 is not +0, and NaN are told apart by their payload
        beyond_abs   |d| > tol: what ``~torch.isclose(new.float(), old.float(), rtol=0, atol=tol, equal_nan=True)`` counts
        beyond_rel   |d| > rel |old|
        beyond_ulp   more than ``ulp`` numbers of the stored dtype away; -0 and +0 are one
        max          the largest |d|
        norm         sqrt(Σ d²), summed in fp64 in an order that depends on the shape alone
        old_norm     sqrt(Σ old²), likewise

    Equal infinities and NaN in both are equal; NaN in one of them is beyond everything, and left out of max and the norms.

    ``beyond_abs`` at 1e-5 is the measure of "Reinforcement Learning Finetunes Small Subnetworks in Large Language Models"
    (arXiv 2505.11711), whose code subtracts and compares in bf16 and so differs where |d| is within 1 % of tol.  The
    tolerance carries much of what it finds: from 1e-8 to 1e-5 its KTO model goes from 71.8 to 96.0 % unchanged.  bf16
    numbers below 2^-9 are less than 1e-5 apart, so that updates which the storage has kept are not counted.  Say the
    tolerance with the figure, and ``changed`` beside it.

    Args:
        old, new: two tensors of one shape, dtype (fp32, bf16, fp16 or fp64) and device; or {name: tensor} of the same names;
            or paths of two checkpoints, a folder or a safetensors file each, read one tensor at a time.
        tol, rel: floats >= 0, taken in d's precision.
        ulp: an integer >= 0.

    Returns: DiffStats, or {name: DiffStats} in the order of old's names.  Waits for the device.

    Raises: ValueError or TypeError that names the tensor.
    """
    for name, value in (("tol", tol), ("rel", rel)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"diff_stats: expected {name} as a float, got {type(value).__name__}")
        if not 0 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"diff_stats: expected {name} finite in fp32 and >= 0, got {value}")
    if isinstance(ulp, bool) or not isinstance(ulp, int):
        raise TypeError(f"diff_stats: expected ulp as an int, got {type(ulp).__name__}")
    if ulp < 0:
        raise ValueError(f"diff_stats: expected ulp >= 0, got {ulp}")
    limits = float(tol), float(rel), ulp
    if all(isinstance(side, (str, os.PathLike)) for side in (old, new)):
        olds, news = _files(old), _files(new)
        _same_names("diff_stats", olds, news)
        return {name: _diff(name, _read(olds[name], name), _read(news[name], name), *limits) for name in olds}
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return _diff("", old, new, *limits)
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        raise TypeError(
            "diff_stats: expected two tensors, two {name: tensor} or two paths,"
            f" got {type(old).__name__} and {type(new).__name__}"
        )
    _same_names("diff_stats", old, new)
    return {name: _diff(name, a, new[name], *limits) for name, a in old.items()}


def total(stats: Mapping[str, DiffStats] | Iterable[DiffStats]) -> DiffStats:
    """The DiffStats of several tensors together: counts added up, the largest max, norms as of one long vector."""
    parts = list(stats.values() if isinstance(stats, Mapping) else stats)
    if bad := [type(s).__name__ for s in parts if not isinstance(s, DiffStats)]:
        raise TypeError(f"total: expected DiffStats, got {bad[0]}")
    counts = (sum(s[i] for s in parts) for i in range(5))
    largest = max((s.max for s in parts), default=0.0)
    norm, old_norm = math.hypot(*(s.norm for s in parts)), math.hypot(*(s.old_norm for s in parts))
    return DiffStats(*counts, largest, norm, old_norm)  # type: ignore[call-arg]  # five counts


def _diff(name, old, new, tol, rel, ulp) -> DiffStats:
    _check_pair("diff_stats", name, old, new)
    counts, largest, squares, old_squares = _ops.diff(old.contiguous(), new.contiguous(), tol, rel, ulp)
    norm, old_norm = math.sqrt(squares), math.sqrt(old_squares)
    return DiffStats(new.numel(), *counts, largest, norm, old_norm)  # type: ignore[call-arg]  # four counts


def _files(path) -> dict[str, Path]:
    files = checkpoints.tensor_files(path)
    if not files:
        raise ValueError(f"diff_stats: expected a folder or a file with safetensors, got {os.fspath(path)!r}")
    return files


def _read(path: Path, name: str) -> Tensor:
    """Opened for each tensor, so that nothing else of the file stays mapped."""
    if not path.is_file():
        raise ValueError(f"{path}: is not there, and the index has {name!r} in it")
    with checkpoints.open_tensors(path) as file:
        return file.get_tensor(name)


def _same_names(what: str, old: Mapping, new: Mapping) -> None:
    if old.keys() != new.keys():
        missing, more = (sorted(map(str, names)) for names in (old.keys() - new.keys(), new.keys() - old.keys()))
        raise ValueError(
            f"{what}: expected the same names in old and new, got {missing[:3]} ({len(missing)}) in old alone"
            f" and {more[:3]} ({len(more)}) in new alone"
        )


def _check_tensor(what: str, name: str, t) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{what}: expected {_shown(name)} to be a tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(f"{what}: expected {_shown(name)} in {', '.join(map(str, _DTYPES))}, got {t.dtype}")
    if type(t).__name__ == "DTensor":
        raise TypeError(f"{what}: {_shown(name)} is a DTensor, which is not supported: give its local shard")


def _check_pair(what: str, name: str, old, new) -> None:
    for t in (old, new):
        _check_tensor(what, name, t)
    for attribute in ("dtype", "shape", "device"):
        a, b = getattr(old, attribute), getattr(new, attribute)
        if a != b:
            raise ValueError(f"{what}: expected one {attribute} of {_shown(name)}, got {a} in old and {b} in new")


def _shown(name: str) -> str:
    return f"tensor {name!r}" if name else "the tensor"


@overload
def topk_mask(
    scores: Tensor | tuple[Tensor, Tensor],
    p: float,
    *,
    scope: str = "global",
    offsets: Mapping[str, int] | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor: ...
@overload
def topk_mask(
    scores: Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    p: float,
    *,
    scope: str = "global",
    offsets: Mapping[str, int] | None = None,
    group: "ProcessGroup | None" = None,
) -> dict[str, Tensor]: ...
@torch.no_grad()
def topk_mask(
    scores: Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor] | tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    p: float,
    *,
    scope: str = "global",
    offsets: Mapping[str, int] | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor | dict[str, Tensor]:
    """The k = round(p · numel) elements of largest score, as packed words: exactly k bits are set.

    Exact, by radix selection on the bits of |score|: up to three passes that count, one that writes.  16-bit differences
    take few values, so that ties at the threshold are the rule.  Of tied elements those are taken that have the smallest
    hash of (name, index): neither the order of the tensors, nor their number, nor how they are cut into shards changes
    the mask, and no tensor is favoured.

    Args:
        scores: {name: tensor}, of which |tensor| is the score; or a pair ({name: old}, {name: new}), whose score is
            |new - old|, subtracted in fp32 from exact values (in fp64 for fp64).  Or a tensor, or a pair of tensors, whose
            name is "".  fp32, bf16, fp16 or fp64, any shape.
        p: the share to take, 0 < p <= 1.
        scope: "global" takes the share of all tensors together, "tensor" of each.
        offsets: {name: index} of a shard's first element in the whole tensor; 0 for others.
        group: a torch.distributed process group whose processes hold shards: each gets the words of its own, of the mask
            of the whole.  A process may lack a tensor.  A replicated tensor counts once per process: give it to one of them.

    Returns: {name: int32 [ceil(numel / 32)]}, or those words of a bare tensor.  Waits for the device.

    Raises: ValueError or TypeError that names the argument; ValueError that names the tensor for NaN scores, in every process.
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"topk_mask: expected p as a float, got {type(p).__name__}")
    if not 0 < p <= 1:
        raise ValueError(f"topk_mask: expected 0 < p <= 1, got {p}")
    if scope not in _SCOPES:
        raise ValueError(f"topk_mask: expected scope in {_SCOPES}, got {scope!r}")
    new, old, bare = _scores(scores)
    firsts = _firsts(offsets, new)
    tasks = {}
    for name, t in new.items():
        before = None if old is None else old[name].contiguous()
        tasks[name] = _ops.Scores(t.contiguous(), before, _seed(name), firsts.get(name, 0))
    sizes, width = _shared({name: t.numel() for name, t in new.items()}, [t.dtype for t in new.values()], group)

    def words(names) -> dict[str, Tensor]:
        chosen = {name: tasks[name] for name in names if name in tasks}
        k = round(p * sum(sizes[name] for name in names))
        key, last = (1 << width) - 1, 0  # nothing is as large
        try:
            if k:
                key, last = _ops.threshold(list(chosen.values()), k, width, lambda t: _added_up(t, group))
        except _ops.NaNScoreError as error:
            bad = next((n for n, s in chosen.items() if _has_nan(s)), None)
            where = "a tensor of another process" if bad is None else _shown(bad)
            raise ValueError(f"topk_mask: expected scores without NaN, got some in {where} ({error})") from None
        return {name: _ops.emit(s, key, last, width) for name, s in chosen.items()}

    masks = words(sizes) if scope == "global" else {n: w for name in sizes for n, w in words([name]).items()}
    return masks[""] if bare else {name: masks[name] for name in new}


def _scores(scores) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None, bool]:
    """(new, old or None, whether they came without names), checked."""
    old, new = scores if isinstance(scores, (tuple, list)) and len(scores) == 2 else (None, scores)
    bare = isinstance(new, Tensor)
    if bare:
        old, new = None if old is None else {"": old}, {"": new}
    if not isinstance(new, Mapping) or not (old is None or isinstance(old, Mapping)):
        raise TypeError(
            f"topk_mask: expected a tensor, {{name: tensor}} or a pair of either, got {type(scores).__name__}"
        )
    if old is not None:
        _same_names("topk_mask", old, new)
    for name, t in new.items():
        if not isinstance(name, str):
            raise TypeError(f"topk_mask: expected names as strings, got {name!r}")
        _check_tensor("topk_mask", name, t)
        if old is not None:
            _check_pair("topk_mask", name, old[name], t)
    return new, old, bare


def _firsts(offsets, tensors) -> dict[str, int]:
    firsts = dict(offsets or {})
    for name, first in firsts.items():
        if name not in tensors:
            raise ValueError(f"topk_mask: offsets has {name!r}, which is none of the tensors")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"topk_mask: expected offsets as integers >= 0, got {first!r} for {name!r}")
    return firsts


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _has_nan(s: "_ops.Scores") -> bool:
    return bool((s.new if s.old is None else s.new - s.old).isnan().any())


def _shared(sizes: dict[str, int], dtypes: list[torch.dtype], group) -> tuple[dict[str, int], int]:
    """Elements by name over all processes, in one order, and how many bits the scores have."""
    has_fp64 = torch.float64 in dtypes
    if group is not None:
        import torch.distributed as dist

        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (sizes, has_fp64), group=group)
        names = sorted({name for in_process, _ in gathered for name in in_process})
        sizes = {name: sum(in_process.get(name, 0) for in_process, _ in gathered) for name in names}
        has_fp64 = any(there for _, there in gathered)
    return sizes, 63 if has_fp64 else 31


def _added_up(counts: Tensor, group) -> Tensor:
    if group is None:
        return counts
    import torch.distributed as dist

    counts = counts.cuda() if dist.get_backend(group) == "nccl" else counts
    dist.all_reduce(counts, group=group)
    return counts.cpu()


class Overlap(NamedTuple):
    """How E masks overlap: int64 sizes [E] and intersections [E, E], the rest fp64 [E, E]; nan where it is 0 / 0."""

    sizes: Tensor
    intersections: Tensor
    jaccard: Tensor  # |i ∩ j| / |i ∪ j|
    one_sided: Tensor  # |i ∩ j| / |i|
    random_jaccard: Tensor  # what independent masks of these sizes have in expectation: |i| |j| / N shared bits
    random_one_sided: Tensor  # |j| / N


@torch.no_grad()
def overlap(masks: Sequence[Tensor | Mapping[str, Tensor]], numel: int | Mapping[str, int] | None = None) -> Overlap:
    """How much masks agree, pair by pair, and how much masks of their sizes would by chance.

    Args:
        masks: a list of E masks, each int32 words or {name: words} (:mod:`lowrank.bits`; the bits after the last element
            are 0), with the same names and lengths.
        numel: how many elements N they are of, or {name: how many}; for the baselines.  Without it, 32 per word, which is up
            to 31 per tensor too many and makes the baselines that much too small.

    Returns: :class:`Overlap`, on the CPU.  Its diagonals are a mask with itself, the baselines' as for any two.

    Raises: ValueError or TypeError that names the mask.
    """
    masks = _masks(masks)
    words = {name: w.numel() for name, w in masks[0].items()}
    N = _numel(numel, words)
    intersections = sum(
        (_ops.intersections([mask[name].contiguous() for mask in masks]) for name in words),
        torch.zeros((len(masks), len(masks)), dtype=torch.int64),
    )
    intersections = intersections.triu() + intersections.triu(1).mT
    sizes = intersections.diagonal().clone()
    shared, size = intersections.double(), sizes.double()
    chance = size[:, None] * size / N
    union = size[:, None] + size
    one_sided = (size / N).expand(len(masks), -1).clone()
    return Overlap(
        sizes, intersections, shared / (union - shared), shared / size[:, None], chance / (union - chance), one_sided
    )


def _masks(masks) -> list[Mapping[str, Tensor]]:
    if not isinstance(masks, (list, tuple)) or not masks:
        got = "none" if isinstance(masks, (list, tuple)) else type(masks).__name__
        raise TypeError(f"overlap: expected a list of masks, got {got}")
    masks = [{"": mask} if isinstance(mask, Tensor) else mask for mask in masks]
    for i, mask in enumerate(masks):
        if not isinstance(mask, Mapping):
            raise TypeError(f"overlap: expected mask {i} as words or {{name: words}}, got {type(mask).__name__}")
        if mask.keys() != masks[0].keys():
            odd = sorted(map(str, mask.keys() ^ masks[0].keys()))
            raise ValueError(f"overlap: expected the same names in every mask, got {odd[:3]} in mask 0 or {i} alone")
        for name, words in mask.items():
            if not isinstance(words, Tensor) or words.dtype is not torch.int32 or words.dim() != 1:
                got = f"{words.dtype} {list(words.shape)}" if isinstance(words, Tensor) else type(words).__name__
                raise TypeError(f"overlap: expected int32 words [ceil(numel / 32)] in mask {i}, got {got} for {name!r}")
            first = masks[0][name]
            if words.shape != first.shape or words.device != first.device:
                raise ValueError(
                    f"overlap: expected {len(first)} words on {first.device} for {name!r} in mask {i},"
                    f" got {len(words)} on {words.device}"
                )
    return masks


def _numel(numel, words: dict[str, int]) -> int:
    most = 32 * sum(words.values())
    if numel is None:
        return most
    if isinstance(numel, Mapping):
        if bad := [name for name, count in words.items() if -(-numel.get(name, -32) // 32) != count]:
            raise ValueError(
                f"overlap: expected numel to fit {words[bad[0]]} words of {bad[0]!r}, got {numel.get(bad[0])}"
            )
        return sum(numel[name] for name in words)
    if isinstance(numel, bool) or not isinstance(numel, int):
        raise TypeError(f"overlap: expected numel as an int or {{name: int}}, got {type(numel).__name__}")
    if not most - 31 * len(words) <= numel <= most:
        raise ValueError(f"overlap: expected numel to fit {most // 32} words, got {numel}")
    return numel


@torch.no_grad()
def stable_rank(delta: Tensor) -> float:
    """‖Δ‖_F² / ‖Δ‖_2² of a matrix: between 1 and its rank; 0.0 of zeros.  The top singular value by a randomized SVD.

    Args:
        delta: [N, K], finite; fp32, fp64, or fp16 and bf16, which are taken in fp32.

    Raises: ValueError or TypeError for anything else.
    """
    _check_tensor("stable_rank", "", delta)
    if delta.dim() != 2 or delta.numel() == 0:
        raise ValueError(f"stable_rank: expected delta [N, K], got {list(delta.shape)}")
    delta = _ops.at_least_fp32(delta)
    largest = float(delta.abs().max())  # nan, if there is one
    if not math.isfinite(largest):
        raise ValueError("stable_rank: expected delta to be finite, got infinities or NaN")
    if largest == 0:
        return 0.0
    delta = delta / largest  # whose squares are neither 0 nor infinite
    values = torch.svd_lowrank(delta, q=min(16, *delta.shape), niter=4)[1]
    return float(delta.square().sum() / values[0].square())
