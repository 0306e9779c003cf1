"""How each method prepares the model.  A new method is one entry of METHODS and its name in settings.METHODS."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .._linears import attention_layers, expert_stacks, target_layers, weight_shape
from .settings import Adapter


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, share of its steps long.  rate multiplies the swept learning rate; ``at_scale_1`` means that a
    LoRA method's swept rate is taken as it would be at a scale of 1: for weights that train in full."""

    share: float
    prepare: Callable[[nn.Module, Adapter], nn.Module]  # the model with what trains requiring grad
    rate: float = 1.0
    at_scale_1: bool = False

    def learning_rate(self, swept: float, adapter: Adapter) -> float:
        return swept * self.rate * (adapter.scale if self.at_scale_1 else 1.0)


@dataclass(frozen=True)
class Method:
    summary: str
    rate: float  # where its learning-rate grid is centred, in units of full fine-tuning's, at a LoRA scale of 1
    phases: tuple[Phase, ...]
    subnetwork: float | None = None  # share of all parameters that trains: those that a probe run moved most
    is_lora: bool = (
        False  # at a scale s a step of the factors moves the weight s times as far: its rates are divided by s
    )
    chooses: Callable[[nn.Module], list[str]] | None = None  # the layers that it adapts, where they are not all

    def centre(self, adapter: Adapter) -> float:
        """The middle of its grid, in units of full fine-tuning's rate."""
        return self.rate / adapter.scale if self.is_lora else self.rate


def lora_config(adapter: Adapter, target_modules=None, target_parameters=()):
    """PEFT's LoraConfig without dropout, so that two implementations draw no random numbers."""
    from peft import LoraConfig

    if target_modules is None:
        target_modules = list(adapter.targets) or "all-linear"
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=target_modules,
        target_parameters=list(target_parameters) or None,
        task_type="CAUSAL_LM",
    )


def _full(model: nn.Module, adapter: Adapter) -> nn.Module:
    return model.requires_grad_(True)


def stacks_of(model: nn.Module, adapter: Adapter) -> list[str]:
    """A mixture's experts, unless layers were named."""
    return [] if adapter.targets else expert_stacks(model)


def _lora(model: nn.Module, adapter: Adapter) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lora_config(adapter, None, stacks_of(model, adapter)))


def _lora_attention(model: nn.Module, adapter: Adapter) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lora_config(adapter, attention_layers(model)))


def _outside_attention(model: nn.Module) -> list[str]:
    attention = set(attention_layers(model))
    others = [name for name in target_layers(model) if name not in attention]
    if not others and not expert_stacks(model):
        raise ValueError(f"{type(model).__name__} has no linear layers but those of attention")
    return others


def _lora_mlp(model: nn.Module, adapter: Adapter) -> nn.Module:
    import lowrank

    return lowrank.adapt(model, lora_config(adapter, _outside_attention(model), expert_stacks(model)))


def _peft_lora(model: nn.Module, adapter: Adapter) -> nn.Module:
    import peft

    return peft.get_peft_model(model, lora_config(adapter, None, stacks_of(model, adapter)))


def directions(model: nn.Module, adapter: Adapter) -> int:
    """svf's k: four per rank, no more than the smallest layer has."""
    return min(4 * adapter.rank, *(min(weight_shape(layer)) for layer in target_layers(model).values()))


def _svf(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The largest singular values of every linear layer, four per rank."""
    import lowrank

    return lowrank.adapt(model, lowrank.SVFConfig(k=directions(model, adapter)))


def _svf_full(model: nn.Module, adapter: Adapter) -> nn.Module:
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
    "lora": Method("lowrank LoRA on all linear layers", 10.0, (Phase(1.0, _lora),), is_lora=True),
    "lora-attention": Method(
        "lowrank LoRA on the attention's linear layers only",
        10.0,
        (Phase(1.0, _lora_attention),),
        is_lora=True,
        chooses=attention_layers,
    ),
    "lora-mlp": Method(
        "lowrank LoRA on all linear layers but the attention's",
        10.0,
        (Phase(1.0, _lora_mlp),),
        is_lora=True,
        chooses=_outside_attention,
    ),
    "peft-lora": Method("PEFT's LoRA on all linear layers", 10.0, (Phase(1.0, _peft_lora),), is_lora=True),
    "full→lora": Method(
        "every weight for half of the steps at a tenth of the rate, then lowrank LoRA for the rest",
        10.0,
        (Phase(0.5, _full, rate=0.1, at_scale_1=True), Phase(0.5, _lora)),
        is_lora=True,
    ),
    "svf": Method(
        "the largest singular values of all linear layers scaled (SVF), four per rank", 90.0, (Phase(1.0, _svf),)
    ),
    "svf-full": Method("every singular value of all linear layers scaled (SVF)", 90.0, (Phase(1.0, _svf_full),)),
}


def method_of(name: str) -> Method:
    """By a name with or without its rank: lora, lora:64."""
    return METHODS[name.partition(":")[0]]
