"""Log-probabilities from a frozen vocabulary head: logp of every row ("forward", no graph), and Σ logp with dh ("both").

A Problem's M is T rows, K the hidden size H, N the vocabulary V, r the rank of the head's LoRA where there is one.
gemms                 the GEMMs nobody can do without, in row chunks of lowrank's: one forward, two more backward
lowrank               logp and entropy; -lora: with one on the head, trained; -logits: by kernels/logits.py, not cuBLAS
plain, plain-chunked  PyTorch: linear, fp32 log_softmax, logp and entropy; the second checkpointed by chunks of rows
trl                   ChunkedLogProbFunction of an installed TRL, logp and entropy
*-ce                  linear cross entropies of lowrank, torch (its own choice of chunks), Liger and cut-cross-entropy: Σ logp
                      alone, no entropy; torch's and Liger's make the gradient in the forward pass of "both", cut's, by its
                      default, leaves small gradients out
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.measure.layer import SCALING, Problem
from lowrank.ops._choice import backend
from lowrank.ops.head import CHUNK_BYTES


class Set(NamedTuple):
    h: torch.Tensor
    W: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    targets: torch.Tensor


def inputs(p: Problem) -> list[Set]:
    dtype, sets = getattr(torch, p.dtype), []
    for _ in range(p.sets):
        h, W, A, B = (
            torch.randn(shape, device=p.device).mul_(scale).to(dtype).requires_grad_(name != "W")
            for name, shape, scale in (
                ("h", (p.M, p.K), 1.0),
                ("W", (p.N, p.K), 3 * p.K**-0.5),
                ("A", (p.r, p.K), p.K**-0.5),
                ("B", (p.N, p.r), 0.1),
            )
        )
        sets.append(Set(h, W, A, B, torch.randint(p.N, (p.M,), device=p.device)))
    return sets


def methods(p: Problem) -> tuple[dict[str, Callable[[Set], tuple]], dict[str, str]]:
    """({name: f(set) -> (logp [T] or their sum, entropy if there is one)}, {name: why it is absent})."""
    by_name = {
        "lowrank": lambda s: lowrank.linear_logprob(s.h, s.W, s.targets),
        "lowrank-lora": lambda s: lowrank.linear_logprob(s.h, s.W, s.targets, lora=(s.A, s.B, SCALING)),
        "lowrank-ce": lambda s: (-lowrank.linear_cross_entropy(s.h, s.W, s.targets, reduction="sum"),),
        "plain": lambda s: _plain(s.h, s.W, s.targets),
        "plain-chunked": lambda s: _chunked(s, rows_of(p)),
    }
    if backend(torch.device(p.device))[0] == "triton":
        for name in ("", "-lora"):
            by_name[f"lowrank{name}-logits"] = lambda s, lora=bool(name): lowrank.linear_logprob(
                s.h, s.W, s.targets, lora=(s.A, s.B, SCALING) if lora else None, batch_invariant=True
            )
    absent = {}
    for name, make in {"trl": _trl, "torch-ce": _torch_ce, "liger-ce": _liger, "cut-ce": _cut}.items():
        try:
            by_name[name] = make(p)
        except Exception as error:  # other people's packages raise what they like on a machine they do not know
            absent[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return by_name, absent


def calls(p: Problem, data: list[Set]) -> tuple[dict, dict[str, str]]:
    functions, absent = methods(p)

    def forward(f):
        def call(i):
            with torch.no_grad():
                return f(data[i % p.sets])

        return call

    def both(f, lora):
        def call(i):
            s = data[i % p.sets]
            logp = f(s)[0]
            return logp.detach(), *torch.autograd.grad(logp.sum(), [s.h, s.A, s.B] if lora else [s.h])

        return call

    return {
        "forward": {
            "gemms": lambda i: _gemms(data[i % p.sets], rows_of(p), False),
            **{name: forward(f) for name, f in functions.items()},
        },
        "both": {
            "gemms": lambda i: _gemms(data[i % p.sets], rows_of(p), True),
            **{name: both(f, "lora" in name) for name, f in functions.items()},
        },
    }, absent


def rows_of(p: Problem) -> int:
    """Of a chunk, on a GPU: fp32 logits and their gradient."""
    return max(1, CHUNK_BYTES // ((4 + getattr(torch, p.dtype).itemsize) * p.N))


@torch.no_grad()
def _gemms(s: Set, rows: int, backward: bool) -> torch.Tensor:
    out = torch.empty_like(s.h)
    for h, o in zip(s.h.split(rows), out.split(rows), strict=True):
        z = h @ s.W.mT
        if backward:
            torch.mm(h, s.W.mT, out=z)
            torch.mm(z, s.W, out=o)
    return out if backward else z


def _plain(h, W, targets):
    lp = linear(h, W).float().log_softmax(-1)
    return lp.gather(-1, targets[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


def _chunked(s: Set, rows: int):
    parts = [
        checkpoint(_plain, h, s.W, y, use_reentrant=False)
        for h, y in zip(s.h.split(rows), s.targets.split(rows), strict=True)
    ]
    return tuple(torch.cat(of) for of in zip(*parts, strict=True))


def _trl(p: Problem):
    f = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    chunk = min(32768, p.N)  # of the vocabulary: what its trainers take
    return lambda s: f.apply(s.h, s.W, None, s.targets, 1.0, chunk, None, 1.0, ("entropy",))[:2]


def _torch_ce(p: Problem):
    f, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda s: (-f(s.h, s.W, s.targets, reduction="sum", options=options),)


def _liger(p: Problem):
    f = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda s: (-f(s.h, s.W, s.targets, reduction="sum"),)


def _cut(p: Problem):
    f = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda s: (-f(s.h, s.W, s.targets, reduction="sum"),)


def bytes_of(p: Problem, mode: str) -> int:
    """h, W, targets, two fp32 results; backward the gradient of logp, h and W again, dh."""
    size = getattr(torch, p.dtype).itemsize
    forward = (p.M * p.K + p.N * p.K) * size + 8 * p.M + 8 * p.M
    return forward if mode == "forward" else forward + 4 * p.M + (2 * p.M * p.K + p.N * p.K) * size


def flops(p: Problem, mode: str) -> int:
    """z once; z again and dz W."""
    return (2 if mode == "forward" else 6) * p.M * p.K * p.N
