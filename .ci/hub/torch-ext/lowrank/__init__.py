"""LoRA as one op per linear layer, with its backward, and a layer that runs PEFT's ``lora.Linear`` on it."""

from . import layers
from ._stats import FallbackError, stats, strict
from .ops.lora import lora_linear, lora_linears

__all__ = ["FallbackError", "layers", "lora_linear", "lora_linears", "stats", "strict"]
