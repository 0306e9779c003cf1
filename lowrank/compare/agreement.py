"""Whether lowrank's LoRA computes what PEFT's does: each layer against the formula in fp64, then the model as a whole.

Nothing trains.  Both models get the same factors, with B so large that a layer's low-rank term is as large as its base's output
on the batch: a scale that is 2 % off then stands out of bf16's rounding.  The base is in eval mode and the LoRA layers are in
training mode: a dropout that was left on in them shows, and nothing else is random.

Layers, in the model's dtype.  Those that the model calls with one tensor are called together, as siblings are, with a random
gradient for every output.  An element's error is counted in units of what rounding can make of it,

    eps · (|base's term| + |low-rank term|) + eps32 · ‖row‖ · ‖column‖.

The terms and their sum are rounded to the result's dtype, each by at most half its eps; products are summed in fp32, with an
error below the second term.  PEFT's root mean square is thus below 1: about 0.2 in bf16, hundredths in fp32.  lowrank rounds
the low-rank term where PEFT rounds the base's, which makes at most √2 of PEFT's error; twice that error and a tenth of a unit
are allowed.  A scale of 1.02 makes more than 1 in bf16 and thousands in fp32.

Model, in fp32: how the layers compute in another dtype is known by then, how the model calls them is not, and a token that
rounding sends to another expert would hide it.  B is a tenth of what it was, so that the model is near what it was trained to
be and does not amplify rounding.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .._linears import dense_weight, has_float_weight, is_linear
from ..adapters.fits import PREFIX
from ..tasks.rows import Batch
from .methods import METHODS
from .settings import Adapter

ROWS = 32  # tokens on which a layer is checked
RATIO, FLOOR = 2.0, 0.1  # of PEFT's error, and in units of rounding
SMALLER = 0.1  # B in the model, of what it is in the layers
MODEL = 1e-3  # of a loss or gradient: thirty times what rounding makes in 30 layers, a twentieth of a scale 2 % off
NEGLIGIBLE = (
    1e-2  # of the whole gradient: what is smaller may be left of a cancellation, and is compared with this much
)
EPS32 = torch.finfo(torch.float32).eps

Prepare = Callable[[nn.Module, Adapter], nn.Module]
Inputs = list[tuple[Tensor, dict[str, float]]]
PREPARE = tuple(METHODS[name].phases[0].prepare for name in ("lora", "peft-lora"))


@dataclass(frozen=True)
class Distance:
    """lowrank's distance in one layer or in the model, what is allowed, and PEFT's own, which a layer alone has."""

    where: str
    lowrank: float
    allowed: float
    peft: float | None = None

    @property
    def excess(self) -> float:
        """Above 1 where lowrank's is more than allowed or PEFT's more than rounding; infinite where one is no number."""
        excess = max(self.lowrank / self.allowed, self.peft or 0.0)
        return excess if self.lowrank + (self.peft or 0.0) < float("inf") else float("inf")


def agreement(
    base: nn.Module,
    batch: Batch,
    adapter: Adapter,
    device: torch.device | str,
    seed: int = 0,
    prepare: tuple[Prepare, Prepare] = PREPARE,
) -> dict:
    """Compare two adapted copies of ``base`` on one batch, for which a few hundred tokens are enough.

    Args:
        base: a causal language model of transformers, in the dtype in which its methods are compared; it is left as it is.
        prepare: what makes lowrank's and PEFT's model of a copy of it: plain LoRA with one adapter, fp32 factors and B zero.

    Returns what JSON can hold: ``dtype``; ``layers``, how many are adapted; ``alone``, how many of them were checked by
    themselves (not stacks of experts, nor what the batch does not reach), on ``tokens`` at most; ``distances``, {quantity: the
    worst :class:`Distance`}, of layers in units of rounding, of the model relative to PEFT's value; ``agrees`` and, if not,
    the ``reasons``.  Models that are not adapted alike have no distances.
    """
    device = torch.device(device)
    batch = batch.to(device)
    result = {"dtype": str(next(base.parameters()).dtype).removeprefix("torch.")}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        ours, peft = (_prepared(base, make, adapter, device, seed) for make in prepare)
        result |= {"layers": len(_adapted(peft)), "alone": 0, "tokens": 0, "distances": {}}
        if reasons := _differences(ours, peft):
            return {**result, "agrees": False, "reasons": reasons}
        inputs = _fill(peft, batch)
        _set_factors(ours, _factors(peft))
        result["alone"] = sum(len(names) for _, names in inputs)
        result["tokens"] = max((len(_some_rows(x)) for x, _ in inputs), default=0)
        distances = _of_layers(ours, peft, inputs)
        del inputs
        small = {name: p.detach() * (SMALLER if "lora_B" in name else 1) for name, p in _factors(peft).items()}
        _set_factors(ours, small)
        _set_factors(peft, small)
        first = _loss_and_gradients(ours, batch)
        del ours  # before the other one grows
        distances |= _of_model(first, _loss_and_gradients(peft, batch))
    reasons = [_reason(quantity, those) for quantity, those in distances.items() if any(d.excess > 1 for d in those)]
    worst = {quantity: asdict(max(those, key=lambda d: d.excess)) for quantity, those in distances.items() if those}
    return {**result, "distances": worst, "agrees": not reasons, "reasons": reasons}


def _prepared(base: nn.Module, make: Prepare, adapter: Adapter, device: torch.device, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make(copy.deepcopy(base).to(device), adapter).eval()
    for layer in _adapted(model).values():
        layer.training = True
        layer.lora_dropout.train()
    return model


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if len(getattr(module, "lora_A", ()))}


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set_factors(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, factor in _factors(model).items():
        factor.copy_(values[name])


def _adapter(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _is_stack(layer: nn.Module) -> bool:
    """Whether it is PEFT's layer over a parameter: a stack of experts, or a router."""
    return hasattr(layer, "parameter_name")


