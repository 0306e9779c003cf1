"""What a method costs and what it did to the weights, measured."""

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._linears import is_matrix
from ..adapters.fits import PREFIX
from ..analysis import diff_stats, stable_rank, total
from ..measure.saved import storage_bytes

TOLERANCE = 1e-5  # what "RL finetunes small subnetworks" (arXiv 2505.11711) counts as equal


@dataclass(frozen=True)
class Memory:
    """Bytes at one training step.  total: the sum of the four on a CPU; the allocator's peak on CUDA."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def memory(model: nn.Module, optimizer: torch.optim.Optimizer, activations: int, device: torch.device) -> Memory:
    """Call between backward and the dropping of the gradients, from the second step on: by then there is state."""
    parameters = list(model.parameters())
    state = [v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    state += getattr(optimizer, "masks", {}).values()
    parts = (
        storage_bytes((*parameters, *model.buffers())),
        storage_bytes(p.grad for p in parameters if p.grad is not None),
        storage_bytes(state),
        activations,
    )
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sum(parts)
    return Memory(*parts, peak)


def linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name in the model without adapters, its value with the adapters merged in fp32) of every linear layer's
    and router's weight [N, K] and every stack of experts' [E, N, K]."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        deltas: dict[str, list[Tensor]] = {}
        while hasattr(module, "get_delta_weight"):  # PEFT's layers over parameters nest, one in another
            inside = name + "."
            adapters = [a for a in module.active_adapters if a in getattr(module, "lora_A", (a,))]
            of_parameter = deltas.setdefault(getattr(module, "parameter_name", "weight"), [])
            of_parameter += [module.get_delta_weight(adapter).float() for adapter in adapters]
            module = module.base_layer
        plain = name.removeprefix(PREFIX)
        for own, parameter in module.named_parameters(recurse=False):
            if is_matrix(module, own, parameter):
                yield f"{plain}.{own}", sum(deltas.get(own, ()), parameter.float())


@torch.no_grad()
def weight_changes(base: nn.Module, model: nn.Module) -> dict:
    """Shares of the weights of linear layers and experts whose stored value (base's dtype) differs in any bit, and by more
    than TOLERANCE; stable ranks of the matrices that changed, as long as they are finite."""
    diffs, ranks = {}, []
    for name, weight in linear_weights(model):
        before = base.get_parameter(name).detach().to(weight.device)
        diffs[name] = diff_stats(before, weight.to(before.dtype), TOLERANCE)
        delta = weight - before.float()
        ranks += [stable_rank(d) for d in delta.reshape(-1, *delta.shape[-2:]) if d.any() and d.isfinite().all()]
    ranks = ranks or [0.0]
    sums = total(diffs)
    return {
        "share_changed": sums.share_changed,
        "share_beyond_tolerance": sums.share_beyond,
        "stable_rank": {"median": statistics.median(ranks), "least": min(ranks), "most": max(ranks)},
    }


@torch.no_grad()
def latency(model: nn.Module | None, batch: Tensor, repeats: int = 15) -> float | None:
    """Seconds of one forward of batch [B, T]: the median of repeats, after two that do not count.  None of no model."""
    if model is None:
        return None
    model.eval()
    seconds = []
    for _ in range(repeats + 2):
        synchronize(batch.device)
        start = time.perf_counter()
        model(input_ids=batch)
        synchronize(batch.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def merged(model: nn.Module) -> nn.Module | None:
    """A copy with its adapters merged; None of a model without."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else None


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the files that save_pretrained writes, the model card aside."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file() and f.suffix != ".md")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
