"""nn.Linear whose singular values are scaled: Transformer²'s SVF, with named experts, mixtures and merging."""

import operator
import sys
from typing import Any

import torch
from torch import nn
from torch.types import Device

from .. import _stats
from .._linears import (
    dense_weight,
    four_bit_state,
    has_float_weight,
    has_linear_forward,
    is_conv1d,
    weight_checksum,
    weight_shape,
)
from ..ops.materialize import MergeReport, materialize, materialize_with_report
from ..ops.node import AGAIN, FORWARD_MODE, again, followed, has_tangent
from ..ops.svf import MODES, cheapest, column_scales, svf_projection
from ..svd import SVDFactors, svd_factors
from ._adapted import AdaptedLinear, refuse_base_options
from ._merged import Composed, _Sums, merged_linear, z_of
from .merging import ordinary, report_merge

PARAMETRIZATIONS = ("free", "sigmoid", "exp")


class SVFLinear(AdaptedLinear):
    """``x @ W'.T + bias`` with W' = W + U diag(σ (z - 1)) Vᵀ (Transformer², arXiv 2501.06252).

    The base is frozen; what trains is one fp32 vector per expert, ``z.<expert>`` [k], and z = 1 to start with: the layer
    starts as the linear it was made from, bit for bit in mode "delta".  The factors are buffers that are not saved:
    :func:`lowrank.svd_factors` gives the same ones again.

    Args:
        in_features, out_features: K and N.
        k: how many of the largest singular values; None for all min(N, K).
        mode: :func:`lowrank.svf_linear`'s.  "merged" keeps W' for as long as z stays the same, and a backward adds up dW
            in fp32 (4 N K bytes) over the layer's calls and projects it onto z once
            (:func:`lowrank.nn.defer_projection`: once for several backwards).  It has second derivatives.
            A base that trains is computed in mode "delta" whatever is asked, and a mixture never in "merged".  A base that is
            quantised, or a subclass of nn.Linear with a forward of its own, is called, and needs "delta" or "auto".
        parametrization: z of what is trained, p: "free" p, "sigmoid" 2 sigmoid(p), "exp" exp(p).
        normalize: None or "nuclear", :func:`lowrank.svf_linear`'s.
        factors: of this weight, if they are known; otherwise they are computed here, by ``method``.
        factors_dtype: of U and Vh; the weight's by default.
        bias, device, dtype: of the base, as nn.Linear's.

    Raises: ValueError or TypeError that names the argument.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    active_expert: str

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
        device: Device = None,
        dtype: torch.dtype | None = None,
        _base: nn.Module | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization: expected one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}")
        if normalize not in (None, "nuclear"):
            raise ValueError(f"normalize: expected None or 'nuclear', got {normalize!r}")
        super().__init__(in_features, out_features, _base, bias, device, dtype)
        self.mode, self.parametrization, self.normalize = mode, parametrization, normalize
        # of a quantised weight, from the bytes that the factors are of: what its library makes of them later is another matrix
        self._quantised_checksum: str | None = None
        with ordinary():
            dense = dense_weight(self.base_layer) if factors is None or not has_float_weight(self.base_layer) else None
            if not has_float_weight(self.base_layer):
                self._quantised_checksum = weight_checksum(dense)  # type: ignore[arg-type]  # is there
            if factors is None:
                factors = svd_factors(dense, k, method=method)  # type: ignore[arg-type]  # is there
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
        weight: torch.Tensor = self.base_layer.weight
        # otherwise the base is called, and the update goes on top
        self.is_dense = has_float_weight(self.base_layer) and has_linear_forward(self.base_layer)
        if not self.is_dense and mode not in ("auto", "delta"):
            raise ValueError(
                f"mode: {mode!r} needs a float weight and nn.Linear's forward; over {type(self.base_layer).__name__} use"
                " 'delta'"
            )
        stored = getattr(four_bit_state(self.base_layer), "original_storage_type", weight.dtype)
        factors_dtype = factors_dtype or (stored if stored.is_floating_point else torch.float32)
        for name, factor, kind in zip(
            factors._fields, factors, (factors_dtype, torch.float32, factors_dtype), strict=True
        ):
            with ordinary():
                factor = factor.clone() if factor.is_inference() else factor
                self.register_buffer(name, factor.to(weight.device, kind), persistent=False)
        self.z = nn.ParameterDict()
        self.disabled = False
        self._mix: tuple[torch.Tensor, tuple[str, ...]] | None = None
        self._cache: Composed | None = None
        self._sums = _Sums()
        self.add_expert("default")

    @classmethod
    def from_linear(cls, linear: nn.Module, k: int | None = None, **options: Any) -> "SVFLinear":
        """Adopt ``linear``: its parameters are used, not copied, and frozen.  ``options``: the constructor's.

        Also transformers' Conv1D, and bitsandbytes' quantised linears, which stay quantised: the factors are those of the
        dequantised weight.
        """
        if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        refuse_base_options(options)
        N, K = weight_shape(linear)
        return cls(K, N, k, _base=linear, **options)

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight, in its own layout: always the pristine one, merged or not."""
        if not torch.compiler.is_compiling():
            _stats.was_read(self, sys._getframe(1))
        return self.base_layer.weight  # type: ignore[return-value]  # of nn.Linear, or like its

    @property
    def factors(self) -> SVDFactors:
        """U [N, k], S [k], Vh [k, K]."""
        return SVDFactors(self.U, self.S, self.Vh)

    @property
    def experts(self) -> list[str]:
        """Names, in the order of :func:`lowrank.expert_mix`'s weights."""
        return list(self.z)

    def add_expert(self, name: str, z: torch.Tensor | None = None) -> None:
        """Add an expert that starts at z = 1, or at ``z`` fp32 [k] (what is trained, p, follows), and make it active."""
        check_name(name)
        if name in self.z:
            raise ValueError(f"name: there is an expert {name!r} already")
        with ordinary():
            start = torch.full_like(self.S, 1.0 if self.parametrization == "free" else 0.0)
            self.z[name] = nn.Parameter(start if z is None else self._parameter_of(z))
        self.set_expert(name)

    def rename_expert(self, name: str, new: str) -> None:
        """Give an expert another name, in its place."""
        check_name(new)
        if new in self.z or name not in self.z:
            raise ValueError(
                f"rename_expert: expected one of {', '.join(self.z)} and a new name, got {name!r}, {new!r}"
            )
        self.z = nn.ParameterDict({new if e == name else e: p for e, p in self.z.items()})
        self._cache = None
        self._sums.rename(name, new)
        if self.active_expert == name:
            self.active_expert = new

    def set_expert(self, name: str) -> None:
        """Let forward use this expert, and it alone train.  The weight is not touched."""
        if name not in self.z:
            raise ValueError(f"name: no expert {name!r}; this layer has {', '.join(self.z)}")
        self.unmerge()
        self.active_expert = name
        for expert, p in self.z.items():
            p.requires_grad_(expert == name)

    def values(self, name: str | None = None) -> torch.Tensor:
        """z [k] of an expert (the active one), with its gradient."""
        return z_of(self.z[name or self.active_expert], self.parametrization)

    def update(self, name: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(A [k,K], m [k], B [N,k]) with W' = W + B diag(m) A: the expert (the active one) as a rank update."""
        m, _ = column_scales(self.S, self.values(name), None, self.normalize, False, ())
        return self.Vh, m, self.U

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype, or autocast's."""
        if followed() is AGAIN:
            return again(self.forward, x)
        if not torch.compiler.is_compiling():
            _stats.was_called(self)
        if self._merged_weight is not None:
            if self.is_dense:
                return nn.functional.linear(x, self._merged_weight, self.bias)
            return torch.func.functional_call(self.base_layer, {"weight": self._as_stored(self._merged_weight)}, (x,))
        if self.disabled:
            return self.base_layer(x)
        mix, names = self._mix or (None, ())
        mode = self._mode(x, mix is not None)
        if mode == "merged":
            return merged_linear(self, x, self._composed(x))
        z = self.values() if mix is None else torch.stack([self.values(name) for name in names])
        absolute = mode == "activation"
        scales, mix = column_scales(self.S, z, _for_rows(mix, x), self.normalize, absolute, x.shape)
        if not self.is_dense:
            return svf_projection(x, None, None, self.base_layer(x), self.Vh, self.U, scales, mix)
        weight = None if absolute else self._dense()
        return svf_projection(x, weight, self.bias, None, self.Vh, self.U, scales, mix)

    def _mode(self, x: torch.Tensor, mixed: bool) -> str:
        N, K = self.out_features, self.in_features
        if not self.is_dense or self.base_layer.weight.requires_grad:
            return "delta"
        # a cache is no graph, and a rule on rows would be a graph per length
        reason = followed()
        if reason is FORWARD_MODE and not has_tangent((x, *self.parameters())):
            reason = None
        compiling = torch.compiler.is_compiling() or reason is not None
        if self.mode != "auto" and not (self.mode == "merged" and (mixed or compiling)):
            return self.mode
        if compiling:
            return "delta" if self.k < min(N, K) else "activation"
        rows = x.numel() // K
        training = torch.is_grad_enabled() and (x.requires_grad or self.z[self.active_expert].requires_grad)
        return cheapest(N, K, self.k, rows, mixed=mixed, training=training, cached=True)

    def _composed(self, x: torch.Tensor) -> Composed:
        """W' of the active expert, kept for as long as what it was made from is the same, in the same version."""
        p, composed = self.z[self.active_expert], self._cache
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        weight: torch.Tensor = self.base_layer.weight
        sources = (p, weight, *self.factors)
        tracked = not any(t.is_inference() for t in sources)
        # p.data = other is no new version, but other memory
        key = (*((t._version, t.data_ptr()) for t in sources), stream) if tracked else None
        if (
            composed is None
            or not tracked
            or composed.key != key
            or not all(map(operator.is_, composed.sources, sources))
        ):
            with ordinary():
                A, m, B = self.update()
                composed = Composed(sources, key, materialize(self._dense(), A, m, B), [])
            self._cache = composed if tracked else None
        return composed

    @ordinary()
    def merge(self) -> MergeReport:
        """Compute W' once, summed in fp32 and rounded once, and use it in forward.

        Out of place: the base's weight and the state dict stay what they were, bit for bit.  The expert gets no gradient
        while it is merged.  Returns what the rounding kept of the update; warns if that is less than half, and raises under
        :func:`lowrank.strict`.
        """
        merged, report = self._merge()
        report_merge(report, merged.dtype)
        self._merged_weight = merged
        return report

    def _refuse_merge(self) -> None:
        kind = type(self.base_layer).__name__
        if not has_float_weight(self.base_layer):
            raise ValueError(f"merge: a {kind} cannot be merged into without requantising it")
        if "weight" not in self.base_layer._parameters:
            raise ValueError(f"merge: the weight of a {kind} is computed from others; remove the parametrization first")
        if not bool(torch.isfinite(self.update()[1]).all()):
            raise ValueError(f"z.{self.active_expert}: holds NaN or infinity")

    def _merge(self) -> tuple[torch.Tensor, MergeReport]:
        self._refuse_merge()
        with ordinary():
            return materialize_with_report(self._dense(), *self.update())

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
        return self._as_stored((B.float() * m) @ A.float())

    def _dense(self) -> torch.Tensor:
        """W [N, K]."""
        return self._as_stored(self.base_layer.weight)

    def _as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] from the layout of the base's weight, or back."""
        return weight.mT if is_conv1d(self.base_layer) else weight

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
        self._cache = None
        self._sums.clear()

        def keep(t):
            new = fn(t)
            return t.to(new.device) if new.dtype is not t.dtype and any(t is e for e in exact) else new

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what can be made again, and in no block of :func:`lowrank.expert_mix`."""
        state = {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith(("_checksum", _stats.CALLED, _stats.READ))
        }
        return state | {"_cache": None, "_mix": None}

    def extra_repr(self) -> str:
        """What nn.Linear prints, and the expert."""
        return f"{super().extra_repr()}, k={self.k}, mode={self.mode}, experts={self.experts}, merged={self.merged}"


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be an expert's name: a dict of parameters and one of modules are to hold it."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name: expected a string without dots, got {name!r}")
    if hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name: {name!r} is PyTorch's own in a dict of modules; expected another")


def _for_rows(mix: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if mix is None:
        return None
    if mix.dim() > x.dim() or mix.shape[:-1] != x.shape[: mix.dim() - 1]:
        raise ValueError(
            f"alpha: {list(mix.shape)} does not fit a batch {list(x.shape)}; expected its first dimensions"
        )
    return mix.to(x.device, torch.float32)
