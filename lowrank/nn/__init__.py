"""Modules for people who compose models by hand."""

from ._merged import defer_projection
from .experts import LoRAExperts
from .lora import LoRALinear
from .svf import SVFLinear

__all__ = ["LoRAExperts", "LoRALinear", "SVFLinear", "defer_projection"]
