"""lowrank: adapting a large model at the cost of the frozen one.

Importing this imports torch and nothing heavier: no triton, no transformers, no device is touched.
"""

from . import analysis, bits, delta, nn, optim
from ._stats import FallbackError, stats, strict
from ._version import __version__
from .adapters import adapt, load_adapter, save_adapter
from .adapters.svf_layers import SVFConfig
from .adapters.svf_model import expert_mix
from .ops import (
    Head,
    LogProb,
    Receipt,
    combine_logits,
    dora_linear,
    experts_linear,
    fold_,
    kl_to,
    linear_cross_entropy,
    linear_logprob,
    lora_linear,
    lora_linears,
    materialize,
    svf_linear,
    unfold_,
)
from .ops._debug import debug_checks
from .svd import SVDFactors, svd_factors

__all__ = [
    "FallbackError",
    "Head",
    "LogProb",
    "Receipt",
    "SVDFactors",
    "SVFConfig",
    "__version__",
    "adapt",
    "analysis",
    "bits",
    "combine_logits",
    "debug_checks",
    "delta",
    "dora_linear",
    "expert_mix",
    "experts_linear",
    "fold_",
    "kl_to",
    "linear_cross_entropy",
    "linear_logprob",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "materialize",
    "nn",
    "optim",
    "save_adapter",
    "stats",
    "strict",
    "svd_factors",
    "svf_linear",
    "unfold_",
]
