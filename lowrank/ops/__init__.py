"""torch.ops.lowrank.*: schema, fake, dispatch and autograd of every op, and the public functions over them."""

from .combine import combine_logits
from .fold import Receipt, fold_, unfold_
from .logprob import LogProb, linear_logprob
from .lora import lora_linear, lora_linears
from .materialize import materialize
from .svf import svf_linear

__all__ = [
    "LogProb",
    "Receipt",
    "combine_logits",
    "fold_",
    "linear_logprob",
    "lora_linear",
    "lora_linears",
    "materialize",
    "svf_linear",
    "unfold_",
]
