"""lowrank: adapting a large model at the cost of the frozen one.

Importing this imports torch and nothing heavier: no triton, no transformers, no device is touched.
"""

from . import bits
from ._version import __version__
from .ops import lora_linear, lora_linears

__all__ = ["__version__", "bits", "lora_linear", "lora_linears"]
