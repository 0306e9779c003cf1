"""Finished runs on disk, so that what was done need not be done again."""

import hashlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from .._version import __version__
from ..checkpoints import read_json, write_json
from .costs import Memory
from .settings import Settings
from .train import Point, Run

KEY, BUDGET, TIME, OLD = "key.json", "budget.json", "time.json", ".before"


class Records:
    """The directory of a comparison's runs: key.json says of what they are, every other file is one run.

    Raises: ValueError where ``--resume`` meets runs of something else, naming what differs; FileNotFoundError where there is
        nothing to resume.
    """

    def __init__(self, folder: Path, key: dict, resume: bool):
        self.folder = folder
        if resume:
            self._check(key)
        else:
            if (folder / KEY).exists():  # hours of work, and --resume may have been forgotten
                shutil.rmtree(old := folder.with_name(folder.name + OLD), ignore_errors=True)
                folder.rename(old)
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.glob("*.json")):
                raise ValueError(f"--out: {folder} holds files that are no runs; expected another directory")
            write_json(folder / KEY, key)

    def _check(self, key: dict) -> None:
        try:
            before = json.loads((self.folder / KEY).read_text())
            if not isinstance(before, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise ValueError(f"--resume: {self.folder / KEY} is damaged: {error}") from error
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"--resume: {self.folder} holds no runs; expected the --out of an earlier run"
            ) from None
        key = json.loads(json.dumps(key))
        if differing := [name for name in key if before.get(name) != key[name]]:
            name = differing[0]
            raise ValueError(
                f"--resume: {self.folder} holds runs of another {name}: {_short(before.get(name))} there, "
                f"{_short(key[name])} now" + (f" (and {', '.join(differing[1:])} differ)" if differing[1:] else "")
            )

    def _path(self, task: str, method: str, rate: float, seed: int) -> Path:
        name = f"{task}-{method}-{rate:g}-{seed}".replace("→", "-to-").replace(":", "-r")
        return self.folder / f"{name}.json"

    def load(self, task: str, method: str, rate: float, seed: int, steps: int) -> Run | None:
        """The run, if it is there whole and of so many steps."""
        try:
            record = json.loads(self._path(task, method, rate, seed).read_text())
            if (record["rate"], record["steps"]) != (rate, steps):
                return None
            points = [
                Point(p["step"], p["seconds"], {name: _tensor(v) for name, v in p["measures"].items()})
                for p in record["points"]
            ]
            memory = Memory(**record["memory"]) if record["memory"] else None
            diversity = tuple(record["diversity"]) if record["diversity"] else None
            return Run(**{**record, "points": points, "memory": memory, "diversity": diversity})
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not whole
            return None

    def save(self, task: str, method: str, run: Run) -> None:
        points = [
            {"step": p.step, "seconds": p.seconds, "measures": {name: v.tolist() for name, v in p.measures.items()}}
            for p in run.points
        ]
        record = {**run.__dict__, "points": points, "memory": asdict(run.memory) if run.memory else None}
        write_json(self._path(task, method, run.rate, run.seed), record)

    def _costs(self, method: str) -> Path:
        return self.folder / f"costs-{method.replace('→', '-to-').replace(':', '-r')}.json"

    def save_costs(self, method: str, costs: dict) -> None:
        write_json(self._costs(method), costs)

    def load_costs(self, method: str) -> dict:
        return read_json(self._costs(method)) or {}

    def save_seconds(self, seconds: float) -> None:
        write_json(self.folder / TIME, {"seconds": seconds})

    def seconds(self) -> float:
        """That the runs which are there took."""
        kept = read_json(self.folder / TIME)
        return float(kept["seconds"]) if isinstance(kept, dict) and "seconds" in kept else 0.0

    def save_budget(self, budget: dict) -> None:
        write_json(self.folder / BUDGET, budget)


def budget_of(folder: Path) -> dict | None:
    """What an earlier run made of its minutes: a timing that need not come out alike again."""
    return read_json(folder / BUDGET)


def key_of(settings: Settings, model: nn.Module, tokenizer, digests: dict[str, str]) -> dict:
    """What two runs must share to be of one comparison, by the name a user knows it by."""
    return {
        "lowrank version": __version__,
        "torch version": torch.__version__,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": settings.device.partition(":")[0],
        "length": settings.length,
        "batch": settings.batch,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "target modules": list(settings.target_modules),
        "replay": settings.replay,
        "loss": settings.loss,
        "validator": settings.valid,
        "evaluation sequences": settings.eval_sequences,
        "masters": not settings.in_place,
        "data": digests,
        "model": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
    }


def model_digest(model: nn.Module) -> str:
    """Of names, shapes and up to 4096 evenly spread values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer) -> str:
    """Of its template, and of what it makes of a line of text."""
    ids = tokenizer.encode('What is the capital of France? {"answer": 1}\n')
    told = repr((tokenizer.template, list(tokenizer.prefix), tokenizer.eos, tokenizer.pad, ids))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 80 else text[:80] + "…"
