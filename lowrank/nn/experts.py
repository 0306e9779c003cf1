"""A mixture's experts with LoRA adapters beside their stacks."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear import Adapter
from ..ops.materialize import materialize
from . import _experts
from .merging import ordinary


class LoRAExperts(nn.Module):
    """transformers' experts, [T,H] from hidden states [T,H], indices and weights [T,k], each stack with a LoRA of every expert.

    The parameters are PEFT's, by the stack's name: ``lora_A[NAME]`` [E r, in], ``lora_B[NAME]`` [out, r E] with the expert
    fastest.  The base is frozen; lora_A starts Kaiming-uniform, lora_B at zero, so the layer starts as the experts it was made
    from.  ``scaling`` is alpha / r, or alpha / sqrt(r) with ``use_rslora``.

    Args:
        experts: a module that transformers' ``use_experts_implementation`` made (``model.layers[0].mlp.experts``): used, not
            copied.
        r: rank of every expert, at least 1.
        lora_alpha: defaults to r.
        lora_dropout: probability in [0, 1], of a choice's input; PEFT has none here.
        targets: names of the stacks; both by default.
        adapter_dtype: of the adapter; fp32 by default, whatever the base is.

    Raises: TypeError for another module; ValueError for a rank, alpha, dropout or name outside its range.
    """

    def __init__(
        self,
        experts: nn.Module,
        r: int,
        *,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        targets: tuple[str, ...] | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ):
        lora_alpha = r if lora_alpha is None else lora_alpha
        if not isinstance(experts, nn.Module) or not experts.__dict__.keys() >= _experts.FLAGS:
            raise TypeError(f"experts: expected a module of transformers' experts, got {type(experts).__name__}")
        names = _experts.names_of(experts)
        targets = names if targets is None else tuple(targets)
        if not targets or not set(targets) <= set(names):
            raise ValueError(f"targets: expected some of {', '.join(names)}, got {', '.join(targets) or 'none'}")
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha}")
        if not 0 <= lora_dropout <= 1:
            raise ValueError(f"lora_dropout: expected a probability in [0, 1], got {lora_dropout}")
        super().__init__()
        self.base_layer = experts.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora, self.lora_dropout = r, lora_alpha, use_rslora, lora_dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in targets:
            E, N, K = _experts.stack_of(experts, name).shape
            new = dict(device=getattr(experts, name).device, dtype=adapter_dtype)
            self.lora_A[name] = nn.Parameter(torch.empty(E * r, K, **new))
            self.lora_B[name] = nn.Parameter(torch.empty(N, r * E, **new))
        self._merged: Any = None
        self.reset_lora_parameters()

    @classmethod
    def from_experts(cls, module: nn.Module, r: int, **options: Any) -> "LoRAExperts":
        """Adopt a module of transformers' experts.  ``options``: the constructor's."""
        return cls(module, r, **options)

    def reset_lora_parameters(self) -> None:
        """PEFT's default start: lora_A Kaiming-uniform with a = sqrt(5), lora_B zero."""
        for name in self.lora_A:
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[name])

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T,H] in hidden_states' dtype; int [T,k] ids of experts, float [T,k]."""
        if self._merged is not None:
            return _experts.experts_forward(self._merged, hidden_states, top_k_index, top_k_weights)
        p = self.lora_dropout if self.training else 0.0
        factors = {
            name: (Adapter(*self._factors(name), self.scaling, None, p),)  # views of the parameters
            for name in self.lora_A
        }
        return _experts.experts_forward(self.base_layer, hidden_states, top_k_index, top_k_weights, factors)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [E,r,in] and B [E,out,r]."""
        A, B = self.lora_A[name], self.lora_B[name]
        E = A.shape[0] // self.r
        return A.view(E, self.r, A.shape[1]), B.view(B.shape[0], self.r, E).permute(2, 0, 1)

    def _apply(self, fn, recurse: bool = True):
        """What is merged goes where the parameters go, in whatever dtype."""
        super()._apply(fn, recurse)
        if self._merged is not None:
            stacks = {name: nn.Parameter(fn(self._merged._parameters[name].data), False) for name in self.lora_A}
            self._merged._parameters = {**self.base_layer._parameters, **stacks}
        return self

    @property
    def merged(self) -> bool:
        return self._merged is not None

    @ordinary()
    def merge(self) -> None:
        """Compute every expert's ``W + scaling B A`` once, in fp32 with one rounding, and use them in forward.

        Out of place: the base's stacks and the state dict stay what they were.  The adapter gets no gradient while merged.
        """
        merged = copy.copy(self.base_layer)
        merged._parameters = dict(self.base_layer._parameters)
        for name in self.lora_A:
            stored = getattr(self.base_layer, name)
            stack = torch.empty_like(stored)
            for W, out, A, B in zip(_experts.stack_of(self.base_layer, name), stack, *self._factors(name), strict=True):
                W = materialize(W.contiguous(), A, self.scaling, B)
                out.copy_(W.mT if self.base_layer.is_transposed else W)
            merged._parameters[name] = nn.Parameter(stack, requires_grad=False)
        self.__dict__["_merged"] = merged  # no submodule: it is in no state dict

    def unmerge(self) -> None:
        """Forget the merged stacks."""
        self.__dict__["_merged"] = None

    def extra_repr(self) -> str:
        text = f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout}"
        return f"{text}, targets={list(self.lora_A)}, merged={self.merged}"
