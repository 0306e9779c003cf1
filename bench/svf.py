"""One SVF linear: the frozen linear, the reference algorithm in plain PyTorch, and each mode of ``svf_linear``.

A Problem's r is the k of the top-k rows ("lowrank-delta"); the others scale every singular value.  Factors are random
matrices of their sizes: no time depends on their values.
"""

from typing import NamedTuple

import torch

import lowrank
from lowrank.measure.layer import Method, Problem
from lowrank.ops import svf_eager
from lowrank.ops._choice import backend


class Set(NamedTuple):
    x: torch.Tensor
    W: torch.Tensor
    full: lowrank.SVDFactors
    top: lowrank.SVDFactors
    z: torch.Tensor
    dY: torch.Tensor


def inputs(p: Problem) -> list[Set]:
    dtype, n, sets = getattr(torch, p.dtype), min(p.K, p.N), []
    for _ in range(p.sets):
        x, W, U, Vh, dY = (
            torch.randn(shape, device=p.device).mul_(shape[1] ** -0.5).to(dtype)
            for shape in ((p.M, p.K), (p.N, p.K), (p.N, n), (n, p.K), (p.M, p.N))
        )
        S, z = torch.rand(n, device=p.device).sort(descending=True).values, torch.rand(n, device=p.device) + 0.5
        top = lowrank.SVDFactors(U[:, : p.r].contiguous(), S[: p.r], Vh[: p.r])
        sets.append(Set(x.requires_grad_(), W, lowrank.SVDFactors(U, S, Vh), top, z.requires_grad_(), dY))
    return sets


def methods(p: Problem, data: list[Set]) -> dict[str, Method]:
    def method(run, of_z=lambda one: [one.z]):
        return Method(lambda i: run(data[i % p.sets]), lambda i: [data[i % p.sets].x, *of_z(data[i % p.sets])])

    tops = {id(one): one.z.detach()[: p.r].clone().requires_grad_() for one in data}
    layers = {id(one): _layer(one) for one in data}
    return {
        "frozen": method(lambda s: torch.nn.functional.linear(s.x, s.W), lambda s: []),
        "reference": method(_reference),
        "lowrank-delta": method(
            lambda s: lowrank.svf_linear(s.x, s.W, s.top, tops[id(s)], mode="delta"), lambda s: [tops[id(s)]]
        ),
        "lowrank-delta-full": method(lambda s: lowrank.svf_linear(s.x, s.W, s.full, s.z, mode="delta")),
        "lowrank-activation": method(lambda s: lowrank.svf_linear(s.x, None, s.full, s.z, mode="activation")),
        "lowrank-merged": method(lambda s: lowrank.svf_linear(s.x, s.W, s.full, s.z, mode="merged")),
        "lowrank-merged-layer": method(
            lambda s: layers[id(s)](s.x), lambda s: [layers[id(s)].z["default"]]
        ),  # W' once per step, dW added up in fp32 and projected
    }


def _layer(one: Set) -> lowrank.nn.SVFLinear:
    base = torch.nn.Linear(*one.W.shape[::-1], bias=False, device="meta")
    base.weight = torch.nn.Parameter(one.W, requires_grad=False)
    layer = lowrank.nn.SVFLinear.from_linear(base, factors=one.full, mode="merged")
    with torch.no_grad():
        layer.z["default"].copy_(one.z)
    return layer


def _reference(s: Set) -> torch.Tensor:
    """SakanaAI/self-adaptive-llms' algorithm, written out: compose W' in the weight's dtype, let autograd do the rest."""
    U, S, Vh = s.full
    m = (S * s.z).to(U.dtype)
    W = (U @ torch.diag_embed(m) @ Vh) * (S.sum() / (S * s.z).sum()).to(U.dtype)
    return torch.nn.functional.linear(s.x, W)


def bytes_of(p: Problem, mode: str) -> int:
    """The delta form's: x, W, Y, then dY, W, dX, and the factors once per pass."""
    size = getattr(torch, p.dtype).itemsize
    one = (p.M * p.K + p.N * p.K + p.M * p.N + p.r * (p.K + p.N + p.M)) * size
    return {"forward": one, "backward": one, "both": 2 * one}[mode]


def flops(p: Problem, mode: str) -> int:
    one = 2 * p.M * p.K * p.N + 2 * p.M * p.r * (p.K + p.N)
    return {"forward": one, "backward": one, "both": 2 * one}[mode]


def dy_inputs(p: Problem) -> list[dict]:
    """dY [M, N], B [N, k], S [M, k], scales [k], or [4, k] beside a mix [M, 4]."""
    thin, sets = getattr(torch, p.thin_dtype), []
    for one in inputs(p):
        S = torch.randn(p.M, p.r, device=p.device).to(thin)
        mixed = dict(scales=torch.rand(4, p.r, device=p.device), mix=torch.rand(p.M, 4, device=p.device))
        sets.append(dict(dY=one.dY, B=one.top.U.to(thin), S=S, scales=one.top.S.clone(), mixed=mixed))
    return sets


def dy_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """The backward's pass over dY, and a copy of as many bytes."""
    modules = {"eager": svf_eager}
    if backend(torch.device(p.device))[0] == "triton":
        from lowrank.kernels import svf

        modules = {"triton": svf, **modules}
    copies = [torch.zeros(2, max(1, dy_bytes(p) // 2), dtype=torch.uint8, device=p.device) for _ in data]
    copy = {"copy": lambda i: copies[i % p.sets][0].copy_(copies[i % p.sets][1])}

    def run(module, t, mixed):
        scales, mix = (t["mixed"]["scales"], t["mixed"]["mix"]) if mixed else (t["scales"], None)
        return module.dy_pass(t["dY"], t["B"], scales, mix, t["S"], True, t["B"].dtype)

    return {
        mode: {
            **{name: lambda i, m=m, mixed=mixed: run(m, data[i % p.sets], mixed) for name, m in modules.items()},
            **copy,
        }
        for mode, mixed in (("", False), ("4 experts", True))
    }


def dy_bytes(p: Problem) -> int:
    """dY, B, S read, dS written."""
    return p.M * p.N * getattr(torch, p.dtype).itemsize + p.r * (p.N + 2 * p.M) * getattr(torch, p.thin_dtype).itemsize


def materialize_inputs(p: Problem) -> list[dict]:
    dtype = getattr(torch, p.dtype)
    return [
        dict(W=s.W, A=s.top.Vh, m=s.top.S.clone(), B=s.top.U, out=torch.empty_like(s.W, dtype=dtype)) for s in inputs(p)
    ]


def materialize_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """W' written to its own memory: lowrank, PyTorch in fp32 with one rounding, and a copy of W."""

    def plain(t):
        return t["out"].copy_(t["W"].float() + (t["B"].float() * t["m"]) @ t["A"].float())

    return {
        "": {
            "lowrank": lambda i: lowrank.materialize(**_named(data[i % p.sets])),
            "eager": lambda i: plain(data[i % p.sets]),
            "copy": lambda i: data[i % p.sets]["out"].copy_(data[i % p.sets]["W"]),
        }
    }


def _named(t: dict) -> dict:
    return dict(weight=t["W"], A=t["A"], m=t["m"], B=t["B"], out=t["out"])
