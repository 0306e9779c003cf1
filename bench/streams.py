"""Streams over whole weights: N x K elements each.  What a pass reads and writes is its floor; "copy" moves as many bytes."""

import torch

import lowrank
from lowrank import analysis, bits, delta, ops
from lowrank.measure.layer import Problem

ACTIVE = 0.2  # share of elements that a mask lets train
CHANGED = 0.01  # share of elements that differ between two checkpoints, or are asked for

# AdamW: bytes per element beside p (read and written) and g, by setting

ADAMW = {
    "": (16.0, {}),
    "stochastic": (16.0, dict(stochastic_rounding=True)),
    "master": (24.0, dict(master_weights=True)),
    "changes": (16.25, dict(track_changes=True)),
    "masked": (16 * ACTIVE + 0.125, {}),
}


def adamw_inputs(p: Problem) -> list[dict]:
    dtype = getattr(torch, p.dtype)
    return [
        dict(p=torch.randn(p.N * p.K, device=p.device).to(dtype), g=torch.randn(p.N * p.K, device=p.device).to(dtype))
        for _ in range(p.sets)
    ]


def adamw_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """torch-fused keeps its moments in the parameters' dtype: in 16 bits it reads and writes 8 bytes less."""
    modes = {
        mode: setting for mode, setting in ADAMW.items() if p.dtype != "float32" or mode not in ("stochastic", "master")
    }
    return {mode: _adamw(p, data, mode, options) for mode, (_, options) in modes.items()}


def _adamw(p: Problem, data: list[dict], mode: str, options: dict) -> dict:
    lowrank_optimizers, torch_optimizers, masks = [], [], []
    for one in data:
        pair = [torch.nn.Parameter(one["p"].clone()) for _ in range(2)]
        for parameter in pair:
            parameter.grad = one["g"].clone()
        active = torch.rand(p.N * p.K, device=p.device) < ACTIVE
        mask_of = {pair[0]: bits.pack(active)} if mode == "masked" else None
        lowrank_optimizers.append(lowrank.optim.AdamW([pair[0]], masks=mask_of, nonfinite="propagate", **options))
        torch_optimizers.append(torch.optim.AdamW([pair[1]], fused=True))
        masks.append((pair[1].grad, active) if mode == "masked" else None)

    def fused(i):
        if masks[i % p.sets]:
            grad, active = masks[i % p.sets]
            grad.mul_(active)
        return torch_optimizers[i % p.sets].step()

    calls = {"lowrank": lambda i: lowrank_optimizers[i % p.sets].step(), "torch-fused": fused}
    return calls | copies(p, adamw_bytes(p, mode))


def adamw_bytes(p: Problem, mode: str) -> int:
    return int(p.N * p.K * (3 * itemsize(p) + ADAMW[mode][0]))


