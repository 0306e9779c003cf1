"""torch.ops.lowrank.*: schema, fake, dispatch and autograd of every op, and the public functions over them."""

from .combine import combine_logits
from .cross_entropy import linear_cross_entropy
from .dora import dora_linear
from .experts import experts_linear
from .fold import Receipt, fold_, unfold_
from .head import Head
from .kl import kl_to
from .logprob import LogProb, linear_logprob
from .lora import lora_linear, lora_linears
from .materialize import materialize
from .svf import svf_linear

__all__ = [
    "Head",
    "LogProb",
    "Receipt",
    "combine_logits",
    "dora_linear",
    "experts_linear",
    "fold_",
    "kl_to",
    "linear_cross_entropy",
    "linear_logprob",
    "lora_linear",
    "lora_linears",
    "materialize",
    "svf_linear",
    "unfold_",
]
