"""One DoRA linear: the frozen linear, a LoRA of the same rank, PEFT's DoRA layer, and ``dora_linear``; and its passes alone.

Under dropout "lowrank-KIND" is PEFT's function, two GEMMs with the weight, and "lowrank-KIND-one-gemm" base_dropout=False.
"""

import torch

import lowrank
from lowrank.measure.layer import (
    SCALING,
    Method,
    Problem,
    Tensors,
    adapter_kinds,
    autocast,
    factors_of,
    frozen,
    lowrank_method,
    tensors,
)
from lowrank.ops import dora_eager, dropout, thin_eager
from lowrank.ops._choice import backend


def methods(p: Problem, data: list[Tensors]) -> tuple[dict[str, Method], dict[str, str]]:
    """({name: Method}, {name: why it is absent})."""
    by_name, absent = {"frozen": frozen(p, data)}, {}
    for kind in adapter_kinds(p):
        by_name[f"lora-{kind}"] = lowrank_method(p, data, kind)
        by_name[f"lowrank-{kind}"] = _ours(p, data, kind, True)
        if p.dropout:
            by_name[f"lowrank-{kind}-one-gemm"] = _ours(p, data, kind, False)
        try:
            by_name[f"peft-{kind}"] = _peft(p, data, kind)
        except ImportError as error:
            absent["peft"] = str(error)
    return by_name, absent


def _magnitudes(p: Problem, data: list[Tensors], factors) -> list[torch.nn.Parameter]:
    """Near the norms, in the factors' dtype, as after some training."""
    magnitudes = []
    for i, (one, (A, B)) in enumerate(zip(data, factors, strict=True)):
        norm = torch.ops.lowrank.dora_norm(one.W, A.detach(), SCALING * B.detach().float())
        noise = torch.randn(p.N, generator=torch.Generator().manual_seed(i)).to(norm)
        magnitudes.append(torch.nn.Parameter((norm * (1 + 0.05 * noise)).to(A.dtype)))
    return magnitudes


def _ours(p: Problem, data: list[Tensors], kind: str, base_dropout: bool) -> Method:
    factors = factors_of(p, data, kind)
    magnitudes = _magnitudes(p, data, factors)

    def forward(i):
        i %= p.sets
        with autocast(p, kind):
            return lowrank.dora_linear(
                data[i].x,
                data[i].W,
                *factors[i],
                magnitudes[i],
                SCALING,
                dropout_p=p.dropout,
                base_dropout=base_dropout,
            )

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets], magnitudes[i % p.sets]])


def _peft(p: Problem, data: list[Tensors], kind: str) -> Method:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    factors, layers = factors_of(p, data, kind), []
    magnitudes = _magnitudes(p, data, factors)
    config = LoraConfig(r=p.r, lora_alpha=SCALING * p.r, lora_dropout=p.dropout, init_lora_weights=False, use_dora=True)
    for one, (A, B), magnitude in zip(data, factors, magnitudes, strict=True):
        base = torch.nn.Linear(p.K, p.N, bias=False, device="meta")
        base.weight = torch.nn.Parameter(one.W, requires_grad=False)
        layer = Linear(base, "default", config, r=p.r, lora_alpha=SCALING * p.r).to(p.device)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
        layer.lora_magnitude_vector["default"].weight = magnitude
        layers.append(layer.train())

    def forward(i):
        with autocast(p, kind):
            return layers[i % p.sets](data[i % p.sets].x)

    return Method(forward, lambda i: [data[i % p.sets].x, *factors[i % p.sets], magnitudes[i % p.sets]])


def bytes_of(p: Problem, mode: str) -> int:
    """x, W twice (its norm is read before its product), v written and read, Y; then dY, v, W, x (for dA), dX; the thin side."""
    wide, thin = getattr(torch, p.dtype).itemsize, getattr(torch, p.thin_dtype).itemsize
    forward = (p.M * p.K + 2 * p.N * p.K + 3 * p.M * p.N) * wide + p.r * (p.K + p.N) * thin
    backward = (2 * p.M * p.K + p.N * p.K + 2 * p.M * p.N) * wide + 2 * p.r * (p.K + p.N) * thin
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def flops(p: Problem, mode: str) -> int:
    """One GEMM each way, the thin products, and W Aᵀ for the norm."""
    thin = 2 * p.M * p.r * (p.K + p.N)
    forward, backward = 2 * p.M * p.K * p.N + thin + 2 * p.N * p.K * p.r, 2 * p.M * p.K * p.N + 2 * thin
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


# The passes alone, beside a copy of as many bytes.


def pass_inputs(p: Problem) -> list[dict]:
    sets = []
    for one in tensors(p):
        A, B, x = one.A.to(getattr(torch, p.thin_dtype)), one.B.float(), one.x.detach()
        gain, seed = torch.rand(p.N, device=p.device), dropout.draw_seeds(1, x.device)
        (keep,) = thin_eager.shrink(x, [A], torch.float32, [0], [6554], seed)[1]
        sets.append(dict(x=x, W=one.W, A=A, B=B, dY=one.dY, v=one.dY.flip(0), gain=gain, keep=keep))
    return sets


_PASSES = {
    "dora_norm": lambda module, t: module.norm(t["W"], t["A"], t["B"]),
    "gain_dy": lambda module, t: module.gain_dy(t["dY"], t["gain"], t["v"], True, False),
    "drop": lambda module, t: module.drop(t["x"], t["keep"]),
}


def pass_bytes(name: str, p: Problem) -> int:
    size, thin = getattr(torch, p.dtype).itemsize, getattr(torch, p.thin_dtype).itemsize
    return {
        "dora_norm": p.N * p.K * size + p.r * p.K * thin + 8 * p.N * p.r,
        "gain_dy": 3 * p.M * p.N * size + 8 * p.N,
        "drop": 2 * p.M * p.K * size + 4 * p.M * -(-p.K // 32),
    }[name]


def pass_flops(name: str, p: Problem) -> int:
    return 2 * p.N * p.K * p.r if name == "dora_norm" else 0


def pass_calls(name: str, p: Problem, data: list[dict]) -> dict[str, dict]:
    modules = {"eager": dora_eager}
    if backend(torch.device(p.device))[0] == "triton":
        from lowrank.kernels import dora

        modules = {"triton": dora, **modules}
    copies = [torch.zeros(2, max(1, pass_bytes(name, p) // 2), dtype=torch.uint8, device=p.device) for _ in data]
    calls = {n: lambda i, module=module: _PASSES[name](module, data[i % p.sets]) for n, module in modules.items()}
    return {"": {**calls, "copy": lambda i: copies[i % p.sets][0].copy_(copies[i % p.sets][1])}}
