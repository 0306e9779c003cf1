"""Modules for people who compose models by hand."""

from ._merged import defer_projection
from .lora import LoRALinear
from .svf import SVFLinear

__all__ = ["LoRALinear", "SVFLinear", "defer_projection"]
