"""nn.Linear whose singular values are scaled: Transformer²'s SVF, with named experts, mixtures and merging."""

import contextlib

import torch
from torch import nn

from ..factors import dense_weight, is_conv1d, weight_shape
from ..ops.dropout import row_blocks
from ..ops.materialize import MergeReport, materialize, materialize_with_report
from ..ops.svf import MODES, cheapest, column_scales, svf_projection
from ..svd import SVDFactors, svd_factors
from .merging import report_merge

PARAMETRIZATIONS = ("free", "sigmoid", "exp")


class SVFLinear(nn.Module):
    """``x @ W'.T + bias`` with W' = W + U diag(σ (z - 1)) Vᵀ (Transformer², arXiv 2501.06252).

    The base is frozen; what trains is one fp32 vector per expert, ``z.<expert>`` [k], and z = 1 to start with: the layer
    starts as the linear it was made from, bit for bit in mode "delta".  The factors are buffers that are not saved:
    :func:`lowrank.svd_factors` gives the same ones again.

    Args:
        in_features, out_features: K and N.
        k: how many of the largest singular values; None for all min(N, K).
        mode: :func:`lowrank.svf_linear`'s.  "merged" keeps W' for as long as z stays the same, and its backward adds up
            dW in fp32 (4 N K bytes) and projects it onto z once (:func:`defer_projection`: once for several backwards).
            A base that trains or is quantised is computed in mode "delta" whatever is asked, and a mixture never in "merged".
        parametrization: z of what is trained, p: "free" p, "sigmoid" 2 sigmoid(p), "exp" exp(p).
        normalize: None or "nuclear", :func:`lowrank.svf_linear`'s.
        factors: of this weight, if they are known; otherwise they are computed here, by ``method``.
        factors_dtype: of U and Vh; the weight's by default.
        bias, device, dtype: of the base, as nn.Linear's.

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int | None = None,
        *,
        mode: str = "auto",
        parametrization: str = "free",
        normalize: str | None = None,
        factors: SVDFactors | None = None,
        method: str = "auto",
        factors_dtype: torch.dtype | None = None,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        _base: nn.Module | None = None,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}")
        if normalize not in (None, "nuclear"):
            raise ValueError(f"normalize: expected None or 'nuclear', got {normalize!r}")
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.parametrization, self.normalize = mode, parametrization, normalize
        self.base_layer = _base or nn.Linear(in_features, out_features, bias, device, dtype)
        self.base_layer.requires_grad_(False)
        if factors is None:
            factors = svd_factors(dense_weight(self.base_layer), k, method=method)
        self.k = factors.S.shape[0]
        if (factors.U.shape, factors.Vh.shape) != ((out_features, self.k), (self.k, in_features)) or k not in (
            None,
            self.k,
        ):
            raise ValueError(
                f"factors: expected U [{out_features}, {k or 'k'}] and Vh [{k or 'k'}, {in_features}], got"
                f" {list(factors.U.shape)} and {list(factors.Vh.shape)}"
            )
        if mode == "activation" and self.k < min(in_features, out_features):
            raise ValueError(
                f"mode: 'activation' needs all {min(in_features, out_features)} directions, got k={self.k}"
            )
        weight = self.base_layer.weight
        self.is_dense = type(self.base_layer) is nn.Linear or is_conv1d(self.base_layer)
        if not self.is_dense and mode not in ("auto", "delta"):
            raise ValueError(f"mode: {mode!r} needs a float weight; over {type(self.base_layer).__name__} use 'delta'")
        factors_dtype = factors_dtype or (weight.dtype if weight.is_floating_point() else torch.float32)
        self.register_buffer("U", factors.U.to(weight.device, factors_dtype), persistent=False)
        self.register_buffer("S", factors.S.to(weight.device, torch.float32), persistent=False)
        self.register_buffer("Vh", factors.Vh.to(weight.device, factors_dtype), persistent=False)
        self.z = nn.ParameterDict()
        self.disabled = False
        self._mix: tuple[torch.Tensor, tuple[str, ...]] | None = None
        self._deferred, self._dW, self._cache = False, None, None
        self.register_buffer("_merged_weight", None, persistent=False)
        self.add_expert("default")

    @classmethod
    def from_linear(cls, linear: nn.Module, k: int | None = None, **options) -> "SVFLinear":
        """Adopt ``linear``: its parameters are used, not copied, and frozen.  ``options``: the constructor's.

        Also transformers' Conv1D, and bitsandbytes' quantised linears, which stay quantised: the factors are those of the
        dequantised weight.
        """
        if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        if given := options.keys() & {"bias", "device", "dtype"}:
            raise TypeError(f"from_linear: the base has its own {', '.join(sorted(given))}")
        N, K = weight_shape(linear)
        return cls(K, N, k, _base=linear, **options)

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight, in its own layout: always the pristine one, merged or not."""
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def factors(self) -> SVDFactors:
        """U [N, k], S [k], Vh [k, K]."""
        return SVDFactors(self.U, self.S, self.Vh)

    @property
    def experts(self) -> list[str]:
        """Names, in the order of :func:`lowrank.expert_mix`'s weights."""
        return list(self.z)

    @property
    def merged(self) -> bool:
        """Whether forward uses one merged weight."""
        return self._merged_weight is not None

    def add_expert(self, name: str, z: torch.Tensor | None = None) -> None:
        """Add an expert that starts at z = 1, or at ``z`` fp32 [k] (what is trained, p, follows), and make it active."""
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a string without dots, got {name!r}")
        if name in self.z:
            raise ValueError(f"name: there is an expert {name!r} already")
        start = torch.full_like(self.S, 1.0 if self.parametrization == "free" else 0.0)
        self.z[name] = nn.Parameter(start if z is None else self._parameter_of(z))
        self.set_expert(name)

    def rename_expert(self, name: str, new: str) -> None:
        """Give an expert another name, in its place."""
        if new in self.z or name not in self.z:
            raise ValueError(
                f"rename_expert: expected one of {', '.join(self.z)} and a new name, got {name!r}, {new!r}"
            )
        self.z = nn.ParameterDict({new if e == name else e: p for e, p in self.z.items()})
        if self.active_expert == name:
            self.active_expert = new

    def set_expert(self, name: str) -> None:
        """Let forward use this expert, and it alone train.  The weight is not touched."""
        if name not in self.z:
            raise ValueError(f"name: no expert {name!r}; this layer has {', '.join(self.z)}")
        self.unmerge()
        self.active_expert = name
        for other, p in self.z.items():
            p.requires_grad_(other == name)

    def values(self, name: str | None = None) -> torch.Tensor:
        """z [k] of an expert (the active one), with its gradient."""
        p = self.z[name or self.active_expert]
        if self.parametrization == "sigmoid":
            return 2 * torch.sigmoid(p)
        return torch.exp(p) if self.parametrization == "exp" else p

    def update(self, name: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(A [k,K], m [k], B [N,k]) with W' = W + B diag(m) A: the expert (the active one) as a rank update."""
        m, _ = column_scales(self.S, self.values(name), None, self.normalize, False, ())
        return self.Vh, m, self.U

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype, or autocast's."""
        if self.merged:
            return nn.functional.linear(x, self._merged_weight, self.bias)
        if self.disabled:
            return self.base_layer(x)
        mix, z = None, None
        if self._mix is not None:
            mix, names = self._mix
            z = torch.stack([self.values(name) for name in names])
        else:
            z = self.values()
        mode = self._mode(x, mix is not None)
        if mode == "merged":
            return self._through_merged(x, z)
        absolute = mode == "activation"
        scales, mix = column_scales(self.S, z, _for_rows(mix, x), self.normalize, absolute, x.shape)
        if not self.is_dense:
            return svf_projection(x, None, None, self.base_layer(x), self.Vh, self.U, scales, mix)
        weight = None if absolute else self._dense()
        return svf_projection(x, weight, self.bias, None, self.Vh, self.U, scales, mix)

    def _mode(self, x: torch.Tensor, mixed: bool) -> str:
        N, K = self.out_features, self.in_features
        if not self.is_dense or self.weight.requires_grad:
            return "delta"
        compiling = torch.compiler.is_compiling()  # a cache is no graph, and a rule on rows would be a graph per length
        if self.mode != "auto" and not (self.mode == "merged" and (mixed or compiling)):
            return self.mode
        if compiling:
            return "delta" if self.k < min(N, K) else "activation"
        rows = x.numel() // K
        training = torch.is_grad_enabled() and (x.requires_grad or self.z[self.active_expert].requires_grad)
        return cheapest(N, K, self.k, rows, mixed=mixed, training=training, cached=True)

    def _through_merged(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        m, _ = column_scales(self.S, z, None, self.normalize, False, ())
        p = self.z[self.active_expert]
        versions = p._version, self.weight._version
        if self._cache is None or self._cache[0] is not p or self._cache[2] != versions:
            self._cache = p, materialize(self._dense(), self.Vh, m.detach(), self.U), versions
        handle = _Projection.apply(m, self) if m.requires_grad and torch.is_grad_enabled() else None
        return _MergedLinear.apply(x, self._cache[1], self.bias, handle, self)

    @torch.no_grad()
    def merge(self) -> MergeReport:
        """Compute W' once, summed in fp32 and rounded once, and use it in forward.

        Out of place: the base's weight and the state dict stay what they were, bit for bit.  The expert gets no gradient
        while it is merged.  Returns what the rounding kept of the update; warns if that is less than half, and raises under
        :func:`lowrank.strict`.
        """
        if not self.is_dense:
            raise ValueError(f"merge: a {type(self.base_layer).__name__} cannot be merged into without requantising it")
        A, m, B = self.update()
        if not bool(torch.isfinite(m).all()):
            raise ValueError(f"z.{self.active_expert}: holds NaN or infinity")
        merged, report = materialize_with_report(self._dense(), A, m, B)
        report_merge(report, self.weight.dtype)
        self._merged_weight = merged
        return report

    def unmerge(self) -> None:
        """Forget the merged weight."""
        self._merged_weight = None

    @property
    def active_adapters(self) -> list[str]:
        """The active expert, as PEFT's layers name it."""
        return [self.active_expert]

    def get_base_layer(self) -> nn.Module:
        """The frozen linear, as PEFT's layers name it."""
        return self.base_layer

    @torch.no_grad()
    def get_delta_weight(self, adapter: str | None = None) -> torch.Tensor:
        """W' - W in fp32, in the layout of :attr:`weight`, as PEFT's layers name it."""
        A, m, B = self.update(adapter)
        delta = (B.float() * m) @ A.float()
        return delta.mT if is_conv1d(self.base_layer) else delta

    def _dense(self) -> torch.Tensor:
        """W [N, K]."""
        return self.weight.mT if is_conv1d(self.base_layer) else self.weight

    def _parameter_of(self, z: torch.Tensor) -> torch.Tensor:
        if not isinstance(z, torch.Tensor) or z.shape != (self.k,) or not z.is_floating_point():
            raise ValueError(f"z: expected a tensor [{self.k}], got {getattr(z, 'shape', type(z).__name__)}")
        z = z.detach().to(self.S.device, torch.float32).clone()
        upper = {"free": torch.inf, "exp": torch.inf, "sigmoid": 2.0}[self.parametrization]
        lower = -torch.inf if self.parametrization == "free" else 0.0
        if not bool(((z > lower) & (z < upper)).all()):
            raise ValueError(f"z: expected values in ({lower:g}, {upper:g}) for {self.parametrization!r}, got {z}")
        return {"free": lambda: z, "exp": z.log, "sigmoid": (z / 2).logit}[self.parametrization]()

    def _apply(self, fn, recurse: bool = True):
        """``.to(bfloat16)`` casts the base and the factors; z and σ stay fp32: 16 bits hold six values near 0.5."""
        exact = [self.S, *self.z.values()]
        self._cache = self._dW = None

        def keep(t):
            new = fn(t)
            return t.to(new.device) if new.dtype is not t.dtype and any(t is e for e in exact) else new

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unmerge()  # what is merged belongs to the parameters that are about to be replaced
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo):
        import copy

        self._cache = None  # no second copy of the weight
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def extra_repr(self) -> str:
        """What nn.Linear prints, and the expert."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, k={self.k}, mode={self.mode}, experts={self.experts}, merged={self.merged}"


@contextlib.contextmanager
def defer_projection(model: nn.Module):
    """Layers of ``model`` in mode "merged" only add up dW in here; the first backward after it projects the whole onto z.

    For all micro-batches of a step but the last, as DDP's ``no_sync``.
    """
    layers = [module for module in model.modules() if isinstance(module, SVFLinear)]
    for layer in layers:
        layer._deferred = True
    try:
        yield
    finally:
        for layer in layers:
            layer._deferred = False


class _Projection(torch.autograd.Function):
    """m [k] -> a handle without elements, whose gradient is what _MergedLinear has added up in the layer by then."""

    @staticmethod
    def forward(ctx, m, layer):
        ctx.layer, ctx.like = layer, torch.empty_like(m)
        return m.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        layer, dm = ctx.layer, torch.zeros_like(ctx.like)
        if layer._deferred or layer._dW is None:
            return dm, None
        wide = layer._dW.dtype
        for rows in row_blocks(*layer._dW.shape, dm.device):
            dm += (layer.U[rows].to(wide) * (layer._dW[rows] @ layer.Vh.to(wide).mT)).sum(0)
        layer._dW = layer._cache = None  # a step follows, and .data may be written without a version
        return dm, None


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, handle, layer):
        ctx.save_for_backward(None if handle is None else x, weight)
        ctx.layer = layer
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, _, need_b, need_handle, _ = ctx.needs_input_grad
        dx = dy @ weight.to(dy.dtype) if need_x else None
        rows = dy.reshape(-1, dy.shape[-1])
        if need_handle:
            ctx.layer._dW = _add_outer(ctx.layer._dW, rows, x.reshape(-1, x.shape[-1]).to(dy.dtype))
        db = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if need_b else None
        return dx, None, db, torch.zeros((), device=dy.device) if need_handle else None, None


def _add_outer(total: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """total + dYᵀ x, summed in fp32 or wider, in place."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    if total is None:
        total = dy.new_zeros((dy.shape[1], x.shape[1]), dtype=wide)
    if dy.is_cuda and dy.dtype is not wide:
        return total.add_(torch.mm(dy.mT, x, out_dtype=wide))
    for rows in row_blocks(*dy.shape, dy.device):
        total.addmm_(dy[rows].to(wide).mT, x[rows].to(wide))
    return total


def _for_rows(mix: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if mix is None:
        return None
    if mix.dim() > x.dim() or mix.shape[:-1] != x.shape[: mix.dim() - 1]:
        raise ValueError(
            f"alpha: {list(mix.shape)} does not fit a batch {list(x.shape)}; expected its first dimensions"
        )
    return mix.to(x.device, torch.float32)
