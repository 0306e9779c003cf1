"""SVD factors of a whole model in one safetensors file: ``save_factors`` and ``load_factors``.

The file holds ``LAYER.U`` [N,k], ``LAYER.S`` [k] and ``LAYER.Vh`` [k,K] of every layer, and under "lowrank" in its metadata,
as JSON, what they are factors of: per layer k, the weight's shape, dtype and checksum, and how it was computed.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ._version import __version__
from .checkpoints import as_bytes, open_tensors, publish, write_tensors
from .svd import WEIGHT_DTYPES, FactorErrors, SVDFactors, resolve_method, svd_factors

_FORMAT = "lowrank factors 1"
_SIGN = "the entry of largest magnitude in each column of U is positive"


def save_factors(
    model: nn.Module,
    path,
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
        from rich.console import Console

        worst = FactorErrors(*map(max, zip(*(layer.errors for layer in written), strict=True)))
        errors = ", ".join(f"{what} {value:.1e}" for what, value in worst._asdict().items())
        Console(stderr=True, highlight=False).print(f"{path}: {len(written)} layers; worst {errors}")
    return Path(path)


def load_factors(path, model: nn.Module | None = None) -> Mapping[str, SVDFactors]:
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


def target_layers(model: nn.Module, target_modules: str | Iterable[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers (nn.Linear with its quantised subclasses, transformers' Conv1D) that PEFT would choose, by name.

    Args:
        target_modules: "all-linear", every one but the output embedding and what is inside adapters; a list of names or
            of endings of names after a dot; or a regular expression that matches whole names.

    Raises: ValueError if nothing matches, an entry of the list matches nothing, or a match is not a linear layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        adapted = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "base_layer"))
        chosen = [
            name
            for name, module in modules.items()
            if _is_linear(module) and module is not head and not name.startswith(adapted)
        ]
        if not chosen:
            raise ValueError(f"model: {type(model).__name__} has no linear layers")
        return {name: modules[name] for name in chosen}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules: {target_modules!r} is not a regular expression: {error}") from error
        chosen = [name for name in modules if pattern.fullmatch(name)]
    else:
        targets = list(target_modules)
        if odd := [target for target in targets if not isinstance(target, str)]:
            raise TypeError(f"target_modules: expected names, got {odd[0]!r}")
        found = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in targets}
        if missing := [target for target, names in found.items() if not names]:
            raise ValueError(f"target_modules: no module of {type(model).__name__} is called {missing[0]!r}")
        matched = {name for names in found.values() for name in names}
        chosen = [name for name in modules if name in matched]
    if not chosen:
        raise ValueError(f"target_modules: {target_modules!r} matches no module of {type(model).__name__}")
    for name in chosen:
        if not _is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"target_modules: expected linear layers, but {target_modules!r} matches the {kind} {name}"
            )
    return {name: modules[name] for name in chosen}


@torch.no_grad()
def dense_weight(module: nn.Module, *, exact: bool = False) -> torch.Tensor:
    """The weight [N,K] of a linear layer in a float dtype, without grad: dequantised by PEFT, Conv1D's transposed.

    Of a 4-bit weight of bitsandbytes the scales are taken in bfloat16, on every device: that is what is left of them once
    bitsandbytes has repacked it, at its first inference on some CPUs, so that the weight is the same before and after.
    ``exact``: the scales as they are, which lowrank 0.1 took.

    Raises: ValueError if there is no such weight, or ``exact`` is asked of one that was repacked; ImportError without PEFT
        for a quantised one.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{type(module).__name__}: has no weight tensor")
    if not has_float_weight(module):
        state = four_bit_state(module)
        if state is not None and not exact:
            return _dequantised(weight, state)
        if state is not None and _is_repacked(state):
            raise ValueError(f"{type(module).__name__}: bitsandbytes has repacked its weight: its scales are gone")
        try:
            from peft.utils.integrations import dequantize_module_weight
        except ImportError as error:
            raise ImportError("quantised weights need PEFT: pip install 'lowrank-kernels[qlora]'") from error
        weight = dequantize_module_weight(module)
    if weight.dtype not in WEIGHT_DTYPES or weight.dim() != 2:
        raise ValueError(
            f"{type(module).__name__}: expected a float weight of two dimensions or one that PEFT dequantises, got a"
            f" {type(weight).__name__} {list(weight.shape)} of {weight.dtype}"
        )
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def four_bit_state(module: nn.Module):
    """bitsandbytes' QuantState of a 4-bit weight; None for any other."""
    weight = getattr(module, "weight", None)
    if type(weight).__name__ != "Params4bit":
        return None
    return getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)


def has_exact_weight(module: nn.Module, checksum: str) -> bool:
    """Whether a 4-bit layer's exact :func:`dense_weight` has this checksum: files of lowrank 0.1 say so."""
    state = four_bit_state(module)
    if state is None or _is_repacked(state):
        return False
    return weight_checksum(dense_weight(module, exact=True)) == checksum


