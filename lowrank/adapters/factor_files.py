"""SVD factors of a whole model in one safetensors file: ``save_factors`` and ``load_factors``.

The file holds ``LAYER.U`` [N,k], ``LAYER.S`` [k] and ``LAYER.Vh`` [k,K] of every layer, and under "lowrank" in its metadata,
as JSON, what they are factors of: per layer k, the weight's shape, dtype and checksum, and how it was computed.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.types import Device

from .. import _screen
from .._linears import Weight, dense_weight, has_exact_weight, module_weights, target_layers, weight_checksum
from .._version import __version__
from ..checkpoints import as_bytes, open_tensors, publish, write_tensors
from ..svd import FactorErrors, SVDFactors, resolve_method, svd_factors

_FORMAT = "lowrank factors 1"
_SIGN = "the entry of largest magnitude in each column of U is positive"


def save_factors(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    k: int | None = None,
    target_modules: str | Iterable[str] = "all-linear",
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Path:
    """Write the factors of ``model``'s linear layers to the safetensors file ``path``, computed where the weights are.

    An interrupted call leaves no file of that name, and what it finished in the folder ``.NAME.partial`` beside it: the
    same call continues there.  Until it is done the disk holds everything twice; memory, one layer.

    Args:
        k, method, dtype: :func:`lowrank.svd_factors`'s.  A layer with fewer than k directions keeps all it has.
        target_modules: :func:`target_layers`'s.
        progress: show a bar, and at the end the worst errors, on stderr.

    Raises: ValueError for k, a layer that is not finite, or targets that match nothing; IsADirectoryError for ``path``.
    """
    weights = module_weights(target_layers(model, target_modules))
    written = write_factors(path, weights, k=k, method=method, dtype=dtype, progress=progress)
    if progress:
        worst = FactorErrors(*map(max, zip(*(layer.errors for layer in written), strict=True)))
        errors = ", ".join(f"{what} {value:.1e}" for what, value in worst._asdict().items())
        print(f"{path}: {len(written)} layers; worst {errors}", file=_screen.Unbreakable(sys.stderr))
    return Path(path)


def load_factors(path: str | os.PathLike[str], model: nn.Module | None = None) -> Mapping[str, SVDFactors]:
    """The factors in a file, by layer name, read from disk (memory-mapped, on the CPU) when they are asked for.

    Args:
        model: checked to have exactly the weights that the file's layers were computed from, by checksum.

    Raises: FileNotFoundError; ValueError for a damaged file, another kind of file, or factors of other weights, which
        names the layer.
    """
    file = FactorsFile(path)
    if model is not None:
        file.check(model)
    return file


class FactorsFile(Mapping[str, SVDFactors]):
    """A file of :func:`save_factors`: reads a layer's factors from disk when it is asked for.

    layers: by name, {"k", "shape" and "dtype" of the weight, "weight" (its checksum), "method", "factors_dtype", "errors"}.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `lowrank tools factors` writes one")
        self._file = open_tensors(self.path)
        text = (self._file.metadata() or {}).get("lowrank")
        description = {} if text is None else json.loads(text)
        if description.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a file of {_FORMAT!r}, got {description.get('format')!r}")
        self.layers: dict[str, dict] = description["layers"]

    def __getitem__(self, name: str) -> SVDFactors:
        if name not in self.layers:
            raise KeyError(name)
        return SVDFactors(*(self._file.get_tensor(f"{name}.{part}") for part in SVDFactors._fields))

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"FactorsFile({str(self.path)!r}, {len(self)} layers)"

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming the first such layer, unless the model has the weights of all layers in the file."""
        modules = dict(model.named_modules())

        def check(name: str) -> None:
            facts = self.layers[name]
            if name not in modules:
                lacks = f"it has {name}, which {type(model).__name__} lacks"
                raise ValueError(f"{self.path}: factors of another model: {lacks}")
            weight = dense_weight(modules[name])
            if has_exact_weight(modules[name], facts["weight"]):
                return
            actual, expected = (list(weight.shape), _name(weight.dtype)), (facts["shape"], facts["dtype"])
            if actual[0] == expected[0] and actual[1] != expected[1]:
                raise ValueError(
                    f"{self.path}: computed from {expected[1]} weights, the model's {name} is {actual[1]}: load the model"
                    f" with dtype=torch.{expected[1]}, or compute the factors from this one"
                )
            if actual != expected or weight_checksum(weight) != facts["weight"]:
                raise ValueError(
                    f"{self.path}: factors of another weight: {name} was {expected[0]} of {expected[1]} with checksum"
                    f" {facts['weight'][:12]}, the model's is {actual[0]} with {weight_checksum(weight)[:12]}"
                )

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            for _ in pool.map(check, self.layers):
                pass


@dataclass(frozen=True)
class WrittenLayer:
    """What :func:`write_factors` did for one layer.  seconds: None if an earlier, interrupted call had done it."""

    name: str
    shape: tuple[int, int]
    k: int
    method: str
    nbytes: int
    errors: FactorErrors
    seconds: float | None


def write_factors(
    path: str | os.PathLike[str],
    weights: Mapping[str, Weight],
    *,
    k: int | None = None,
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: Device = None,
    progress: bool = True,
) -> list[WrittenLayer]:
    """:func:`save_factors` for weights that need not be in memory.  device: where to compute; None: where each one is."""
    path = Path(path)
    if path.is_dir() or not path.name:
        raise IsADirectoryError(f"{path}: expected a file name to write to, got a directory")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    largest = max((weight.shape for weight in weights.values()), key=min)
    resolve_method(method, largest, k, dtype)  # raises for k and method before anything is computed
    work = path.with_name(f".{path.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    shards: dict[str, tuple[Path, dict]] = {}
    written = []
    with _screen.progress(disable=not progress) as bar:
        task = bar.add_task("", total=len(weights))
        for name, weight in weights.items():
            bar.update(task, description=name)
            shard, facts, seconds = _shard(work, name, weight, k, method, dtype, device)
            shards[name] = shard, facts
            nbytes = dtype.itemsize * facts["k"] * (sum(facts["shape"]) + 1)
            errors = FactorErrors(*facts["errors"])
            written.append(WrittenLayer(name, weight.shape, facts["k"], facts["method"], nbytes, errors, seconds))
            bar.advance(task)
        bar.update(task, description=str(path))
        _assemble(path, work, shards, dtype)
    shutil.rmtree(work)
    return written


def _shard(work: Path, name: str, source: Weight, k, method, dtype, device) -> tuple[Path, dict, float | None]:
    """(file, facts, seconds) of one layer's factors, computed unless the file is there and says the same facts."""
    from safetensors.torch import save_file

    start = time.perf_counter()
    weight = source.read()
    k = min(weight.shape) if k is None else min(k, *weight.shape)
    wanted = {
        "k": k,
        "shape": list(weight.shape),
        "dtype": _name(weight.dtype),
        "weight": weight_checksum(weight),
        "method": resolve_method(method, weight.shape, k, dtype),
        "factors_dtype": _name(dtype),
        "lowrank": __version__,
    }
    shard = work / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"  # names may hold slashes
    if (facts := _facts(shard)) is not None and all(facts.get(key) == value for key, value in wanted.items()):
        return shard, facts, None
    try:
        weight = weight.to(device)
        factors = svd_factors(weight, k, method=wanted["method"], dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    facts = {**wanted, "errors": list(factors.errors(weight))}
    unfinished = shard.with_suffix(f".{os.getpid()}")
    save_file(
        {part: t.cpu() for part, t in factors._asdict().items()}, unfinished, metadata={"lowrank": json.dumps(facts)}
    )
    publish(unfinished, shard)
    return shard, facts, time.perf_counter() - start


def _facts(shard: Path) -> dict | None:
    try:
        file = open_tensors(shard)
    except (FileNotFoundError, ValueError):  # not there, or not whole
        return None
    with file:
        return json.loads(file.metadata()["lowrank"])


def _assemble(path: Path, work: Path, shards: dict[str, tuple[Path, dict]], dtype: torch.dtype) -> None:
    """Copy the layers into one file: safetensors' save_file wants every tensor in memory."""
    layers = {name: facts for name, (_, facts) in shards.items()}
    description = {"format": _FORMAT, "lowrank": __version__, "order": "descending", "sign": _SIGN, "layers": layers}
    entries = {}
    for name, facts in layers.items():
        (N, K), k = facts["shape"], facts["k"]
        for part, shape in zip(SVDFactors._fields, ([N, k], [k], [k, K]), strict=True):
            entries[f"{name}.{part}"] = dtype, shape

    def chunks():
        for shard, _ in shards.values():
            with open_tensors(shard) as file:
                for part in SVDFactors._fields:
                    yield as_bytes(file.get_tensor(part))

    metadata = {"format": "pt", "lowrank": json.dumps(description)}
    write_tensors(path, work / f"{path.name}.{os.getpid()}", entries, chunks(), metadata)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
