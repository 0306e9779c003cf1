"""To be added to src/liger_kernel/transformers/functional.py, in its alphabetical places."""

from liger_kernel.ops import LigerLoRAFunction


def liger_lora_linear(x, weight, lora_A, lora_B, scaling: float = 1.0, bias=None):
    return LigerLoRAFunction.apply(x, weight, lora_A, lora_B, scaling, bias)