def _is_repacked(state) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dequantised(weight: torch.Tensor, state) -> torch.Tensor:
    """[N,K] in the dtype that was quantised: each code's value times its block's scale in bf16."""
    N, K = state.shape
    packed, absmax = weight.data.contiguous().view(torch.uint8).reshape(-1), state.absmax
    if _is_repacked(
        state
    ):  # 32 bytes: 32 rows by two columns, the first 32 codes low, the others high; scales transposed
        codes = torch.stack((packed.view(-1, 32) & 15, packed.view(-1, 32) >> 4), 1)
        codes = codes.view(N // 32, K // 2, 32, 2).transpose(1, 2).reshape(-1)
        absmax = absmax.mT
    else:
        codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)[: N * K]
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.reshape(-1).bfloat16().float()
    dense = state.code.to(scales)[codes.int()].view(N, K)
    dense = dense.view(-1).mul_(scales.repeat_interleave(state.blocksize)[: N * K]).view(N, K)
    return dense.to(state.original_dtype if _is_repacked(state) else state.dtype)


def has_float_weight(module: nn.Module) -> bool:
    """Whether its weight is a plain float matrix: not quantised, whatever class the module is of."""
    weight = getattr(module, "weight", None)
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in WEIGHT_DTYPES and weight.dim() == 2


def weight_checksum(weight: torch.Tensor) -> str:
    """sha256, in hexadecimal, of a tensor's dtype, shape and elements in row-major order."""
    if weight.is_meta:
        raise ValueError("weight: expected a tensor with data, got one on the meta device")
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FactorsFile(Mapping[str, SVDFactors]):
    """A file of :func:`save_factors`: reads a layer's factors from disk when it is asked for.

    layers: by name, {"k", "shape" and "dtype" of the weight, "weight" (its checksum), "method", "factors_dtype", "errors"}.
    """

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; `lowrank tools factors` writes one")
        try:
            self._file = safe_open(self.path, "pt")
        except SafetensorError as error:
            size = self.path.stat().st_size
            raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): {error}") from error
        text = (self._file.metadata() or {}).get("lowrank")
        description = {} if text is None else json.loads(text)
        if description.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a file of {_FORMAT!r}, got {description.get('format')!r}")
        self.layers: dict[str, dict] = description["layers"]

    def __getitem__(self, name: str) -> SVDFactors:
        if name not in self.layers:
            raise KeyError(name)
        return SVDFactors(*(self._file.get_tensor(f"{name}.{part}") for part in SVDFactors._fields))

    def __contains__(self, name) -> bool:
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
            found, expected = (list(weight.shape), _name(weight.dtype)), (facts["shape"], facts["dtype"])
            if found[0] == expected[0] and found[1] != expected[1]:
                raise ValueError(
                    f"{self.path}: computed from {expected[1]} weights, the model's {name} is {found[1]}: load the model"
                    f" with dtype=torch.{expected[1]}, or compute the factors from this one"
                )
            if found != expected or weight_checksum(weight) != facts["weight"]:
                raise ValueError(
                    f"{self.path}: factors of another weight: {name} was {expected[0]} of {expected[1]} with checksum"
                    f" {facts['weight'][:12]}, the model's is {found[0]} with {weight_checksum(weight)[:12]}"
                )

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            for _ in pool.map(check, self.layers):
                pass


class Weight(NamedTuple):
    """A weight that is read when its turn comes: its shape (N, K) and how to get it."""

    shape: tuple[int, int]
    read: Callable[[], torch.Tensor]


def module_weights(layers: Mapping[str, nn.Module]) -> dict[str, Weight]:
    """The layers' :func:`dense_weight`, read one at a time: dequantised ones are not all in memory."""
    return {
        name: Weight(weight_shape(layer), lambda layer=layer: dense_weight(layer)) for name, layer in layers.items()
    }


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, quantised or not."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape[::-1])


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
    path,
    weights: Mapping[str, Weight],
    *,
    k: int | None = None,
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
    device=None,
    progress: bool = True,
) -> list[WrittenLayer]:
    """:func:`save_factors` for weights that need not be in memory.  device: where to compute; None: where each one is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    path = Path(path)
    if path.is_dir() or not path.name:
        raise IsADirectoryError(f"{path}: expected a file name to write to, got a directory")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    largest = max((weight.shape for weight in weights.values()), key=min)
    resolve_method(method, largest, k, dtype)  # raises for k and method before anything is computed
    work = path.with_name(f".{path.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    shards: dict[str, tuple[Path, dict]] = {}
    written = []
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "pt") as file:
            return json.loads(file.metadata()["lowrank"])
    except (FileNotFoundError, SafetensorError):
        return None


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


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [K,N].  By name: importing transformers takes seconds."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def has_linear_forward(module: nn.Module) -> bool:
    """Whether calling it is F.linear of its weight and bias: no subclass or instance brings a forward of its own."""
    owner = next(c for c in type(module).__mro__ if "forward" in c.__dict__)
    plain = owner is nn.Linear or (owner.__name__, owner.__module__) == ("Conv1D", "transformers.pytorch_utils")
    return plain and "forward" not in module.__dict__


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)
