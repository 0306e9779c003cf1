"""lowrank: adapting a large model at the cost of the frozen one.

Importing this imports torch and nothing heavier: no triton, no transformers, no device is touched.
"""

from . import bits, nn
from ._stats import FallbackError, stats, strict
from ._version import __version__
from .adapters import adapt, load_adapter, save_adapter
from .ops import lora_linear, lora_linears

__all__ = [
    "FallbackError",
    "__version__",
    "adapt",
    "bits",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "nn",
    "save_adapter",
    "stats",
    "strict",
]
