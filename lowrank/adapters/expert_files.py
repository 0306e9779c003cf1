"""PEFT's files of LoRA on expert parameters, in the layout of PEFT 0.19 or in the one before.

For a stack [E,N,K] (not gpt-oss's, which are stored [E,K,N]) PEFT 0.17 and 0.18 took N for the inputs: A [E r, N], B [K, r E].
Since 0.19 A is [E r, K] and B [N, r E]: vLLM and PEFT itself misread the old files, silently where N = K.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from .fits import PREFIX

TURNED = (0, 19)  # the first PEFT that writes them so
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def as_written_today(
    base: nn.Module, path: Path, tensors: dict[str, Tensor]
) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """(path, tensors), or those of a copy whose factors of experts are turned round, where an older PEFT wrote them.

    Raises: ValueError where the file does not say which PEFT wrote it and its shapes allow both.
    """
    config = json.loads((path / CONFIG).read_text())
    pairs = _pairs(base, tensors) if config.get("target_parameters") else {}
    for key, (stacks, A, _) in pairs.items() if not config.get("rank_pattern") else ():
        if (count := A.shape[0] / (config.get("r") or 1)) != stacks[0][0]:
            raise ValueError(
                f"{path}: an adapter of another model: {key.removeprefix(PREFIX)} is of {count:g} experts, the model has "
                f"{stacks[0][0]}"
            )
    old = (release := _release(config)) is not None and release < TURNED
    if config.get("target_parameters") and old and getattr(base, "_checkpoint_conversion_mapping", None):
        raise ValueError(
            f"{path}: PEFT {config['peft_version']} wrote it, for a model whose layers have other names now"
        )
    whole = [key for key, (stacks, A, _) in pairs.items() if A.shape[0] % stacks[0][0] == 0]
    turned = {key for key in whole if _is_turned(path, config, key, *pairs[key])}
    if not turned:
        yield path, tensors
        return
    from safetensors.torch import save_file

    made = dict(tensors)
    for key in turned:
        stacks, A, B = pairs[key]
        made[f"{key}.lora_A.weight"], made[f"{key}.lora_B.weight"] = turn(A, B, stacks[0][0])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        save_file({name: t.contiguous() for name, t in made.items()}, copy / WEIGHTS, metadata={"format": "pt"})
        (copy / CONFIG).write_text(json.dumps({**config, "peft_version": "0.19.0"}))
        yield copy, made


def turn(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The same update in the other layout: A [E r, N], B [K, r E] -> [E r, K], [N, r E], and back."""
    r = A.shape[0] // experts
    new_A = B.view(B.shape[0], r, experts).permute(2, 1, 0).reshape(experts * r, B.shape[0])
    new_B = A.view(experts, r, A.shape[1]).permute(2, 1, 0).reshape(A.shape[1], r * experts)
    return new_A, new_B


def _pairs(base: nn.Module, tensors: dict[str, Tensor]) -> dict[str, tuple[list[tuple[int, ...]], Tensor, Tensor]]:
    """{key without its end: (shapes of the module's stacks, A, B)} of the factors of stacks that are stored [E,N,K]."""
    modules, pairs = dict(base.named_modules()), {}
    for name, A in tensors.items():
        key = name.removesuffix(".lora_A.weight")
        B = tensors.get(f"{key}.lora_B.weight")
        module = modules.get(key.removeprefix(PREFIX).replace(".base_layer", ""))
        while hasattr(module, "base_layer"):  # adapted already
            module = module.base_layer
        if key == name or B is None or module is None or getattr(module, "is_transposed", False):
            continue
        stacks = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
        if stacks and A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]:
            pairs[key] = stacks, A, B
    return pairs


def _is_turned(path: Path, config: dict, key: str, stacks: list[tuple[int, ...]], A: Tensor, B: Tensor) -> bool:
    """By the shapes where they fit one way alone; else by the release that wrote them."""
    sides = (B.shape[0], A.shape[1])  # [N, K] as it is today
    now, before = (any(stack[1:] == side for stack in stacks) for side in (sides, sides[::-1]))
    if not (now and before):
        return before
    if (release := _release(config)) is None:
        raise ValueError(
            f"{path}: {key.removeprefix(PREFIX)} could be of PEFT 0.19 and later or, with its factors the other way round, "
            'of 0.17 or 0.18, and adapter_config.json has no "peft_version" of a release; add the one that wrote it'
        )
    return release < TURNED


def _release(config: dict) -> tuple[int, int] | None:
    """None of what is between two releases, too."""
    version = str(config.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None or "dev" in version else (int(found[1]), int(found[2]))
