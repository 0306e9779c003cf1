"""What stands between the two products of an expert, and its gradient, for the activations that are known by name.

    gated    h = f(gate) up            gate over up in G's columns, or one beside the other (interleaved)
    clamped  h = (clamp(up) + 1) g sigmoid(alpha g), g = min(gate, limit)          gpt-oss
    plain    h = f(G)

f: silu, gelu, gelu_tanh, relu2 (squared).  In G's own dtype, rounded where transformers rounds; clamped in fp32, rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PLAIN = frozenset(("silu", "gelu", "gelu_tanh", "relu2"))
_ops = torch.ops.aten


class Activation(NamedTuple):
    """alpha, limit: of "clamped" alone."""

    name: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0

    def width(self, columns: int) -> int:
        """Columns of h for so many of G's."""
        return columns // 2 if self.gated else columns


def forward(G: Tensor, act: Activation) -> Tensor:
    """h [S,I] of G [S,2I], or of [S,I] without a gate."""
    if not act.gated:
        return _f(G, act.name)
    gate, up = _halves(G, act)
    if act.name != "clamped":
        return _f(gate, act.name).mul_(up)
    gate, up, sigmoid = _clamped(gate, up, act)
    return (up + 1).mul_(gate).mul_(sigmoid).to(G.dtype)


def backward(G: Tensor, dh: Tensor, act: Activation) -> Tensor:
    """dG."""
    if not act.gated:
        return _df(dh, G, act.name)
    dG = torch.empty_like(G)
    (gate, up), (dgate, dup) = _halves(G, act), _halves(dG, act)
    if act.name != "clamped":
        torch.mul(dh, _f(gate, act.name), out=dup)
        dgate.copy_(_df(dh * up, gate, act.name))
        return dG
    inside = gate <= act.limit, (up >= -act.limit) & (up <= act.limit)
    gate, up, sigmoid = _clamped(gate, up, act)
    dup.copy_(torch.where(inside[1], dh * gate * sigmoid, 0))
    slope = sigmoid * (1 + act.alpha * gate * (1 - sigmoid))
    dgate.copy_(torch.where(inside[0], dh * (up + 1) * slope, 0))
    return dG


def differentiable(G: Tensor, act: Activation) -> Tensor:
    """:func:`forward` in operations that autograd follows to any order."""
    if not act.gated:
        return _f(G, act.name)
    gate, up = _halves(G, act)
    if act.name != "clamped":
        return _f(gate, act.name) * up
    gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * act.alpha))


def _halves(t: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    if act.interleaved:
        return t[..., ::2], t[..., 1::2]
    gate, up = t.chunk(2, -1)
    return gate, up


def _clamped(gate: Tensor, up: Tensor, act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up within their limits, and sigmoid(alpha gate), in fp32 or fp64."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    gate, up = gate.to(dtype).clamp(max=act.limit), up.to(dtype).clamp(-act.limit, act.limit)
    return gate, up, torch.sigmoid(act.alpha * gate)


def _f(t: Tensor, name: str) -> Tensor:
    if name == "relu2":
        return torch.relu(t).square()
    if name == "silu":
        return torch.nn.functional.silu(t)
    return torch.nn.functional.gelu(t, approximate="tanh" if name == "gelu_tanh" else "none")


def _df(dh: Tensor, t: Tensor, name: str) -> Tensor:
    if name == "relu2":
        return dh * (2 * torch.relu(t))
    if name == "silu":
        return _ops.silu_backward(dh, t)
    return _ops.gelu_backward(dh, t, approximate="tanh" if name == "gelu_tanh" else "none")
