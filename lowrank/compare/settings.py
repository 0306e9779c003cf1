"""What one comparison does: the command line's options, checked before any long work starts.  Imports nothing heavy."""

import importlib.util
import math
import os
import shlex
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

METHODS = (
    "full",
    "full-masked",
    "lora",
    "lora-attention",
    "lora-mlp",
    "peft-lora",
    "full→lora",
    "svf",
    "svf-full",
)
RANKED = ("lora", "lora-attention", "lora-mlp", "peft-lora", "full→lora")  # those that take a rank: lora:64
ALIASES = {"full-lora": "full→lora"}  # what a keyboard types
STEPS = {"text": 200, "knowledge": 120, "format": 40}  # of every run
EMBEDDED_STEPS = {
    "text": 100,
    "knowledge": 300,
    "format": 100,
}  # of the embedded model, which learns slowly and steps fast
TASKS = tuple(STEPS)
DEFAULT_METHODS = {
    "text": ("full", "lora", "lora-attention", "svf"),
    "knowledge": ("full", "lora"),
    "format": ("full", "lora"),
}
LOSSES = ("assistant", "last", "all")
REPORTS = ("compare.json", "compare.png", "compare.md")  # in the order they are put in place
RUNS = "runs"  # the directory of finished runs, beside the reports
SAVED = "saved"
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
    """The size of a method's adapters, LoRA's being scaled by ``alpha / rank``.  targets: names of layers; empty for all
    linear ones."""

    rank: int
    alpha: float = 32
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Settings:
    """methods: by task.  steps: None for the task's own.  alpha: None for equal to rank.  length, batch: None for the
    model's.  minutes: None for no budget.  rates: by method; the others' grids are made."""

    dtype: str
    device: str
    methods: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_METHODS))
    steps: int | None = None
    rank: int = 8
    alpha: float | None = 32
    target_modules: tuple[str, ...] = ()
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    replay: float = 0.0
    length: int | None = None
    batch: int | None = None
    eval_sequences: int = 64
    people: int = 10
    pairs: int = 60
    minutes: float | None = None
    in_place: bool = False
    seed: int = 0
    seeds: int = 1
    model: str | None = None
    data: Path | None = None
    test: Path | None = None
    valid: str | None = None
    loss: str | None = None
    general_data: Path | None = None
    out: Path = Path("lowrank-compare")
    resume: bool = False
    save: bool = False
    embedded: Embedded = Embedded()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.methods)

    @property
    def names(self) -> tuple[str, ...]:
        """The methods of all tasks, each once."""
        return tuple(dict.fromkeys(name for names in self.methods.values() for name in names))

    def steps_of(self, task: str) -> int:
        return self.steps or (EMBEDDED_STEPS if self.model is None else STEPS)[task]

    def adapter(self, name: str) -> Adapter:
        """Of a method, by its rank or the common one."""
        rank = int(name.partition(":")[2] or self.rank)
        return Adapter(rank, rank if self.alpha is None else self.alpha, self.target_modules)

    @property
    def command(self) -> str:
        """The command line that repeats this run, quoted for a POSIX shell: what is not as it is by default."""
        parts = ["lowrank", "compare"]
        for option, value in self._options():
            parts += [option] if value is True else [f"{option}={value}"] if value[:1] == "-" else [option, value]
        return shlex.join(parts)

    def _options(self):
        defaults = {f.name: f.default for f in fields(self)}
        typed = {full: alias for alias, full in ALIASES.items()}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            option = {"length": "--seq"}.get(name, f"--{name.replace('_', '-')}")
            if name in ("embedded", "resume") or (name not in ("methods", "rates") and value == defaults[name]):
                continue
            if name == "methods":
                yield "--task", ",".join(value)
                for task, names in value.items():
                    yield option, f"{task}={','.join(typed.get(n, n) for n in names)}"
            elif name == "rates":
                for method, rates in value.items():
                    yield option, f"{typed.get(method, method)}={','.join(f'{rate:g}' for rate in rates)}"
            elif name == "alpha" and value is None:
                yield option, "r"
            elif isinstance(value, bool):
                yield option, True
            else:
                yield option, ",".join(value) if isinstance(value, tuple) else str(value)


