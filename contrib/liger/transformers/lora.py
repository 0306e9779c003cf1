import torch
import torch.nn as nn

from liger_kernel.ops import LigerLoRAFunction


class LigerLoRALinear(nn.Module):
    """A frozen nn.Linear with a LoRA; parameters are named as PEFT names those of its ``lora.Linear``."""

    def __init__(self, base_layer: nn.Linear, r: int = 8, lora_alpha: float = 8.0):
        super().__init__()
        options = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, **options)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, **options)
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        return LigerLoRAFunction.apply(
            x, base.weight, self.lora_A.weight, self.lora_B.weight, self.scaling, base.bias
        )  # fmt: skip

    def extra_repr(self):
        return f"r={self.lora_A.out_features}, scaling={self.scaling}"