def copies(p: Problem, count: int) -> dict:
    """A copy that reads and writes ``count`` bytes together."""
    pairs = [torch.zeros(2, max(1, count // 2), dtype=torch.uint8, device=p.device) for _ in range(p.sets)]
    return {"copy": lambda i: pairs[i % p.sets][0].copy_(pairs[i % p.sets][1])}


# Two checkpoints: how much differs, and where most


def pair_inputs(p: Problem) -> list[dict]:
    """old, and new of which one element in a hundred moved by about a unit of its spacing, as RL's steps leave them."""
    dtype = getattr(torch, p.dtype)
    pairs = []
    for _ in range(p.sets):
        old = torch.randn(p.N, p.K, device=p.device).mul_(0.02).to(dtype)
        moved = torch.rand(p.N, p.K, device=p.device) < CHANGED
        new = torch.where(moved, old * (1 + 2 * torch.finfo(dtype).eps), old)
        pairs.append(dict(old=old, new=new))
    return pairs


def diff_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """torch: the bits that differ and isclose at one tolerance, as the published analysis does."""

    def in_torch(i):
        one = data[i % p.sets]
        return (
            (bits.bitcast(one["old"]) != bits.bitcast(one["new"])).sum().item(),
            torch.isclose(one["old"], one["new"], rtol=0, atol=1e-5).sum().item(),
            (one["old"].float() - one["new"].float()).norm().item(),
        )

    calls = {
        "lowrank": lambda i: analysis.diff_stats(data[i % p.sets]["old"], data[i % p.sets]["new"]),
        "torch": in_torch,
    }
    return {"": calls | copies(p, pair_bytes(p, ""))}


def topk_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """torch.topk breaks ties as it likes; ours the same way everywhere."""
    k = round(CHANGED * p.N * p.K)

    def in_torch(i):
        score = (data[i % p.sets]["new"].float() - data[i % p.sets]["old"].float()).abs_().view(-1)
        return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, score.topk(k, sorted=False).indices, True)

    calls = {
        "lowrank": lambda i: analysis.topk_mask((data[i % p.sets]["old"], data[i % p.sets]["new"]), CHANGED),
        "torch": in_torch,
    }
    return {"": calls | copies(p, topk_bytes(p, ""))}


def pair_bytes(p: Problem, mode: str) -> int:
    return 2 * p.N * p.K * itemsize(p)


def topk_bytes(p: Problem, mode: str) -> int:
    """Three passes for a threshold, one that writes the mask; a tie takes more."""
    return int(p.N * p.K * (8 * itemsize(p) + 0.125))


# Sparse deltas


def delta_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """torch: positions as int32 beside values, which is what weight sync sends elsewhere; 6 bytes an element in 16 bits."""
    maps = [ops.delta.map_changes(one["old"], one["new"]) for one in data]
    blobs = [delta.encode({"w": one["new"]}, old={"w": one["old"]}, fingerprint=False) for one in data]
    positions = [(bits.bitcast(one["old"]) != bits.bitcast(one["new"])).view(-1).nonzero()[:, 0] for one in data]
    values = [one["new"].view(-1)[at] for one, at in zip(data, positions, strict=True)]
    targets = [one["old"].clone() for one in data]

    def byte_diff(i):
        one = data[i % p.sets]
        at = (bits.bitcast(one["old"]) != bits.bitcast(one["new"])).view(-1).nonzero()[:, 0]
        return at.int(), one["new"].view(-1)[at]

    calls = {
        "encode-map": {
            "lowrank": lambda i: delta.encode(
                {"w": data[i % p.sets]["new"]}, changes={"w": maps[i % p.sets]}, fingerprint=False
            )
        },
        "encode-old": {
            "lowrank": lambda i: delta.encode(
                {"w": data[i % p.sets]["new"]}, old={"w": data[i % p.sets]["old"]}, fingerprint=False
            ),
            "torch": byte_diff,
        },
        "apply": {
            "lowrank": lambda i: delta.apply_({"w": targets[i % p.sets]}, blobs[i % p.sets]),
            "torch": lambda i: targets[i % p.sets].view(-1).index_copy_(0, positions[i % p.sets], values[i % p.sets]),
        },
    }
    return {mode: of | copies(p, delta_bytes(p, mode)) for mode, of in calls.items()}


def delta_bytes(p: Problem, mode: str) -> int:
    """What was encoded, three bytes a changed element in 16 bits and two a block, and what it is made from or goes into:
    of a tensor whose changed elements alone are touched, the sectors of 32 bytes that hold one."""
    n, size = p.N * p.K, itemsize(p)
    encoded = n * (CHANGED * (1 + size) + 2 / 1024)
    touched = n * size * (1 - (1 - CHANGED) ** (32 // size))
    return int(encoded + {"encode-map": n / 8 + touched, "encode-old": 2 * n * size, "apply": 2 * touched}[mode])


# A rank update written into the weight, and out again


def fold_inputs(p: Problem) -> list[dict]:
    dtype = getattr(torch, p.dtype)
    return [
        dict(
            W=torch.randn(p.N, p.K, device=p.device).mul_(0.02).to(dtype),
            A=torch.randn(p.r, p.K, device=p.device).to(dtype),
            B=torch.randn(p.N, p.r, device=p.device).mul_(2e-5 * p.r**-0.5).to(dtype),  # an update of 1e-3 of W
        )
        for _ in range(p.sets)
    ]


def fold_calls(p: Problem, data: list[dict]) -> dict[str, dict]:
    """peft: its merge and unmerge, weight += scaling * B @ A and weight -= the same; not to the bit.  A call is both."""

    def ours(i):
        one = data[i % p.sets]
        receipt = lowrank.fold_(one["W"], one["A"], 2.0, one["B"])
        lowrank.unfold_(one["W"], one["A"], 2.0, one["B"], receipt)

    def peft(i):
        one = data[i % p.sets]
        one["W"] += 2.0 * (one["B"] @ one["A"])
        one["W"] -= 2.0 * (one["B"] @ one["A"])

    return {"both": {"lowrank": ours, "peft": peft} | copies(p, fold_bytes(p, ""))}


def fold_bytes(p: Problem, mode: str) -> int:
    return 4 * p.N * p.K * itemsize(p)


def itemsize(p: Problem) -> int:
    return getattr(torch, p.dtype).itemsize