def from_arguments(args, embedded: Embedded) -> Settings:
    """argparse.Namespace -> Settings.  What cannot work raises, naming option, what came and what was expected."""
    at_least = (
        ("steps", 6),
        ("rank", 1),
        ("seeds", 1),
        ("seed", 0),
        ("length", 8),
        ("batch", 1),
        ("eval_sequences", 8),
        ("people", 1),
        ("pairs", 8),
    )
    for name, least in at_least:
        if (value := getattr(args, name)) is not None and value < least:
            option = {"length": "seq"}.get(name, name.replace("_", "-"))
            raise ValueError(f"--{option} {value}: expected at least {least}")
    for name, most in (("people", 360), ("pairs", 60)):
        if getattr(args, name) > most:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at most {most}")
    if args.seed + args.seeds > SEEDS:
        raise ValueError(
            f"--seed {args.seed}: expected at most 2**64 - {args.seeds}, so that every seed is below 2**64"
        )
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes {args.minutes}: expected a positive number")
    if not 0 <= args.replay < 1:
        raise ValueError(
            f"--replay {args.replay}: expected the share of old text in every batch, at least 0 and below 1"
        )
    if args.replay and args.batch == 1:
        raise ValueError(f"--replay {args.replay} with --batch 1: expected a batch of at least 2, one of them old text")
    paths = {}
    for name in ("data", "test", "general_data"):
        if (path := getattr(args, name)) is not None:
            readable(f"--{name.replace('_', '-')} {path}", Path(path))
        paths[name] = Path(path) if path else None
    if args.loss is not None and args.loss not in LOSSES:
        raise ValueError(f"--loss {args.loss!r}: expected one of {', '.join(LOSSES)}")
    for name in ("test", "valid", "loss"):
        if getattr(args, name) is not None and not is_examples(paths["data"]):
            raise ValueError(f"--{name} is about examples: expected --data FILE.jsonl with it")
    device = device_of(args.device)
    tasks = _tasks(args.task, paths["data"], args.test, args.valid)
    for name, wants in (("test", "knowledge"), ("valid", "format")):
        if getattr(args, name) is not None and wants not in tasks:
            raise ValueError(f"--{name} is asked in the task {wants}: it is not among the tasks ({','.join(tasks)})")
    methods = _methods(args.methods, tasks)
    settings = Settings(
        dtype=dtype_of(args.dtype, device),
        device=device,
        methods=methods,
        steps=args.steps,
        rank=args.rank,
        alpha=_alpha(args.alpha),
        target_modules=tuple(name for name in (args.target_modules or "").split(",") if name),
        rates=_rates(args.rates, tuple(dict.fromkeys(n for names in methods.values() for n in names))),
        replay=args.replay,
        length=args.length,
        batch=args.batch,
        eval_sequences=args.eval_sequences,
        people=args.people,
        pairs=args.pairs,
        minutes=args.minutes,
        in_place=args.in_place,
        seed=args.seed,
        seeds=args.seeds,
        model=_model(args.model),
        valid=args.valid,
        loss=args.loss,
        out=_out(args.out),
        resume=args.resume,
        save=args.save,
        embedded=embedded,
        **paths,
    )
    for package in ("peft", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"compare needs {package}: pip install 'lowrank-kernels[compare]'")
    try_out(f"--out {args.out}", settings.out, REPORTS)
    return settings


def is_examples(path: Path | None) -> bool:
    """Whether a file holds examples, one JSON object a line, and no running text."""
    return path is not None and path.suffix.lower() in (".jsonl", ".json", ".ndjson")


def _tasks(text: str | None, data: Path | None, test, valid) -> tuple[str, ...]:
    """What --task says; without it all that are generated, or what the given files can be asked for."""
    if text is None:
        if data is None:
            return TASKS
        wanted = {"knowledge": test is not None, "format": valid is not None}
        return tuple(name for name in TASKS if wanted.get(name)) or ("text",)
    names = TASKS if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    if not names or (unknown := [name for name in names if name not in TASKS]):
        came = f"unknown task {unknown[0]!r}" if names else "no task"
        raise ValueError(f"--task {text!r}: {came}; expected all or some of {','.join(TASKS)}")
    return tuple(name for name in TASKS if name in names)


def _methods(given: list[str] | None, tasks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Every task's methods, from what was given for it, for all, or by default."""
    chosen = {}
    for text in given or []:
        task, is_own, names = text.rpartition("=")
        if is_own and task not in TASKS:
            raise ValueError(f"--methods {text!r}: unknown task {task!r}; expected some of {','.join(TASKS)}")
        if is_own and task not in tasks:
            raise ValueError(f"--methods {text!r}: {task} is not among the tasks ({','.join(tasks)})")
        chosen[task] = _method_names(text, names)
    return {task: chosen.get(task, chosen.get("", DEFAULT_METHODS[task])) for task in tasks}


def _method_names(text: str, names: str) -> tuple[str, ...]:
    if names.strip() == "all":
        return METHODS
    labels = []
    for part in (part.strip() for part in names.split(",")):
        name, colon, rank = part.partition(":")
        name = ALIASES.get(name, name)
        if part and name not in METHODS:
            typed = [next((a for a, full in ALIASES.items() if full == name), name) for name in METHODS]
            raise ValueError(f"--methods {text!r}: unknown method {name!r}; expected all or some of {','.join(typed)}")
        if colon and (name not in RANKED or not (rank.isascii() and rank.isdigit()) or int(rank) < 1):
            raise ValueError(
                f"--methods {text!r}: {part!r}: expected a method alone, or a LoRA method and its rank, as in lora:64"
            )
        labels += [name + colon + rank] if part else []
    if not labels:
        raise ValueError(f"--methods {text!r}: no method")
    order = {label: (METHODS.index(label.partition(":")[0]), int(label.partition(":")[2] or 0)) for label in labels}
    return tuple(sorted(order, key=order.get))


def _rates(given: list[str] | None, methods: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    rates = {}
    for text in given or []:
        name, _, numbers = text.rpartition("=")
        name = ALIASES.get(name, name)
        if name not in methods:
            raise ValueError(f"--rates {text!r}: expected METHOD=RATE,RATE with one of {', '.join(methods)}")
        try:
            values = tuple(sorted({float(number) for number in numbers.split(",")}))
        except ValueError:
            values = (math.nan,)
        if not all(0 < value < math.inf for value in values):
            raise ValueError(f"--rates {text!r}: expected positive numbers, as in {name}=1e-4,3e-4")
        rates[name] = values
    return rates


def readable(what: str, path: Path) -> None:
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


def _alpha(text: str) -> float | None:
    """A positive number, or "r" for every method's own rank: None."""
    if text == "r":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ValueError(f"--alpha {text!r}: expected a positive number, or r for the rank")
    return int(alpha) if alpha == int(alpha) else alpha


def device_of(name: str | None) -> str:
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


def dtype_of(name: str | None, device: str) -> str:
    """By default bfloat16 on GPUs and on CPUs that multiply it in hardware."""
    if name is None:
        from ..measure.environment import has_bf16_units

        return "bfloat16" if device != "cpu" or has_bf16_units() else "float32"
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
