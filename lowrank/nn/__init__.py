"""Modules for people who compose models by hand."""

from .lora import LoRALinear
from .svf import SVFLinear, defer_projection

__all__ = ["LoRALinear", "SVFLinear", "defer_projection"]
