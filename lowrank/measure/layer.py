"""One LoRA linear to be measured: a Problem, its tensors, and the methods that take them: frozen, lowrank, PEFT."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("bfloat16", "float16", "float32")
SCALING = 2.0


@dataclass(frozen=True)
class Problem:
    """One LoRA linear: x [M, K], W [N, K], A [r, K], B [N, r].  dtypes by torch name; ``thin_dtype`` is that of A and B where
    a benchmark does not choose it itself.  ``sets``: copies that calls rotate through, so that no cache holds the weight.
    """

    M: int
    K: int
    N: int
    r: int = 16
    dtype: str = "bfloat16"
    thin_dtype: str = "bfloat16"
    device: str = "cpu"
    dropout: float = 0.0
    sets: int = 4

    def __post_init__(self) -> None:
        for name in ("M", "K", "N", "r", "sets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("dtype", "thin_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")


class Tensors(NamedTuple):
    """One set: x [M, K] and dY [M, N] in the problem's dtype, frozen W [N, K], fp32 masters of A [r, K] and B [N, r]."""

    x: "Tensor"
    W: "Tensor"
    A: "Tensor"
    B: "Tensor"
    dY: "Tensor"


class Method(NamedTuple):
    """A way to compute Y.  forward(i) takes set i; leaves(i) are the tensors it differentiates with respect to."""

    forward: Callable[[int], "Tensor"]
    leaves: Callable[[int], "list[Tensor]"]


def tensors(p: Problem) -> list[Tensors]:
    import torch

    dtype, sets = getattr(torch, p.dtype), []
    for _ in range(p.sets):
        x, W, A, B, dY = (
            torch.randn(shape, device=p.device).mul_(scale)
            for shape, scale in (
                ((p.M, p.K), 1.0),
                ((p.N, p.K), p.K**-0.5),
                ((p.r, p.K), p.K**-0.5),
                ((p.N, p.r), p.r**-0.5),
                ((p.M, p.N), 1.0),
            )
        )
        sets.append(Tensors(x.to(dtype).requires_grad_(), W.to(dtype), A, B, dY.to(dtype)))
    return sets


def adapter_kinds(p: Problem) -> tuple[str, ...]:
    """How adapters are kept and run: in the base's 16 bits, in fp32 (PEFT's default), in fp32 under autocast (trainers)."""
    return ("fp32",) if p.dtype == "float32" else ("16bit", "fp32", "fp32-autocast")


def frozen(p: Problem, data: list[Tensors]) -> Method:
    import torch

    return Method(
        lambda i: torch.nn.functional.linear(data[i % p.sets].x, data[i % p.sets].W), lambda i: [data[i % p.sets].x]
    )


def lowrank_method(p: Problem, data: list[Tensors], kind: str) -> Method:
    import lowrank

    factors = factors_of(p, data, kind)

    def forward(i):
        (x, W, *_), (A, B) = data[i % p.sets], factors[i % p.sets]
        with autocast(p, kind):
            return lowrank.lora_linear(x, W, A, B, SCALING, dropout_p=p.dropout)

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets]])


def peft_method(p: Problem, data: list[Tensors], kind: str, compiled: bool = False) -> Method:
    """PEFT's own layer around the same tensors.  Raises ImportError without PEFT."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    factors, layers = factors_of(p, data, kind), []
    config = LoraConfig(r=p.r, lora_alpha=int(SCALING * p.r), lora_dropout=p.dropout, init_lora_weights=False)
    for one, (A, B) in zip(data, factors, strict=True):
        base = torch.nn.Linear(p.K, p.N, bias=False, device="meta")
        base.weight = torch.nn.Parameter(one.W, requires_grad=False)
        layer = Linear(base, "default", config, r=p.r, lora_alpha=int(SCALING * p.r)).to(p.device)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
        layers.append(layer.train())

    def call(layer, x):
        return layer(x)

    if compiled:
        # a kept graph is run backward again and again, which buffers given away at the first time would forbid
        torch._functorch.config.donated_buffer = False
        # dynamo counts recompilations by code object, and gives up at eight: one object per problem
        call.__code__ = call.__code__.replace(co_name=f"call_{p.M}_{p.K}_{p.N}_{p.r}_{kind}")
        call = torch.compile(call, dynamic=False)

    def forward(i):
        with autocast(p, kind):
            return call(layers[i % p.sets], data[i % p.sets].x)

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets]])


def passes(method: Method, dYs: "list[Tensor]") -> dict[str, Callable[[int], object]]:
    """{"forward", "backward", "both"} -> call(i).  Backward alone runs over graphs that its first calls leave behind."""
    import torch

    kept = {}

    def backward(i):
        i %= len(dYs)
        # autograd runs backward on forward's stream, and a CUDA graph may capture one stream only
        key = i, torch.cuda.current_stream().cuda_stream if dYs[i].is_cuda else 0
        if key not in kept:
            kept[key] = method.forward(i)
        return torch.autograd.grad(kept[key], method.leaves(i), dYs[i], retain_graph=True)

    def both(i):
        i %= len(dYs)
        y = method.forward(i)
        return y, *torch.autograd.grad(y, method.leaves(i), dYs[i])

    return {"forward": method.forward, "backward": backward, "both": both}


def factors_of(p: Problem, data: list[Tensors], kind: str) -> "list[tuple[torch.nn.Parameter, torch.nn.Parameter]]":
    import torch

    dtype = getattr(torch, p.dtype) if kind == "16bit" else torch.float32
    return [(torch.nn.Parameter(one.A.to(dtype)), torch.nn.Parameter(one.B.to(dtype))) for one in data]


def autocast(p: Problem, kind: str) -> contextlib.AbstractContextManager[Any]:
    import torch

    if kind == "fp32-autocast":
        return torch.autocast(torch.device(p.device).type, getattr(torch, p.dtype))
    return contextlib.nullcontext()