def _differences(ours: nn.Module, peft: nn.Module) -> list[str]:
    """What is adapted or trained in one model and not, or in another shape or dtype, in the other."""

    def parts(model: nn.Module) -> dict[str, str]:
        trained = {
            name: f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}" for name, p in _factors(model).items()
        }
        return dict.fromkeys(_adapted(model), "a LoRA layer") | trained

    mine, other = parts(ours), parts(peft)
    kinds = {name: [of.get(name, "not adapted") for of in (mine, other)] for name in other | mine}
    return [
        f"{name.removeprefix(PREFIX)} is {ours} in lowrank's model, {peft} in PEFT's"
        for name, (ours, peft) in kinds.items()
        if ours != peft
    ]


@torch.no_grad()
def _fill(model: nn.Module, batch: Batch) -> Inputs:
    """Draw every B.  Returns the linear layers' inputs without adapters, each with {layer: its base's output's norm}."""
    inputs: dict[int, tuple[Tensor, dict[str, float]]] = {}
    layers, met = _adapted(model), set()

    def after(name: str, x: Tensor, y: Tensor) -> None:
        if name not in met:
            met.add(name)
            inputs.setdefault(id(x), (x, {}))[1][name] = float(y.float().norm())

    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: after(name, args[0], y))
        for name, layer in layers.items()
        if not _is_stack(layer) and is_linear(layer.base_layer) and has_float_weight(layer.base_layer)
    ]
    try:
        model(**batch.arguments())
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers.values():
        _, B, _ = _adapter(layer)
        B.copy_(torch.randn(B.shape))
        if _is_stack(layer):  # there the update is as large as the parameter
            update = layer.get_delta_weight(layer.active_adapters[0])
            _resize(B, float(layer.get_param().float().norm()), update)
    for x, norms in inputs.values():
        for name, norm in norms.items():
            A, B, scaling = _adapter(layers[name])
            _resize(B, norm, scaling * x.to(A.dtype) @ A.mT @ B.mT)
    return list(inputs.values())


def _resize(B: Tensor, norm: float, term: Tensor) -> None:
    """Multiply B so that the norm of a term it is a factor of becomes ``norm``, unless one of the two is zero."""
    before = float(term.float().norm())
    if norm and before:
        B.mul_(norm / before)


def _of_layers(ours: nn.Module, peft: nn.Module, inputs: Inputs) -> dict[str, list[Distance]]:
    distances = {"output": [], "gradient of the input": [], "gradient of A": [], "gradient of B": []}
    models = _adapted(ours), _adapted(peft)
    for whole, names in inputs:
        x = _some_rows(whole).reshape(*[1] * (whole.dim() - 2), -1, whole.shape[-1])
        together = [[layers[name] for name in names] for layers in models]
        dys = [torch.randn(*x.shape[:-1], _adapter(layer)[1].shape[0]).to(x) for layer in together[1]]
        plain = [name.removeprefix(PREFIX) for name in names]
        places = [("output", name) for name in plain] + [("gradient of the input", ", ".join(plain))]
        places += [(f"gradient of {factor}", name) for name in plain for factor in "AB"]
        results = *(_called(layers, x, dys) for layers in together), _formula(together[1], x, dys)
        for (quantity, where), mine, other, (value, unit) in zip(places, *results, strict=True):
            lowrank, error = (float(((t - value) / unit).square().mean().sqrt()) for t in (mine, other))
            distances[quantity].append(Distance(where, lowrank, RATIO * error + FLOOR, error))
    return distances


