"""What is timed: one entry per op, with its inputs, the bytes and FLOPs it cannot do without, and who does it.

A benchmark's ``calls`` gives {pass: {provider: call(i)}}; providers of one pass are timed in paired rounds, ``baseline`` is
what their ratio is taken over.  ``bytes`` and ``flops`` are lower bounds of one pass: each tensor read or written once.  The
floor is the larger of bytes / this device's copy rate and FLOPs / its matrix rate, both measured in the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import dora
import experts
import llama_layer
import logprob
import peers
import streams
import svf
import torch

from lowrank.measure.layer import Problem, passes, tensors
from lowrank.ops import dropout, thin_eager
from lowrank.ops._choice import backend, forced

Calls = dict[str, dict[str, Callable[[int], object]]]


@dataclass(frozen=True)
class Benchmark:
    name: str
    make_inputs: Callable[[Problem], list]  # one entry per rotated set
    calls: Callable[[Problem, list, "Options"], Calls]
    bytes: Callable[[Problem, str], int]
    flops: Callable[[Problem, str], int]
    baseline: str
    tests: tuple[str, ...] = ()  # what must be green before a speed is printed
    dropouts: tuple[float, ...] = (0.0,)
    graphs: bool = True  # time CUDA graphs: the device alone, without the host
    rows: tuple[int, ...] = ()  # M, where the benchmark is about M


@dataclass
class Options:
    """``peers``: names for peers.methods; ``absent`` is filled with {peer: why}."""

    peers: tuple[str, ...] = peers.DEFAULT
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, absent: dict[str, str]) -> None:
        for name, why in absent.items():
            if why not in (before := self.absent.get(name, "")):
                self.absent[name] = f"{before}; {why}" if before else why


def floor_us(benchmark: Benchmark, p: Problem, mode: str, copy_rate: float, matmul_rate: float) -> float:
    """Microseconds; rates in bytes/s and FLOP/s."""
    return 1e6 * max(benchmark.bytes(p, mode) / copy_rate, benchmark.flops(p, mode) / matmul_rate)


def _sizes(p: Problem) -> tuple[int, int]:
    return getattr(torch, p.dtype).itemsize, getattr(torch, p.thin_dtype).itemsize


def _keep_bytes(p: Problem) -> int:
    return 4 * p.M * -(-p.K // 32) if p.dropout else 0


# addmm: is adding to C in place as fast as overwriting it?


def _addmm_inputs(p):
    new = dict(device=p.device)
    dtype = getattr(torch, p.dtype)
    shapes = ((p.M, p.K), (p.N, p.K), (p.M, p.N), (p.M, p.N), (p.M, p.K))  # x, W, Y, dY, dX
    return [[torch.randn(shape, **new).mul_(shape[1] ** -0.5).to(dtype) for shape in shapes] for _ in range(p.sets)]


def _addmm_calls(p, inputs, options) -> Calls:
    def call(function):
        return lambda i: function(*inputs[i % p.sets])

    return {
        "forward": {
            "mm": call(lambda x, W, Y, dY, dX: torch.mm(x, W.mT, out=Y)),
            "addmm_": call(lambda x, W, Y, dY, dX: Y.addmm_(x, W.mT)),
        },
        "dX": {
            "mm": call(lambda x, W, Y, dY, dX: torch.mm(dY, W, out=dX)),
            "addmm_": call(lambda x, W, Y, dY, dX: dX.addmm_(dY, W)),
        },
    }


# The four thin products: the kernel where it can run, PyTorch (ops/thin_eager.py), and a copy of as many bytes.


def _thin_inputs(p):
    """Per set: x [M, K], dY [M, N], A [r, K], B [N, r], S and dS [M, r], keep bits, seeds, dX."""
    sets = []
    for one in tensors(p):
        thin, x = getattr(torch, p.thin_dtype), one.x.detach()
        A, B = one.A.to(thin), one.B.to(thin)
        S, dS = (torch.randn(p.M, p.r, device=p.device).to(thin) for _ in range(2))
        seeds, cuts = dropout.draw_seeds(1, x.device), [dropout.threshold(p.dropout)] if p.dropout else []
        keeps = thin_eager.shrink(x, [A], thin, [0], cuts, seeds)[1] if p.dropout else []
        sets.append(
            dict(x=x, dY=one.dY, A=A, B=B, S=S, dS=dS, keeps=keeps, seeds=seeds, cuts=cuts, dX=torch.empty_like(x))
        )
    return sets


def _thin_calls(run):
    """``run(module, t, p)``: one call of the product by kernels.thin or ops.thin_eager."""

    def calls(p, inputs, options) -> Calls:
        modules = {"eager": thin_eager}
        if backend(torch.device(p.device))[0] == "triton":
            from lowrank.kernels import thin

            modules = {"triton": thin, **modules}
        products = {
            name: lambda i, module=module: run(module, inputs[i % p.sets], p) for name, module in modules.items()
        }
        size = max(1, _THIN_BYTES[run.__name__.strip("_")](p) // 2)
        copies = [torch.zeros(2, size, dtype=torch.uint8, device=p.device) for _ in inputs]
        return {"": {**products, "copy": lambda i: copies[i % p.sets][0].copy_(copies[i % p.sets][1])}}

    return calls


def _shrink(module, t, p):
    return module.shrink(t["x"], [t["A"]], t["A"].dtype, [0 if p.dropout else -1], t["cuts"], t["seeds"])


def _expand(module, t, p):
    return module.expand(t["S"], [t["B"]], [2.0], [None], None, t["x"].dtype)


def _dy_pass(module, t, p):
    return module.dy_pass(t["dY"], [t["B"]], [2.0], [None], t["S"], [True], True, t["B"].dtype)


def _x_pass(module, t, p):
    masks = [0 if p.dropout else -1]
    return module.x_pass(t["x"], [t["dS"]], [t["A"]], [True], t["dX"], masks, t["keeps"]), t["dX"]


def _thin_bytes(wide, thin, keep):
    """Bytes from ``wide(p)`` elements of activations, ``thin(p)`` of the thin side, and keep bits."""
    return lambda p: wide(p) * _sizes(p)[0] + thin(p) * _sizes(p)[1] + (_keep_bytes(p) if keep else 0)


_THIN_BYTES = {
    "shrink": _thin_bytes(lambda p: p.M * p.K, lambda p: p.r * (p.K + p.M), True),
    "expand": _thin_bytes(lambda p: p.M * p.N, lambda p: p.r * (p.N + p.M), False),
    "dy_pass": _thin_bytes(lambda p: p.M * p.N, lambda p: 2 * p.r * (p.N + p.M), False),
    "x_pass": _thin_bytes(lambda p: 2 * p.M * p.K, lambda p: p.r * (2 * p.K + p.M), True),
}
_THIN_FLOPS = {
    "shrink": lambda p: 2 * p.M * p.K * p.r,
    "expand": lambda p: 2 * p.M * p.N * p.r,
    "dy_pass": lambda p: 4 * p.M * p.N * p.r,
    "x_pass": lambda p: 4 * p.M * p.K * p.r,
}


def _thin(name, run, dropouts=(0.0,)) -> Benchmark:
    return Benchmark(
        name,
        _thin_inputs,
        _thin_calls(run),
        lambda p, mode: _THIN_BYTES[name](p),
        lambda p, mode: _THIN_FLOPS[name](p),
        baseline="copy",
        tests=(f"tests/kernels/test_{name}.py", "tests/ops/test_dropout.py", "tests/ops/test_lora.py"),
        dropouts=dropouts,
    )


# The whole op.


def _linear_calls(p, inputs, options) -> Calls:
    methods, absent = peers.methods(p, inputs, options.peers)
    options.add(absent)
    return _by_pass(methods, [one.dY for one in inputs])


def _by_pass(methods, dYs) -> Calls:
    split = {name: passes(method, dYs) for name, method in methods.items()}
    return {mode: {name: calls[mode] for name, calls in split.items()} for mode in ("forward", "backward", "both")}


def _linear_bytes(p: Problem, mode: str) -> int:
    """x, W, Y; then dY, W, x (for dA), dX; and the thin side once per pass."""
    wide, thin = _sizes(p)
    forward = (p.M * p.K + p.N * p.K + p.M * p.N) * wide + p.r * (p.K + p.N) * thin
    backward = (2 * p.M * p.K + p.N * p.K + p.M * p.N) * wide + 2 * p.r * (p.K + p.N) * thin
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def _linear_flops(p: Problem, mode: str) -> int:
    thin = 2 * p.M * p.r * (p.K + p.N)
    forward, backward = 2 * p.M * p.K * p.N + thin, 2 * p.M * p.K * p.N + 2 * thin
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


# The crossover: from which M on do kernels pay on this host and device?  Called one by one, as training calls them.


def _small_calls(p, inputs, options) -> Calls:
    device = torch.device(p.device)
    methods, absent = peers.methods(p, inputs, ("frozen", "peft"))
    options.add(absent)
    kind = "fp32" if p.dtype == "float32" else "16bit"
    calls = _by_pass(
        {name: m for name, m in methods.items() if name in ("frozen", f"peft-{kind}")}, [t.dY for t in inputs]
    )
    ours = peers.methods(p, inputs, ("lowrank",))[0][f"lowrank-{kind}"]
    forced = ["eager", *(["triton"] if backend(device)[0] == "triton" else [])]
    for name in forced:
        for mode, call in passes(ours, [t.dY for t in inputs]).items():
            calls[mode][f"lowrank-{name}"] = _forced(name, call)
    return {mode: calls[mode] for mode in ("forward", "both")}


def _forced(name, call):
    def run(i):
        with forced(name):
            return call(i)

    return run


# One decoder layer of Llama: its seven linears among attention, norms and activation.


def _llama_calls(p, inputs, options) -> Calls:
    methods, absent = llama_layer.methods(p, inputs)
    options.add(absent)
    return _by_pass(methods, [t.dY for t in inputs])


# A mixture of experts.


def _experts(name: str, count: int, layers: int = 1) -> Benchmark:
    def calls(p, inputs, options) -> Calls:
        methods, absent = experts.methods(p, inputs)
        options.add(absent)
        return _by_pass(methods, [one.dY for one in inputs])

    make = experts.inputs if layers == 1 else experts.model_inputs
    return Benchmark(
        name,
        lambda p: make(p, count),
        calls,
        lambda p, mode: experts.bytes_of(p, mode, count, layers),
        lambda p, mode: experts.flops(p, mode, count, layers),
        "frozen",
        EXPERTS,
    )


# SVF.


def _svf_calls(p, inputs, options) -> Calls:
    return _by_pass(svf.methods(p, inputs), [one.dY for one in inputs])


def _stream(name, inputs, calls, bytes_of, *tests) -> Benchmark:
    return Benchmark(
        name, inputs, lambda p, data, options: calls(p, data), bytes_of, lambda p, mode: 0, "copy", tests, graphs=False
    )


# DoRA.


def _dora_calls(p, inputs, options) -> Calls:
    methods, absent = dora.methods(p, inputs)
    options.add(absent)
    return _by_pass(methods, [one.dY for one in inputs])


def _dora_pass(name) -> Benchmark:
    return Benchmark(
        name,
        dora.pass_inputs,
        lambda p, data, options: dora.pass_calls(name, p, data),
        lambda p, mode: dora.pass_bytes(name, p),
        lambda p, mode: dora.pass_flops(name, p),
        "copy",
        DORA,
    )


# A vocabulary head.


def _logprob_calls(p, inputs, options) -> Calls:
    calls, absent = logprob.calls(p, inputs)
    options.add(absent)
    return calls


OPS = ("tests/ops/test_dropout.py", "tests/ops/test_lora.py", "tests/ops/test_gpu.py")
SVF = (
    "tests/ops/test_svf.py",
    "tests/nn/test_svf.py",
    "tests/kernels/test_svf_dy.py",
    "tests/kernels/test_svf_scale.py",
)
DORA = ("tests/ops/test_dora.py", *(f"tests/kernels/test_{name}.py" for name in ("dora_norm", "gain_dy", "drop")))
HEAD = (
    "tests/ops/test_logprob.py",
    "tests/ops/test_cross_entropy.py",
    "tests/kernels/test_logprob.py",
    "tests/kernels/test_logits.py",
)
EXPERTS = ("tests/ops/test_experts.py", "tests/ops/test_experts_layer.py", "tests/integrations/test_experts.py")
KERNELS = tuple(f"tests/kernels/test_{name}.py" for name in _THIN_BYTES)


def _addmm_bytes(p: Problem, mode: str) -> int:
    return (p.M * p.K + p.N * p.K + p.M * p.N) * _sizes(p)[0]


REGISTRY = {
    entry.name: entry
    for entry in (
        Benchmark("addmm", _addmm_inputs, _addmm_calls, _addmm_bytes, lambda p, mode: 2 * p.M * p.K * p.N, "mm"),
        _thin("shrink", _shrink, (0.0, 0.1)),
        _thin("expand", _expand),
        _thin("dy_pass", _dy_pass),
        _thin("x_pass", _x_pass, (0.0, 0.1)),
        Benchmark(
            "lora_linear", tensors, _linear_calls, _linear_bytes, _linear_flops, "frozen", OPS + KERNELS, (0.0, 0.1)
        ),
        Benchmark(
            "small",
            tensors,
            _small_calls,
            _linear_bytes,
            _linear_flops,
            "frozen",
            OPS + KERNELS,
            graphs=False,
            rows=(1, 8, 32, 128, 512),
        ),
        Benchmark(
            "llama_layer",
            llama_layer.inputs,
            _llama_calls,
            llama_layer.bytes_of,
            llama_layer.flops,
            "frozen",
            OPS + KERNELS + ("tests/integrations/test_peft.py",),
            (0.0, 0.1),
        ),
        _experts("experts", 128),
        _experts("experts_64", 64),
        _experts("experts_model", 128, experts.LAYERS),
        Benchmark("svf_linear", svf.inputs, _svf_calls, svf.bytes_of, svf.flops, "frozen", SVF),
        Benchmark(
            "svf_dy",
            svf.dy_inputs,
            lambda p, inputs, options: svf.dy_calls(p, inputs),
            lambda p, mode: svf.dy_bytes(p),
            lambda p, mode: 2 * p.M * p.N * p.r,
            "copy",
            SVF,
        ),
        Benchmark(
            "dora_linear",
            tensors,
            _dora_calls,
            dora.bytes_of,
            dora.flops,
            "frozen",
            OPS + DORA + ("tests/integrations/test_dora.py",),
            (0.0, 0.1),
        ),
        _dora_pass("dora_norm"),
        _dora_pass("gain_dy"),
        _dora_pass("drop"),
        Benchmark(
            "linear_logprob",
            logprob.inputs,
            _logprob_calls,
            logprob.bytes_of,
            logprob.flops,
            "gemms",
            HEAD,
            graphs=False,
        ),
        Benchmark(
            "materialize",
            svf.materialize_inputs,
            lambda p, inputs, options: svf.materialize_calls(p, inputs),
            lambda p, mode: 2 * p.N * p.K * _sizes(p)[0] + p.r * (p.N + p.K) * _sizes(p)[1],
            lambda p, mode: 2 * p.N * p.K * p.r,
            "copy",
            ("tests/ops/test_materialize.py", "tests/kernels/test_materialize.py"),
        ),
        _stream("adamw", streams.adamw_inputs, streams.adamw_calls, streams.adamw_bytes, "tests/test_optim.py"),
        _stream("diff_stats", streams.pair_inputs, streams.diff_calls, streams.pair_bytes, "tests/test_analysis.py"),
        _stream("topk_mask", streams.pair_inputs, streams.topk_calls, streams.topk_bytes, "tests/test_analysis.py"),
        _stream("delta", streams.pair_inputs, streams.delta_calls, streams.delta_bytes, "tests/test_delta.py"),
        _stream("fold", streams.fold_inputs, streams.fold_calls, streams.fold_bytes, "tests/ops/test_fold.py"),
    )
}
