"""nn.Linear with a LoRA adapter beside it."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..ops import lora_linear
from ..ops.materialize import MergeReport, materialize, materialize_with_report
from ..svd import svd_factors
from ._adapted import AdaptedLinear, refuse_base_options
from .merging import ordinary, report_merge

if TYPE_CHECKING:

    class _Linears(nn.ModuleDict):
        def __getitem__(self, key: str) -> nn.Linear: ...
else:
    _Linears = nn.ModuleDict

INITS = ("default", "pissa", "olora")


class LoRALinear(AdaptedLinear):
    """``base_layer(x) + scaling * lora_B(lora_A(dropout(x)))`` in one op (Hu et al. 2021, arXiv 2106.09685).

    The parameters and their names are PEFT's: ``base_layer.weight`` [N, K], ``lora_A.default.weight`` [r, K],
    ``lora_B.default.weight`` [N, r].  The base is frozen; lora_A starts Kaiming-uniform, lora_B at zero, so the layer
    starts as the linear it was made from.  ``scaling`` is alpha / r, or alpha / sqrt(r) with ``use_rslora`` (Kalajdzievski
    2023, arXiv 2312.03732).

    Args:
        in_features, out_features: K and N.
        r: rank, at least 1.
        lora_alpha: defaults to r.
        lora_dropout: probability in [0, 1].
        bias, device, dtype: of the base, as nn.Linear's.
        lora_bias: whether lora_B has a bias.
        adapter_dtype: of the adapter; fp32 by default, whatever the base is.
        init: "default" (lora_B zero); "pissa" (Meng, Wang, Zhang 2024, arXiv 2404.02948): the r largest singular directions
            of the weight; or "olora" (Büyükakyüz 2024, arXiv 2406.01775): its QR factors.  The last two take
            ``scaling * B A`` out of the base's weight, in place and rounded once, and train what they took;
            :func:`lowrank.save_adapter` with format="lora" writes them as a plain LoRA of the weight as it was.

    Raises: ValueError for a rank, alpha or dropout outside its range.
    """

    _merged_bias: Tensor | None
    _initial_A: Tensor | None
    _initial_B: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        lora_bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        init: str = "default",
        _base: nn.Linear | None = None,
    ):
        lora_alpha = r if lora_alpha is None else lora_alpha
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha}")
        if not 0 <= lora_dropout <= 1:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1], got {lora_dropout}")
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        super().__init__(in_features, out_features, _base, bias, device, dtype)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        device = self.base_layer.weight.device
        self.lora_A = _Linears({"default": nn.Linear(in_features, r, False, device, adapter_dtype)})
        self.lora_B = _Linears({"default": nn.Linear(r, out_features, lora_bias, device, adapter_dtype)})
        self.lora_dropout = lora_dropout
        self.register_buffer("_merged_bias", None, persistent=False)
        self.register_buffer("_initial_A", None, persistent=False)  # what the base's weight lacks, of PiSSA and OLoRA
        self.register_buffer("_initial_B", None, persistent=False)
        self.init = init
        self.reset_lora_parameters()
        if init != "default":
            self._take_from_base()

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options: Any) -> "LoRALinear":
        """Adopt ``linear``: its parameters are used, not copied, and frozen.  ``options``: the constructor's."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        refuse_base_options(options)
        return cls(linear.in_features, linear.out_features, r, _base=linear, **options)

    def reset_lora_parameters(self) -> None:
        """PEFT's default start: lora_A Kaiming-uniform with a = sqrt(5), lora_B zero."""
        nn.init.kaiming_uniform_(self.lora_A["default"].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B["default"].weight)
        if self.lora_B["default"].bias is not None:
            nn.init.zeros_(self.lora_B["default"].bias)

    @torch.no_grad()
    def _take_from_base(self) -> None:
        if not 1 <= self.r <= min(self.weight.shape):
            raise ValueError(f"r: {self.init!r} needs at most min(N, K) = {min(self.weight.shape)}, got {self.r}")
        if self.scaling <= 0:
            raise ValueError(f"lora_alpha: {self.init!r} needs a positive one, got {self.lora_alpha}")
        if self.init == "pissa":
            U, S, Vh = svd_factors(self.weight, self.r)
            root = (S / self.scaling).sqrt()
            B, A = U * root, Vh * root.unsqueeze(1)
        else:
            B, A = torch.linalg.qr(self.weight.float())
            B, A = B[:, : self.r], A[: self.r]
        self.lora_A["default"].weight.copy_(A)
        self.lora_B["default"].weight.copy_(B)
        self._initial_A = self.lora_A["default"].weight.detach().clone()
        self._initial_B = self.lora_B["default"].weight.detach().clone()
        self._initial_scaling = self.scaling
        self.weight.copy_(materialize(self.weight, self._initial_A, -self.scaling, self._initial_B))

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype, or autocast's."""
        if self._merged_weight is not None:
            return nn.functional.linear(x, self._merged_weight, self._merged_bias)
        A, B = self.lora_A["default"], self.lora_B["default"]
        p = self.lora_dropout if self.training else 0.0
        return lora_linear(
            x, self.weight, A.weight, B.weight, self.scaling, bias=self.bias, lora_bias=B.bias, dropout_p=p
        )

    @ordinary()
    def merge(self) -> MergeReport:
        """Compute ``weight + scaling * lora_B @ lora_A`` once, in fp32 with one rounding, and use it in forward.

        Out of place: the base's weight and the state dict stay what they were, bit for bit.  The adapter gets no gradient
        while it is merged.  Returns what the rounding kept of the update; warns if that is less than half, and raises under
        :func:`lowrank.strict`.
        """
        A, B = self.lora_A["default"], self.lora_B["default"]
        acc_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        merged, report = materialize_with_report(self.weight, A.weight, self.scaling, B.weight)
        report_merge(report, self.weight.dtype)
        self._merged_weight = merged
        self._merged_bias = None if self.bias is None else self.bias.clone()
        if B.bias is not None:
            shift = B.bias.to(acc_dtype) * self.scaling
            self._merged_bias = (shift if self.bias is None else self.bias.to(acc_dtype) + shift).to(self.weight.dtype)
        return report

    def unmerge(self) -> None:
        """Forget the merged weight."""
        super().unmerge()
        self._merged_bias = None

    def extra_repr(self) -> str:
        """What nn.Linear prints, and the adapter."""
        text = f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout}, merged={self.merged}"
        return f"{super().extra_repr()}, {text}"
