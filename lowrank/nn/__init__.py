"""Modules for people who compose models by hand."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
