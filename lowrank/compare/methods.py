"""How each method prepares the model.  A new method is one entry of METHODS and its name in settings.METHODS."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .._linears import attention_layers


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, share of its steps long.  rate multiplies the swept learning rate."""

    share: float
    prepare: Callable[[nn.Module, int], nn.Module]  # (model, rank) -> the model with what trains requiring grad
    rate: float = 1.0


@dataclass(frozen=True)
class Method:
    summary: str
    rate: float  # where its learning-rate grid is centred, in units of full fine-tuning's
    phases: tuple[Phase, ...]
    subnetwork: float | None = None  # share of all parameters that trains: those that a probe run moved most


def lora_config(rank: int, target_modules="all-linear"):
    """PEFT's LoraConfig with alpha = rank and no dropout, so that two implementations draw no random numbers."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM")


def _full(model: nn.Module, rank: int) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: nn.Module, rank: int) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lora_config(rank))


def _lora_attention(model: nn.Module, rank: int) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lora_config(rank, attention_layers(model)))


def _peft_lora(model: nn.Module, rank: int) -> nn.Module:
    import peft

    return peft.get_peft_model(model, lora_config(rank))


def _svf(model: nn.Module, rank: int) -> nn.Module:
    """The largest singular values of every linear layer, four per rank."""
    import lowrank
    from lowrank._linears import target_layers, weight_shape

    k = min(4 * rank, *(min(weight_shape(layer)) for layer in target_layers(model).values()))
    return lowrank.adapt(model, lowrank.SVFConfig(k=k))


def _svf_full(model: nn.Module, rank: int) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lowrank.SVFConfig())


METHODS = {
    "full": Method("every weight trains", 1.0, (Phase(1.0, _full),)),
    "full-masked": Method(
        "full, of the 20 % of all weights that a probe run moved most; their moments alone are kept",
        1.0,
        (Phase(1.0, _full),),
        subnetwork=0.2,
    ),
    "lora": Method("lowrank LoRA on all linear layers", 10.0, (Phase(1.0, _lora),)),
    "lora-attention": Method(
        "lowrank LoRA on the attention's linear layers only", 10.0, (Phase(1.0, _lora_attention),)
    ),
    "peft-lora": Method("PEFT's LoRA on all linear layers", 10.0, (Phase(1.0, _peft_lora),)),
    "full→lora": Method(
        "every weight for half of the steps at a tenth of the rate, then lowrank LoRA for the rest",
        10.0,
        (Phase(0.5, _full, rate=0.1), Phase(0.5, _lora)),
    ),
    "svf": Method(
        "the largest singular values of all linear layers scaled (SVF), four per rank", 90.0, (Phase(1.0, _svf),)
    ),
    "svf-full": Method("every singular value of all linear layers scaled (SVF)", 90.0, (Phase(1.0, _svf_full),)),
}
