"""torch.ops.lowrank.*: schema, fake, dispatch and autograd of every op, and the public functions over them."""

from .lora import lora_linear, lora_linears
from .materialize import materialize
from .svf import svf_linear

__all__ = ["lora_linear", "lora_linears", "materialize", "svf_linear"]
