"""torch.ops.lowrank.*: schema, fake, dispatch and autograd of every op, and the public functions over them."""

from .fold import Receipt, fold_, unfold_
from .logits import combine_logits
from .lora import lora_linear, lora_linears
from .materialize import materialize
from .svf import svf_linear

__all__ = [
    "Receipt",
    "combine_logits",
    "fold_",
    "lora_linear",
    "lora_linears",
    "materialize",
    "svf_linear",
    "unfold_",
]