def _some_rows(x: Tensor) -> Tensor:
    """At most ROWS of the tokens of x [..., K], evenly spaced."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long().to(x.device)]


def _called(layers: list[nn.Module], x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    """Each layer's output, the gradient of x, then those of each layer's A and B."""
    x = x.clone().requires_grad_()
    ys = [layer(x) for layer in layers]
    leaves = [x, *(factor for layer in layers for factor in _adapter(layer)[:2])]
    return [y.detach() for y in ys] + list(torch.autograd.grad(ys, leaves, dys, materialize_grads=True))


def _formula(layers: list[nn.Module], x: Tensor, dys: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(value, unit of rounding) in fp64 of what :func:`_called` returns."""
    eps, shape = torch.finfo(x.dtype).eps, x.shape
    x = x.double().reshape(-1, shape[-1]).requires_grad_()
    ys, dxs, of_factors = [], [], []
    for layer, dy in zip(layers, dys, strict=True):
        base = copy.deepcopy(layer.base_layer).double()
        y, dy = base(x), dy.double().reshape(-1, dy.shape[-1])
        (dx,) = torch.autograd.grad(y, x, dy)
        with torch.no_grad():
            A, B, scaling = _adapter(layer)
            A, B, W = A.double(), scaling * B.double(), dense_weight(base)
            S, dS = x @ A.mT, dy @ B
            bias = torch.zeros_like(W[:, 0]) if base.bias is None else base.bias
            ys.append(_rounded(eps, [y - bias, bias, S @ B.mT], [(x, W.mT), (A.norm() * x, B.mT)]))
            dxs.append(_rounded(eps, [dx, dS @ A], [(dy, W), (B.norm() * dy, A)]))
            of_factors.append(_rounded(EPS32, [dS.mT @ x], [(dy.norm() * B.mT, x)]))
            of_factors.append(_rounded(EPS32, [scaling * dy.mT @ S], [(scaling * x.norm() * dy.mT, A.mT)]))
    dx = tuple(sum(parts) for parts in zip(*dxs, strict=True))
    return [tuple(t.reshape(*shape[:-1], -1) for t in pair) for pair in (*ys, dx)] + of_factors


def _rounded(eps: float, terms: list[Tensor], products: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(the terms' sum, what rounding can make of it).  products: what was multiplied, whose row's norm times its column's no
    element exceeds."""
    sums = sum(left.norm(dim=1, keepdim=True) * right.norm(dim=0, keepdim=True) for left, right in products)
    unit = eps * sum(term.abs() for term in terms) + EPS32 * sums
    return sum(terms), unit.clamp_min(torch.finfo(torch.float64).tiny)


def _loss_and_gradients(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """In fp32, which the model is left in."""
    loss = model.float()(**batch.arguments()).loss
    loss.backward()
    return float(loss.detach()), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in _factors(model).items()
    }


def _of_model(lowrank, peft) -> dict[str, list[Distance]]:
    """Of what :func:`_loss_and_gradients` gave for each."""
    (loss, gradients), (expected, wanted) = lowrank, peft
    least = NEGLIGIBLE * float(torch.stack([g.norm() for g in wanted.values()]).norm()) or EPS32
    apart = {name: float((gradients[name] - g).norm()) / max(float(g.norm()), least) for name, g in wanted.items()}
    return {
        "loss of the model": [Distance("", abs(loss - expected) / max(abs(expected), EPS32), MODEL)],
        "gradients of the model": [
            Distance(name.removeprefix(PREFIX), distance, MODEL) for name, distance in apart.items()
        ],
    }


def _reason(quantity: str, distances: list[Distance]) -> str:
    worst, wrong = max(distances, key=lambda d: d.excess), sum(d.excess > 1 for d in distances)
    said = f"{quantity}: lowrank's is {worst.lowrank:.2g} off, {worst.allowed:.2g} allowed"
    said += "" if worst.peft is None else f", PEFT's {worst.peft:.2g}"
    return f"{said} ({wrong} of {len(distances)}, {worst.where} most)" if worst.where else said
