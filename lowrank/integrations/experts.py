"""transformers' mixture-of-experts layers on lowrank: the experts implementation "lowrank".

    import lowrank.integrations.experts
    model.set_experts_implementation("lowrank")

Registered with ``transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS``, the seam that transformers' own implementations use:
routing, shared experts and the model's code stay as they are.  :mod:`lowrank.integrations.peft` calls the same function with
the factors of PEFT's layers over expert parameters.
"""

from ..nn._experts import NAME, experts_forward

try:
    from transformers.integrations import moe
except ImportError as error:
    raise ImportError("this needs transformers 5: pip install 'lowrank-kernels[transformers]'") from error

moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
