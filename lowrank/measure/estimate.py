"""Memory and FLOPs of fine-tuning a model, computed from its config alone.

The model is built on the meta device and really run forward there, with a loss, as a trainer calls it: parameters are
counted from the modules, and activations are the distinct storages that autograd keeps for backward.  Nothing about an
architecture is written down but the built-in configs (models.py).  What a meta run cannot know is stated in ASSUMPTIONS.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .._linears import attention_layers, is_linear
from . import meta_forward
from .meta_forward import Setting

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What PyTorch reports as total memory on such a card, GiB; a tenth is left to the context, workspaces, fragmentation.
CARDS = {"24 GB": 23.6, "80 GB": 79.1, "141 GB": 139.7}
USABLE = 0.9
# NF4 in blocks of 64 with one absmax each, itself quantised to 8 bits in blocks of 256 (QLoRA's double quantisation).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ASSUMPTIONS = (
    "Computed, not measured; `lowrank compare` measures.",
    "Activations: what autograd keeps for backward on {device}, loss and its fp32 logits included; {attention}; "
    "one micro-batch.",
    "AdamW: two fp32 moments{master}.  Adapters: {adapter_dtype}{autocast}.",
    "qlora: NF4 with double quantisation, output head and embeddings in {dtype}; PEFT's layers.",
    f"GPUs: everything sharded evenly, {USABLE:.0%} of each card usable: a lower bound (no workspace, no gathered "
    "layer, no logit gradients).",
)


@dataclass(frozen=True)
class Method:
    """One row of the table.  layers: which Linear layers get an adapter (None: everything trains, without one)."""

    name: str
    layers: str | None  # None | "all" | "attention"
    run_by: str = "lowrank"  # whose layers compute the adapters: "lowrank" | "peft"
    nf4: bool = False


METHODS = (
    Method("full", None),
    Method("lora", "all"),
    Method("lora-attention", "attention"),
    Method("peft-lora", "all", run_by="peft"),
    Method("qlora", "all", run_by="peft", nf4=True),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes, parameter counts, and FLOPs per token of one method.

    flops_per_token: training, forward and backward, with N the weights of every linear layer (the output head included,
    tied or not), n those of the adapters, D the attention width (heads x head size), T the tokens, L the layers:

        full   6 N + 6 T D L            weights: forward 2, their inputs' gradients 2, their own gradients 2
        lora   4 N + 6 n + 6 T D L      causal attention: forward 2 T D L (half of the square), backward twice that

    Of experts' weights N has what a token visits; a scan's elementwise work is in none of them.

    Gradient checkpointing adds one forward of everything between the embedding and the head.
    fused: whether attention is; where it is not, [T,T] are kept and all of T D L is computed.
    """

    method: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    flops_per_token: int
    fused: bool = True

    @property
    def total(self) -> int:
        """Bytes of weights + gradients + optimizer + activations."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def gpus(self) -> dict[str, int]:
        """How many cards of each kind hold an even share of `total`."""
        return {card: math.ceil(self.total / (USABLE * gib * 2**30)) for card, gib in CARDS.items()}


def estimate(config: "PretrainedConfig", method: Method, setting: Setting) -> Estimate:
    """What one training step of `method` on the model of `config` keeps in memory and computes."""
    dtype, adapter_dtype = (getattr(torch, name) for name in (setting.dtype, setting.adapter_dtype))
    model = meta_forward.build(config, dtype)
    head, fused = model.get_output_embeddings(), meta_forward.is_fused(model)
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    every = [name for name, m in linears.items() if m is not head]
    if not every:
        raise ValueError(f"{type(model).__name__} has no linear layers to adapt: not supported")
    parameters = sum(p.numel() for p in model.parameters())
    weights = parameters * dtype.itemsize
    matmul, in_experts = meta_forward.macs_per_token(model)
    if method.nf4:
        quantised = sum(linears[name].weight.numel() for name in every)
        weights -= quantised * dtype.itemsize - round(quantised * NF4_BYTES)
    if method.layers is None:
        trained = parameters
        itemsize = dtype.itemsize
    else:
        adapted = attention_layers(model) if method.layers == "attention" else "all-linear" if in_experts else every
        model = meta_forward.add_lora(model, adapted, setting, run_by=method.run_by, dtype=adapter_dtype)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        itemsize = adapter_dtype.itemsize
        if any(hasattr(m, "parameter_name") for m in model.modules()):
            raise ValueError("PEFT puts these adapters on experts' weights too: not computed")
        weights += trained * itemsize
    run = meta_forward.forward(model, setting, compute_dtype=dtype)
    attention = run.attention_flops // (setting.batch * setting.seq)
    flops = 3 * attention + (6 * matmul if method.layers is None else 4 * matmul + 6 * trained)
    if setting.gradient_checkpointing:
        recomputed = matmul - (head.weight.numel() if head is not None else 0)
        flops += attention + 2 * (recomputed + (trained if method.layers else 0))
    master = 4 * trained if not setting.in_place and method.layers is None and itemsize < 4 else 0
    return Estimate(
        method=method.name,
        parameters=parameters,
        trainable=trained,
        weights=weights,
        gradients=trained * itemsize,
        optimizer=8 * trained + master,
        activations=run.checkpointed_bytes if setting.gradient_checkpointing else run.saved_bytes,
        checkpoint=trained * itemsize,
        flops_per_token=flops,
        fused=fused,
    )


def estimate_all(config: "PretrainedConfig", setting: Setting) -> tuple[list[Estimate], dict[str, str]]:
    """Every method's estimate, and {method: why not} of those that this model cannot have.  Raises ValueError if none can."""
    estimates, not_done = [], {}
    for method in METHODS:
        try:
            estimates.append(estimate(config, method, setting))
        except ValueError as error:
            if not estimates and method.layers is None:  # full fine-tuning asks for nothing but the model
                raise
            not_done[method.name] = " ".join(str(error).split())
    return estimates, not_done
