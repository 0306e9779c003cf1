"""What one comparison does: the command line's options, checked before any long work starts.  Imports nothing heavy."""

import importlib.util
import math
import os
import shlex
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

METHODS = ("full", "full-masked", "lora", "lora-attention", "peft-lora", "full→lora", "svf", "svf-full")
ALIASES = {"full-lora": "full→lora"}  # what a keyboard types
REPORTS = ("compare.json", "compare.png", "compare.md")  # in the order they are put in place
SEEDS = 2**64  # what torch's generators tell apart
DTYPES = ("float32", "bfloat16")  # float16 would need a loss scaler, which would then be compared as well


@dataclass(frozen=True)
class Embedded:
    """The byte-level model pretrained on the spot; sized so that the default run ends in minutes on two cores."""

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    pretrain_steps: int = 800
    pretrain_rate: float = 4e-3
    batch: int = 8
    length: int = 128


@dataclass(frozen=True)
class Adapter:
    """The size of a method's adapters, LoRA's being scaled by ``alpha / rank``."""

    rank: int
    alpha: float = 32

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...]
    steps: int
    rank: int
    dtype: str
    device: str
    seed: int
    seeds: int
    out: Path
    alpha: float = 32
    in_place: bool = False
    model: str | None = None
    data: Path | None = None
    general_data: Path | None = None
    embedded: Embedded = Embedded()

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.rank, self.alpha)

    @property
    def sweep_steps(self) -> int:
        """Steps of each run of the learning-rate sweep: a third of a full run."""
        return max(self.steps // 3, 2)

    @property
    def command(self) -> str:
        """The command line that repeats this run, quoted for a POSIX shell."""
        parts = ["lowrank", "compare"]
        typed = {full: alias for alias, full in ALIASES.items()}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value is False or field.name == "embedded":
                continue
            if value is True:
                parts.append(f"--{field.name.replace('_', '-')}")
                continue
            value = ",".join(typed.get(name, name) for name in value) if field.name == "methods" else str(value)
            option = f"--{field.name.replace('_', '-')}"
            parts += [f"{option}={value}"] if value.startswith("-") else [option, value]
        return shlex.join(parts)


def from_arguments(args, embedded: Embedded) -> Settings:
    """argparse.Namespace -> Settings.  What cannot work raises, naming option, what came and what was expected."""
    for option, least in (("steps", 6), ("rank", 1), ("seeds", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} {getattr(args, option)}: expected at least {least}")
    if args.seed + args.seeds > SEEDS:
        raise ValueError(
            f"--seed {args.seed}: expected at most 2**64 - {args.seeds}, so that every seed is below 2**64"
        )
    for option in ("data", "general_data"):
        if (path := getattr(args, option)) is not None:
            _readable(f"--{option.replace('_', '-')} {path}", Path(path))
    device = _device(args.device)
    settings = Settings(
        methods=_methods(args.methods),
        steps=args.steps,
        rank=args.rank,
        alpha=_alpha(args.alpha, args.rank),
        in_place=args.in_place,
        dtype=_dtype(args.dtype, device),
        device=device,
        seed=args.seed,
        seeds=args.seeds,
        out=_out(args.out),
        model=_model(args.model),
        data=Path(args.data) if args.data else None,
        general_data=Path(args.general_data) if args.general_data else None,
        embedded=embedded,
    )
    for package in ("peft", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"compare needs {package}: pip install 'lowrank-kernels[compare]'")
    try_out(f"--out {args.out}", settings.out, REPORTS)
    return settings


def _readable(what: str, path: Path) -> None:
    if not path.is_file():
        came = "is no file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{what}: {came}; expected a text file")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise type(error)(f"{what}: cannot be read: {error.strerror}") from error


def try_out(what: str, folder: Path, names) -> None:
    """Write a file into a folder and take it away again, with the folders made for it.  Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if folders := [name for name in names if (folder / name).is_dir()]:
        raise IsADirectoryError(f"{what}: {folder / folders[0]} is a directory; expected a file or nothing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise type(error)(f"{what}: {error.filename or folder} is not writable: {error.strerror}") from error
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _alpha(text: str, rank: int) -> float:
    """A positive number, or "r" for the rank."""
    if text == "r":
        return rank
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ValueError(f"--alpha {text!r}: expected a positive number, or r for the rank")
    return int(alpha) if alpha == int(alpha) else alpha


def _methods(text: str) -> tuple[str, ...]:
    names = [ALIASES.get(name, name) for name in (part.strip() for part in text.split(",")) if name]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        typed = [next((a for a, full in ALIASES.items() if full == name), name) for name in METHODS]
        came = f"unknown method {unknown[0]!r}" if unknown else "no method"
        raise ValueError(f"--methods {text!r}: {came}; expected some of {','.join(typed)}")
    return tuple(name for name in METHODS if name in names)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit())):
        raise ValueError(f"--device {name!r}: expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(
            f"--device {name!r}: expected a device that exists; torch {torch.__version__} sees {count} CUDA devices"
        )
    return name


def _dtype(name: str | None, device: str) -> str:
    if name is None:
        return "float32" if device == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return name


def _model(name: str | None) -> str | None:
    """A directory that is there, or something that can be a hub id (`name` or `owner/name`)."""
    if name is None or Path(name).is_dir():
        return name
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(
            f"--model {name}: no such directory; expected a transformers model's directory or a hub id"
        )
    return name


def _out(name: str) -> Path:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out {name}: is a file; expected a directory to write the reports into")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"--out {name}: {parent} is not writable")
    return path
