"""LoRA as one op per linear layer, with its backward, and a layer that runs PEFT's ``lora.Linear`` on it."""

from ._stats import FallbackError, stats, strict
from .integrations import peft_layer as layers
from .ops.lora import lora_linear, lora_linears

__all__ = ["FallbackError", "layers", "lora_linear", "lora_linears", "stats", "strict"]
